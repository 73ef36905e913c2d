//! Patches of an image as rows of a matrix (im2col), a tile at a time.
//!
//! Both the forward pass and the input gradient are gathers: each pixel of a *grid* (the output, or one parity phase of the
//! input) reads a rectangle of *source* pixels (the input, or the output gradient), zero outside the image. A patch is
//! ordered `[taps y][taps x][channels]`, so one row of taps is one contiguous piece of the source.

use std::ops::Range;

use super::geometry::ConvGeometry;
use crate::backend::cpu::Real;

/// One axis of a gather: grid position `i` reads source positions `i * stride + first + t`, `t` in `0..taps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Axis {
    /// Size of the source.
    pub size: usize,
    /// Size of the grid.
    pub grid: usize,
    /// Source positions per grid position.
    pub stride: usize,
    /// Offset of the first tap.
    pub first: isize,
    /// Number of taps.
    pub taps: usize,
}

/// A gather over a batch of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gather {
    /// Channels of the source.
    pub channels: usize,
    /// Vertical and horizontal axis.
    pub axes: [Axis; 2],
}

/// Horizontally adjacent grid pixels: `count` of them from `x` on, in row `row` of all images' rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub row: usize,
    pub x: usize,
    pub count: usize,
}

impl Gather {
    /// The forward pass: output pixels read the input.
    pub fn forward(g: &ConvGeometry) -> Gather {
        let axis = |d: usize, size: usize, grid: usize| Axis {
            size,
            grid,
            stride: g.stride[d],
            first: -(g.padding[d] as isize),
            taps: g.kernel[d],
        };
        Gather { channels: g.c_in, axes: [axis(0, g.h, g.oh()), axis(1, g.w, g.ow())] }
    }

    /// The input gradient at pixels `phase` + stride * i: they read the output gradient. Where a stride is 1, there is but
    /// phase 0.
    pub fn dgrad(g: &ConvGeometry, phase: [usize; 2]) -> Gather {
        let axis = |d: usize, size: usize, source: usize| {
            let taps = phase_taps(g, d, phase[d]);
            Axis {
                size: source,
                grid: size.saturating_sub(phase[d]).div_ceil(g.stride[d]),
                stride: 1,
                first: ((phase[d] + g.padding[d]) / g.stride[d]) as isize + 1 - taps as isize,
                taps,
            }
        };
        Gather { channels: g.c_out, axes: [axis(0, g.h, g.oh()), axis(1, g.w, g.ow())] }
    }

    /// Elements of a patch.
    pub fn patch(&self) -> usize {
        self.axes[0].taps * self.axes[1].taps * self.channels
    }

    /// The grid pixels `range`, numbered through all images, as runs.
    pub fn runs(&self, range: Range<usize>) -> impl Iterator<Item = Run> + Clone + use<> {
        let width = self.axes[1].grid;
        let mut next = range.start;
        std::iter::from_fn(move || {
            let (row, x) = (next / width, next % width);
            let count = (width - x).min(range.end - next);
            next += count;
            (count > 0).then_some(Run { row, x, count })
        })
    }

    /// Writes columns `columns` of the patches of `runs` to `tile`, whose rows are `tile_stride` apart.
    pub fn pack<T: Real>(
        &self,
        source: &[T],
        runs: impl Iterator<Item = Run>,
        columns: Range<usize>,
        tile: &mut [T],
        tile_stride: usize,
    ) {
        let mut rows = tile.chunks_mut(tile_stride);
        for run in runs {
            for (x, row) in (run.x..run.x + run.count).zip(rows.by_ref()) {
                self.pack_patch(source, run.row, x, columns.clone(), &mut row[..columns.len()]);
            }
        }
    }

    /// Columns `columns` of one patch.
    fn pack_patch<T: Real>(&self, source: &[T], row: usize, x: usize, columns: Range<usize>, mut to: &mut [T]) {
        let [vertical, horizontal] = self.axes;
        let (image, y) = (row / vertical.grid, row % vertical.grid);
        let tap_row = horizontal.taps * self.channels;
        let line = horizontal.size * self.channels;
        // Where the row of taps starts, relative to the line of the source, in elements.
        let start = ((x * horizontal.stride) as isize + horizontal.first) * self.channels as isize;
        let mut column = columns.start;
        while column < columns.end {
            let (tap_y, offset) = (column / tap_row, column % tap_row);
            let len = (tap_row - offset).min(columns.end - column);
            let (piece, rest) = to.split_at_mut(len);
            let source_y = (y * vertical.stride + tap_y) as isize + vertical.first;
            if (0..vertical.size as isize).contains(&source_y) {
                let line_start = (image * vertical.size + source_y as usize) * line;
                copy_clipped(&source[line_start..line_start + line], start + offset as isize, piece);
            } else {
                piece.fill(T::ZERO);
            }
            to = rest;
            column += len;
        }
    }
}

/// How many kernel taps touch the input pixels of a phase along axis `d`.
fn phase_taps(g: &ConvGeometry, d: usize, phase: usize) -> usize {
    let first = (phase + g.padding[d]) % g.stride[d];
    g.kernel[d].saturating_sub(first).div_ceil(g.stride[d])
}

/// The kernel tap that tap `t` of [`Gather::dgrad`] stands for: the gradient runs through the kernel backwards.
pub(super) fn dgrad_kernel_tap(g: &ConvGeometry, d: usize, phase: usize, t: usize) -> usize {
    (phase + g.padding[d]) % g.stride[d] + (phase_taps(g, d, phase) - 1 - t) * g.stride[d]
}

/// Copies `line[start..]` to `to`, zeros where that lies outside the line.
fn copy_clipped<T: Real>(line: &[T], start: isize, to: &mut [T]) {
    let before = start.min(0).unsigned_abs().min(to.len());
    let first = start.max(0) as usize;
    let inside = line.len().saturating_sub(first).min(to.len() - before);
    to[..before].fill(T::ZERO);
    to[before + inside..].fill(T::ZERO);
    if inside > 0 {
        to[before..before + inside].copy_from_slice(&line[first..first + inside]);
    }
}
