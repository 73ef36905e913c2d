//! What a CPU op is handed: typed slices of the arena.

use bytemuck::Pod;

use crate::tensor::TensorDesc;

/// A tensor that an op reads.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Shape and element type.
    pub desc: &'a TensorDesc,
    /// The elements, 64-byte aligned.
    pub bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// The elements. `T` must match `desc.dtype` in size; ops dispatch on the dtype before they call this.
    pub fn get<T: Pod>(&self) -> &'a [T] {
        bytemuck::cast_slice(self.bytes)
    }
}

/// A tensor that an op writes.
#[derive(Debug)]
pub struct Output<'a> {
    /// Shape and element type.
    pub desc: &'a TensorDesc,
    /// The elements, 64-byte aligned.
    pub bytes: &'a mut [u8],
    /// Whether to add to what is there instead of overwriting it (the planner's choice, see `Op::accumulates`).
    pub accumulate: bool,
}

impl Output<'_> {
    /// The elements. `T` must match `desc.dtype` in size.
    pub fn get<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes)
    }
}

/// Everything one node works on.
#[derive(Debug)]
pub struct CpuIo<'a> {
    /// Inputs, in the op's order.
    pub inputs: Vec<Input<'a>>,
    /// Outputs, in the op's order.
    pub outputs: Vec<Output<'a>>,
    /// Tensors changed in place, in the op's order.
    pub updates: Vec<Output<'a>>,
    /// Scratch of the size that the op declared; content undefined.
    pub workspace: &'a mut [u8],
    /// Which implementation to use where an op has several.
    pub tier: Tier,
}

/// The CPU implementations of expensive ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Plain loops with float64 accumulation: the oracle.
    Reference,
    /// Implicit GEMM in the tensor's own precision.
    #[default]
    Direct,
}
