//! Matrices cut into fixed blocks, one task each. The cut depends on shapes alone, so results are bit-identical for any
//! number of threads.
#![allow(unsafe_code)] // disjoint blocks of one strided matrix, shared among threads

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Mat, Real, gemm_raw};
use super::panels::{Panels, pack_panels};
use super::scratch::with_scratch;

/// Longest chain of sums in working precision; longer inner dimensions are cut into such parts, whose results are added in
/// order. One chain of 4608 products would lose a digit.
pub const MAX_CHAIN: usize = 384;

/// Size of the parts when `total` is cut into nearly equal ones of at most `limit`; at least 1.
pub fn even_part(total: usize, limit: usize) -> usize {
    total.div_ceil(total.div_ceil(limit).max(1)).max(1)
}

/// `range` in parts of `size`; an empty range is one empty part, so that products with it still write their zeros.
pub fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = range.len().div_ceil(size).max(1);
    (0..count).map(move |i| range.start + i * size..(range.start + (i + 1) * size).min(range.end))
}

/// A block of a mutable matrix that no other task can reach.
#[derive(Debug)]
pub struct Block<'a, T> {
    pub(super) ptr: *mut T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a block is an exclusive borrow of its elements, as `&mut [T]` is.
unsafe impl<T: Send> Send for Block<'_, T> {}

impl<'a, T: Real> Block<'a, T> {
    /// The whole of `c`.
    ///
    /// # Panics
    /// If the slice is shorter than its matrix or elements overlap.
    pub fn whole(c: Mat<&'a mut [T]>) -> Block<'a, T> {
        assert!(c.span() <= c.data.len(), "matrix: slice too short");
        assert!(c.has_distinct_elements(), "matrix: result overlaps itself");
        Block {
            ptr: c.data.as_mut_ptr(),
            rows: c.rows,
            cols: c.cols,
            row_stride: c.row_stride,
            col_stride: c.col_stride,
            matrix: PhantomData,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// A part of it, lent for as long as the whole is not used.
    ///
    /// # Panics
    /// If the part does not lie inside the block.
    pub fn part(&mut self, rows: Range<usize>, cols: Range<usize>) -> Block<'_, T> {
        let inside = |range: &Range<usize>, len: usize| range.start <= range.end && range.end <= len;
        assert!(inside(&rows, self.rows) && inside(&cols, self.cols), "block: part lies outside");
        let (row_stride, col_stride) = (self.row_stride, self.col_stride);
        let start =
            if rows.is_empty() || cols.is_empty() { 0 } else { rows.start * row_stride + cols.start * col_stride };
        // SAFETY: the first element of the part is one of the block's; an empty part starts where the block does.
        let ptr = unsafe { self.ptr.add(start) };
        Block { ptr, rows: rows.len(), cols: cols.len(), row_stride, col_stride, matrix: PhantomData }
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no such row or the columns are not adjacent.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows && (self.col_stride == 1 || self.cols <= 1), "block: no such row");
        // SAFETY: row i of the block, `cols` adjacent elements, is ours and borrowed as long as the block.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// `self = a b` or, with `accumulate`, `self += a b`. Runs on the calling thread.
    ///
    /// # Panics
    /// If the dimensions do not fit together or a slice is shorter than its matrix.
    pub fn gemm(&mut self, a: Mat<&[T]>, b: Mat<&[T]>, accumulate: bool) {
        assert!(a.rows == self.rows && b.cols == self.cols && a.cols == b.rows, "gemm: dimensions do not fit");
        assert!(a.span() <= a.data.len() && b.span() <= b.data.len(), "gemm: slice too short");
        // SAFETY: a block's elements are valid and exclusively ours by construction; the spans of `a` and `b` were just
        // checked.
        unsafe { gemm_raw(self.ptr, self.row_stride, self.col_stride, a, b, accumulate) }
    }
}

/// Runs `f` on every block of `c`, in parallel; `f` gets the block and the row and column of its first element. Blocks have
/// `block` = [rows, columns], fewer at the far edges.
///
/// # Panics
/// If the slice is shorter than its matrix, elements overlap, or `block` has a zero.
pub fn par_blocks<T: Real>(c: Mat<&mut [T]>, block: [usize; 2], f: impl Fn(Block<'_, T>, usize, usize) + Sync) {
    let whole = Block::whole(c);
    let down = whole.rows.div_ceil(block[0]);
    let across = whole.cols.div_ceil(block[1]);
    let base = SharedPtr(whole.ptr);
    (0..down * across).into_par_iter().for_each(|i| {
        let (row, col) = (i / across * block[0], i % across * block[1]);
        // SAFETY: (row, col) lies inside the matrix, whose extent `Block::whole` has checked.
        let ptr = unsafe { base.get().add(row * whole.row_stride + col * whole.col_stride) };
        let rows = block[0].min(whole.rows - row);
        let cols = block[1].min(whole.cols - col);
        // Every index i makes a different block and distinct elements do not overlap: the borrow is exclusive.
        f(Block { ptr, rows, cols, matrix: PhantomData, ..whole }, row, col);
    });
}

/// A pointer that tasks may share; they must derive disjoint blocks from it.
struct SharedPtr<T>(*mut T);

impl<T> SharedPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: only `par_blocks` uses it, for blocks that do not overlap.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

/// `c = a b` or, with `accumulate`, `c += a b`, in parallel over fixed blocks of `c`.
///
/// # Panics
/// If the dimensions do not fit together or a slice is shorter than its matrix.
pub fn gemm_blocks<T: Real>(c: Mat<&mut [T]>, a: Mat<&[T]>, b: Mat<&[T]>, accumulate: bool) {
    assert!(a.rows == c.rows && b.cols == c.cols && a.cols == b.rows, "gemm: dimensions do not fit");
    assert!(a.span() <= a.data.len() && b.span() <= b.data.len(), "gemm: slice too short");
    if c.col_stride != 1 && c.row_stride == 1 {
        return gemm_blocks(c.t(), b.t(), a.t(), accumulate);
    }
    let adjacent = c.col_stride == 1;
    let block = block_shape(c.rows, c.cols, a.cols);
    par_blocks(c, block, |mut c, row, col| {
        let a = a.sub(row, 0, c.rows(), a.cols);
        let b = b.sub(0, col, b.rows, c.cols());
        if adjacent {
            multiply_packed(&mut c, a, b, accumulate);
        } else {
            c.gemm(a, b, accumulate);
        }
    });
}

/// The product of one block, both operands packed chunk by chunk. Runs on the calling thread.
fn multiply_packed<T: Real>(c: &mut Block<'_, T>, a: Mat<&[T]>, b: Mat<&[T]>, accumulate: bool) {
    let longest = a.cols.min(MAX_CHAIN);
    with_scratch(Panels::<T>::size(longest, b.cols) + a.rows * longest, |memory| {
        let (panels, tile) = memory.split_at_mut(Panels::<T>::size(longest, b.cols));
        let mut start = 0;
        loop {
            let len = longest.min(a.cols - start);
            let panels = pack_panels(b.sub(start, 0, len, b.cols), panels);
            let a_part = pack_left(a.sub(0, start, a.rows, len), tile);
            c.multiply(a_part, panels, 0..len, accumulate || start > 0);
            start += len;
            if start == a.cols {
                break;
            }
        }
    });
}

/// Copies `a` to `tile`, without gaps: rows far apart would crowd into a few sets of the cache.
pub(super) fn pack_left<'a, T: Real>(a: Mat<&[T]>, tile: &'a mut [T]) -> Mat<&'a [T]> {
    if a.row_stride == 1 && a.col_stride != 1 {
        return pack_left(a.t(), tile).t();
    }
    for (i, row) in tile.chunks_exact_mut(a.cols.max(1)).take(a.rows).enumerate() {
        let from = a.sub(i, 0, 1, a.cols).data;
        if a.col_stride == 1 {
            row.copy_from_slice(&from[..a.cols]);
        } else {
            row.iter_mut().zip(from.iter().step_by(a.col_stride)).for_each(|(to, from)| *to = *from);
        }
    }
    Mat::row_major(tile, a.rows, a.cols)
}

/// Blocks of about 256 x 256, cut smaller while there are too few to share out and each still is worth a task.
fn block_shape(rows: usize, cols: usize, inner: usize) -> [usize; 2] {
    const ENOUGH_TASKS: usize = 16;
    const SMALLEST_TASK: usize = 1 << 20; // multiply-adds
    let mut block = [rows.clamp(1, 256), cols.clamp(1, 256)];
    let tasks = |b: [usize; 2]| rows.div_ceil(b[0]) * cols.div_ceil(b[1]);
    while tasks(block) < ENOUGH_TASKS && block[0] * block[1] * inner >= 2 * SMALLEST_TASK && block[0].max(block[1]) > 32
    {
        let longer = usize::from(block[1] >= block[0]);
        block[longer] = block[longer].div_ceil(2).next_multiple_of(16);
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(len: usize, step: f64) -> Vec<f64> {
        (0..len).map(|i| (i as f64 * step).sin()).collect()
    }

    /// A matrix of these sizes in one of four layouts: row-major, padded, transposed, and with gaps both ways.
    fn layout<S>(data: S, rows: usize, cols: usize, which: usize) -> Mat<S> {
        match which {
            0 => Mat::row_major(data, rows, cols),
            1 => Mat::strided(data, rows, cols, cols + 3),
            2 => Mat::strided(data, cols, rows, rows + 2).t(),
            _ => Mat { data, rows, cols, row_stride: 2, col_stride: 2 * rows + 1 },
        }
    }

    #[test]
    fn blocked_product_matches_plain_loops_in_every_layout() {
        for (m, k, n) in [(1, 7, 1), (37, 400, 130), (300, 65, 33), (64, 20, 300), (5, 0, 9)] {
            let (a, b) = (filled(2 * (m + 3) * (k + 3), 0.7), filled(2 * (k + 3) * (n + 3), 1.3));
            for case in 0..64 {
                let a = layout(&a[..], m, k, case % 4);
                let b = layout(&b[..], k, n, case / 4 % 4);
                let accumulate = case % 3 == 0;
                let before = filled(2 * (m + 3) * (n + 3), 0.1);
                let mut got = before.clone();
                gemm_blocks(layout(&mut got[..], m, n, case / 16), a, b, accumulate);
                let c = layout((), m, n, case / 16);
                let mut want = before;
                for i in 0..m {
                    for j in 0..n {
                        let product = |l: usize| {
                            a.data[i * a.row_stride + l * a.col_stride] * b.data[l * b.row_stride + j * b.col_stride]
                        };
                        let to = &mut want[i * c.row_stride + j * c.col_stride];
                        *to = if accumulate { *to } else { 0.0 } + (0..k).map(product).sum::<f64>();
                    }
                }
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() < 1e-11, "{m}x{k}x{n}, layouts {case}: {got} against {want}");
                }
            }
        }
    }

    #[test]
    fn blocked_product_does_not_depend_on_the_number_of_threads() {
        let (m, k, n) = (130, 513, 777);
        let a: Vec<f32> = filled(m * k, 0.7).iter().map(|&v| v as f32).collect();
        let b: Vec<f32> = filled(k * n, 1.3).iter().map(|&v| v as f32).collect();
        let run = |threads: usize| {
            let mut c = vec![f32::NAN; m * n];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                gemm_blocks(Mat::row_major(&mut c, m, n), Mat::row_major(&a, m, k), Mat::row_major(&b, k, n), false)
            });
            c.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let one = run(1);
        for threads in 2..=4 {
            assert_eq!(one, run(threads), "{threads} threads");
        }
    }

    #[test]
    #[should_panic(expected = "overlaps itself")]
    fn overlapping_result_is_refused() {
        let mut c = vec![0.0f32; 64];
        par_blocks(Mat { data: &mut c[..], rows: 4, cols: 8, row_stride: 7, col_stride: 1 }, [1, 8], |_, _, _| {});
    }
}
