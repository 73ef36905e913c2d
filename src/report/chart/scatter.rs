//! Points in a plane as PNG, coloured by class: a map of a dataset.

use std::path::Path;

use image::RgbImage;

use super::canvas::{self, Anchor, Canvas, Color, Font};
use super::scale::{Ticks, padded_range};
use super::{GAP, GRID, INK, LABEL, MARGIN, PALETTE, SOFT, TITLE, TITLE_ROW, shortened};
use crate::error::Result;
use crate::report::grid::write_png;

/// A point and the place of its class in the legend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Position.
    pub at: [f64; 2],
    /// Its class; without one it is grey.
    pub class: Option<usize>,
}

/// A map.
#[derive(Debug, Clone, Default)]
pub struct Scatter {
    /// The first line.
    pub title: String,
    /// The line below it.
    pub subtitle: String,
    /// What x and y are. Where both are empty, there are no ticks either.
    pub axes: [String; 2],
    /// Names of the classes.
    pub classes: Vec<String>,
    /// The points; later ones are drawn over earlier ones.
    pub points: Vec<Point>,
}

const WIDTH: f64 = 1000.0;
/// Side of the square that points lie in.
const SIDE: f64 = 700.0;
const SUBTITLE_ROW: f64 = 26.0;
const LEFT: f64 = MARGIN + 74.0;
const AXIS_ROWS: f64 = 48.0;
const LEGEND: f64 = LEFT + SIDE + 22.0;
const LEGEND_ROW: f64 = 22.0;
/// Classes in the legend.
const MOST_NAMED: usize = 28;
/// Points that are drawn large, and small; in between in between.
const FEW: f64 = 300.0;
const MANY: f64 = 5000.0;
const NO_CLASS: Color = Color(170, 170, 176);

/// Colours beyond those of charts, for classes from the eighth on: darker and paler ones, which are less sure to be told apart.
const MORE_COLORS: [Color; 13] = [
    Color(240, 228, 66),
    Color(120, 40, 140),
    Color(140, 86, 40),
    Color(0, 90, 70),
    Color(160, 0, 40),
    Color(150, 190, 90),
    Color(120, 130, 220),
    Color(240, 150, 140),
    Color(60, 60, 120),
    Color(110, 110, 0),
    Color(90, 220, 200),
    Color(220, 80, 220),
    Color(110, 110, 116),
];
const COLORS: usize = PALETTE.len() + MORE_COLORS.len();

fn color_of(class: Option<usize>) -> Color {
    let Some(class) = class else { return NO_CLASS };
    PALETTE.iter().chain(&MORE_COLORS).nth(class % COLORS).copied().unwrap_or(NO_CLASS)
}

/// Writes `scatter` as a PNG at `path` (temporary file, then rename).
///
/// # Errors
/// [`crate::error::Error::Io`] when the file cannot be written.
pub fn write_scatter(path: &Path, scatter: &Scatter) -> Result<()> {
    write_png(path, &render(scatter)?)
}

fn render(scatter: &Scatter) -> Result<RgbImage> {
    let top = MARGIN + TITLE_ROW + SUBTITLE_ROW;
    let frame = Frame::new(scatter, top);
    canvas::draw(WIDTH as u32, (top + SIDE + AXIS_ROWS + MARGIN / 2.0).ceil() as u32, |canvas| {
        canvas.text((MARGIN, MARGIN + 8.0), &scatter.title, TITLE, Anchor::Left)?;
        canvas.text((MARGIN, MARGIN + TITLE_ROW + 4.0), &scatter.subtitle, LABEL, Anchor::Left)?;
        frame.draw(canvas, &scatter.axes)?;
        let radius = radius(scatter.points.len());
        for point in scatter.points.iter().filter(|p| p.at.iter().all(|v| v.is_finite())) {
            canvas.dot(frame.place(point.at), radius, color_of(point.class))?;
        }
        draw_legend(canvas, scatter, top)
    })
}

/// Many points are drawn smaller, so that they cover each other less.
fn radius(points: usize) -> f64 {
    let share = ((points as f64).clamp(FEW, MANY) - FEW) / (MANY - FEW);
    3.4 - 1.6 * share
}

/// The square that points lie in, and the ranges that it spans.
struct Frame {
    top: f64,
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    /// Both ranges are equally long: a map is not stretched.
    fn new(scatter: &Scatter, top: f64) -> Frame {
        let range = |axis: usize| padded_range(scatter.points.iter().map(|p| p.at[axis]), 0.04);
        let (x, y) = (range(0), range(1));
        let half = (x.1 - x.0).max(y.1 - y.0) / 2.0;
        let around = |(lo, hi): (f64, f64)| {
            let middle = lo + (hi - lo) / 2.0;
            (middle - half, middle + half)
        };
        Frame { top, x: around(x), y: around(y) }
    }

    fn place(&self, [x, y]: [f64; 2]) -> (f64, f64) {
        let share = |v: f64, (lo, hi): (f64, f64)| (v - lo) / (hi - lo);
        (LEFT + share(x, self.x) * SIDE, self.top + SIDE - share(y, self.y) * SIDE)
    }

    fn draw(&self, canvas: &Canvas<'_>, axes: &[String; 2]) -> Result<()> {
        let (right, bottom) = (LEFT + SIDE, self.top + SIDE);
        if axes.iter().any(|axis| !axis.is_empty()) {
            let ticks = Ticks::new(self.x, 8, 0.0);
            for &value in &ticks.values {
                let (x, _) = self.place([value, self.y.0]);
                canvas.line(&[(x, self.top), (x, bottom)], 1.0, GRID)?;
                canvas.text((x, bottom + 13.0), &ticks.format(value, 0), LABEL, Anchor::Centre)?;
            }
            let ticks = Ticks::new(self.y, 8, 0.0);
            for &value in &ticks.values {
                let (_, y) = self.place([self.x.0, value]);
                canvas.line(&[(LEFT, y), (right, y)], 1.0, GRID)?;
                canvas.text((LEFT - GAP, y), &ticks.format(value, 0), LABEL, Anchor::Right)?;
            }
        }
        let corners = [(LEFT, self.top), (right, self.top), (right, bottom), (LEFT, bottom), (LEFT, self.top)];
        canvas.line(&corners, 1.0, SOFT)?;
        canvas.text(((LEFT + right) / 2.0, bottom + 34.0), &axes[0], LABEL, Anchor::Centre)?;
        canvas.text((MARGIN, (self.top + bottom) / 2.0), &axes[1], LABEL, Anchor::CentreUpwards)
    }
}

/// The classes that have points, by colour.
fn draw_legend(canvas: &Canvas<'_>, scatter: &Scatter, top: f64) -> Result<()> {
    let shown = |class: Option<usize>| scatter.points.iter().any(|point| point.class == class);
    let classes: Vec<usize> = (0..scatter.classes.len()).filter(|&class| shown(Some(class))).collect();
    let mut y = top + LEGEND_ROW / 2.0;
    let font = Font { color: INK, ..LABEL };
    let mut entry = |color: Color, name: &str| {
        canvas.dot((LEGEND + 6.0, y), 5.0, color)?;
        let room = WIDTH - MARGIN - LEGEND - 18.0;
        canvas.text((LEGEND + 18.0, y), &shortened(name, font, room)?, font, Anchor::Left)?;
        y += LEGEND_ROW;
        Ok::<(), crate::error::Error>(())
    };
    for &class in classes.iter().take(MOST_NAMED) {
        entry(color_of(Some(class)), &scatter.classes[class])?;
    }
    if shown(None) {
        entry(NO_CLASS, "no label")?;
    }
    let more = classes.len().saturating_sub(MOST_NAMED);
    let mut note = |text: &str| {
        y += LEGEND_ROW;
        canvas.text((LEGEND, y - LEGEND_ROW), text, LABEL, Anchor::Left)
    };
    if more > 0 {
        note(&format!("and {more} more classes"))?;
    }
    if classes.last().is_some_and(|&class| class >= COLORS) {
        note("colours repeat")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(image: &RgbImage, color: Color) -> usize {
        let near = |a: u8, b: u8| a.abs_diff(b) < 12;
        image.pixels().filter(|p| near(p.0[0], color.0) && near(p.0[1], color.1) && near(p.0[2], color.2)).count()
    }

    fn spiral(n: usize, classes: usize) -> Scatter {
        let point = |i: usize| {
            let angle = i as f64 * 0.3;
            let at = [angle * angle.cos(), 40.0 + 2.0 * angle * angle.sin()];
            Point { at, class: (i % 7 != 6).then_some(i % classes) }
        };
        Scatter {
            title: "Spiral".into(),
            axes: ["x".into(), "y".into()],
            classes: (0..classes).map(|i| format!("class {i} of a name that is far too long for the legend")).collect(),
            points: (0..n).map(point).collect(),
            ..Scatter::default()
        }
    }

    #[test]
    fn every_point_is_drawn_in_the_colour_of_its_class_within_the_frame() {
        let image = render(&spiral(90, 3)).unwrap();
        let dot = std::f64::consts::PI * radius(90).powi(2);
        for class in [Some(0), Some(1), Some(2), None] {
            let points = spiral(90, 3).points.iter().filter(|p| p.class == class).count() as f64 + 2.0; // the legend's is larger
            let share = count(&image, color_of(class)) as f64 / (points * dot);
            // The edges of letters and of the frame are as grey as points without a class.
            let most = if class.is_some() { 1.2 } else { 2.0 };
            assert!((0.4..most).contains(&share), "{class:?}: {share} of the expected area");
        }
        let top = (MARGIN + TITLE_ROW + SUBTITLE_ROW) as u32;
        let blue = |x: u32, y: u32| image.get_pixel(x, y).0 == [0, 114, 178];
        let outside = (0..image.width()).flat_map(|x| (0..image.height()).map(move |y| (x, y)));
        let outside = outside
            .filter(|&(x, y)| f64::from(x) < LEFT - 4.0 || y < top - 4 || f64::from(y) > f64::from(top) + SIDE + 4.0);
        assert_eq!(outside.filter(|&(x, y)| blue(x, y)).count(), 0);
    }

    #[test]
    fn odd_maps_give_a_picture() {
        for (n, classes) in [(0, 1), (1, 1), (200, 60)] {
            render(&spiral(n, classes)).unwrap();
        }
        let same = Point { at: [3.0, 3.0], class: None };
        let wild = Point { at: [f64::NAN, 1e300], class: Some(0) };
        render(&Scatter { points: vec![same, same, wild], classes: vec!["a".into()], ..Scatter::default() }).unwrap();
    }

    #[test]
    fn many_points_are_drawn_smaller() {
        assert!(radius(100) == radius(300) && radius(300) > radius(2000) && radius(5000) == radius(50_000));
    }
}
