//! The graph's own ops on a CUDA device.
#![allow(unsafe_code)] // launches

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::Result;

kernels! { "elementwise";
    /// y = value
    fn fill[F32, Bf16, F16; 256](y: DevicePtr, value: f32, n: i64);
    /// y = x, or y += x
    fn copy[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, n: i64, accumulate: i32);
    /// y = a + b
    fn add[F32, Bf16, F16; 256](a: DevicePtr, b: DevicePtr, y: DevicePtr, n: i64);
}

pub(super) fn constant(io: &CudaIo<'_>, value: f64) -> Result<()> {
    let y = &io.outputs[0];
    let n = y.desc.shape.len();
    let call = fill(y.desc.dtype, y.ptr, value as f32, n as i64);
    // SAFETY: y has `n` elements.
    unsafe { io.launch(Grid::packs(n, y.desc.dtype), call) }
}

pub(super) fn copy_or_add(io: &CudaIo<'_>) -> Result<()> {
    let (x, y) = (&io.inputs[0], &io.outputs[0]);
    let n = x.desc.shape.len();
    let call = copy(io.dtype(), x.ptr, y.ptr, n as i64, i32::from(y.accumulate));
    // SAFETY: `infer` made y like x, so both have `n` elements.
    unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
}

pub(super) fn sum(io: &CudaIo<'_>) -> Result<()> {
    let n = io.inputs[0].desc.shape.len();
    let call = add(io.dtype(), io.inputs[0].ptr, io.inputs[1].ptr, io.outputs[0].ptr, n as i64);
    // SAFETY: `infer` checked that a and b are alike and made y like them, so all have `n` elements.
    unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
}
