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
