//! Implicit GEMM: patches are gathered into tiles that stay in the L2 cache and multiplied there. No matrix of all patches
//! is ever made. Blocks and the order of sums depend on the geometry alone, so results are bit-identical for any number of
//! threads.

use std::ops::Range;

use rayon::prelude::*;

use super::gather::{Gather, Run, dgrad_kernel_tap};
use super::geometry::ConvGeometry;
use crate::backend::cpu::panels::pack_panel;
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Block, Mat, Panels, Real, par_blocks};

/// Longest chain of sums in working precision; longer inner dimensions are cut into such chunks, whose results are added in
/// order. One chain of 4608 products would lose a digit.
const MAX_CHAIN: usize = 384;

/// Grid pixels of a task: enough to pay for streaming the weights, few enough that a tile of patches stays in the L2 cache.
const TASK_PIXELS: usize = 140;

/// As many tasks keep the threads of common machines evenly busy; layers with fewer are cut finer where that pays.
const ENOUGH_TASKS: usize = 32;

/// y = x * w.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn forward<T: Real>(g: &ConvGeometry, x: &[T], w: &[T], y: &mut [T]) {
    g.check_lengths(x.len(), w.len(), y.len());
    let gather = Gather::forward(g);
    let patch = g.patch();
    with_scratch(Panels::<T>::size(patch, g.c_out), |memory| {
        let w = Mat::row_major(w, g.c_out, patch).t();
        for_each_panel(memory, patch, g.c_out, |panel, columns| {
            pack_panel(w.sub(0, columns.start, patch, columns.len()), Panels::<T>::width(), panel);
        });
        let weights = Panels::new(memory, patch, g.c_out);
        multiply_grid(&gather, x, weights, Mat::row_major(y, g.n * g.oh() * g.ow(), g.c_out), false);
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
        if g.stride == [1, 1] {
            let gather = Gather::dgrad(g, [0, 0]);
            let weights = Panels::new(memory, gather.patch(), g.c_in);
            multiply_grid(&gather, d_y, weights, Mat::row_major(d_x, g.n * g.h * g.w, g.c_in), accumulate);
        } else {
            dgrad_strided(g, d_y, memory, d_x, accumulate);
        }
    });
}

/// Elements of workspace that [`wgrad`] needs.
pub fn wgrad_workspace(g: &ConvGeometry) -> usize {
    match WgradTasks::new(g).splits {
        1 => 0,
        splits => splits * g.w_len(),
    }
}

/// Gradient of the weights, written over `d_w` or added to it.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it or the workspace is shorter than [`wgrad_workspace`].
pub fn wgrad<T: Real>(g: &ConvGeometry, x: &[T], d_y: &[T], d_w: &mut [T], accumulate: bool, workspace: &mut [T]) {
    g.check_lengths(x.len(), d_w.len(), d_y.len());
    let tasks = WgradTasks::new(g);
    if tasks.splits == 1 {
        return wgrad_partials(g, tasks, x, d_y, d_w, accumulate);
    }
    let partials = &mut workspace[..tasks.splits * g.w_len()];
    wgrad_partials(g, tasks, x, d_y, partials, false);
    add_partials(partials, d_w, accumulate);
}

/// Sums the parts of `partials`, each as long as `to`, in their order and in float64, so that it does not matter how many there
/// are.
fn add_partials<T: Real>(partials: &[T], to: &mut [T], accumulate: bool) {
    const CHUNK: usize = 1024;
    let len = to.len();
    to.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, to)| {
        let mut sums = [0.0; CHUNK];
        if accumulate {
            sums.iter_mut().zip(&*to).for_each(|(sum, to)| *sum = to.to_f64());
        }
        for partial in partials.chunks_exact(len) {
            let partial = &partial[chunk * CHUNK..][..to.len()];
            sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial.to_f64());
        }
        to.iter_mut().zip(sums).for_each(|(to, sum)| *to = T::of(sum));
    });
}

/// The patches of all grid pixels times `weights`.
fn multiply_grid<T: Real>(gather: &Gather, source: &[T], weights: Panels<T>, to: Mat<&mut [T]>, accumulate: bool) {
    let pixels = to.rows.div_ceil(ENOUGH_TASKS).clamp(TASK_PIXELS / 2, TASK_PIXELS);
    let block = [even_part(to.rows, pixels), to.cols];
    par_blocks(to, block, |mut to, pixel, _| {
        let runs = gather.runs(pixel..pixel + to.rows());
        multiply_patches(gather, source, runs, weights, &mut to, accumulate);
    });
}

/// The patches of `runs` times `weights`, on the calling thread.
fn multiply_patches<T: Real>(
    gather: &Gather,
    source: &[T],
    runs: impl Iterator<Item = Run> + Clone,
    weights: Panels<T>,
    to: &mut Block<'_, T>,
    accumulate: bool,
) {
    let chunk = even_part(gather.patch(), MAX_CHAIN);
    if gather.is_identity() && reads_well_in_place::<T>(gather.channels) {
        let first = runs.clone().next().map_or(0, |run| run.row * gather.axes[1].grid + run.x);
        let patches = Mat::row_major(&source[first * gather.channels..], to.rows(), gather.channels);
        for columns in parts(0..gather.channels, chunk) {
            let part = patches.sub(0, columns.start, to.rows(), columns.len());
            to.multiply(part, weights, columns.clone(), accumulate || columns.start > 0);
        }
        return;
    }
    with_scratch(to.rows() * chunk, |tile| {
        for columns in parts(0..gather.patch(), chunk) {
            gather.pack_rows(source, runs.clone(), columns.clone(), tile, chunk);
            let patches = Mat::strided(&*tile, to.rows(), columns.len(), chunk);
            to.multiply(patches, weights, columns.clone(), accumulate || columns.start > 0);
        }
    });
}

/// Whether the rows of a register tile, one source pixel each, find room in the L1 cache side by side. Rows a multiple of
/// 2 KiB apart would crowd into a few of its sets: they are better copied.
fn reads_well_in_place<T>(channels: usize) -> bool {
    !(channels * size_of::<T>()).is_multiple_of(2048)
}

/// Size of the parts when `total` is cut into nearly equal ones of at most `limit`; at least 1.
fn even_part(total: usize, limit: usize) -> usize {
    total.div_ceil(total.div_ceil(limit).max(1)).max(1)
}

/// `range` in parts of `size`; an empty range is one empty part, so that products with it still write their zeros.
fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let count = range.len().div_ceil(size).max(1);
    (0..count).map(move |i| range.start + i * size..(range.start + (i + 1) * size).min(range.end))
}

/// Fills the panels of an `inner` x `cols` matrix in parallel; `f` gets the memory and the columns of a panel.
fn for_each_panel<T: Real>(memory: &mut [T], inner: usize, cols: usize, f: impl Fn(&mut [T], Range<usize>) + Sync) {
    let width = Panels::<T>::width();
    let memory = &mut memory[..Panels::<T>::size(inner, cols)];
    memory.par_chunks_mut((inner * width).max(1)).enumerate().for_each(|(i, panel)| {
        f(panel, i * width..((i + 1) * width).min(cols));
    });
}

/// All phases of the stride, in the order in which their weights are stored.
fn phases(g: &ConvGeometry) -> impl Iterator<Item = [usize; 2]> {
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

/// A task is a band of lines of `d_x`; each phase of the stride is a product of its own, then scattered into the band.
fn dgrad_strided<T: Real>(g: &ConvGeometry, d_y: &[T], weights: &[T], d_x: &mut [T], accumulate: bool) {
    let band = (TASK_PIXELS * g.stride[0] * g.stride[1]).div_ceil(g.w);
    let line = g.w * g.c_in;
    d_x.par_chunks_mut(band * line).enumerate().for_each(|(i, d_x)| {
        let lines = i * band..i * band + d_x.len() / line;
        let mut weights = weights;
        for phase in phases(g) {
            let gather = Gather::dgrad(g, phase);
            let (panels, rest) = weights.split_at(Panels::<T>::size(gather.patch(), g.c_in));
            weights = rest;
            let width = gather.axes[1].grid;
            let of_phase = lines.clone().filter(|l| l % g.h % g.stride[0] == phase[0]);
            let pixels = of_phase.clone().count() * width;
            if pixels == 0 || (panels.is_empty() && accumulate) {
                continue;
            }
            let runs = of_phase.clone().map(|l| Run {
                row: l / g.h * gather.axes[0].grid + l % g.h / g.stride[0],
                x: 0,
                count: width,
            });
            with_scratch(pixels * g.c_in, |product| {
                let mut to = Block::whole(Mat::row_major(&mut *product, pixels, g.c_in));
                let panels = Panels::new(panels, gather.patch(), g.c_in);
                multiply_patches(&gather, d_y, runs, panels, &mut to, false);
                let targets = of_phase.flat_map(|l| {
                    (0..width).map(move |x| ((l - lines.start) * g.w + x * g.stride[1] + phase[1]) * g.c_in)
                });
                for (from, start) in product.chunks_exact(g.c_in).zip(targets) {
                    let to = &mut d_x[start..start + g.c_in];
                    if accumulate {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
                    } else {
                        to.copy_from_slice(from);
                    }
                }
            });
        }
    });
}

/// Pixels that a step of the weight gradient takes, and most rows (c_out) and columns (the patch) of a task.
const WGRAD_PIXELS: usize = 256;
const WGRAD_ROWS: usize = 512;
const WGRAD_COLUMNS: usize = 288;

/// How the weight gradient is cut into tasks: blocks of the weight matrix, and sums over parts of the pixels where these are
/// few.
#[derive(Debug, Clone, Copy)]
struct WgradTasks {
    rows: usize,
    columns: usize,
    splits: usize,
}

impl WgradTasks {
    fn new(g: &ConvGeometry) -> WgradTasks {
        const ENOUGH_TASKS: usize = 16; // fewer: each split costs a whole weight gradient of memory
        const MAX_ELEMENTS: usize = 1 << 22;
        let columns = even_part(g.patch(), WGRAD_COLUMNS).next_multiple_of(32); // whole panels of any width
        let blocks = |rows| g.c_out.div_ceil(rows) * g.patch().div_ceil(columns);
        let mut rows = even_part(g.c_out, WGRAD_ROWS);
        while blocks(rows) < ENOUGH_TASKS && rows >= 256 {
            rows = rows.div_ceil(2);
        }
        let chunks = (g.n * g.oh() * g.ow()).div_ceil(WGRAD_PIXELS);
        let splits = ENOUGH_TASKS.div_ceil(blocks(rows)).min(chunks).min(MAX_ELEMENTS / g.w_len()).max(1);
        WgradTasks { rows, columns, splits }
    }
}

/// `tasks.splits` weight gradients, each over its part of the pixels, one after the other in `to`.
fn wgrad_partials<T: Real>(g: &ConvGeometry, tasks: WgradTasks, x: &[T], d_y: &[T], to: &mut [T], accumulate: bool) {
    let gather = Gather::forward(g);
    let pixels = g.n * g.oh() * g.ow();
    let part = pixels.div_ceil(tasks.splits);
    to.par_chunks_mut(g.w_len()).enumerate().for_each(|(split, to)| {
        let pixels = (part * split).min(pixels)..(part * (split + 1)).min(pixels);
        let to = Mat::row_major(to, g.c_out, g.patch());
        par_blocks(to, [tasks.rows, tasks.columns], |mut to, row, column| {
            let columns = column..column + to.cols();
            with_scratch(Panels::<T>::size(WGRAD_PIXELS, columns.len()), |tile| {
                for part in parts(pixels.clone(), WGRAD_PIXELS) {
                    gather.pack_panels(x, gather.runs(part.clone()), columns.clone(), tile, Panels::<T>::width());
                    let patches = Panels::new(tile, part.len(), columns.len());
                    let d_y = Mat::row_major(&d_y[part.start * g.c_out..part.end * g.c_out], part.len(), g.c_out);
                    let d_y = d_y.sub(0, row, part.len(), to.rows()).t();
                    to.multiply(d_y, patches, 0..part.len(), accumulate || part.start > pixels.start);
                }
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::rng::Stream;

    fn geometry(n: usize, hw: [usize; 2], c: [usize; 2], k: [usize; 2], s: [usize; 2], p: [usize; 2]) -> ConvGeometry {
        ConvGeometry { n, h: hw[0], w: hw[1], c_in: c[0], c_out: c[1], kernel: k, stride: s, padding: p }
    }

    fn awkward() -> Vec<ConvGeometry> {
        vec![
            geometry(2, [9, 7], [3, 17], [3, 3], [1, 1], [1, 1]),
            geometry(3, [8, 11], [64, 33], [3, 3], [1, 1], [1, 1]),
            geometry(2, [9, 8], [5, 7], [3, 3], [2, 2], [1, 1]),
            geometry(2, [12, 12], [7, 64], [3, 3], [2, 2], [1, 1]),
            geometry(1, [23, 30], [3, 9], [7, 7], [2, 2], [3, 3]),
            geometry(1, [6, 5], [64, 31], [1, 1], [1, 1], [0, 0]),
            geometry(4, [7, 7], [31, 65], [1, 1], [2, 2], [0, 0]),
            geometry(2, [11, 13], [5, 3], [5, 3], [3, 2], [1, 2]),
            geometry(2, [5, 4], [1, 1], [2, 4], [1, 3], [3, 5]),
            geometry(1, [3, 3], [7, 5], [3, 3], [4, 4], [2, 2]),
            geometry(1, [1, 1], [3, 2], [1, 1], [1, 1], [0, 0]),
            geometry(3, [5, 6], [130, 47], [3, 3], [1, 1], [1, 1]),
            geometry(1, [4, 4], [512, 40], [3, 3], [1, 1], [1, 1]),
            geometry(5, [16, 14], [9, 96], [3, 3], [1, 2], [0, 1]),
        ]
    }

    fn noise<T: Real>(len: usize, index: u64) -> Vec<T> {
        let mut stream = Stream::new(42, 0, index);
        (0..len).map(|_| T::of(stream.uniform(-1.0, 1.0))).collect()
    }

    /// Input, weights and output gradient.
    fn tensors<T: Real>(g: &ConvGeometry) -> [Vec<T>; 3] {
        [noise(g.x_len(), 1), noise(g.w_len(), 2), noise(g.y_len(), 3)]
    }

    fn widened<T: Real>(values: &[T]) -> Vec<f64> {
        values.iter().map(|v| v.to_f64()).collect()
    }

    fn magnitudes<T: Real>(values: &[T]) -> Vec<f64> {
        values.iter().map(|v| v.to_f64().abs()).collect()
    }

    /// y, d_x and d_w of one tier. Outputs hold `before` first, or NaN where they are to be overwritten.
    struct Passes<T> {
        y: Vec<T>,
        d_x: Vec<T>,
        d_w: Vec<T>,
    }

    fn before<T: Real>(len: usize, accumulate: bool) -> Vec<T> {
        if accumulate { noise(len, 4) } else { vec![T::of(f64::NAN); len] }
    }

    fn direct<T: Real>(g: &ConvGeometry, [x, w, d_y]: &[Vec<T>; 3], accumulate: bool) -> Passes<T> {
        let mut y = before(g.y_len(), false);
        let (mut d_x, mut d_w) = (before(g.x_len(), accumulate), before(g.w_len(), accumulate));
        let mut workspace = before(wgrad_workspace(g), false);
        forward(g, x, w, &mut y);
        dgrad(g, d_y, w, &mut d_x, accumulate);
        wgrad(g, x, d_y, &mut d_w, accumulate, &mut workspace);
        Passes { y, d_x, d_w }
    }

    fn oracle(g: &ConvGeometry, [x, w, d_y]: &[Vec<f64>; 3], [mut d_x, mut d_w]: [Vec<f64>; 2]) -> Passes<f64> {
        let mut y = vec![0.0; g.y_len()];
        reference::forward(g, x, w, &mut y);
        reference::dgrad(g, d_y, w, &mut d_x, true);
        reference::wgrad(g, x, d_y, &mut d_w, true, &mut []);
        Passes { y, d_x, d_w }
    }

    /// Every element within `tolerance` of the oracle, relative to the sum of the magnitudes of its terms.
    fn check<T: Real>(g: &ConvGeometry, tolerance: f64, accumulate: bool) {
        let inputs = tensors::<T>(g);
        let got = direct(g, &inputs, accumulate);
        let old = |len| if accumulate { widened(&before::<T>(len, true)) } else { vec![0.0; len] };
        let want = oracle(g, &inputs.each_ref().map(|v| widened(v)), [old(g.x_len()), old(g.w_len())]);
        let scale = oracle(
            g,
            &inputs.each_ref().map(|v| magnitudes(v)),
            [old(g.x_len()), old(g.w_len())].map(|v| magnitudes(&v)),
        );
        let results = [
            ("y", got.y, want.y, scale.y),
            ("d_x", got.d_x, want.d_x, scale.d_x),
            ("d_w", got.d_w, want.d_w, scale.d_w),
        ];
        for (name, got, want, scale) in results {
            for (i, got) in got.iter().enumerate() {
                let error = (got.to_f64() - want[i]).abs();
                assert!(error <= tolerance * scale[i], "{g:?} {name}[{i}]: {got} against {}", want[i]);
            }
        }
    }

    #[test]
    fn agrees_with_the_reference_in_f64() {
        for g in awkward() {
            check::<f64>(&g, 1e-14, false);
            check::<f64>(&g, 1e-14, true);
        }
    }

    #[test]
    fn agrees_with_the_reference_in_f32() {
        for g in awkward() {
            check::<f32>(&g, 1e-6, false);
            check::<f32>(&g, 1e-6, true);
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        for g in awkward() {
            let inputs = tensors::<f32>(&g);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let passes = pool.install(|| direct(&g, &inputs, false));
                [passes.y, passes.d_x, passes.d_w].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            };
            let one = run(1);
            for threads in 2..=4 {
                assert_eq!(one, run(threads), "{g:?}, {threads} threads");
            }
        }
    }
}
