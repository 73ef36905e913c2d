//! Images beside those that a network finds most like them, as PNG: a row for each query.

use std::path::Path;

use image::RgbImage;
use image::imageops::overlay;

use super::canvas::{self, Anchor, Canvas, Color, Font};
use super::{GAP, INK, LABEL, MARGIN, PALETTE, SOFT, TITLE, TITLE_ROW, shortened};
use crate::error::Result;
use crate::report::grid::{fit, write_png};

/// An image and the line under it.
#[derive(Debug, Clone)]
pub struct Tile {
    /// The image.
    pub image: RgbImage,
    /// What stands under it.
    pub text: String,
    /// Whether it agrees with its query, which decides the colour of the text; unknown where either has no class.
    pub agrees: Option<bool>,
}

/// A query and its neighbours.
#[derive(Debug, Clone)]
pub struct Row {
    /// The query.
    pub query: Tile,
    /// Its neighbours, nearest first.
    pub neighbours: Vec<Tile>,
}

const CELL: u32 = 96;
const TEXT_ROW: f64 = 22.0;
const SUBTITLE_ROW: f64 = 26.0;
/// Between the query and its neighbours.
const APART: f64 = 26.0;
const CAPTION: Font = Font { size: 12.5, bold: false, color: INK };
/// Of the chart's colours, blue and vermilion.
const AGREES: Color = PALETTE[0];
const DIFFERS: Color = PALETTE[1];

/// Writes `rows` as a PNG at `path` (temporary file, then rename).
///
/// # Errors
/// [`crate::error::Error::Io`] when the file cannot be written.
pub fn write_gallery(path: &Path, title: &str, subtitle: &str, rows: &[Row]) -> Result<()> {
    write_png(path, &render(title, subtitle, rows)?)
}

/// Left edge of the `i`-th image of a row, the query being the first.
fn left(i: usize) -> f64 {
    let step = f64::from(CELL) + GAP;
    MARGIN + i as f64 * step + if i > 0 { APART } else { 0.0 }
}

fn top(row: usize) -> f64 {
    MARGIN + TITLE_ROW + SUBTITLE_ROW + row as f64 * (f64::from(CELL) + TEXT_ROW + GAP)
}

fn render(title: &str, subtitle: &str, rows: &[Row]) -> Result<RgbImage> {
    let most = rows.iter().map(|row| row.neighbours.len()).max().unwrap_or(0);
    let width = (left(most + 1) - GAP + MARGIN).max(canvas::text_width(title, TITLE)? + 2.0 * MARGIN);
    let width = width.max(canvas::text_width(subtitle, LABEL)? + 2.0 * MARGIN);
    let mut picture = canvas::draw(width.ceil() as u32, (top(rows.len()) + MARGIN / 2.0).ceil() as u32, |canvas| {
        canvas.text((MARGIN, MARGIN + 8.0), title, TITLE, Anchor::Left)?;
        canvas.text((MARGIN, MARGIN + TITLE_ROW + 4.0), subtitle, LABEL, Anchor::Left)?;
        let end = top(rows.len()) - GAP;
        let line = left(1) - APART / 2.0 - GAP / 2.0;
        canvas.line(&[(line, top(0)), (line, end)], 1.0, SOFT)?;
        rows.iter().enumerate().try_for_each(|(i, row)| draw_texts(canvas, i, row))
    })?;
    for (i, row) in rows.iter().enumerate() {
        for (j, tile) in [&row.query].into_iter().chain(&row.neighbours).enumerate() {
            let fitted = fit(&tile.image, CELL);
            let inset = |side: u32| f64::from(CELL - side) / 2.0;
            let (x, y) = (left(j) + inset(fitted.width()), top(i) + inset(fitted.height()));
            overlay(&mut picture, &fitted, x as i64, y as i64);
        }
    }
    Ok(picture)
}

fn draw_texts(canvas: &Canvas<'_>, i: usize, row: &Row) -> Result<()> {
    for (j, tile) in [&row.query].into_iter().chain(&row.neighbours).enumerate() {
        let color = match tile.agrees {
            None => INK,
            Some(true) => AGREES,
            Some(false) => DIFFERS,
        };
        let font = Font { color, bold: j == 0, ..CAPTION };
        let text = shortened(&tile.text, font, f64::from(CELL) + GAP / 2.0)?;
        let middle = (left(j) + f64::from(CELL) / 2.0, top(i) + f64::from(CELL) + TEXT_ROW / 2.0);
        canvas.text(middle, &text, font, Anchor::Centre)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(color: [u8; 3], size: (u32, u32), agrees: Option<bool>) -> Tile {
        let image = RgbImage::from_pixel(size.0, size.1, image::Rgb(color));
        Tile { image, text: "0.93 a class of a very long name".into(), agrees }
    }

    #[test]
    fn every_image_has_its_place() {
        let row = |query, neighbours: &[[u8; 3]]| Row {
            query: tile(query, (32, 32), None),
            neighbours: neighbours.iter().map(|c| tile(*c, (200, 100), Some(c[0] > 100))).collect(),
        };
        let rows = [row([250, 0, 0], &[[0, 250, 0], [150, 150, 0]]), row([0, 0, 250], &[[120, 0, 120]])];
        let picture = render("Neighbours", "of nothing", &rows).unwrap();
        let at = |i: usize, j: usize| {
            let half = f64::from(CELL) / 2.0;
            picture.get_pixel((left(j) + half) as u32, (top(i) + half) as u32).0
        };
        assert_eq!((at(0, 0), at(0, 1), at(0, 2)), ([250, 0, 0], [0, 250, 0], [150, 150, 0]));
        assert_eq!((at(1, 0), at(1, 1), at(1, 2)), ([0, 0, 250], [120, 0, 120], [255, 255, 255]));
        let blue = |p: &&image::Rgb<u8>| p.0[0] < 40 && p.0[1].abs_diff(114) < 30 && p.0[2].abs_diff(178) < 30;
        assert!(picture.pixels().filter(blue).count() > 20, "texts that agree are blue");
        render("Nothing", "", &[]).unwrap();
    }
}
