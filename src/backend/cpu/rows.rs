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
    /// Row-major and as large as c, which it takes the place of; not with `accumulate`.
    pub addend: Option<&'a [T]>,
    /// What is below zero becomes zero; not with `accumulate`.
    pub relu: bool,
    /// Whether c has values already.
    pub accumulate: bool,
}

impl<T: Real> Epilogue<'_, T> {
    /// Writes to a block of c what the product is added to; `row` and `column` are those of its first element in a c of
    /// `width` columns. Returns whether there is anything.
    pub(super) fn begin(&self, to: &mut Block<'_, T>, row: usize, column: usize, width: usize) -> bool {
        let bias = self.bias.map(|bias| &bias[column..][..to.cols()]);
        for i in 0..to.rows() {
            let to = to.row_mut(i);
            let addend = self.addend.map(|addend| &addend[(row + i) * width + column..][..to.len()]);
            match (bias, addend) {
                (Some(bias), Some(addend)) => {
                    to.iter_mut().zip(bias.iter().zip(addend)).for_each(|(to, (bias, addend))| *to = *bias + *addend);
                }
                (Some(bias), None) if self.accumulate => to.iter_mut().zip(bias).for_each(|(to, bias)| *to += *bias),
                (Some(values), None) | (None, Some(values)) => to.copy_from_slice(values),
                (None, None) => {}
            }
        }
        self.accumulate || bias.is_some() || self.addend.is_some()
    }

    /// Completes a block to which the product was added.
    pub(super) fn end(&self, to: &mut Block<'_, T>) {
        if self.relu {
            for i in 0..to.rows() {
                to.row_mut(i).iter_mut().for_each(|to| *to = if *to > T::ZERO { *to } else { T::ZERO });
            }
        }
    }
}

/// Rows of a task: enough to pay for streaming b, few enough that they stay in the L2 cache with what they become.
const TASK_ROWS: usize = 140;
/// Most columns of a task.
const TASK_COLUMNS: usize = 1024;
/// Columns that are begun, multiplied and completed before the next ones are.
const COLUMNS: usize = 128;

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
            let (rows, columns) = (to.rows(), to.cols());
            with_scratch(if in_place { 0 } else { rows * chain }, |tile| {
                for k in parts(0..inner, chain) {
                    let left = a.sub(row, k.start, rows, k.len());
                    let left = if in_place { left } else { pack_left(left, tile) };
                    for part in parts(0..columns, COLUMNS) {
                        let of_b = panels.columns(column + part.start..column + part.end);
                        let mut to = to.part(0..rows, part.clone());
                        let add = k.start > 0 || epilogue.begin(&mut to, row, column + part.start, width);
                        to.multiply(left, of_b, k.clone(), add);
                        if k.end == inner {
                            epilogue.end(&mut to);
                        }
                    }
                }
            });
        });
    });
}

/// Rows and columns of a task; fewer columns where there would be too few tasks to share out.
fn task_block(rows: usize, columns: usize) -> [usize; 2] {
    const ENOUGH_TASKS: usize = 16;
    let band = even_part(rows, rows.div_ceil(2 * ENOUGH_TASKS).clamp(TASK_ROWS / 2, TASK_ROWS));
    let mut block = [band, columns.clamp(1, TASK_COLUMNS)];
    while rows.div_ceil(band) * columns.div_ceil(block[1]) < ENOUGH_TASKS && block[1] >= 256 {
        block[1] = block[1].div_ceil(2).next_multiple_of(WIDEST_PANEL);
    }
    block
}
