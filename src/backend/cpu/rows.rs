//! Products with many rows. What is added to a result, and its ReLU, pass over it while it is in the cache.

use super::blocks::{Block, MAX_CHAIN, even_part, pack_left, par_blocks, parts};
use super::gemm::{Mat, Real};
use super::panels::{Panels, WIDEST_PANEL, reads_well_in_place};
use super::scratch::with_scratch;

/// What becomes of a product: `c = act(a b + bias + addend)` or, with `accumulate`, `c += a b + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// A value for each column.
    pub bias: Option<&'a [T]>,
    /// Row-major and as large as c; not with `accumulate`.
    pub addend: Option<&'a [T]>,
    /// What is below zero becomes zero; not with `accumulate`.
    pub relu: bool,
    /// Whether the product is added to what c holds.
    pub accumulate: bool,
}

impl<T: Real> Epilogue<'_, T> {
    /// Completes a block of c, which has `width` columns; `row` and `column` are those of the block's first element.
    pub(super) fn complete(&self, to: &mut Block<'_, T>, row: usize, column: usize, width: usize) {
        let bias = self.bias.map(|bias| &bias[column..][..to.cols()]);
        for i in 0..to.rows() {
            let to = to.row_mut(i);
            let addend = self.addend.map(|addend| &addend[(row + i) * width + column..][..to.len()]);
            match (bias, addend) {
                (Some(bias), Some(addend)) => {
                    let added = bias.iter().zip(addend).map(|(bias, addend)| *bias + *addend);
                    complete_row(to, added, self.relu);
                }
                (Some(added), None) | (None, Some(added)) => complete_row(to, added.iter().copied(), self.relu),
                (None, None) if self.relu => to.iter_mut().for_each(|to| *to = positive(*to)),
                (None, None) => {}
            }
        }
    }
}

#[inline]
fn complete_row<T: Real>(to: &mut [T], added: impl Iterator<Item = T>, relu: bool) {
    match relu {
        true => to.iter_mut().zip(added).for_each(|(to, added)| *to = positive(*to + added)),
        false => to.iter_mut().zip(added).for_each(|(to, added)| *to += added),
    }
}

#[inline]
fn positive<T: Real>(x: T) -> T {
    x.when(x > T::ZERO)
}

/// Most rows and columns of a task: enough rows to pay for streaming b, few enough that the block stays in the L2 cache until
/// it is complete. Rows are kept as long as they may be: memory is read and written fastest in long pieces.
const TASK: [usize; 2] = [56, 1024];

/// The product of `a` (rows x k) and `b` (k x n), and its epilogue; c is row-major. Tasks follow from the sizes alone.
///
/// # Panics
/// If the dimensions do not fit together or a slice is shorter than its matrix.
pub fn multiply_rows<T: Real>(c: &mut [T], a: Mat<&[T]>, b: Mat<&[T]>, epilogue: &Epilogue<'_, T>) {
    let (rows, inner, width) = (a.rows, b.rows, b.cols);
    assert!(a.cols == inner && c.len() == rows * width, "multiply_rows: dimensions do not fit");
    let chain = even_part(inner, MAX_CHAIN);
    let in_place = a.col_stride == 1 && reads_well_in_place::<T>(a.row_stride);
    with_scratch(Panels::<T>::size(inner, width), |memory| {
        let panels = Panels::pack(b, memory);
        par_blocks(Mat::row_major(c, rows, width), task_block(rows, width), |mut to, row, column| {
            let (rows, of_b) = (to.rows(), panels.columns(column..column + to.cols()));
            with_scratch(if in_place { 0 } else { rows * chain }, |tile| {
                for k in parts(0..inner, chain) {
                    let left = a.sub(row, k.start, rows, k.len());
                    let left = if in_place { left } else { pack_left(left, tile) };
                    to.multiply(left, of_b, k.clone(), epilogue.accumulate || k.start > 0);
                }
            });
            epilogue.complete(&mut to, row, column, width);
        });
    });
}

/// Rows and columns of a task; fewer columns where there would be too few tasks to share out.
fn task_block(rows: usize, columns: usize) -> [usize; 2] {
    const ENOUGH_TASKS: usize = 16;
    let band = even_part(rows, rows.div_ceil(2 * ENOUGH_TASKS).clamp(TASK[0] / 2, TASK[0]));
    let mut block = [band, columns.clamp(1, TASK[1])];
    while rows.div_ceil(band) * columns.div_ceil(block[1]) < ENOUGH_TASKS && block[1] >= 256 {
        block[1] = block[1].div_ceil(2).next_multiple_of(WIDEST_PANEL);
    }
    block
}
