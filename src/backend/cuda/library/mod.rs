//! What NVIDIA's libraries compute for the engine: convolutions (cuDNN) and matrix products (cuBLASLt), described in words of
//! the backend.
#![allow(unsafe_code)] // declares launches, whose conditions callers discharge

pub mod cache;
mod choose;
pub mod cublaslt;
pub mod cudnn;
mod installed;
mod measure;
pub mod search;
mod table;

pub use choose::{CudaLibraries, graph, limits};
pub use installed::{Installed, installed};
pub use measure::Measured;

use std::fmt::Debug;

use crate::backend::conv::ConvGeometry;
use crate::error::Result;
use crate::tensor::DType;

use super::{DevicePtr, Driver};

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

/// What a convolution computes besides, in the same pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fused {
    /// Nothing.
    #[default]
    Nothing,
    /// Of y (forward): the sum and the sum of squares of each channel, for each of so many equal parts of the batch.
    Statistics {
        /// Parts; n is a multiple of it.
        groups: usize,
    },
    /// Of d_x (data gradient): its sum with another tensor.
    Addition,
}

/// A convolution; x is `[n][h][w][c_in]`, w `[c_out][kh][kw][c_in]`, y `[n][oh][ow][c_out]`, zero padding, no flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Convolution {
    /// What is computed.
    pub direction: Direction,
    /// Of what sizes.
    pub geometry: ConvGeometry,
    /// Element type of x, w and y; d_w is float32 always.
    pub dtype: DType,
    /// What is computed with it.
    pub fused: Fused,
}

impl Convolution {
    /// One that computes nothing besides.
    pub fn new(direction: Direction, geometry: ConvGeometry, dtype: DType) -> Convolution {
        Convolution { direction, geometry, dtype, fused: Fused::Nothing }
    }

    /// The same as a matrix product, which it is for 1x1 kernels that leave nothing out, when nothing is fused with it.
    pub fn as_product(&self) -> Option<Product> {
        if self.fused != Fused::Nothing {
            return None;
        }
        let ConvGeometry { n, h, w, c_in, c_out, kernel, stride, padding } = self.geometry;
        if kernel != [1, 1] || stride != [1, 1] || padding != [0, 0] {
            return None;
        }
        let (rows, dtype) = (n * h * w, self.dtype);
        Some(match self.direction {
            Direction::Forward => Product::new([rows, c_out, c_in], [false, true], dtype, dtype),
            Direction::DataGradient => Product::new([rows, c_in, c_out], [false, false], dtype, dtype),
            // Of the operands x and d_y, d_y is A: see `Work`.
            Direction::WeightGradient => Product::new([c_out, c_in, rows], [true, false], dtype, DType::F32),
        })
    }
}

/// C = act(A B + bias + addend), once or for each of several groups of matrices that lie one after the other: A is m x k, B
/// k x n, C m x n, all row-major; a transposed one is stored as its transpose. Sums are in float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Product {
    /// How many products.
    pub groups: usize,
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
    /// Whether there is but one A, and but one B, for all groups.
    pub shared: [bool; 2],
    /// Whether a float32 value per column is added, in each group its own.
    pub bias: bool,
    /// Whether a tensor like C is added.
    pub addend: bool,
    /// Whether what is below zero becomes zero.
    pub relu: bool,
    /// Whether float32 operands must not be rounded to TF32.
    pub exact: bool,
    /// Element type of A and B.
    pub dtype: DType,
    /// Element type of C: that of A and B, or float32.
    pub out: DType,
}

impl Product {
    /// C = A B, of sizes `[m, n, k]`; whether A and B are transposed, their element type, and that of C.
    pub fn new([m, n, k]: [usize; 3], transposed: [bool; 2], dtype: DType, out: DType) -> Product {
        let [a_transposed, b_transposed] = transposed;
        let (shared, [bias, addend, relu, exact]) = ([false; 2], [false; 4]);
        Product { groups: 1, m, n, k, a_transposed, b_transposed, shared, bias, addend, relu, exact, dtype, out }
    }

    /// Elements from a group's A, B and C to the next one's.
    fn strides(&self) -> [usize; 3] {
        let unless = |shared: bool, elements| if shared { 0 } else { elements };
        [unless(self.shared[0], self.m * self.k), unless(self.shared[1], self.k * self.n), self.m * self.n]
    }

    /// The bias and the addend of what is added.
    fn added(&self, added: [DevicePtr; 2]) -> [DevicePtr; 2] {
        match (self.bias, self.addend) {
            (true, _) => added,
            (false, true) => [DevicePtr::NULL, added[0]],
            (false, false) => [DevicePtr::NULL; 2],
        }
    }
}

/// A piece of work. Its operands are, in order: x, w (forward); d_y, w (data gradient); x, d_y (weight gradient); A, B; then
/// what is added, if anything is: a product's bias, a tensor.
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
    /// The same as a matrix product, where it is one.
    pub fn as_product(&self) -> Option<Product> {
        match self {
            Work::Convolution(convolution) => convolution.as_product(),
            Work::Product(product) => Some(*product),
        }
    }

    /// Bytes of workspace: [`SCRATCH`], and after it room for what has to be converted.
    pub fn workspace(&self) -> usize {
        SCRATCH + self.staging()
    }

    /// Bytes of what has to be converted before or after, at [`SCRATCH`] in the workspace: weight gradients of 16-bit tensors,
    /// which no engine of cuDNN's widens; the bias of a 16-bit result, which cuBLASLt takes in that type alone.
    pub fn staging(&self) -> usize {
        match self {
            Work::Convolution(c) if c.direction == Direction::WeightGradient && c.dtype != DType::F32 => {
                c.geometry.w_len() * c.dtype.size()
            }
            Work::Product(p) if p.bias && p.out != DType::F32 => p.groups * p.n * p.out.size(),
            _ => 0,
        }
    }

    /// Of [`Work::staging`], what is written and read whichever library is chosen: cuBLASLt widens a weight gradient by itself.
    pub fn converted(&self) -> usize {
        match self {
            Work::Convolution(convolution) if convolution.as_product().is_some() => 0,
            _ => self.staging(),
        }
    }
}

/// Where the tensors of a piece of work lie.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// The two inputs, in the order that [`Work`] says.
    pub inputs: [DevicePtr; 2],
    /// What is added to the result: the bias of a product, then its addend or the tensor of [`Fused::Addition`]; those that
    /// there are come first, then NULL.
    pub added: [DevicePtr; 2],
    /// The result.
    pub out: DevicePtr,
    /// The sums of [`Fused::Statistics`], `[groups][2][c_out]` in float32, else NULL.
    pub sums: DevicePtr,
    /// Whether it is added to what is there.
    pub accumulate: bool,
    /// Scratch of [`Work::workspace`] bytes, at a multiple of 256 bytes.
    pub workspace: DevicePtr,
}

/// How algorithms are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub struct Choice {
    /// Whether float32 operands may be rounded to TF32.
    pub tf32: bool,
    /// Time every candidate that the heuristics name, instead of only the first few of each library.
    pub autotune: bool,
}

/// cuDNN and cuBLASLt on one device.
pub trait Libraries: Debug + Send + Sync {
    /// Chooses an algorithm for `work`, the one that was chosen before where there is one. Candidates are run on `operands`,
    /// on the compute stream of `driver`, whose libraries these are: the content of the result and of the workspace is lost.
    /// What is returned has run once.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] when no algorithm can do it.
    ///
    /// # Safety
    /// The operands are memory of this device, as large as `work` says.
    unsafe fn prepare(
        &self,
        driver: &dyn Driver,
        work: &Work,
        operands: &Operands,
        choice: Choice,
    ) -> Result<Box<dyn Prepared>>;

    /// Keeps what was chosen for the next run on this machine. A file that cannot be written is told of in the log.
    fn remember(&self);
}

/// A piece of work with its algorithm.
pub trait Prepared: Debug + Send + Sync {
    /// The algorithm, for people: `cuDNN engine 62` or `cuBLASLt`.
    fn algorithm(&self) -> String;

    /// Starts it on the compute stream of `driver`, the one that it was prepared on; may be captured.
    ///
    /// # Errors
    /// What the library refuses.
    ///
    /// # Safety
    /// The operands are memory of this device, as large as the work that this was prepared for says, and `accumulate` is as
    /// it was then.
    unsafe fn run(&self, driver: &dyn Driver, operands: &Operands) -> Result<()>;
}
