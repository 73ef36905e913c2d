//! Register-tile matrix kernels: a few rows of the result, two vectors wide, stay in registers along the whole inner
//! dimension. One generic body, compiled for AVX-512, AVX2 and any other machine; which one runs is found out once.
//!
//! With AVX-512 and AVX2 every element is the same chain of fused multiply-adds, so both give the same bits.
#![allow(unsafe_code)] // raw pointers in the innermost loop, vector intrinsics

use super::gemm::Real;

/// A kernel and the shape of its register tile.
#[derive(Debug, Clone, Copy)]
pub struct Kernel<T> {
    /// Most rows that one call takes.
    pub(super) rows: usize,
    /// Columns of a tile: the width of a panel of packed columns.
    pub(super) width: usize,
    run: unsafe fn(usize, Tile<T>),
}

/// Operands of one tile: `c = a b` or `c += a b`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile<T> {
    /// Inner dimension.
    pub inner: usize,
    /// Left operand, with the distances between its rows and between its columns.
    pub a: *const T,
    pub a_row: usize,
    pub a_col: usize,
    /// Right operand: a packed panel, `inner` rows of one tile's width.
    pub b: *const T,
    /// Result, with the distance between its rows.
    pub c: *mut T,
    pub c_row: usize,
    pub accumulate: bool,
}

impl<T> Kernel<T> {
    /// Multiplies a tile of `rows` rows.
    ///
    /// # Safety
    /// `1 <= rows <= self.rows`; `a` must be readable for `rows` x `inner` elements with its strides, `b` for `inner` x
    /// `self.width` elements, and `c` writable (readable too, to accumulate) for `rows` x `self.width` elements.
    #[inline]
    pub(super) unsafe fn run(&self, rows: usize, tile: Tile<T>) {
        // SAFETY: the same promises, by the caller; the choice of `run` made sure that the machine has the instructions.
        unsafe { (self.run)(rows, tile) }
    }
}

/// Vectors of `LANES` elements.
trait Vector<T: Real>: Copy {
    const LANES: usize;
    /// Zero in all lanes.
    ///
    /// # Safety
    /// The machine has the instructions of this vector type.
    unsafe fn zero() -> Self;
    /// `*from` in all lanes.
    ///
    /// # Safety
    /// As [`Vector::zero`], and `from` is readable.
    unsafe fn splat(from: *const T) -> Self;
    /// `LANES` elements from `from` on.
    ///
    /// # Safety
    /// As [`Vector::zero`], and they are readable.
    unsafe fn load(from: *const T) -> Self;
    /// Writes `LANES` elements from `to` on.
    ///
    /// # Safety
    /// As [`Vector::zero`], and they are writable.
    unsafe fn store(self, to: *mut T);
    /// `self + other`.
    ///
    /// # Safety
    /// As [`Vector::zero`].
    unsafe fn plus(self, other: Self) -> Self;
    /// `self + a * b`.
    ///
    /// # Safety
    /// As [`Vector::zero`].
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
}

/// The kernel's body. `A_ROW` is the distance between the rows of `a` where it is known at compile time, else 0.
///
/// # Safety
/// As [`Kernel::run`] with `R` rows, on a machine that has `V`'s instructions.
#[inline(always)]
unsafe fn tile<T: Real, V: Vector<T>, const R: usize, const A_ROW: usize>(t: Tile<T>) {
    let a_row = if A_ROW > 0 { A_ROW } else { t.a_row };
    // SAFETY: row i and column l of `a` are at i * a_row + l * a_col, i < R, l < inner; row l of `b` at 2 * LANES * l; row i
    // of `c` at i * c_row: all inside what the caller has promised.
    unsafe {
        let mut sums = [[V::zero(); 2]; R];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.inner {
            let b0 = V::load(b);
            let b1 = V::load(b.add(V::LANES));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(a.add(i * a_row));
                sums[0] = sums[0].plus_product(a, b0);
                sums[1] = sums[1].plus_product(a, b1);
            }
            a = a.wrapping_add(t.a_col);
            b = b.add(2 * V::LANES);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (half, sum) in sums.into_iter().enumerate() {
                let c = t.c.add(i * t.c_row + half * V::LANES);
                let sum = if t.accumulate { V::load(c).plus(sum) } else { sum };
                sum.store(c);
            }
        }
    }
}

/// Calls the body for a number of rows out of a list, for `a` with adjacent rows and for any other.
macro_rules! dispatch {
    ($vector:ty, $rows:expr, $tile:expr, [$($r:literal),*]) => {
        match ($rows, $tile.a_row) {
            $(
                ($r, 1) => tile::<T, $vector, $r, 1>($tile),
                ($r, _) => tile::<T, $vector, $r, 0>($tile),
            )*
            _ => unreachable!("kernel: more rows than a tile has"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Real, Tile, Vector, tile};

    macro_rules! vector {
        ($v:ty, $t:ty, $zero:ident, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident) => {
            // SAFETY (all of them): the intrinsics ask for the instructions and for valid pointers, which the trait's callers
            // have promised. The unaligned forms are used.
            impl Vector<$t> for $v {
                const LANES: usize = size_of::<$v>() / size_of::<$t>();
                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: see above.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn splat(from: *const $t) -> Self {
                    // SAFETY: see above.
                    unsafe { $splat(*from) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $t) -> Self {
                    // SAFETY: see above.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $t) {
                    // SAFETY: see above.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn plus(self, other: Self) -> Self {
                    // SAFETY: see above.
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn plus_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: see above.
                    unsafe { $fma(a, b, self) }
                }
            }
        };
    }
    vector!(
        __m512,
        f32,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps
    );
    vector!(
        __m512d,
        f64,
        _mm512_setzero_pd,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_fmadd_pd
    );
    vector!(
        __m256,
        f32,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_fmadd_ps
    );
    vector!(
        __m256d,
        f64,
        _mm256_setzero_pd,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_fmadd_pd
    );

    /// # Safety
    /// As [`Kernel::run`], on a machine with AVX-512F.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<T: Real, V: Vector<T>>(rows: usize, t: Tile<T>) {
        // SAFETY: the caller's promises.
        unsafe { dispatch!(V, rows, t, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]) }
    }

    /// # Safety
    /// As [`Kernel::run`], on a machine with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<T: Real, V: Vector<T>>(rows: usize, t: Tile<T>) {
        // SAFETY: the caller's promises.
        unsafe { dispatch!(V, rows, t, [1, 2, 3, 4, 5, 6]) }
    }

    /// The kernels of this machine, widest vectors first.
    pub(super) fn kernels<T: Real, V512: Vector<T>, V256: Vector<T>>() -> Vec<Kernel<T>> {
        let mut kernels = Vec::new();
        if is_x86_feature_detected!("avx512f") {
            // 28 sums of the 32 registers.
            kernels.push(Kernel { rows: 14, width: 2 * V512::LANES, run: avx512::<T, V512> });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // 12 sums of the 16 registers.
            kernels.push(Kernel { rows: 6, width: 2 * V256::LANES, run: avx2::<T, V256> });
        }
        kernels
    }
}

/// Four elements for any machine; the compiler finds the instructions.
#[derive(Clone, Copy)]
struct Plain<T>([T; 4]);

impl<T: Real> Vector<T> for Plain<T> {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Plain([T::ZERO; 4])
    }
    #[inline(always)]
    unsafe fn splat(from: *const T) -> Self {
        // SAFETY: the caller promises that it is readable.
        Plain([unsafe { *from }; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller promises four readable elements; [T; 4] has the alignment of T.
        Plain(unsafe { *from.cast() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: the caller promises four writable elements; [T; 4] has the alignment of T.
        unsafe { *to.cast() = self.0 }
    }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
}

/// # Safety
/// As [`Kernel::run`].
unsafe fn plain<T: Real>(rows: usize, t: Tile<T>) {
    // SAFETY: the caller's promises; `Plain` needs no special instructions.
    unsafe { dispatch!(Plain<T>, rows, t, [1, 2, 3, 4]) }
}

/// All kernels that this machine can run, the best first.
pub(super) fn f32_kernels() -> Vec<Kernel<f32>> {
    #[cfg(target_arch = "x86_64")]
    let mut kernels = x86::kernels::<f32, std::arch::x86_64::__m512, std::arch::x86_64::__m256>();
    #[cfg(not(target_arch = "x86_64"))]
    let mut kernels = Vec::new();
    kernels.push(Kernel { rows: 4, width: 8, run: plain::<f32> });
    kernels
}

/// All kernels that this machine can run, the best first.
pub(super) fn f64_kernels() -> Vec<Kernel<f64>> {
    #[cfg(target_arch = "x86_64")]
    let mut kernels = x86::kernels::<f64, std::arch::x86_64::__m512d, std::arch::x86_64::__m256d>();
    #[cfg(not(target_arch = "x86_64"))]
    let mut kernels = Vec::new();
    kernels.push(Kernel { rows: 4, width: 8, run: plain::<f64> });
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Real>(kernel: Kernel<T>) {
        const INNER: usize = 37;
        let value = |i: usize| T::of((i as f64 * 0.37).sin());
        for rows in 1..=kernel.rows {
            for (a_row, a_col) in [(INNER + 3, 1), (1, rows + 2)] {
                for accumulate in [false, true] {
                    let a: Vec<T> = (0..(rows - 1) * a_row + (INNER - 1) * a_col + 1).map(value).collect();
                    let b: Vec<T> = (0..INNER * kernel.width).map(|i| value(i + 1000)).collect();
                    let c_row = kernel.width + 5;
                    let before: Vec<T> = (0..rows * c_row).map(|i| value(i + 2000)).collect();
                    let mut c = before.clone();
                    let tile = Tile {
                        inner: INNER,
                        a: a.as_ptr(),
                        a_row,
                        a_col,
                        b: b.as_ptr(),
                        c: c.as_mut_ptr(),
                        c_row,
                        accumulate,
                    };
                    // SAFETY: the vectors were made with the lengths that the strides need.
                    unsafe { kernel.run(rows, tile) };
                    for (i, (&got, &old)) in c.iter().zip(&before).enumerate() {
                        let (row, col) = (i / c_row, i % c_row);
                        if col >= kernel.width {
                            assert_eq!(got, old, "wrote beside the tile");
                            continue;
                        }
                        let product =
                            |l: usize| a[row * a_row + l * a_col].to_f64() * b[l * kernel.width + col].to_f64();
                        let start = if accumulate { old.to_f64() } else { 0.0 };
                        let want = start + (0..INNER).map(product).sum::<f64>();
                        let tolerance = if size_of::<T>() == 4 { 1e-5 } else { 1e-13 };
                        assert!(
                            (got.to_f64() - want).abs() < tolerance,
                            "{kernel:?}: {row},{col}: {got} against {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_kernel_of_this_machine_multiplies() {
        f32_kernels().into_iter().for_each(check);
        f64_kernels().into_iter().for_each(check);
    }
}
