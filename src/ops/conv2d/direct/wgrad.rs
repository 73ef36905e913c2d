//! The weight gradient: a product of the output gradient, transposed, and the patches.

use rayon::prelude::*;

use super::super::geometry::ConvGeometry;
use super::gather::Gather;
use super::{even_part, parts};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Mat, Panels, Real, par_blocks};

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
