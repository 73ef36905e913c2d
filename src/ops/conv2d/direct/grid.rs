//! The forward pass and the input gradient: for each pixel of a grid, the product of its patch and the weights.

use std::ops::Range;

use super::gather::{Gather, Run, dgrad_kernel_tap};
use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::blocks::{MAX_CHAIN, even_part, parts};
use crate::backend::cpu::panels::{WIDEST_PANEL, for_each_panel, pack_panel, reads_well_in_place};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Block, Mat, Panels, Real, par_blocks};

/// Grid pixels of a task: enough to pay for streaming the weights, few enough that a tile of patches stays in the L2 cache.
/// Twice as many where the border of the image is multiplied apart.
const TASK_PIXELS: usize = 140;

/// As many tasks keep the threads of common machines evenly busy; layers with fewer are cut finer where that pays.
const ENOUGH_TASKS: usize = 16;

/// One gather and its weights: the grid pixel (y, x) makes the result pixel `origin` + (y, x) * `step`.
#[derive(Clone, Copy)]
struct Product<'a, T> {
    gather: Gather,
    weights: Panels<'a, T>,
    origin: [usize; 2],
    step: [usize; 2],
}

/// y = x * w.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn forward<T: Real>(g: &ConvGeometry, x: &[T], w: &[T], y: &mut [T]) {
    g.check_lengths(x.len(), w.len(), y.len());
    let patch = g.patch();
    with_scratch(Panels::<T>::size(patch, g.c_out), |memory| {
        let w = Mat::row_major(w, g.c_out, patch).t();
        let weights = Panels::pack(w, memory);
        let product = Product { gather: Gather::forward(g), weights, origin: [0, 0], step: [1, 1] };
        let y = Mat::row_major(y, g.n * g.oh() * g.ow(), g.c_out);
        multiply(std::iter::once(product), x, [g.oh(), g.ow()], y, false);
    });
}

/// Gradient of the input, written over `d_x` or added to it.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn dgrad<T: Real>(g: &ConvGeometry, d_y: &[T], w: &[T], d_x: &mut [T], accumulate: bool) {
    g.check_lengths(d_x.len(), w.len(), d_y.len());
    // Each tap of the kernel belongs to exactly one phase: together the phases' weights are as many as the weights.
    with_scratch(Panels::<T>::size(g.kernel[0] * g.kernel[1] * g.c_out, g.c_in), |memory| {
        pack_dgrad_weights(g, w, memory);
        let memory = &*memory;
        let products = phases(g).scan(0, |start, phase| {
            let gather = Gather::dgrad(g, phase);
            let weights = Panels::new(&memory[*start..], gather.patch(), g.c_in);
            *start += Panels::<T>::size(gather.patch(), g.c_in);
            Some(Product { gather, weights, origin: phase, step: g.stride })
        });
        let d_x = Mat::row_major(d_x, g.n * g.h * g.w, g.c_in);
        multiply(products, d_y, [g.h, g.w], d_x, accumulate);
    });
}

/// All phases of the stride, in the order in which their weights are stored.
fn phases(g: &ConvGeometry) -> impl Iterator<Item = [usize; 2]> + Clone + use<> {
    let [down, across] = g.stride;
    (0..down * across).map(move |i| [i / across, i % across])
}

/// Panels for the input gradient: for each phase those of a matrix `[taps y][taps x][c_out]` x `[c_in]`.
fn pack_dgrad_weights<T: Real>(g: &ConvGeometry, w: &[T], mut memory: &mut [T]) {
    let width = Panels::<T>::width();
    for phase in phases(g) {
        let gather = Gather::dgrad(g, phase);
        let (panels, rest) = memory.split_at_mut(Panels::<T>::size(gather.patch(), g.c_in));
        for_each_panel(panels, gather.patch(), g.c_in, |panel, columns| {
            for (tap, part) in panel.chunks_exact_mut(g.c_out * width).enumerate() {
                let ky = dgrad_kernel_tap(g, 0, phase[0], tap / gather.axes[1].taps);
                let kx = dgrad_kernel_tap(g, 1, phase[1], tap % gather.axes[1].taps);
                let tap = &w[(ky * g.kernel[1] + kx) * g.c_in..];
                let tap = Mat::strided(tap, g.c_out, g.c_in, g.patch());
                pack_panel(tap.sub(0, columns.start, g.c_out, columns.len()), width, part);
            }
        });
        memory = rest;
    }
}

/// All of `products`, which together make every pixel of a result of `size` = [height, width], in bands of its lines.
fn multiply<'a, T: Real>(
    products: impl Iterator<Item = Product<'a, T>> + Clone + Sync,
    source: &[T],
    size: [usize; 2],
    to: Mat<&mut [T]>,
    accumulate: bool,
) {
    let block = task_block(products.clone().map(|p| p.gather), to.rows / size[1], size[1], to.cols);
    par_blocks(to, [block[0] * size[1], block[1]], |mut to, row, column| {
        let lines = row / size[1]..(row + to.rows()) / size[1];
        for product in products.clone() {
            let weights = product.weights.columns(column..column + to.cols());
            Product { weights, ..product }.multiply_band(source, size, lines.clone(), &mut to, accumulate);
        }
    });
}

/// Lines and columns of a task.
fn task_block(gathers: impl Iterator<Item = Gather>, lines: usize, width: usize, columns: usize) -> [usize; 2] {
    let whole = gathers.map(|gather| gather.segments().count()).sum::<usize>() == 1;
    let most = if whole { TASK_PIXELS } else { 2 * TASK_PIXELS };
    let pixels = (lines * width).div_ceil(2 * ENOUGH_TASKS).clamp(most / 2, most);
    let band = even_part(lines, (pixels / width).max(1));
    let mut block = [band, columns];
    while lines.div_ceil(band) * columns.div_ceil(block[1]) < ENOUGH_TASKS && block[1] >= 256 {
        block[1] = block[1].div_ceil(2).next_multiple_of(WIDEST_PANEL);
    }
    block
}

/// Elements of scratch memory that forward and input gradient need: the packed weights, once per call, and in each thread a
/// tile of patches and a product.
pub(super) fn scratch(g: &ConvGeometry) -> [usize; 2] {
    let tile =
        |[lines, columns]: [usize; 2], width: usize, patch: usize| lines * width * (columns + MAX_CHAIN.min(patch));
    let forward = task_block(std::iter::once(Gather::forward(g)), g.n * g.oh(), g.ow(), g.c_out);
    let dgrad = task_block(phases(g).map(|phase| Gather::dgrad(g, phase)), g.n * g.h, g.w, g.c_in);
    let taps = g.kernel[0] * g.kernel[1];
    let padded = |channels: usize| channels.next_multiple_of(WIDEST_PANEL);
    [
        taps * (padded(g.c_out) * g.c_in).max(g.c_out * padded(g.c_in)),
        tile(forward, g.ow(), g.patch()).max(tile(dgrad, g.w, taps * g.c_out)),
    ]
}

impl<T: Real> Product<'_, T> {
    /// Makes its pixels of the result's `lines`, counted through all images; `to` holds these lines.
    fn multiply_band(
        &self,
        source: &[T],
        size: [usize; 2],
        lines: Range<usize>,
        to: &mut Block<'_, T>,
        accumulate: bool,
    ) {
        let [height, width] = size;
        let grid = self.gather.axes.map(|axis| axis.grid);
        for [down, across] in self.gather.segments() {
            let of_segment = lines.clone().filter_map(|line| {
                let (image, y) = (line / height, line % height);
                let on_grid = y % self.step[0] == self.origin[0] && down.grid.contains(&(y / self.step[0]));
                on_grid.then_some((line - lines.start, image * grid[0] + y / self.step[0]))
            });
            let pixels = of_segment.clone().count() * across.grid.len();
            let runs = of_segment.clone().map(|(_, row)| Run { row, x: across.grid.start, count: across.grid.len() });
            if pixels == 0 || (accumulate && (down.taps.is_empty() || across.taps.is_empty())) {
                continue;
            }
            if pixels == to.rows() {
                self.multiply_patches(source, runs, &down.taps, &across.taps, to, accumulate);
                continue;
            }
            with_scratch(pixels * to.cols(), |product| {
                let mut block = Block::whole(Mat::row_major(&mut *product, pixels, to.cols()));
                self.multiply_patches(source, runs, &down.taps, &across.taps, &mut block, false);
                let targets = of_segment.flat_map(|(line, _)| {
                    across.grid.clone().map(move |x| line * width + x * self.step[1] + self.origin[1])
                });
                for (from, target) in product.chunks_exact(to.cols()).zip(targets) {
                    let to = to.row_mut(target);
                    if accumulate {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
                    } else {
                        to.copy_from_slice(from);
                    }
                }
            });
        }
    }

    /// The taps `down` x `across` of the patches of `runs`, times their weights.
    fn multiply_patches(
        &self,
        source: &[T],
        runs: impl Iterator<Item = Run> + Clone,
        down: &Range<usize>,
        across: &Range<usize>,
        to: &mut Block<'_, T>,
        accumulate: bool,
    ) {
        let gather = &self.gather;
        let mut accumulate = accumulate;
        if gather.is_identity() && reads_well_in_place::<T>(gather.channels) {
            let first = runs.clone().next().map_or(0, |run| run.row * gather.axes[1].grid + run.x);
            let patches = Mat::row_major(&source[first * gather.channels..], to.rows(), gather.channels);
            for columns in chunks(0..gather.channels) {
                let part = patches.sub(0, columns.start, to.rows(), columns.len());
                to.multiply(part, self.weights, columns, accumulate);
                accumulate = true;
            }
            return;
        }
        with_scratch(to.rows() * MAX_CHAIN.min(gather.patch()), |tile| {
            for columns in gather.columns(down, across).flat_map(chunks) {
                gather.pack_rows(source, runs.clone(), columns.clone(), tile, columns.len());
                let patches = Mat::row_major(&*tile, to.rows(), columns.len());
                to.multiply(patches, self.weights, columns, accumulate);
                accumulate = true;
            }
        });
        if !accumulate {
            // No taps, no products: zeros.
            (0..to.rows()).for_each(|i| to.row_mut(i).fill(T::ZERO));
        }
    }
}

/// `columns` in nearly equal parts of at most [`MAX_CHAIN`].
fn chunks(columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let size = even_part(columns.len(), MAX_CHAIN);
    parts(columns, size)
}
