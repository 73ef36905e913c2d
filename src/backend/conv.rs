//! The sizes of one convolution, on every device.

/// Sizes of one 2-D convolution. x: `[n][h][w][c_in]`, w: `[c_out][kh][kw][c_in]`, y: `[n][oh][ow][c_out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ConvGeometry {
    /// Images.
    pub n: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Stride, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zero padding on both sides, vertical and horizontal.
    pub padding: [usize; 2],
}

impl ConvGeometry {
    /// Output height.
    pub fn oh(&self) -> usize {
        (self.h + 2 * self.padding[0] - self.kernel[0]) / self.stride[0] + 1
    }

    /// Output width.
    pub fn ow(&self) -> usize {
        (self.w + 2 * self.padding[1] - self.kernel[1]) / self.stride[1] + 1
    }

    /// Elements of a patch: `kh * kw * c_in`, the inner dimension of the GEMM.
    pub fn patch(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.c_in
    }

    /// Floating-point operations of one pass (multiply and add counted as two).
    pub fn flops(&self) -> u64 {
        2 * (self.n * self.oh() * self.ow() * self.c_out * self.patch()) as u64
    }

    /// Elements of the input.
    pub fn x_len(&self) -> usize {
        self.n * self.h * self.w * self.c_in
    }

    /// Elements of the input that lie in a window. Of a 1x1 kernel with stride 2 that is a quarter.
    pub fn x_covered(&self) -> usize {
        let rows = covered(self.h, self.oh(), self.kernel[0], self.stride[0], self.padding[0]);
        let columns = covered(self.w, self.ow(), self.kernel[1], self.stride[1], self.padding[1]);
        self.n * rows * columns * self.c_in
    }

    /// Elements of the weights.
    pub fn w_len(&self) -> usize {
        self.c_out * self.patch()
    }

    /// Elements of the output.
    pub fn y_len(&self) -> usize {
        self.n * self.oh() * self.ow() * self.c_out
    }

    /// Panics unless slices for input, weights and output have these lengths.
    pub fn check_lengths(&self, x: usize, w: usize, y: usize) {
        assert_eq!((x, w, y), (self.x_len(), self.w_len(), self.y_len()), "convolution: lengths of x, w and y");
    }
}

/// Of `size` positions in a row, those that lie in one of `windows` windows.
fn covered(size: usize, windows: usize, kernel: usize, stride: usize, padding: usize) -> usize {
    let (mut count, mut end) = (0, 0);
    for start in (0..windows).map(|window| window * stride) {
        let (from, to) = (start.saturating_sub(padding), (start + kernel).saturating_sub(padding).min(size));
        count += to.saturating_sub(from.max(end));
        end = end.max(to);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covered_positions_are_those_of_any_window() {
        for (size, kernel, stride, padding) in [
            (56, 1, 2, 0),
            (55, 1, 2, 0),
            (9, 3, 2, 1),
            (8, 3, 2, 1),
            (224, 7, 2, 3),
            (10, 2, 3, 0),
            (11, 2, 5, 1),
            (3, 1, 1, 2),
        ] {
            let windows = (size + 2 * padding - kernel) / stride + 1;
            let inside = |i: usize| (0..windows).any(|w| (w * stride..w * stride + kernel).contains(&(i + padding)));
            let expected = (0..size).filter(|&i| inside(i)).count();
            assert_eq!(covered(size, windows, kernel, stride, padding), expected, "{size} {kernel} {stride} {padding}");
        }
    }

    #[test]
    fn strided_pixels_are_a_quarter() {
        let (kernel, stride, padding) = ([1, 1], [2, 2], [0, 0]);
        let downsample = ConvGeometry { n: 3, h: 56, w: 28, c_in: 5, c_out: 7, kernel, stride, padding };
        assert_eq!(4 * downsample.x_covered(), downsample.x_len());
        assert_eq!(ConvGeometry { stride: [1, 1], ..downsample }.x_covered(), downsample.x_len());
    }
}
