//! Matrices cut into fixed blocks, one task each. The cut depends on shapes alone, so results are bit-identical for any
//! number of threads.
#![allow(unsafe_code)] // disjoint blocks of one strided matrix, shared among threads

use std::marker::PhantomData;

use rayon::prelude::*;

use super::gemm::{Mat, Real, gemm_raw};

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
    let block = block_shape(c.rows, c.cols, a.cols);
    par_blocks(c, block, |mut c, row, col| {
        c.gemm(a.sub(row, 0, c.rows(), a.cols), b.sub(0, col, b.rows, c.cols()), accumulate);
    });
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

    #[test]
    fn blocked_product_matches_one_product_on_strided_operands() {
        for (m, k, n) in [(1, 7, 1), (37, 300, 530), (600, 65, 33), (64, 512, 700), (5, 0, 9)] {
            // a is stored transposed, c has padded rows.
            let (a, b) = (filled(m * k, 0.7), filled(k * n, 1.3));
            let (a, b) = (Mat::row_major(&a[..], k, m).t(), Mat::row_major(&b[..], k, n));
            for accumulate in [false, true] {
                let before = filled(m * (n + 3), 0.1);
                let mut got = before.clone();
                gemm_blocks(Mat::strided(&mut got, m, n, n + 3), a, b, accumulate);
                for (i, (&got, &old)) in got.iter().zip(&before).enumerate() {
                    let (row, col) = (i / (n + 3), i % (n + 3));
                    let want = if col < n {
                        let sum: f64 = (0..k).map(|l| a.data[l * m + row] * b.data[l * n + col]).sum();
                        sum + if accumulate { old } else { 0.0 }
                    } else {
                        old
                    };
                    assert!((got - want).abs() < 1e-11, "{m}x{k}x{n} at {row},{col}: {got} against {want}");
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
