//! A right operand packed for the kernels, and the product that uses it.
#![allow(unsafe_code)] // calls into the kernels, which take raw pointers

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::Block;
use super::gemm::{Mat, Real};
use super::kernel::{Kernel, Tile};

/// The panel width of every kernel divides this.
pub const WIDEST_PANEL: usize = 32;

/// Whether the rows of a register tile, each of so many columns, find room in the L1 cache side by side where they lie. Rows a
/// multiple of 2 KiB apart would crowd into a few of its sets: they are better copied.
pub fn reads_well_in_place<T>(columns: usize) -> bool {
    !(columns * size_of::<T>()).is_multiple_of(2048)
}

/// A matrix of `inner` rows cut into panels of [`Panels::width`] columns, one panel after the other, each row-major. The last
/// panel is filled up with zeros.
#[derive(Debug, Clone, Copy)]
pub struct Panels<'a, T> {
    kernel: Kernel<T>,
    data: &'a [T],
    inner: usize,
    cols: usize,
}

impl<'a, T: Real> Panels<'a, T> {
    /// Columns of a panel.
    pub fn width() -> usize {
        T::kernel().width
    }

    /// Elements of memory for an `inner` x `cols` matrix.
    pub fn size(inner: usize, cols: usize) -> usize {
        inner * cols.next_multiple_of(Self::width())
    }

    /// Memory that holds the packed panels of an `inner` x `cols` matrix.
    ///
    /// # Panics
    /// If the memory is shorter than [`Panels::size`].
    pub fn new(data: &'a [T], inner: usize, cols: usize) -> Panels<'a, T> {
        Self::for_kernel(T::kernel(), data, inner, cols)
    }

    /// Packs `b` into `memory`, all threads together.
    ///
    /// # Panics
    /// If the memory is shorter than [`Panels::size`].
    pub fn pack(b: Mat<&[T]>, memory: &'a mut [T]) -> Panels<'a, T> {
        for_each_panel(memory, b.rows, b.cols, |panel, columns| {
            pack_panel(b.sub(0, columns.start, b.rows, columns.len()), Self::width(), panel);
        });
        Panels::new(memory, b.rows, b.cols)
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If the range does not start with a panel or does not lie inside the matrix.
    pub fn columns(self, range: Range<usize>) -> Panels<'a, T> {
        assert!(range.start.is_multiple_of(self.kernel.width) && range.end <= self.cols, "panels: columns lie outside");
        Panels { data: &self.data[range.start * self.inner..], cols: range.len(), ..self }
    }

    fn for_kernel(kernel: Kernel<T>, data: &'a [T], inner: usize, cols: usize) -> Panels<'a, T> {
        assert!(inner * cols.next_multiple_of(kernel.width) <= data.len(), "panels: memory too short");
        Panels { kernel, data, inner, cols }
    }
}

/// Fills the panels of an `inner` x `cols` matrix in parallel; `f` gets the memory and the columns of a panel.
///
/// # Panics
/// If the memory is shorter than [`Panels::size`].
pub fn for_each_panel<T: Real>(memory: &mut [T], inner: usize, cols: usize, f: impl Fn(&mut [T], Range<usize>) + Sync) {
    let width = Panels::<T>::width();
    let memory = &mut memory[..Panels::<T>::size(inner, cols)];
    memory.par_chunks_mut((inner * width).max(1)).enumerate().for_each(|(i, panel)| {
        f(panel, i * width..((i + 1) * width).min(cols));
    });
}

/// [`Panels::pack`] on the calling thread.
///
/// # Panics
/// If the memory is shorter than [`Panels::size`].
pub fn pack_panels<'a, T: Real>(b: Mat<&[T]>, memory: &'a mut [T]) -> Panels<'a, T> {
    let width = Panels::<T>::width();
    for (i, panel) in memory.chunks_exact_mut((b.rows * width).max(1)).take(b.cols.div_ceil(width)).enumerate() {
        pack_panel(b.sub(0, i * width, b.rows, width.min(b.cols - i * width)), width, panel);
    }
    Panels::new(memory, b.rows, b.cols)
}

/// Packs `b`, some rows and at most `width` columns of the matrix, into `panel`: its part of one panel.
///
/// # Panics
/// If `panel` does not have `width` elements for each row of `b`.
pub fn pack_panel<T: Real>(b: Mat<&[T]>, width: usize, panel: &mut [T]) {
    assert!(b.cols <= width && panel.len() == b.rows * width, "pack_panel: lengths do not fit");
    if b.col_stride == 1 {
        for (row, to) in panel.chunks_exact_mut(width).enumerate() {
            let (values, padding) = to.split_at_mut(b.cols);
            values.copy_from_slice(&b.data[row * b.row_stride..][..b.cols]);
            padding.fill(T::ZERO);
        }
        return;
    }
    if b.row_stride == 1 {
        return transpose_panel(b, width, panel);
    }
    for (row, to) in panel.chunks_exact_mut(width).enumerate() {
        let from = b.data[row * b.row_stride..].iter().step_by(b.col_stride);
        let (values, padding) = to.split_at_mut(b.cols);
        values.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        padding.fill(T::ZERO);
    }
}

/// [`pack_panel`] of a matrix whose columns are contiguous: squares of 4 x 4 elements, some rows at a time so that both sides
/// stay in the cache.
fn transpose_panel<T: Real>(b: Mat<&[T]>, width: usize, panel: &mut [T]) {
    const ROWS: usize = 16;
    for (block, panel) in panel.chunks_mut(ROWS * width).enumerate() {
        let rows = panel.len() / width;
        let column = |col: usize| &b.data[block * ROWS + col * b.col_stride..][..rows];
        let squares = if rows == ROWS { b.cols / 4 * 4 } else { 0 };
        for col in (0..squares).step_by(4) {
            let from = [0, 1, 2, 3].map(|i| column(col + i).as_chunks::<4>().0);
            for (square, to) in panel.chunks_exact_mut(4 * width).enumerate() {
                let transposed = T::transpose(from.map(|column| column[square]));
                for (to, row) in to.chunks_exact_mut(width).zip(&transposed) {
                    to[col..col + 4].copy_from_slice(row);
                }
            }
        }
        for col in squares..b.cols {
            panel[col..].iter_mut().step_by(width).zip(column(col)).for_each(|(to, from)| *to = *from);
        }
        for row in panel.chunks_exact_mut(width) {
            row[b.cols..].fill(T::ZERO);
        }
    }
}

impl<T: Real> Block<'_, T> {
    /// `self = a b` or, with `accumulate`, `self += a b`, where b is the rows `inner` of `panels`. Each element is one chain
    /// of sums, so callers cut a long inner dimension. Runs on the calling thread.
    ///
    /// # Panics
    /// If the dimensions do not fit together, a slice is shorter than its matrix, or the columns of `self` are not adjacent.
    pub fn multiply(&mut self, a: Mat<&[T]>, panels: Panels<'_, T>, inner: Range<usize>, accumulate: bool) {
        let Panels { kernel, data, inner: panel_rows, cols } = panels;
        assert!(a.rows == self.rows && cols == self.cols && a.cols == inner.len(), "multiply: dimensions do not fit");
        assert!(inner.start <= inner.end && inner.end <= panel_rows, "multiply: rows lie outside the panels");
        assert!(a.span() <= a.data.len(), "multiply: slice too short");
        assert!(self.col_stride == 1 || cols <= 1, "multiply: columns are not adjacent");
        if self.rows == 0 {
            return;
        }
        // Tiles of nearly equal height: a last one of one row would take as long as one of four.
        let tiles = self.rows.div_ceil(kernel.rows);
        let step = self.rows.div_ceil(tiles);
        for col in (0..cols).step_by(kernel.width) {
            let panel = &data[(col * panel_rows + inner.start * kernel.width)..][..inner.len() * kernel.width];
            let width = kernel.width.min(cols - col);
            for row in (0..self.rows).step_by(step) {
                let rows = step.min(self.rows - row);
                // SAFETY: (row, col) lies inside the block, the first element of row `row` inside `a` unless `a` has no
                // columns, and then the kernel does not read it.
                let (c, a_tile) = unsafe {
                    (self.ptr.add(row * self.row_stride + col), a.data.as_ptr().wrapping_add(row * a.row_stride))
                };
                let tile = Tile {
                    inner: inner.len(),
                    a: a_tile,
                    a_row: a.row_stride,
                    a_col: a.col_stride,
                    b: panel.as_ptr(),
                    c,
                    c_row: self.row_stride,
                    accumulate,
                };
                if width == kernel.width {
                    // SAFETY: 1 <= rows <= kernel.rows; rows x inner elements of `a` lie inside its slice (its span was
                    // checked), the panel has inner x width elements, and rows x width elements of the block are ours.
                    unsafe { kernel.run(rows, tile) };
                } else {
                    // SAFETY: as above, with `width` columns of the block.
                    unsafe { run_narrow(kernel, rows, width, tile) };
                }
            }
        }
    }
}

/// A tile of which only `width` columns belong to the result: multiplied beside it, then copied.
///
/// # Safety
/// As [`Kernel::run`], but with `width` columns of `c`; `width` is not more than the kernel's.
unsafe fn run_narrow<T: Real>(kernel: Kernel<T>, rows: usize, width: usize, tile: Tile<T>) {
    const LARGEST_TILE: usize = 14 * 32;
    let mut product = [T::ZERO; LARGEST_TILE];
    assert!(kernel.rows * kernel.width <= LARGEST_TILE, "kernel: tile too large");
    // SAFETY: the operands are the caller's; `product` has room for the tile.
    unsafe { kernel.run(rows, Tile { c: product.as_mut_ptr(), c_row: kernel.width, accumulate: false, ..tile }) };
    for row in 0..rows {
        // SAFETY: the caller owns `width` elements from here on, valid because they are part of a slice.
        let to = unsafe { std::slice::from_raw_parts_mut(tile.c.add(row * tile.c_row), width) };
        for (to, from) in to.iter_mut().zip(&product[row * kernel.width..]) {
            *to = if tile.accumulate { *to + *from } else { *from };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::{f32_kernels, f64_kernels};
    use super::*;

    fn check<T: Real>(kernel: Kernel<T>) {
        let value = |i: usize| T::of((i as f64 * 0.73).sin());
        for (m, k, n) in [(1, 1, 1), (3, 5, 33), (29, 40, 32), (70, 17, 95), (4, 0, 7)] {
            for transposed in [false, true] {
                let a: Vec<T> = (0..m * k).map(value).collect();
                let b: Vec<T> = (0..k * n).map(|i| value(i + 500)).collect();
                let a = if transposed { Mat::row_major(&a[..], k, m).t() } else { Mat::row_major(&a[..], m, k) };
                let b = if transposed { Mat::row_major(&b[..], n, k).t() } else { Mat::row_major(&b[..], k, n) };
                let mut memory = vec![T::of(f64::NAN); k * n.next_multiple_of(kernel.width)];
                for (j, panel) in memory.chunks_exact_mut((k * kernel.width).max(1)).enumerate() {
                    let col = j * kernel.width;
                    pack_panel(b.sub(0, col, k, kernel.width.min(n - col)), kernel.width, panel);
                }
                let panels = Panels::for_kernel(kernel, &memory, k, n);
                let mut c = vec![T::of(f64::NAN); m * (n + 3)];
                let mut block = Block::whole(Mat::strided(&mut c[..], m, n, n + 3));
                let half = k / 2;
                block.multiply(a.sub(0, 0, m, half), panels, 0..half, false);
                block.multiply(a.sub(0, half, m, k - half), panels, half..k, true);
                for (i, got) in c.iter().enumerate() {
                    let (row, col) = (i / (n + 3), i % (n + 3));
                    if col >= n {
                        assert!(got.to_f64().is_nan(), "wrote beside the block");
                        continue;
                    }
                    let product = |l: usize| {
                        let (a, b) = (a.sub(row, l, 1, 1).data[0], b.sub(l, col, 1, 1).data[0]);
                        a.to_f64() * b.to_f64()
                    };
                    let want: f64 = (0..k).map(product).sum();
                    let tolerance = if size_of::<T>() == 4 { 1e-5 } else { 1e-13 };
                    assert!((got.to_f64() - want).abs() < tolerance, "{kernel:?} {m}x{k}x{n}: {got} against {want}");
                }
            }
        }
    }

    #[test]
    fn product_with_panels_matches_plain_loops_for_every_kernel() {
        f32_kernels().into_iter().for_each(check);
        f64_kernels().into_iter().for_each(check);
    }

    #[test]
    fn fused_kernels_agree_bit_for_bit() {
        let (m, k, n) = (23, 100, 70);
        let value = |i: usize| (i as f32 * 0.73).sin();
        let a: Vec<f32> = (0..m * k).map(value).collect();
        let b: Vec<f32> = (0..k * n).map(|i| value(i + 500)).collect();
        let product = |kernel: Kernel<f32>| {
            let mut memory = vec![0.0; k * n.next_multiple_of(kernel.width)];
            for (j, panel) in memory.chunks_exact_mut(k * kernel.width).enumerate() {
                let columns = kernel.width.min(n - j * kernel.width);
                pack_panel(Mat::row_major(&b[..], k, n).sub(0, j * kernel.width, k, columns), kernel.width, panel);
            }
            let mut c = vec![0.0; m * n];
            let mut block = Block::whole(Mat::row_major(&mut c[..], m, n));
            block.multiply(Mat::row_major(&a, m, k), Panels::for_kernel(kernel, &memory, k, n), 0..k, false);
            c.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        // The last one is the plain kernel, which does not fuse.
        let mut kernels = f32_kernels();
        kernels.pop();
        let products: Vec<_> = kernels.into_iter().map(product).collect();
        assert!(products.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
