//! Safe, strided, single-threaded matrix product over the `gemm` crate. Callers parallelise over blocks of the result, so
//! the order of every sum is fixed and results are bit-identical for any number of threads.
#![allow(unsafe_code)] // one call into the `gemm` crate, whose interface is raw pointers, and vector instructions

use std::iter::Sum;
use std::sync::LazyLock;

use bytemuck::Pod;

use super::blocks::Block;
use super::kernel::{self, Kernel};

/// Element types the CPU backend computes in: f32 for training, f64 for gradient checks.
pub trait Real:
    Pod
    + Send
    + Sync
    + PartialOrd
    + Sum
    + std::fmt::Debug
    + std::fmt::Display
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// From f64, rounding.
    fn of(value: f64) -> Self;
    /// To f64, exactly.
    fn to_f64(self) -> f64;
    /// Itself or 0, without a branch: where what to keep is as good as random, as behind a ReLU, a processor guesses every other
    /// branch wrong, and takes ten times as long.
    fn when(self, keep: bool) -> Self;
    /// The best kernel of this machine.
    fn kernel() -> Kernel<Self>;
    /// The transpose of a square.
    #[inline]
    fn transpose(rows: [[Self; 4]; 4]) -> [[Self; 4]; 4] {
        std::array::from_fn(|i| rows.map(|row| row[i]))
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    fn of(value: f64) -> f32 {
        value as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline]
    fn when(self, keep: bool) -> f32 {
        f32::from_bits(self.to_bits() & u32::from(keep).wrapping_neg())
    }
    fn kernel() -> Kernel<f32> {
        static BEST: LazyLock<Kernel<f32>> = LazyLock::new(|| kernel::f32_kernels()[0]);
        *BEST
    }
    // Every x86-64 has these instructions; left to itself the compiler moves element by element, four times as slow.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn transpose(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
        use std::arch::x86_64::*;
        let [a, b, c, d]: [__m128; 4] = bytemuck::cast(rows);
        // SAFETY: SSE is part of x86-64.
        let transposed = unsafe {
            let (ab_low, ab_high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
            let (cd_low, cd_high) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
            [
                _mm_movelh_ps(ab_low, cd_low),
                _mm_movehl_ps(cd_low, ab_low),
                _mm_movelh_ps(ab_high, cd_high),
                _mm_movehl_ps(cd_high, ab_high),
            ]
        };
        bytemuck::cast(transposed)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn of(value: f64) -> f64 {
        value
    }
    fn to_f64(self) -> f64 {
        self
    }
    #[inline]
    fn when(self, keep: bool) -> f64 {
        f64::from_bits(self.to_bits() & u64::from(keep).wrapping_neg())
    }
    fn kernel() -> Kernel<f64> {
        static BEST: LazyLock<Kernel<f64>> = LazyLock::new(|| kernel::f64_kernels()[0]);
        *BEST
    }
}

/// A strided matrix over a slice; strides in elements.
#[derive(Debug, Clone, Copy)]
pub struct Mat<S> {
    /// The elements.
    pub data: S,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<S> Mat<S> {
    /// A dense row-major matrix.
    pub fn row_major(data: S, rows: usize, cols: usize) -> Mat<S> {
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// A row-major matrix whose rows lie `row_stride` elements apart.
    pub fn strided(data: S, rows: usize, cols: usize, row_stride: usize) -> Mat<S> {
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving data.
    pub fn t(self) -> Mat<S> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }

    /// Elements from the first to the last, both included.
    pub(crate) fn span(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }

    /// Whether no element lies at the place of another, judged by strides alone: one axis steps over the other's extent.
    pub(crate) fn has_distinct_elements(&self) -> bool {
        let steps_over = |stride: usize, inner: usize, inner_stride: usize| stride > (inner - 1) * inner_stride;
        match (self.rows, self.cols) {
            (0, _) | (_, 0) | (1, 1) => true,
            (1, _) => self.col_stride > 0,
            (_, 1) => self.row_stride > 0,
            (rows, cols) => {
                self.row_stride > 0
                    && self.col_stride > 0
                    && (steps_over(self.row_stride, cols, self.col_stride)
                        || steps_over(self.col_stride, rows, self.row_stride))
            }
        }
    }
}

impl<'a, T> Mat<&'a [T]> {
    /// The `rows` x `cols` part whose first element is at (`row`, `col`).
    ///
    /// # Panics
    /// If the part does not lie inside the matrix.
    pub fn sub(self, row: usize, col: usize, rows: usize, cols: usize) -> Mat<&'a [T]> {
        assert!(row + rows <= self.rows && col + cols <= self.cols, "sub: part lies outside");
        let start = if rows * cols == 0 { 0 } else { row * self.row_stride + col * self.col_stride };
        Mat { data: &self.data[start..], rows, cols, ..self }
    }
}

/// `c = a b` or, with `accumulate`, `c += a b`. Runs on the calling thread.
///
/// # Panics
/// If the dimensions do not fit together or a slice is shorter than its matrix: callers have checked both in `infer`.
pub fn gemm<T: Real>(c: Mat<&mut [T]>, a: Mat<&[T]>, b: Mat<&[T]>, accumulate: bool) {
    Block::whole(c).gemm(a, b, accumulate);
}

/// The product behind [`Block::gemm`].
///
/// # Safety
/// `a` and `b` must lie inside their slices and fit together; `c` must point to a matrix of `a.rows` x `b.cols` elements with
/// these strides that are valid, distinct and overlap neither `a` nor `b`.
pub(super) unsafe fn gemm_raw<T: Real>(
    c: *mut T,
    row_stride: usize,
    col_stride: usize,
    a: Mat<&[T]>,
    b: Mat<&[T]>,
    accumulate: bool,
) {
    // SAFETY: the caller's promises are those that `gemm` asks for; T is f32 or f64, which `gemm` supports.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c,
            col_stride as isize,
            row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_product_matches_plain_loops() {
        let (m, n, k) = (5, 7, 11);
        let a: Vec<f64> = (0..m * k).map(|i| (i as f64 * 0.7).sin()).collect();
        let b: Vec<f64> = (0..n * k).map(|i| (i as f64 * 1.3).cos()).collect();
        let mut c: Vec<f64> = (0..m * (n + 2)).map(|i| i as f64).collect();
        let before = c.clone();
        // b is stored transposed, c has padded rows.
        gemm(Mat::strided(&mut c, m, n, n + 2), Mat::row_major(&a, m, k), Mat::row_major(&b[..], n, k).t(), true);
        for i in 0..m {
            for j in 0..n + 2 {
                let sum: f64 = if j < n { (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum() } else { 0.0 };
                assert!((c[i * (n + 2) + j] - before[i * (n + 2) + j] - sum).abs() < 1e-12);
            }
        }
    }
}
