//! Products that sum over many rows, `c = a^T b`: Gram matrices and the gradients of weights.

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::{Block, even_part, par_blocks, parts};
use super::gemm::{Mat, Real};
use super::panels::{Panels, WIDEST_PANEL, pack_panel, pack_panels};
use super::rows::Epilogue;
use super::scratch::with_scratch;

/// Rows of a and b that a step takes: the longest chain of sums.
const STEP: usize = 192;
/// Steps whose results are added in working precision; the sums of as many are added in float64.
const STEPS: usize = 64;
/// Most rows and columns of c in a task.
const TASK: [usize; 2] = [256, 512];

/// How a product is cut into tasks: blocks of c, and sums over parts of the rows.
#[derive(Debug, Clone, Copy)]
struct Tasks {
    block: [usize; 2],
    splits: usize,
    /// Rows of a and b in a part.
    share: usize,
}

impl Tasks {
    /// For `sizes` = [columns of a, columns of b, rows of both].
    fn new([m, n, k]: [usize; 3]) -> Tasks {
        const ENOUGH_TASKS: usize = 16;
        const MAX_ELEMENTS: usize = 1 << 22; // each part costs a whole c of memory
        let block = [even_part(m, TASK[0]), even_part(n, TASK[1]).next_multiple_of(WIDEST_PANEL)];
        let blocks = m.div_ceil(block[0]) * n.div_ceil(block[1]);
        let steps = k.div_ceil(STEP);
        let wanted = ENOUGH_TASKS.div_ceil(blocks.max(1)).max(steps.div_ceil(STEPS));
        let splits = wanted.min(steps).min(MAX_ELEMENTS / (m * n).max(1)).max(1);
        Tasks { block, splits, share: steps.div_ceil(splits) * STEP }
    }
}

/// Elements of workspace that [`multiply_long`] needs for `[m, n, k]` = [columns of a, columns of b, rows of both].
pub fn long_workspace([m, n, k]: [usize; 3]) -> usize {
    match Tasks::new([m, n, k]).splits {
        1 => 0,
        splits => splits * m * n,
    }
}

/// The product of the transpose of `a` (k x m) and `b` (k x n), and its epilogue; c is row-major. Of the product of a matrix
/// with itself only what lies above the diagonal is computed, which gives the same bits. Tasks follow from the sizes alone.
///
/// # Panics
/// If the dimensions do not fit together, a slice is shorter than its matrix, or the workspace than [`long_workspace`].
pub fn multiply_long<T: Real>(
    c: &mut [T],
    a: Mat<&[T]>,
    b: Mat<&[T]>,
    epilogue: &Epilogue<'_, T>,
    workspace: &mut [T],
) {
    let (m, n) = (a.cols, b.cols);
    assert!(a.rows == b.rows && c.len() == m * n, "multiply_long: dimensions do not fit");
    let tasks = Tasks::new([m, n, a.rows]);
    let add = epilogue.accumulate;
    let product = Product { a, b, tasks, symmetric: !add && is_gram(a, b) };
    if tasks.splits == 1 {
        product.partials(c, add);
    } else {
        let partials = &mut workspace[..tasks.splits * c.len()];
        product.partials(partials, false);
        add_partials(partials, c, add);
    }
    if product.symmetric {
        mirror(c, n);
    }
    epilogue.complete(&mut Block::whole(Mat::row_major(c, m, n)), 0, 0, n);
}

/// Whether both are the same matrix.
fn is_gram<T>(a: Mat<&[T]>, b: Mat<&[T]>) -> bool {
    let strides = |of: Mat<&[T]>| (of.row_stride, of.col_stride);
    std::ptr::eq(a.data, b.data) && a.cols == b.cols && strides(a) == strides(b)
}

/// Copies what lies above the diagonal to its place below.
fn mirror<T: Copy>(c: &mut [T], n: usize) {
    for row in 1..n {
        for column in 0..row {
            c[row * n + column] = c[column * n + row];
        }
    }
}

/// A product and its tasks.
#[derive(Clone, Copy)]
struct Product<'a, T> {
    a: Mat<&'a [T]>,
    b: Mat<&'a [T]>,
    tasks: Tasks,
    /// Whether panels that lie before the diagonal as a whole may be left out.
    symmetric: bool,
}

impl<T: Real> Product<'_, T> {
    /// The products over each part of the rows, one after the other in `to`.
    fn partials(&self, to: &mut [T], add: bool) {
        let (m, n, k) = (self.a.cols, self.b.cols, self.a.rows);
        to.par_chunks_mut(m * n).enumerate().for_each(|(split, to)| {
            let from = (split * self.tasks.share).min(k);
            let rows = from..(from + self.tasks.share).min(k);
            par_blocks(Mat::row_major(to, m, n), self.tasks.block, |mut to, row, column| {
                for step in parts(rows.clone(), STEP) {
                    self.step(&mut to, [row, column], step.clone(), add || step.start > rows.start);
                }
            });
        });
    }

    /// Adds what rows `k` of a and b contribute to the block of c at `place`.
    fn step(&self, to: &mut Block<'_, T>, [row, column]: [usize; 2], k: Range<usize>, add: bool) {
        let (rows, columns, width) = (to.rows(), to.cols(), Panels::<T>::width());
        // Columns of the block that are left out of its row `i`: whole panels.
        let left_out = |i: usize| if self.symmetric { (row + i).saturating_sub(column) / width * width } else { 0 };
        let first = left_out(0);
        if first >= columns {
            return;
        }
        with_scratch(k.len() * width + Panels::<T>::size(k.len(), columns - first), |memory| {
            let (strip, panels) = memory.split_at_mut(k.len() * width);
            let panels = pack_panels(self.b.sub(k.start, column + first, k.len(), columns - first), panels);
            for i in (0..rows).step_by(width) {
                let (height, from) = (width.min(rows - i), left_out(i));
                if from >= columns {
                    break;
                }
                pack_panel(self.a.sub(k.start, row + i, k.len(), height), width, strip);
                let left = Mat::strided(&*strip, k.len(), height, width).t();
                let right = panels.columns(from - first..columns - first);
                to.part(i..i + height, from..columns).multiply(left, right, 0..k.len(), add);
            }
        });
    }
}

/// Sums the parts of `partials`, each as long as `to`, in their order and in float64, so that it does not matter how many there
/// are.
pub fn add_partials<T: Real>(partials: &[T], to: &mut [T], accumulate: bool) {
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
