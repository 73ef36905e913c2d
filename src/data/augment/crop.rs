//! Crop and resize in one pass: a separable triangle filter with antialiasing. The taps of a crop never reach
//! outside it and are renormalised at its border: the same as cropping first and resizing the cut-out.

use std::ops::Range;

use crate::data::augment::{Image, Planes};

/// Source rows are resampled in pairs of four-lane pixels (red, green, blue, unused), which fill a wide register.
type PixelPair = [f32; 8];
const LANES: usize = 4;

/// What one axis of a resize reads: the real interval `start..end` of the source is spread over the whole output, by
/// taps inside `bounds`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    pub start: f64,
    pub end: f64,
    pub bounds: Range<usize>,
}

impl Span {
    /// How the span is resized to a number of outputs.
    pub fn filter(self, outputs: usize) -> Filter {
        let step = (self.end - self.start) / outputs as f64;
        let support = step.max(1.0);
        let taps = ((2.0 * support).ceil() as usize).min(self.bounds.len());
        Filter { start: self.start, step, support, bounds: self.bounds, taps }
    }
}

/// The triangle filter of one axis. Output i has its centre at `start + (i + 0.5) * step` of the source.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter {
    /// Where the first output begins.
    pub start: f64,
    /// Source pixels from one output to the next.
    pub step: f64,
    /// Half the width of the triangle.
    pub support: f64,
    /// The source pixels that may be read.
    pub bounds: Range<usize>,
    /// Weights of every output.
    pub taps: usize,
}

/// The filter of one axis: for every output the first source index and as many weights as any output needs.
#[derive(Debug, Default)]
struct Taps {
    first: Vec<usize>,
    weights: Vec<f32>,
    per_output: usize,
}

impl Taps {
    /// Fills in the taps of `outputs` outputs, mirrored when `flip` is set.
    fn compute(&mut self, filter: &Filter, outputs: usize, flip: bool) {
        let &Filter { start, step, support, ref bounds, taps } = filter;
        self.per_output = taps;
        self.first.clear();
        self.weights.clear();
        for output in 0..outputs {
            let place = if flip { outputs - 1 - output } else { output };
            let centre = start + (place as f64 + 0.5) * step;
            // PIL's window: the samples whose centres lie within the support, by its way of rounding.
            let low = ((centre - support + 0.5).max(0.0) as usize).clamp(bounds.start, bounds.end - 1);
            let high = ((centre + support + 0.5) as usize).clamp(low + 1, bounds.end);
            let first = low.min(bounds.end - self.per_output);
            let weight = |i: usize| match (low..high).contains(&i) {
                true => (1.0 - ((i as f64 + 0.5 - centre) / support).abs()).max(0.0),
                false => 0.0,
            };
            let window = first..first + self.per_output;
            let total: f64 = window.clone().map(weight).sum();
            self.first.push(first);
            self.weights.extend(window.map(|i| (weight(i) / total) as f32));
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.first.iter().copied().zip(self.weights.chunks_exact(self.per_output))
    }
}

/// Resizes parts of images to squares; keeps its scratch memory.
#[derive(Debug, Default)]
pub(super) struct Resizer {
    columns: Taps,
    rows: Taps,
    /// Two source rows as floats.
    source: Vec<PixelPair>,
    /// The last horizontally resized rows, a ring: source row y lies in slot y modulo their number.
    resized: Vec<f32>,
    /// One output row before it is split into planes.
    row: Vec<f32>,
}

impl Resizer {
    /// Resizes what the filters cut out of `image` to `planes`, left-right flipped if `flip` is set.
    #[inline(always)]
    pub(super) fn resize(
        &mut self,
        image: &Image,
        horizontal: &Filter,
        vertical: &Filter,
        flip: bool,
        planes: &mut Planes,
    ) {
        let size = planes.size();
        self.columns.compute(horizontal, size, flip);
        self.rows.compute(vertical, size, false);
        let row_len = size * LANES;
        let ring_rows = (self.rows.per_output + 1).next_multiple_of(2);
        self.resized.resize(ring_rows * row_len, 0.0);
        self.row.resize(row_len, 0.0);
        self.source.resize(horizontal.bounds.len(), [0.0; 8]);

        let mut ready = vertical.bounds.start;
        for (y, (first, weights)) in self.rows.iter().enumerate() {
            while ready < first + self.rows.per_output {
                let slot = (ready - vertical.bounds.start) % ring_rows;
                let next = (ready + 1).min(vertical.bounds.end - 1);
                widen(image, [ready, next], horizontal.bounds.clone(), &mut self.source);
                let (even, odd) = self.resized[slot * row_len..][..2 * row_len].split_at_mut(row_len);
                resize_rows(&self.source, &self.columns, horizontal.bounds.start, even, odd);
                ready += 2;
            }
            let slot = |i: usize| (first + i - vertical.bounds.start) % ring_rows;
            let source = |i: usize| &self.resized[slot(i) * row_len..][..row_len];
            blend_rows(weights, source, &mut self.row);
            split(&self.row, planes.row_mut(y));
        }
    }
}

/// Reads two rows of the source as floats, side by side; a grey image gives three equal channels.
#[inline(always)]
fn widen(image: &Image, rows: [usize; 2], columns: Range<usize>, out: &mut [PixelPair]) {
    let channels = image.channels();
    let row = |y: usize| &image.row(y)[columns.start * channels..columns.end * channels];
    let (even, odd) = (row(rows[0]), row(rows[1]));
    if channels == 1 {
        for ((pair, &a), &b) in out.iter_mut().zip(even).zip(odd) {
            let (a, b) = (f32::from(a), f32::from(b));
            *pair = [a, a, a, 0.0, b, b, b, 0.0];
        }
        return;
    }
    // Reading four bytes at a time lets the compiler convert a pixel in one instruction.
    let four = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3]].map(f32::from);
    let last = out.len() - 1;
    for ((pair, a), b) in out.iter_mut().zip(even.windows(4).step_by(3)).zip(odd.windows(4).step_by(3)) {
        let (a, b) = (four(a), four(b));
        *pair = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
    }
    let (a, b) = (&even[3 * last..], &odd[3 * last..]);
    out[last] = [a[0], a[1], a[2], 0, b[0], b[1], b[2], 0].map(f32::from);
}

/// Resizes a pair of rows horizontally.
#[inline(always)]
fn resize_rows(source: &[PixelPair], taps: &Taps, offset: usize, even: &mut [f32], odd: &mut [f32]) {
    let (even, odd) = (even.as_chunks_mut::<LANES>().0, odd.as_chunks_mut::<LANES>().0);
    for (((first, weights), even), odd) in taps.iter().zip(even).zip(odd) {
        let mut sum = [0.0; 8];
        for (&weight, pair) in weights.iter().zip(&source[first - offset..]) {
            for lane in 0..8 {
                sum[lane] += weight * pair[lane];
            }
        }
        even.copy_from_slice(&sum[..4]);
        odd.copy_from_slice(&sum[4..]);
    }
}

/// `out = sum of weights[i] * source(i)`.
#[inline(always)]
fn blend_rows<'a>(weights: &[f32], source: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    for (value, &s) in out.iter_mut().zip(source(0)) {
        *value = weights[0] * s;
    }
    for (i, &weight) in weights.iter().enumerate().skip(1) {
        for (value, &s) in out.iter_mut().zip(source(i)) {
            *value += weight * s;
        }
    }
}

/// Splits four-lane pixels into planes.
#[inline(always)]
fn split(pixels: &[f32], [red, green, blue]: [&mut [f32]; 3]) {
    let pixels = pixels.as_chunks::<LANES>().0;
    for (((pixel, r), g), b) in pixels.iter().zip(red).zip(green).zip(blue) {
        [*r, *g, *b] = [pixel[0], pixel[1], pixel[2]];
    }
}
