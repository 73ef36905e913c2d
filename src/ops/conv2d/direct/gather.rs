//! Patches of an image as rows of a matrix (im2col), a tile at a time.
//!
//! Both the forward pass and the input gradient are gathers: each pixel of a *grid* (the output, or one parity phase of the
//! input) reads a rectangle of *source* pixels (the input, or the output gradient), zero outside the image. A patch is
//! ordered `[taps y][taps x][channels]`, so one row of taps is one contiguous piece of the source.

use std::ops::Range;

use crate::backend::conv::ConvGeometry;
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

/// Adjacent grid positions of one axis that read the same taps, the others lying beside the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub grid: Range<usize>,
    pub taps: Range<usize>,
}

/// Longest axis that is cut into segments. On a longer one the border is too thin for its zeros to matter.
const SEGMENTED: usize = 16;

impl Axis {
    /// The grid in segments. A long axis is one segment with all taps: its border reads zeros.
    pub fn segments(self) -> impl Iterator<Item = Segment> + Clone {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = next;
            if start == self.grid {
                return None;
            }
            if self.grid > SEGMENTED {
                next = self.grid;
                return Some(Segment { grid: 0..self.grid, taps: 0..self.taps });
            }
            let taps = self.taps_inside(start);
            next = (start..self.grid).find(|&i| self.taps_inside(i) != taps).unwrap_or(self.grid);
            Some(Segment { grid: start..next, taps })
        })
    }

    /// The grid positions at which any of `taps` lies inside the source.
    fn positions(self, taps: Range<usize>) -> Range<usize> {
        let reads = |i: usize, t: usize| (i * self.stride + t) as isize + self.first;
        let start = (0..self.grid).find(|&i| reads(i, taps.end - 1) >= 0).unwrap_or(self.grid);
        let end = (start..self.grid).find(|&i| reads(i, taps.start) >= self.size as isize).unwrap_or(self.grid);
        start..end
    }

    /// The taps of grid position `i` that lie inside the source.
    fn taps_inside(self, i: usize) -> Range<usize> {
        let first = (i * self.stride) as isize + self.first;
        let clamp = |t: isize| t.clamp(0, self.taps as isize) as usize;
        let inside = clamp(-first)..clamp(self.size as isize - first);
        if inside.is_empty() { 0..0 } else { inside }
    }
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

    /// The parts of the grid that read the same taps, vertically and horizontally.
    pub fn segments(self) -> impl Iterator<Item = [Segment; 2]> {
        let [vertical, horizontal] = self.axes;
        vertical.segments().flat_map(move |down| horizontal.segments().map(move |across| [down.clone(), across]))
    }

    /// The grid positions, vertical and horizontal, at which any of columns `columns` of the patch lies inside the source.
    pub fn positions(&self, columns: &Range<usize>) -> [Range<usize>; 2] {
        let [vertical, horizontal] = self.axes;
        let taps = columns.start / self.channels..columns.end.div_ceil(self.channels);
        let down = taps.start / horizontal.taps..taps.end.div_ceil(horizontal.taps);
        let across = if down.len() == 1 {
            taps.start - down.start * horizontal.taps..taps.end - down.start * horizontal.taps
        } else {
            0..horizontal.taps
        };
        [vertical.positions(down), horizontal.positions(across)]
    }

    /// The pixels number `range` of all images' grid pixels at `positions`, as runs.
    pub fn runs(
        &self,
        positions: &[Range<usize>; 2],
        range: Range<usize>,
    ) -> impl Iterator<Item = Run> + Clone + use<> {
        let [down, across] = positions.clone();
        let grid = self.axes[0].grid;
        let mut next = range.start;
        std::iter::from_fn(move || {
            if next >= range.end {
                return None;
            }
            let (line, x) = (next / across.len(), next % across.len());
            let count = (across.len() - x).min(range.end - next);
            next += count;
            Some(Run { row: line / down.len() * grid + down.start + line % down.len(), x: across.start + x, count })
        })
    }

    /// The columns of the patches that belong to taps `down` x `across`, in contiguous ranges.
    pub fn columns(&self, down: &Range<usize>, across: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (channels, tap_row) = (self.channels, self.axes[1].taps * self.channels);
        let whole = across.len() == self.axes[1].taps;
        let (down, across) = (down.clone(), across.clone());
        let count = if across.is_empty() || whole { down.len().min(1) } else { down.len() };
        (0..count).map(move |i| {
            if whole {
                down.start * tap_row..down.end * tap_row
            } else {
                let row = (down.start + i) * tap_row;
                row + across.start * channels..row + across.end * channels
            }
        })
    }

    /// Whether each patch is just the pixel at the same place.
    pub fn is_identity(&self) -> bool {
        self.axes.iter().all(|axis| axis.taps == 1 && axis.stride == 1 && axis.first == 0)
    }

    /// Writes columns `columns` of the patches of `runs` to the rows of `tile`, which are `stride` apart.
    pub fn pack_rows<T: Real>(
        &self,
        source: &[T],
        runs: impl Iterator<Item = Run>,
        columns: Range<usize>,
        tile: &mut [T],
        stride: usize,
    ) {
        let mut first = 0;
        for run in runs {
            self.for_each_piece(source, run, columns.clone(), |piece| {
                self.copy_piece(piece, run.count, &mut tile[first * stride..], stride);
            });
            first += run.count;
        }
    }

    /// As [`Gather::pack_rows`], but cut into panels of `width` columns, one panel of all the patches after the other; the
    /// last one is filled up with zeros.
    pub fn pack_panels<T: Real>(
        &self,
        source: &[T],
        runs: impl Iterator<Item = Run> + Clone,
        columns: Range<usize>,
        tile: &mut [T],
        width: usize,
    ) {
        let pixels: usize = runs.clone().map(|run| run.count).sum();
        let mut first = 0;
        for run in runs {
            self.for_each_piece(source, run, columns.clone(), |mut piece| {
                while piece.len > 0 {
                    let (panel, offset) = (piece.offset / width, piece.offset % width);
                    let len = piece.len.min(width - offset);
                    let to = &mut tile[(panel * pixels + first) * width..];
                    self.copy_piece(Piece { offset, len, ..piece }, run.count, to, width);
                    piece.offset += len;
                    piece.start += len as isize;
                    piece.len -= len;
                }
            });
            first += run.count;
        }
        if !columns.len().is_multiple_of(width) {
            let last = columns.len() / width * pixels * width;
            for row in tile[last..].chunks_exact_mut(width).take(pixels) {
                row[columns.len() % width..].fill(T::ZERO);
            }
        }
    }

    /// Calls `f` for each row of taps that columns `columns` of the patches of `run` touch.
    fn for_each_piece<T>(&self, source: &[T], run: Run, columns: Range<usize>, mut f: impl FnMut(Piece<'_, T>)) {
        let [vertical, horizontal] = self.axes;
        let (image, y) = (run.row / vertical.grid, run.row % vertical.grid);
        let tap_row = horizontal.taps * self.channels;
        let line_len = horizontal.size * self.channels;
        let start = ((run.x * horizontal.stride) as isize + horizontal.first) * self.channels as isize;
        let mut column = columns.start;
        while column < columns.end {
            let (tap_y, offset) = (column / tap_row, column % tap_row);
            let len = (tap_row - offset).min(columns.end - column);
            let source_y = (y * vertical.stride + tap_y) as isize + vertical.first;
            let line = if (0..vertical.size as isize).contains(&source_y) {
                &source[(image * vertical.size + source_y as usize) * line_len..][..line_len]
            } else {
                &[]
            };
            f(Piece { offset: column - columns.start, line, start: start + offset as isize, len });
            column += len;
        }
    }

    /// Copies a piece of `count` adjacent patches to rows `stride` apart.
    fn copy_piece<T: Real>(&self, piece: Piece<'_, T>, count: usize, to: &mut [T], stride: usize) {
        let step = (self.axes[1].stride * self.channels) as isize;
        for (i, row) in to.chunks_mut(stride).take(count).enumerate() {
            copy_clipped(piece.line, piece.start + i as isize * step, &mut row[piece.offset..][..piece.len]);
        }
    }
}

/// Contiguous columns of the patches of a run.
struct Piece<'a, T> {
    /// The first column.
    offset: usize,
    /// The line of the source; empty above and below the image.
    line: &'a [T],
    /// Where on the line the first patch starts; may lie beside it.
    start: isize,
    /// How many columns.
    len: usize,
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
#[inline]
fn copy_clipped<T: Real>(line: &[T], start: isize, to: &mut [T]) {
    if start >= 0 && start as usize + to.len() <= line.len() {
        return copy(&line[start as usize..][..to.len()], to);
    }
    let before = start.min(0).unsigned_abs().min(to.len());
    let first = start.max(0) as usize;
    let inside = line.len().saturating_sub(first).min(to.len() - before);
    to[..before].fill(T::ZERO);
    to[before + inside..].fill(T::ZERO);
    if inside > 0 {
        copy(&line[first..first + inside], &mut to[before..before + inside]);
    }
}

/// A copy that does without a call for the commonest short length, a panel's width.
#[inline]
fn copy<T: Real>(from: &[T], to: &mut [T]) {
    match (<&[T; 32]>::try_from(from), <&mut [T; 32]>::try_from(&mut *to)) {
        (Ok(from), Ok(to)) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}
