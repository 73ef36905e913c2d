//! What NVIDIA's libraries compute for the engine: convolutions (cuDNN) and matrix products (cuBLASLt), described in words of
//! the backend.
#![allow(unsafe_code)] // declares launches, whose conditions callers discharge

use std::fmt::Debug;

use crate::error::Result;
use crate::tensor::DType;

use super::DevicePtr;

/// Scratch that every piece of work has: algorithms that want more are not taken. 32 MiB is what cuBLASLt wants on Hopper;
/// with 8-channel input every convolution of the ResNets has an algorithm within it (`tests/cudnn_plans.rs`).
pub const SCRATCH: usize = 32 << 20;

/// What a convolution computes of y = x * w.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// y from x and w.
    Forward,
    /// d_x from d_y and w.
    DataGradient,
    /// d_w from x and d_y.
    WeightGradient,
}

/// A convolution; x is `[n][h][w][c_in]`, w `[c_out][kh][kw][c_in]`, y `[n][oh][ow][c_out]`, zero padding, no flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Convolution {
    /// What is computed.
    pub direction: Direction,
    /// Images.
    pub n: usize,
    /// Height of x.
    pub h: usize,
    /// Width of x.
    pub w: usize,
    /// Channels of x.
    pub c_in: usize,
    /// Channels of y.
    pub c_out: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal padding, on both sides.
    pub padding: [usize; 2],
    /// Element type of x, w and y; d_w is float32 always.
    pub dtype: DType,
}

impl Convolution {
    /// Height of y.
    pub fn oh(&self) -> usize {
        (self.h + 2 * self.padding[0] - self.kernel[0]) / self.stride[0] + 1
    }

    /// Width of y.
    pub fn ow(&self) -> usize {
        (self.w + 2 * self.padding[1] - self.kernel[1]) / self.stride[1] + 1
    }

    /// The same as a matrix product, which it is for 1x1 kernels that leave nothing out.
    pub fn as_product(&self) -> Option<Product> {
        if self.kernel != [1, 1] || self.stride != [1, 1] || self.padding != [0, 0] {
            return None;
        }
        let (rows, dtype) = (self.n * self.h * self.w, self.dtype);
        let product = |[m, n, k]: [usize; 3], [a_transposed, b_transposed]: [bool; 2], out| Product {
            m,
            n,
            k,
            a_transposed,
            b_transposed,
            bias: false,
            dtype,
            out,
        };
        Some(match self.direction {
            Direction::Forward => product([rows, self.c_out, self.c_in], [false, true], dtype),
            Direction::DataGradient => product([rows, self.c_in, self.c_out], [false, false], dtype),
            // Of the operands x and d_y, d_y is A: see `Work`.
            Direction::WeightGradient => product([self.c_out, self.c_in, rows], [true, false], DType::F32),
        })
    }
}

/// C = A B, or C = A B + bias: A is m x k, B k x n, C m x n, all row-major; a transposed one is stored as its transpose. Sums
/// are in float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Product {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Whether A is stored as `[k][m]`.
    pub a_transposed: bool,
    /// Whether B is stored as `[n][k]`.
    pub b_transposed: bool,
    /// Whether a float32 value per column is added.
    pub bias: bool,
    /// Element type of A and B.
    pub dtype: DType,
    /// Element type of C: that of A and B, or float32.
    pub out: DType,
}

/// A piece of work. Its operands are, in order: x, w (forward); d_y, w (data gradient); x, d_y (weight gradient); A, B.
/// When a weight gradient becomes a product, A is its second operand and B its first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// cuDNN, or cuBLASLt where it is a product and faster.
    Convolution(Convolution),
    /// cuBLASLt.
    Product(Product),
}

impl Work {
    /// Bytes of workspace: [`SCRATCH`], and where a result has to be made elsewhere first, room for it after that.
    pub fn workspace(&self, accumulate: bool) -> usize {
        SCRATCH + self.staging(accumulate)
    }

    /// Bytes of a result that a library cannot bring to its place: weight gradients of 16-bit tensors, which cuDNN does not
    /// widen; data gradients to be added to others, unless they are products, which can add.
    pub fn staging(&self, accumulate: bool) -> usize {
        let Work::Convolution(c) = self else { return 0 };
        match c.direction {
            Direction::Forward => 0,
            Direction::DataGradient if accumulate && c.as_product().is_none() => {
                c.n * c.h * c.w * c.c_in * c.dtype.size()
            }
            Direction::DataGradient => 0,
            Direction::WeightGradient if c.dtype == DType::F32 && !accumulate => 0,
            Direction::WeightGradient => c.c_out * c.kernel[0] * c.kernel[1] * c.c_in * c.dtype.size(),
        }
    }
}

/// Where the tensors of a piece of work lie.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// The two inputs, in the order that [`Work`] says.
    pub inputs: [DevicePtr; 2],
    /// The bias of a product that has one, else NULL.
    pub bias: DevicePtr,
    /// The result.
    pub out: DevicePtr,
    /// Whether it is added to what is there.
    pub accumulate: bool,
    /// Scratch of [`Work::workspace`] bytes, at a multiple of 256 bytes.
    pub workspace: DevicePtr,
}

/// How algorithms are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Choice {
    /// Whether float32 operands may be rounded to TF32.
    pub tf32: bool,
    /// Time every candidate that the heuristics name, instead of only cuDNN's first against cuBLASLt's first.
    pub autotune: bool,
}

/// cuDNN and cuBLASLt on one device.
pub trait Libraries: Debug + Send + Sync {
    /// Chooses an algorithm for `work`. Candidates may be run on `operands`, whose content is lost.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] when no algorithm can do it.
    ///
    /// # Safety
    /// The operands are memory of this device, as large as `work` says.
    unsafe fn prepare(&self, work: &Work, operands: &Operands, choice: Choice) -> Result<Box<dyn Prepared>>;

    /// Keeps what was chosen for the next run on this machine.
    ///
    /// # Errors
    /// A file that cannot be written.
    fn remember(&self) -> Result<()>;
}

/// A piece of work with its algorithm.
pub trait Prepared: Debug + Send + Sync {
    /// The algorithm, for people: `cuDNN engine 62` or `cuBLASLt`.
    fn algorithm(&self) -> String;

    /// Starts it on the compute stream; may be captured.
    ///
    /// # Errors
    /// What the library refuses.
    ///
    /// # Safety
    /// The operands are memory of this device, as large as the work that this was prepared for says, and `accumulate` is as
    /// it was then.
    unsafe fn run(&self, operands: &Operands) -> Result<()>;
}
