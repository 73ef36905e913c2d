//! A confusion matrix as PNG: a row for each true class, shaded by the share of its images that are taken for each class.

use std::path::Path;

use image::RgbImage;

use super::canvas::{self, Anchor, Canvas, Color, Font, text_width};
use super::{GAP, INK, LABEL, MARGIN, PALETTE, TITLE, TITLE_ROW};
use crate::error::Result;
use crate::report::grid::write_png;

/// Up to so many classes rows and columns have names, and cells their share in per cent.
const NAMED: usize = 40;
/// Side of a cell with a name, and of the whole matrix where cells have none.
const CELL: f64 = 34.0;
const MATRIX: f64 = 1000.0;
/// Names are cut at this width.
const NAMES: f64 = 180.0;
const NAME: Font = Font { size: 13.0, bold: false, color: INK };
const HEADING: Font = Font { size: 13.0, ..LABEL };
/// Shares below it are not written into their cells.
const WRITTEN: f64 = 0.005;

/// Writes the matrix `rows` (true class, then predicted class) of `classes` as a PNG at `path` (temporary file, then rename).
///
/// # Errors
/// [`crate::error::Error::Io`] when the file cannot be written.
pub fn write_confusion(path: &Path, title: &str, classes: &[String], rows: &[&[u64]]) -> Result<()> {
    write_png(path, &render(title, classes, rows)?)
}

fn render(title: &str, classes: &[String], rows: &[&[u64]]) -> Result<RgbImage> {
    let named = rows.len() <= NAMED;
    let names: Vec<String> = match named {
        true => classes.iter().map(|name| shortened(name)).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let widest = names
        .iter()
        .try_fold(0.0, |widest: f64, name| Ok::<_, crate::error::Error>(widest.max(text_width(name, NAME)?)))?;
    let cell = if named { CELL } else { (MATRIX / rows.len() as f64).max(1.0) };
    let side = cell * rows.len().max(1) as f64;
    // The names of the columns run upwards.
    let [left, top] = [MARGIN + NAME.size + GAP, MARGIN + TITLE_ROW + NAME.size].map(|start| start + widest + GAP);
    let width = (left + side + MARGIN).max(MARGIN * 2.0 + text_width(title, TITLE)?);
    canvas::draw(width.ceil() as u32, (top + side + MARGIN).ceil() as u32, |canvas| {
        canvas.text((MARGIN, MARGIN + 8.0), title, TITLE, Anchor::Left)?;
        canvas.text((left + side / 2.0, MARGIN + TITLE_ROW), "taken for", HEADING, Anchor::Centre)?;
        canvas.text((MARGIN, top + side / 2.0), "true class", HEADING, Anchor::CentreUpwards)?;
        for (row, counts) in rows.iter().enumerate() {
            draw_row(canvas, counts, (left, top + cell * row as f64), cell, named)?;
        }
        for (place, name) in names.iter().enumerate() {
            let middle = cell * (place as f64 + 0.5);
            canvas.text((left - GAP, top + middle), name, NAME, Anchor::Right)?;
            let half = text_width(name, NAME)? / 2.0;
            canvas.text((left + middle, top - GAP - half), name, NAME, Anchor::CentreUpwards)?;
        }
        frame(canvas, (left, top), side)
    })
}

fn draw_row(canvas: &Canvas, counts: &[u64], (left, top): (f64, f64), cell: f64, named: bool) -> Result<()> {
    let total = counts.iter().sum::<u64>().max(1) as f64;
    for (column, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (share, x) = (count as f64 / total, left + cell * column as f64);
        canvas.fill((x, top), (x + cell, top + cell), shade(share))?;
        if named && share >= WRITTEN {
            let color = if share > 0.5 { Color(255, 255, 255) } else { INK };
            let text = format!("{:.0}", share * 100.0);
            canvas.text((x + cell / 2.0, top + cell / 2.0), &text, Font { color, ..NAME }, Anchor::Centre)?;
        }
    }
    Ok(())
}

fn frame(canvas: &Canvas, (left, top): (f64, f64), side: f64) -> Result<()> {
    let (right, bottom) = (left + side, top + side);
    canvas.line(&[(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], 1.0, LABEL.color)
}

/// White for none, the palette's blue for all; the root lets small shares be seen.
fn shade(share: f64) -> Color {
    let Color(red, green, blue) = PALETTE[0];
    let mixed = |channel: u8| (255.0 - share.sqrt() * f64::from(255 - channel)).round() as u8;
    Color(mixed(red), mixed(green), mixed(blue))
}

/// The beginning of a name that is too long.
fn shortened(name: &str) -> Result<String> {
    let mut text = name.to_string();
    let mut kept = name.chars().count();
    while text_width(&text, NAME)? > NAMES {
        kept -= 1;
        text = format!("{}\u{2026}", name.chars().take(kept).collect::<String>());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixels(image: &RgbImage, color: Color) -> usize {
        image.pixels().filter(|p| p.0 == [color.0, color.1, color.2]).count()
    }

    #[test]
    fn cells_are_shaded_by_the_share_of_their_row() {
        let classes =
            ["cat", "dog", "a name that is much longer than there is any room for in a picture"].map(String::from);
        let rows: [&[u64]; 3] = [&[3, 1, 0], &[0, 50, 0], &[0, 0, 0]];
        let image = render("title", &classes, &rows).unwrap();
        let cell = (CELL * CELL) as usize;
        // Less the digits, the frame and smoothed edges.
        for share in [0.75, 0.25, 1.0] {
            let drawn = pixels(&image, shade(share));
            assert!((cell * 6 / 10..=cell).contains(&drawn), "{share}: {drawn} of {cell}");
        }
        assert!(text_width(&shortened(&classes[2]).unwrap(), NAME).unwrap() <= NAMES);
    }

    #[test]
    fn a_thousand_classes_and_none_give_a_picture() {
        let rows: Vec<Vec<u64>> = (0..1000).map(|i| (0..1000).map(|j| u64::from(i == j)).collect()).collect();
        let rows: Vec<&[u64]> = rows.iter().map(Vec::as_slice).collect();
        let image = render("many", &vec![String::new(); 1000], &rows).unwrap();
        assert!(pixels(&image, shade(1.0)) > 900);
        render("", &[], &[]).unwrap();
    }
}
