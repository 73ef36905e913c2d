//! A picture that text, lines and dots are drawn on, in pixels of the finished image. Drawing happens at a multiple of
//! the size and is averaged down, which smooths every edge alike.

use std::sync::OnceLock;

use image::RgbImage;
use plotters::backend::BitMapBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{Circle, PathElement, Rectangle};
pub use plotters::style::RGBColor as Color;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontDesc, FontFamily, FontStyle, FontTransform, TextStyle, register_font};

use crate::error::{Error, Result};

const SCALE: u32 = 3;
const FAMILY: &str = "DejaVu Sans";
static BOOK: &[u8] = include_bytes!("../../../assets/fonts/DejaVuSans.ttf");
static BOLD: &[u8] = include_bytes!("../../../assets/fonts/DejaVuSans-Bold.ttf");

/// Size, weight and colour of a text.
#[derive(Debug, Clone, Copy)]
pub struct Font {
    /// Height of a line in pixels.
    pub size: f64,
    /// Bold face.
    pub bold: bool,
    /// Colour.
    pub color: Color,
}

/// Which point of a text its position names; vertically it is always the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// Left end.
    Left,
    /// Middle.
    Centre,
    /// Right end.
    Right,
    /// Middle, the text running upwards.
    CentreUpwards,
}

/// The picture being drawn.
pub struct Canvas<'a> {
    area: DrawingArea<BitMapBackend<'a>, Shift>,
}

/// Draws a picture of `width` x `height` with `paint`.
///
/// # Errors
/// [`Error::Internal`] when the drawing library refuses, or what `paint` returns.
pub fn draw(width: u32, height: u32, paint: impl FnOnce(&Canvas) -> Result<()>) -> Result<RgbImage> {
    register_fonts()?;
    let mut large = RgbImage::from_pixel(width * SCALE, height * SCALE, image::Rgb([255; 3]));
    {
        let area = BitMapBackend::with_buffer(&mut large, (width * SCALE, height * SCALE)).into_drawing_area();
        paint(&Canvas { area })?;
    }
    Ok(image::imageops::thumbnail(&large, width, height))
}

fn register_fonts() -> Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let faces = [(FontStyle::Normal, BOOK), (FontStyle::Bold, BOLD)];
    let registered =
        REGISTERED.get_or_init(|| faces.into_iter().all(|(style, bytes)| register_font(FAMILY, style, bytes).is_ok()));
    if *registered { Ok(()) } else { Err(refused("the embedded font is not a font")) }
}

fn refused(reason: impl ToString) -> Error {
    Error::Internal { thread: "the chart".into(), message: reason.to_string() }
}

fn face(font: Font) -> FontDesc<'static> {
    let style = if font.bold { FontStyle::Bold } else { FontStyle::Normal };
    FontDesc::new(FontFamily::Name(FAMILY), font.size * f64::from(SCALE), style)
}

/// The width that `text` takes.
///
/// # Errors
/// [`Error::Internal`] when the embedded font cannot be read.
pub fn text_width(text: &str, font: Font) -> Result<f64> {
    register_fonts()?;
    let (width, _) = face(font).box_size(text).map_err(refused)?;
    Ok(f64::from(width) / f64::from(SCALE))
}

fn scaled(value: f64) -> i32 {
    (value * f64::from(SCALE)).round() as i32
}

impl Canvas<'_> {
    /// Draws `text`.
    pub fn text(&self, (x, y): (f64, f64), text: &str, font: Font, anchor: Anchor) -> Result<()> {
        let horizontal = match anchor {
            Anchor::Left => HPos::Left,
            Anchor::Centre | Anchor::CentreUpwards => HPos::Center,
            Anchor::Right => HPos::Right,
        };
        let transform = if anchor == Anchor::CentreUpwards { FontTransform::Rotate270 } else { FontTransform::None };
        let style = TextStyle::from(face(font).transform(transform)).color(&font.color);
        let style = style.pos(Pos::new(horizontal, VPos::Center));
        self.area.draw_text(text, &style, (scaled(x), scaled(y))).map_err(refused)
    }

    /// Draws the line through `points`, with round joints.
    pub fn line(&self, points: &[(f64, f64)], width: f64, color: Color) -> Result<()> {
        let style = color.stroke_width(scaled(width).max(1) as u32);
        for pair in points.windows(2) {
            // Piece by piece: the library's mitred joints shoot far beyond the sharp turns of a noisy line.
            let ends = [pair[0], pair[1]].map(|(x, y)| (scaled(x), scaled(y)));
            self.area.draw(&PathElement::new(ends, style)).map_err(refused)?;
        }
        for &joint in points.iter().skip(1).take(points.len().saturating_sub(2)) {
            self.dot(joint, width / 2.0, color)?;
        }
        Ok(())
    }

    /// Draws a level dashed line.
    pub fn dashes(&self, (left, right): (f64, f64), y: f64, width: f64, color: Color) -> Result<()> {
        const DASH: f64 = 6.0;
        const GAP: f64 = 4.0;
        let mut x = left;
        while x < right {
            self.fill((x, y - width / 2.0), ((x + DASH).min(right), y + width / 2.0), color)?;
            x += DASH + GAP;
        }
        Ok(())
    }

    /// Fills a rectangle.
    pub fn fill(&self, (x0, y0): (f64, f64), (x1, y1): (f64, f64), color: Color) -> Result<()> {
        let corners = [(scaled(x0), scaled(y0)), (scaled(x1), scaled(y1))];
        self.area.draw(&Rectangle::new(corners, color.filled())).map_err(refused)
    }

    /// Draws a dot.
    pub fn dot(&self, (x, y): (f64, f64), radius: f64, color: Color) -> Result<()> {
        self.area.draw(&Circle::new((scaled(x), scaled(y)), scaled(radius), color.filled())).map_err(refused)
    }
}
