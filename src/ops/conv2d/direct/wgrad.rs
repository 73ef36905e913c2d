//! The weight gradient: a product of the output gradient, transposed, and the patches.

use std::ops::Range;

use rayon::prelude::*;

use super::gather::{Gather, Run};
use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::blocks::{even_part, parts};
use crate::backend::cpu::long::add_partials;
use crate::backend::cpu::panels::WIDEST_PANEL;
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Mat, Panels, Real, par_blocks};

/// Elements of workspace that [`wgrad`] needs.
pub fn wgrad_workspace(g: &ConvGeometry) -> usize {
    match Tasks::new(g).splits {
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
    let tasks = Tasks::new(g);
    if tasks.splits == 1 {
        return wgrad_partials(g, tasks, x, d_y, d_w, accumulate);
    }
    let partials = &mut workspace[..tasks.splits * g.w_len()];
    wgrad_partials(g, tasks, x, d_y, partials, false);
    add_partials(partials, d_w, accumulate);
}

/// Pixels that a step of the weight gradient takes, and most rows (c_out) and columns (the patch) of a task.
const PIXELS: usize = 192;
const ROWS: usize = 256;
const COLUMNS: usize = 512;

/// How the weight gradient is cut into tasks: blocks of the weight matrix, and sums over parts of the pixels where these are
/// few.
#[derive(Debug, Clone, Copy)]
struct Tasks {
    rows: usize,
    columns: usize,
    splits: usize,
}

impl Tasks {
    fn new(g: &ConvGeometry) -> Tasks {
        const ENOUGH_TASKS: usize = 16; // fewer: each split costs a whole weight gradient of memory
        const MAX_ELEMENTS: usize = 1 << 22;
        let columns = task_columns(g);
        let mut rows = even_part(g.c_out, ROWS);
        let blocks = |rows| g.c_out.div_ceil(rows) * g.patch().div_ceil(columns);
        while blocks(rows) < ENOUGH_TASKS && rows >= 256 {
            rows = rows.div_ceil(2);
        }
        let chunks = (g.n * g.oh() * g.ow()).div_ceil(PIXELS);
        let splits = ENOUGH_TASKS.div_ceil(blocks(rows)).min(chunks).min(MAX_ELEMENTS / g.w_len()).max(1);
        Tasks { rows, columns, splits }
    }
}

/// Columns of a task, whole panels of any width. Where they can be those of one tap or one row of taps, they are: then the
/// pixels at which these taps read padding are left out.
fn task_columns(g: &ConvGeometry) -> usize {
    let tap_row = g.kernel[1] * g.c_in;
    let whole_panels = |columns: usize| columns.is_multiple_of(WIDEST_PANEL);
    [tap_row, g.c_in, g.c_in / 2, g.c_in / 4]
        .into_iter()
        .find(|&columns| whole_panels(columns) && (128..=COLUMNS).contains(&columns))
        .unwrap_or(even_part(g.patch(), COLUMNS).next_multiple_of(WIDEST_PANEL))
}

/// Elements of scratch memory that the weight gradient needs in each thread.
pub(super) fn scratch(g: &ConvGeometry) -> usize {
    let tasks = Tasks::new(g);
    PIXELS * (tasks.rows + tasks.columns.next_multiple_of(WIDEST_PANEL))
}

/// `tasks.splits` weight gradients, each over its part of the pixels, one after the other in `to`.
fn wgrad_partials<T: Real>(g: &ConvGeometry, tasks: Tasks, x: &[T], d_y: &[T], to: &mut [T], accumulate: bool) {
    let gather = Gather::forward(g);
    let width = Panels::<T>::width();
    to.par_chunks_mut(g.w_len()).enumerate().for_each(|(split, to)| {
        let to = Mat::row_major(to, g.c_out, g.patch());
        par_blocks(to, [tasks.rows, tasks.columns], |mut to, row, column| {
            let columns = column..column + to.cols();
            let positions = gather.positions(&columns);
            let pixels = g.n * positions[0].len() * positions[1].len();
            let share = pixels.div_ceil(tasks.splits);
            let pixels = (share * split).min(pixels)..(share * (split + 1)).min(pixels);
            with_scratch(PIXELS * (to.rows() + columns.len().next_multiple_of(width)), |tiles| {
                let (gradient, patches) = tiles.split_at_mut(PIXELS * to.rows());
                for part in parts(pixels.clone(), PIXELS) {
                    let runs = gather.runs(&positions, part.clone());
                    gather.pack_panels(x, runs.clone(), columns.clone(), patches, width);
                    pack_gradient(g, d_y, runs, row..row + to.rows(), gradient);
                    let patches = Panels::new(patches, part.len(), columns.len());
                    let gradient = Mat::row_major(&*gradient, part.len(), to.rows()).t();
                    to.multiply(gradient, patches, 0..part.len(), accumulate || part.start > pixels.start);
                }
            });
        });
    });
}

/// Copies channels `channels` of the output gradient at the pixels of `runs`, side by side.
fn pack_gradient<T: Real>(
    g: &ConvGeometry,
    d_y: &[T],
    runs: impl Iterator<Item = Run>,
    channels: Range<usize>,
    to: &mut [T],
) {
    let pixels = runs.flat_map(|run| (0..run.count).map(move |i| run.row * g.ow() + run.x + i));
    for (to, pixel) in to.chunks_exact_mut(channels.len()).zip(pixels) {
        to.copy_from_slice(&d_y[pixel * g.c_out + channels.start..][..channels.len()]);
    }
}
