//! Standard output, whose reader may leave before the end.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Prints what `fill` writes. A reader that has seen enough, like `head`, is no error.
///
/// # Errors
/// [`Error::Io`] when standard output takes no more, e.g. because it is a file on a full disk.
pub fn print(fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = io::stdout().lock();
    match fill(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::io("write to", Path::new("standard output"))),
    }
}

/// Prints rows of cells in columns two spaces apart, the first `left` of them flush left, the others flush right.
///
/// # Errors
/// Those of `out`.
pub fn columns<const N: usize>(
    out: &mut dyn Write,
    left: usize,
    rows: impl IntoIterator<Item = [String; N]>,
) -> io::Result<()> {
    let rows: Vec<[String; N]> = rows.into_iter().collect();
    let mut widths = [0; N];
    for row in &rows {
        widths.iter_mut().zip(row).for_each(|(width, cell)| *width = cell.chars().count().max(*width));
    }
    for row in &rows {
        let cell = |(i, (cell, width)): (usize, (&String, usize))| match i < left {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        };
        let cells: Vec<String> = row.iter().zip(widths).enumerate().map(cell).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let rows = [["a", "\u{e9}t\u{e9}", "x"], ["bcd", "", "-12"], ["", "e", ""]];
        columns(&mut out, 2, rows.map(|row| row.map(String::from))).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a    \u{e9}t\u{e9}    x\nbcd       -12\n     e\n");
    }
}
