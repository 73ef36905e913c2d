//! Charts as PNG. Here those of lines: panels stacked over a shared x axis, such as loss, z std, effective rank and kNN accuracy by epoch.

pub mod bars;
mod canvas;
pub mod confusion;
pub mod gallery;
mod scale;
pub mod scatter;

use std::path::Path;

use canvas::{Anchor, Canvas, Color, Font, text_width};
use image::RgbImage;
use scale::{Ticks, padded_range, spread, thin, visible_runs};

use crate::error::Result;
use crate::report::grid::write_png;

/// One line of a panel.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// Name in the legend. A name has the same colour in every panel of a chart.
    pub name: String,
    /// (x, y), x rising. A point that is not finite is left out and breaks the line.
    pub points: Vec<(f64, f64)>,
}

/// One panel of a chart.
#[derive(Debug, Clone, Default)]
pub struct Panel {
    /// What the panel shows.
    pub title: String,
    /// What the y axis counts; may be empty.
    pub y_label: String,
    /// The lines.
    pub series: Vec<Series>,
    /// Level dashed lines with their labels, such as the accuracy of raw pixels.
    pub reference_lines: Vec<(String, f64)>,
    /// The y axis; without it the range of the data. Lines are cut off outside it.
    pub y_range: Option<(f64, f64)>,
}

const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 20.0;
const TITLE_ROW: f64 = 34.0;
const LEGEND_ROW: f64 = 24.0;
const PANEL_TITLE_ROW: f64 = 26.0;
const PLOT_HEIGHT: f64 = 150.0;
const PANEL_GAP: f64 = 18.0;
const X_AXIS_ROWS: f64 = 44.0;
/// Left of the plots: the axis label and the tick labels.
const LEFT: f64 = MARGIN + 74.0;
const LABEL_HEIGHT: f64 = 16.0;
const SWATCH: f64 = 26.0;
const GAP: f64 = 8.0;
/// Series with at most this many points show each as a dot.
const MOST_DOTS: usize = 40;

/// Okabe and Ito's palette, told apart with any colour vision; without its yellow, which is too pale on white.
const PALETTE: [Color; 7] = [
    Color(0, 114, 178),
    Color(213, 94, 0),
    Color(0, 158, 115),
    Color(204, 121, 167),
    Color(230, 159, 0),
    Color(86, 180, 233),
    Color(0, 0, 0),
];
const INK: Color = Color(38, 38, 42);
const SOFT: Color = Color(92, 92, 98);
const GRID: Color = Color(228, 228, 232);

const TITLE: Font = Font { size: 21.0, bold: true, color: INK };
const PANEL_TITLE: Font = Font { size: 15.0, bold: true, color: INK };
const LABEL: Font = Font { size: 14.0, bold: false, color: SOFT };

/// Writes a chart of `panels`, one above the other over the same x axis, as a PNG at `path` (temporary file, then rename).
///
/// # Errors
/// [`crate::error::Error::Io`] when the file cannot be written.
pub fn write_chart(path: &Path, title: &str, x_label: &str, panels: &[Panel]) -> Result<()> {
    write_png(path, &render(title, x_label, panels)?)
}

fn render(title: &str, x_label: &str, panels: &[Panel]) -> Result<RgbImage> {
    let names = series_names(panels);
    let legend = legend_layout(panels, &names)?;
    let legend_rows = legend.last().map_or(0, |entry| entry.row + 1);
    let top = MARGIN + TITLE_ROW + LEGEND_ROW * legend_rows as f64;
    let panel_height = PANEL_TITLE_ROW + PLOT_HEIGHT + PANEL_GAP;
    let height = top + panel_height * panels.len() as f64 - PANEL_GAP + X_AXIS_ROWS + MARGIN / 2.0;

    let labels: Vec<Vec<EndLabel>> = panels.iter().map(|panel| end_labels(panel, &names)).collect();
    let right = WIDTH - MARGIN - widest(labels.iter().flatten())? - GAP;
    let x = x_range(panels);
    canvas::draw(WIDTH as u32, height.ceil() as u32, |canvas| {
        canvas.text((MARGIN, MARGIN + 8.0), title, TITLE, Anchor::Left)?;
        draw_legend(canvas, &legend)?;
        for (i, (panel, labels)) in panels.iter().zip(labels).enumerate() {
            let plot_top = top + panel_height * i as f64 + PANEL_TITLE_ROW;
            let plot = Plot { canvas, right, top: plot_top, bottom: plot_top + PLOT_HEIGHT, x, y: y_range(panel) };
            plot.draw(panel, &names)?;
            plot.draw_end_labels(labels)?;
            if i + 1 == panels.len() {
                plot.draw_x_axis(x_label)?;
            }
        }
        Ok(())
    })
}

/// As much of the beginning of `text` as fits into `width`, with an ellipsis where something is left out.
fn shortened(text: &str, font: Font, width: f64) -> Result<String> {
    if text_width(text, font)? <= width {
        return Ok(text.to_string());
    }
    let mut kept: Vec<char> = text.chars().collect();
    loop {
        kept.pop();
        let short = kept.iter().collect::<String>().trim_end().to_string() + "\u{2026}";
        if kept.is_empty() || text_width(&short, font)? <= width {
            return Ok(short);
        }
    }
}

/// The names of all series, each once, in order of appearance: a name's place decides its colour.
fn series_names(panels: &[Panel]) -> Vec<&str> {
    let mut names: Vec<&str> = vec![];
    for series in panels.iter().flat_map(|panel| &panel.series) {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    names
}

fn color_of(name: &str, names: &[&str]) -> Color {
    let place = names.iter().position(|n| *n == name).unwrap_or(0);
    PALETTE[place % PALETTE.len()]
}

fn finite_points(series: &Series) -> impl Iterator<Item = (f64, f64)> {
    series.points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite())
}

fn x_range(panels: &[Panel]) -> (f64, f64) {
    let points = panels.iter().flat_map(|panel| &panel.series).flat_map(finite_points);
    padded_range(points.map(|p| p.0), 0.0)
}

fn y_range(panel: &Panel) -> (f64, f64) {
    match panel.y_range {
        Some((lo, hi)) if lo < hi && (hi - lo).is_finite() => (lo, hi),
        _ => {
            let points = panel.series.iter().flat_map(finite_points).map(|p| p.1);
            padded_range(points.chain(panel.reference_lines.iter().map(|line| line.1)), 0.07)
        }
    }
}

/// A name in the legend and where it stands.
struct LegendEntry<'a> {
    name: &'a str,
    color: Color,
    row: usize,
    x: f64,
}

/// The legend of charts in which a panel has several lines; one line alone is named by its panel's title.
fn legend_layout<'a>(panels: &[Panel], names: &[&'a str]) -> Result<Vec<LegendEntry<'a>>> {
    let mut entries = vec![];
    if panels.iter().all(|panel| panel.series.len() < 2) {
        return Ok(entries);
    }
    let (mut row, mut x) = (0, MARGIN);
    for &name in names {
        let width = SWATCH + GAP + text_width(name, LABEL)?;
        if x > MARGIN && x + width > WIDTH - MARGIN {
            (row, x) = (row + 1, MARGIN);
        }
        entries.push(LegendEntry { name, color: color_of(name, names), row, x });
        x += width + 3.0 * GAP;
    }
    Ok(entries)
}

fn draw_legend(canvas: &Canvas, entries: &[LegendEntry]) -> Result<()> {
    for entry in entries {
        let y = MARGIN + TITLE_ROW + LEGEND_ROW * entry.row as f64;
        canvas.line(&[(entry.x, y), (entry.x + SWATCH, y)], 3.0, entry.color)?;
        canvas.text((entry.x + SWATCH + GAP, y), entry.name, LABEL, Anchor::Left)?;
    }
    Ok(())
}

/// A text right of the plot, level with what it names: a reference line, or the last value of a series.
struct EndLabel {
    text: String,
    font: Font,
    value: f64,
}

fn end_labels(panel: &Panel, names: &[&str]) -> Vec<EndLabel> {
    let y = y_range(panel);
    let ticks = y_ticks(y);
    let lines =
        panel.reference_lines.iter().map(|(text, value)| EndLabel { text: text.clone(), font: LABEL, value: *value });
    let last_values = panel.series.iter().filter_map(|series| {
        let value = finite_points(series).last()?.1;
        let font = Font { bold: true, color: color_of(&series.name, names), ..LABEL };
        Some(EndLabel { text: ticks.format(value, 1), font, value })
    });
    last_values.chain(lines).filter(|label| (y.0..=y.1).contains(&label.value)).collect()
}

fn widest<'a>(labels: impl Iterator<Item = &'a EndLabel>) -> Result<f64> {
    labels.map(|label| text_width(&label.text, label.font)).try_fold(0.0, |widest, width| Ok(width?.max(widest)))
}

fn y_ticks(range: (f64, f64)) -> Ticks {
    Ticks::new(range, 5, 0.0)
}

/// The rectangle that one panel's lines are drawn in, and the ranges that it spans.
struct Plot<'a, 'b> {
    canvas: &'a Canvas<'b>,
    right: f64,
    top: f64,
    bottom: f64,
    x: (f64, f64),
    y: (f64, f64),
}

impl Plot<'_, '_> {
    fn px(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (self.right - LEFT)
    }

    fn py(&self, y: f64) -> f64 {
        self.bottom - (y - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }

    fn x_ticks(&self) -> Ticks {
        // Epochs and steps are whole numbers; no tick stands between two of them.
        Ticks::new(self.x, 10, if self.x.1 - self.x.0 > 2.0 { 1.0 } else { 0.0 })
    }

    fn draw(&self, panel: &Panel, names: &[&str]) -> Result<()> {
        let middle = (self.top + self.bottom) / 2.0;
        self.canvas.text((LEFT, self.top - PANEL_TITLE_ROW / 2.0), &panel.title, PANEL_TITLE, Anchor::Left)?;
        self.canvas.text((MARGIN, middle), &panel.y_label, LABEL, Anchor::CentreUpwards)?;
        self.draw_grid()?;
        for (_, value) in panel.reference_lines.iter().filter(|line| (self.y.0..=self.y.1).contains(&line.1)) {
            self.canvas.dashes((LEFT, self.right), self.py(*value), 1.3, SOFT)?;
        }
        for series in &panel.series {
            self.draw_series(series, color_of(&series.name, names))?;
        }
        if panel.series.iter().all(|series| finite_points(series).next().is_none()) {
            self.canvas.text(((LEFT + self.right) / 2.0, middle), "no data", LABEL, Anchor::Centre)?;
        }
        Ok(())
    }

    fn draw_grid(&self) -> Result<()> {
        let ticks = y_ticks(self.y);
        for &value in &ticks.values {
            let y = self.py(value);
            self.canvas.line(&[(LEFT, y), (self.right, y)], 1.0, GRID)?;
            self.canvas.text((LEFT - GAP, y), &ticks.format(value, 0), LABEL, Anchor::Right)?;
        }
        for &value in &self.x_ticks().values {
            let x = self.px(value);
            self.canvas.line(&[(x, self.top), (x, self.bottom)], 1.0, GRID)?;
        }
        self.canvas.line(&[(LEFT, self.top), (LEFT, self.bottom), (self.right, self.bottom)], 1.0, SOFT)
    }

    fn draw_series(&self, series: &Series, color: Color) -> Result<()> {
        let dots = series.points.len() <= MOST_DOTS;
        for run in visible_runs(&series.points, self.y) {
            let run = thin(run, self.x, (self.right - LEFT) as usize);
            let pixels: Vec<(f64, f64)> = run.iter().map(|&(x, y)| (self.px(x), self.py(y))).collect();
            self.canvas.line(&pixels, 2.0, color)?;
            // A point without neighbours is no line.
            if pixels.len() == 1 {
                self.canvas.dot(pixels[0], 3.2, color)?;
            }
        }
        for (x, y) in finite_points(series).filter(|p| dots && (self.y.0..=self.y.1).contains(&p.1)) {
            self.canvas.dot((self.px(x), self.py(y)), 3.2, color)?;
        }
        Ok(())
    }

    fn draw_end_labels(&self, labels: Vec<EndLabel>) -> Result<()> {
        let mut heights: Vec<f64> = labels.iter().map(|label| self.py(label.value)).collect();
        spread(&mut heights, LABEL_HEIGHT, (self.top, self.bottom));
        for (label, y) in labels.iter().zip(heights) {
            self.canvas.text((self.right + GAP, y), &label.text, label.font, Anchor::Left)?;
        }
        Ok(())
    }

    fn draw_x_axis(&self, x_label: &str) -> Result<()> {
        let ticks = self.x_ticks();
        for &value in &ticks.values {
            self.canvas.text((self.px(value), self.bottom + 13.0), &ticks.format(value, 0), LABEL, Anchor::Centre)?;
        }
        self.canvas.text(((LEFT + self.right) / 2.0, self.bottom + 33.0), x_label, LABEL, Anchor::Centre)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    /// Pixels of about this colour.
    fn count(image: &RgbImage, color: Color) -> usize {
        let near = |a: u8, b: u8| a.abs_diff(b) < 24;
        image.pixels().filter(|p| near(p.0[0], color.0) && near(p.0[1], color.1) && near(p.0[2], color.2)).count()
    }

    #[test]
    fn what_training_can_log_gives_a_picture() {
        let odd: [&[(f64, f64)]; 6] = [
            &[],
            &[(3.0, 0.5)],
            &[(0.0, f64::NAN), (1.0, f64::INFINITY)],
            &[(0.0, 1.0), (1.0, f64::NAN), (2.0, 1.0)],
            &[(0.0, -0.94), (1.0, -0.94), (2.0, -0.94)],
            &[(0.0, -1e308), (1.0, 1e308), (f64::NAN, 0.0)],
        ];
        for points in odd {
            let panel = Panel { series: vec![series("loss", points)], ..Panel::default() };
            let drawable = points.iter().any(|p| p.0.is_finite() && p.1.is_finite());
            let image = render("Loss", "epoch", &[panel]).unwrap();
            assert_eq!(count(&image, PALETTE[0]) > 10, drawable, "{points:?}");
        }
        render("Nothing", "", &[]).unwrap();
    }

    #[test]
    fn lines_stay_inside_their_plot() {
        let wild = series("wild", &[(0.0, -50.0), (1.0, 0.5), (2.0, 80.0), (3.0, -1e9), (4.0, 0.9)]);
        let noise = |i: u32| f64::from(i.wrapping_mul(2_654_435_761) >> 8) / f64::from(1 << 24);
        let sharp_turns: Vec<(f64, f64)> = (0..20_000).map(|i| (f64::from(i), noise(i))).collect();
        for drawn in [wild, series("sharp turns", &sharp_turns)] {
            let panel = Panel { series: vec![drawn], y_range: Some((0.0, 1.0)), ..Panel::default() };
            let image = render("", "", &[panel]).unwrap();
            let top = MARGIN + TITLE_ROW + PANEL_TITLE_ROW;
            let rows = top - 3.0..top + PLOT_HEIGHT + 3.0;
            for (x, y, pixel) in image.enumerate_pixels() {
                let inside = rows.contains(&f64::from(y)) && f64::from(x) > LEFT - 5.0;
                assert!(inside || pixel.0[2] <= pixel.0[0].saturating_add(40), "blue at {x}, {y}");
            }
        }
    }

    #[test]
    fn a_name_keeps_its_colour_and_reference_lines_are_dashed() {
        let healthy = series("healthy", &[(0.0, 0.0), (1.0, 1.0)]);
        let collapsed = series("collapsed", &[(0.0, 1.0), (1.0, 0.0)]);
        let both = Panel { series: vec![healthy, collapsed.clone()], ..Panel::default() };
        let single = Panel { series: vec![collapsed], ..Panel::default() };
        let image = render("", "", &[both.clone(), single]).unwrap();
        let without = render("", "", std::slice::from_ref(&both)).unwrap();
        assert!(count(&image, PALETTE[1]) > count(&without, PALETTE[1]) + 500);
        assert!(count(&image, PALETTE[0]) < count(&without, PALETTE[0]) + 50);

        let lined = Panel { reference_lines: vec![(String::new(), 0.3)], ..both };
        let dashes = count(&render("", "", &[lined]).unwrap(), SOFT) as f64 - count(&without, SOFT) as f64;
        let plot_width = WIDTH - MARGIN - GAP - LEFT;
        assert!((0.4..0.9).contains(&(dashes / plot_width)), "{dashes} pixels of a line {plot_width} long");
    }

    #[test]
    fn the_png_is_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chart.png");
        let panel = Panel { series: vec![series("loss", &[(0.0, 1.0), (1.0, 0.5)])], ..Panel::default() };
        write_chart(&path, "Loss", "epoch", &[panel]).unwrap();
        assert_eq!(image::open(&path).unwrap().width(), WIDTH as u32);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    }
}
