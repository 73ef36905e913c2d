//! Grids of small images as one PNG: contact sheets and augmentation previews.

use std::path::Path;

use image::imageops::{FilterType, overlay, resize};
use image::{ImageFormat, Rgb, RgbImage};

use crate::atomic::write_atomic;
use crate::error::{Error, Result};

const GAP: u32 = 4;
const BACKGROUND: Rgb<u8> = Rgb([32, 32, 36]);

/// Writes `tiles` row by row, `columns` to a row, each fitted into a square of `cell` pixels, as a PNG at `path`
/// (temporary file, then rename).
///
/// # Errors
/// [`Error::Io`] when the file cannot be written.
pub fn write_grid(path: &Path, tiles: &[RgbImage], columns: usize, cell: u32) -> Result<()> {
    let columns = columns.clamp(1, tiles.len().max(1)) as u32;
    let rows = (tiles.len() as u32).div_ceil(columns).max(1);
    let mut canvas = RgbImage::from_pixel(columns * (cell + GAP) + GAP, rows * (cell + GAP) + GAP, BACKGROUND);
    for (i, tile) in tiles.iter().enumerate() {
        let fitted = fit(tile, cell);
        let (column, row) = (i as u32 % columns, i as u32 / columns);
        let x = GAP + column * (cell + GAP) + (cell - fitted.width()) / 2;
        let y = GAP + row * (cell + GAP) + (cell - fitted.height()) / 2;
        overlay(&mut canvas, &fitted, i64::from(x), i64::from(y));
    }
    write_png(path, &canvas)
}

/// Writes `image` as a PNG: temporary file, then rename.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written.
pub fn write_png(path: &Path, image: &RgbImage) -> Result<()> {
    let mut png = std::io::Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).map_err(|e| Error::io("encode", path)(std::io::Error::other(e)))?;
    write_atomic(path, |out| out.write_all(png.get_ref()))
}

/// Scales to fit a square of `cell` pixels: small images by whole factors (pixels stay crisp), large ones smoothly.
pub(super) fn fit(tile: &RgbImage, cell: u32) -> RgbImage {
    let longest = tile.width().max(tile.height()).max(1);
    if longest <= cell {
        let factor = cell / longest;
        return resize(tile, tile.width() * factor, tile.height() * factor, FilterType::Nearest);
    }
    let scaled = |side: u32| ((u64::from(side) * u64::from(cell)) / u64::from(longest)).max(1) as u32;
    resize(tile, scaled(tile.width()), scaled(tile.height()), FilterType::Triangle)
}
