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
