//! Level bars as PNG: what takes how long, and how much of it could not be helped.

use std::path::Path;

use image::RgbImage;

use super::canvas::{self, Anchor, Canvas, Color, Font, text_width};
use super::{GAP, INK, LABEL, LEGEND_ROW, MARGIN, PALETTE, PANEL_TITLE, SOFT, SWATCH, TITLE, TITLE_ROW, WIDTH};
use crate::error::Result;
use crate::report::grid::write_png;

/// One bar and the figures beside it.
#[derive(Debug, Clone, Default)]
pub struct Bar {
    /// What it stands for.
    pub label: String,
    /// Its length, in any unit that all bars share.
    pub value: f64,
    /// How much of the length is drawn full; the rest is pale.
    pub full: f64,
    /// Its group, by number, which decides its colour.
    pub group: usize,
    /// The figures, one for each of [`BarChart::columns`].
    pub cells: Vec<String>,
}

/// Bars under a heading; the longest takes the whole width.
#[derive(Debug, Clone, Default)]
pub struct BarPanel {
    /// What the bars are.
    pub title: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

/// Panels, one above the other.
#[derive(Debug, Clone, Default)]
pub struct BarChart {
    /// The first line.
    pub title: String,
    /// The line below it.
    pub subtitle: String,
    /// Names of the groups, for the legend.
    pub groups: Vec<String>,
    /// What full and pale mean, for the legend.
    pub key: String,
    /// Headings of the figures beside the bars.
    pub columns: Vec<String>,
    /// The panels.
    pub panels: Vec<BarPanel>,
}

const ROW: f64 = 23.0;
const BAR: f64 = 15.0;
const PANEL_ROW: f64 = 34.0;
const PANEL_GAP: f64 = 14.0;
/// Labels are cut at this width.
const LABELS: f64 = 330.0;
const COLUMN_GAP: f64 = 18.0;
/// How much of a colour's distance to white a pale part goes.
const PALENESS: f64 = 0.68;
const NAME: Font = Font { size: 14.0, bold: false, color: INK };

/// Writes `chart` as a PNG at `path` (temporary file, then rename).
///
/// # Errors
/// [`crate::error::Error::Io`] when the file cannot be written.
pub fn write_bars(path: &Path, chart: &BarChart) -> Result<()> {
    write_png(path, &render(chart)?)
}

fn render(chart: &BarChart) -> Result<RgbImage> {
    let layout = Layout::new(chart)?;
    let top = MARGIN + TITLE_ROW + 2.0 * LEGEND_ROW;
    let heights = chart.panels.iter().map(|panel| PANEL_ROW + ROW * panel.bars.len() as f64 + PANEL_GAP);
    let height = top + heights.sum::<f64>() + MARGIN / 2.0;
    canvas::draw(WIDTH as u32, height.ceil() as u32, |canvas| {
        canvas.text((MARGIN, MARGIN + 8.0), &chart.title, TITLE, Anchor::Left)?;
        canvas.text((MARGIN, MARGIN + TITLE_ROW), &chart.subtitle, LABEL, Anchor::Left)?;
        draw_legend(canvas, chart, MARGIN + TITLE_ROW + LEGEND_ROW)?;
        let mut y = top;
        for panel in &chart.panels {
            layout.draw_panel(canvas, chart, panel, y)?;
            y += PANEL_ROW + ROW * panel.bars.len() as f64 + PANEL_GAP;
        }
        Ok(())
    })
}

fn draw_legend(canvas: &Canvas, chart: &BarChart, y: f64) -> Result<()> {
    let mut x = MARGIN;
    for (group, name) in chart.groups.iter().enumerate() {
        let half = x + SWATCH / 2.0;
        canvas.fill((x, y - BAR / 2.0), (half, y + BAR / 2.0), color(group))?;
        canvas.fill((half, y - BAR / 2.0), (x + SWATCH, y + BAR / 2.0), pale(color(group)))?;
        canvas.text((x + SWATCH + GAP, y), name, LABEL, Anchor::Left)?;
        x += SWATCH + GAP + text_width(name, LABEL)? + 3.0 * GAP;
    }
    canvas.text((x, y), &chart.key, LABEL, Anchor::Left)
}

/// Where bars and figures stand, the same in every panel.
struct Layout {
    /// Left and right end of the longest bar.
    left: f64,
    right: f64,
    /// Right end of each column of figures.
    columns: Vec<f64>,
}

impl Layout {
    fn new(chart: &BarChart) -> Result<Layout> {
        let bars = || chart.panels.iter().flat_map(|panel| &panel.bars);
        let widest = bars().map(|bar| text_width(&bar.label, NAME)).try_fold(0.0, |w: f64, new| Ok(w.max(new?)))?;
        let mut columns = vec![];
        let mut x = WIDTH - MARGIN;
        for (number, heading) in chart.columns.iter().enumerate().rev() {
            columns.insert(0, x);
            let cells = bars().filter_map(|bar| bar.cells.get(number)).map(|cell| text_width(cell, NAME));
            x -= COLUMN_GAP + cells.chain([text_width(heading, LABEL)]).try_fold(0.0, |w: f64, new| Ok(w.max(new?)))?;
        }
        Ok(Layout { left: MARGIN + widest.min(LABELS) + GAP, right: x, columns })
    }

    fn draw_panel(&self, canvas: &Canvas, chart: &BarChart, panel: &BarPanel, top: f64) -> Result<()> {
        let heading = top + PANEL_ROW / 2.0;
        canvas.text((MARGIN, heading), &panel.title, PANEL_TITLE, Anchor::Left)?;
        for (x, name) in self.columns.iter().zip(&chart.columns) {
            canvas.text((*x, heading), name, LABEL, Anchor::Right)?;
        }
        let longest = panel.bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
        for (row, bar) in panel.bars.iter().enumerate() {
            self.draw_bar(canvas, bar, longest, top + PANEL_ROW + ROW * (row as f64 + 0.5))?;
        }
        let bottom = top + PANEL_ROW + ROW * panel.bars.len() as f64;
        canvas.line(&[(self.left, top + PANEL_ROW), (self.left, bottom)], 1.0, SOFT)
    }

    fn draw_bar(&self, canvas: &Canvas, bar: &Bar, longest: f64, y: f64) -> Result<()> {
        let at = |value: f64| {
            let share = Some(value / longest).filter(|share| share.is_finite()).unwrap_or(0.0);
            self.left + share.clamp(0.0, 1.0) * (self.right - self.left)
        };
        let color = color(bar.group);
        let full = at(bar.full.min(bar.value));
        canvas.fill((full, y - BAR / 2.0), (at(bar.value), y + BAR / 2.0), pale(color))?;
        canvas.fill((self.left, y - BAR / 2.0), (full, y + BAR / 2.0), color)?;
        canvas.text((self.left - GAP, y), &shortened(&bar.label)?, NAME, Anchor::Right)?;
        let mut cells = self.columns.iter().zip(&bar.cells);
        cells.try_for_each(|(x, cell)| canvas.text((*x, y), cell, NAME, Anchor::Right))
    }
}

/// The end of a label that is too long: what tells nodes of a network apart stands at the end.
fn shortened(label: &str) -> Result<String> {
    let mut text = label.to_string();
    let mut start = 0;
    while text_width(&text, NAME)? > LABELS {
        start += 1;
        text = format!("\u{2026}{}", label.chars().skip(start).collect::<String>());
    }
    Ok(text)
}

fn color(group: usize) -> Color {
    PALETTE[group % PALETTE.len()]
}

fn pale(color: Color) -> Color {
    let mixed = |channel: u8| (f64::from(channel) + PALENESS * f64::from(255 - channel)).round() as u8;
    Color(mixed(color.0), mixed(color.1), mixed(color.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Length in pixels of the longest level run of exactly this colour.
    fn longest_run(image: &RgbImage, color: Color) -> usize {
        let row = |y| {
            let same = |x| image.get_pixel(x, y).0 == [color.0, color.1, color.2];
            (0..image.width()).fold((0, 0), |(best, run), x| {
                let run = if same(x) { run + 1 } else { 0 };
                (usize::max(best, run), run)
            })
        };
        (0..image.height()).map(|y| row(y).0).max().unwrap_or(0)
    }

    fn bar(label: &str, value: f64, full: f64, group: usize) -> Bar {
        Bar { label: label.into(), value, full, group, cells: vec![format!("{value:.1} ms")] }
    }

    fn chart(bars: Vec<Bar>) -> BarChart {
        let columns = vec!["time".into()];
        BarChart { columns, panels: vec![BarPanel { title: "nodes".into(), bars }], ..BarChart::default() }
    }

    #[test]
    fn lengths_are_in_proportion() {
        let drawn = chart(vec![bar("a", 8.0, 2.0, 0), bar("b", 4.0, 4.0, 1), bar("c", 1.0, 9.0, 2)]);
        let layout = Layout::new(&drawn).unwrap();
        let image = render(&drawn).unwrap();
        let whole = layout.right - layout.left;
        for (color, share) in [
            (pale(PALETTE[0]), 0.75),
            (PALETTE[0], 0.25),
            (PALETTE[1], 0.5),
            (pale(PALETTE[1]), 0.0),
            (PALETTE[2], 0.125),
        ] {
            let length = longest_run(&image, color) as f64;
            assert!((length - share * whole).abs() < 3.0, "{color:?}: {length} of {whole}");
        }
    }

    #[test]
    fn odd_bars_stay_inside_the_picture() {
        let long = "encoder.layer1.0.".repeat(20);
        let cut = shortened(&long).unwrap();
        assert!(cut.ends_with("layer1.0.") && text_width(&cut, NAME).unwrap() <= LABELS, "{cut}");
        let odd = vec![bar(&long, 0.0, 0.0, 9), bar("", f64::NAN, 1.0, 0), bar("c", f64::INFINITY, f64::NAN, 1)];
        render(&chart(odd)).unwrap();
        render(&BarChart::default()).unwrap();
    }
}
