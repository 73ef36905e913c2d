//! Kernels that do nothing but one thing as fast as the device can: what other kernels are measured against.
#![allow(unsafe_code)] // launches

use super::kernel::kernels;
use super::{DevicePtr, DeviceTensor, Driver, Grid};
use crate::error::{Error, Result};
use crate::tensor::DType;

kernels! { "ceilings";
    /// to = from
    fn ceiling_copy[; 256](from: DevicePtr, to: DevicePtr, n: i64);
    /// Fused multiply-adds in float32
    fn ceiling_fma[; 256](out: DevicePtr, rounds: i32);
    /// Products of 16x16 and 16x8 in bf16, in registers
    fn ceiling_mma_bf16[; 256](out: DevicePtr, rounds: i32);
}

const THREADS: usize = 256;
const WARP: usize = 32;
/// Independent chains of a thread or warp, as in kernels/ceilings.cu.
const CHAINS: usize = 8;

/// Copies a float32 tensor to one of the same size; returns the bytes moved, read and written.
///
/// # Errors
/// [`Error::Shape`] for tensors that do not match; a launch that the device refuses.
pub fn copy(driver: &dyn Driver, from: DeviceTensor<'_>, to: DeviceTensor<'_>) -> Result<u64> {
    if from.desc != to.desc || from.desc.dtype != DType::F32 {
        return Err(Error::shape("ceiling", "to", format!("{} in f32", from.desc.shape), to.desc));
    }
    let n = from.desc.shape.len();
    // SAFETY: both tensors have `n` float32.
    unsafe { driver.launch(Grid::packs(n, DType::F32), ceiling_copy(from.ptr, to.ptr, n as i64))? };
    Ok(2 * from.desc.bytes() as u64)
}

/// `rounds` of float32 multiply-adds in as many threads as `out`, a float32 tensor, has elements (whole blocks of 256 of
/// them); returns the floating-point operations. `out` becomes 16 where 25 rounds or more were made.
///
/// # Errors
/// [`Error::Shape`] for another element type; a launch that the device refuses.
pub fn fma(driver: &dyn Driver, out: DeviceTensor<'_>, rounds: u32) -> Result<u64> {
    let grid = grid(out)?;
    // SAFETY: each thread writes the element of its number, and the grid has no more threads than `out` elements.
    unsafe { driver.launch(grid, ceiling_fma(out.ptr, rounds as i32))? };
    let threads = u64::from(grid.blocks[0]) * THREADS as u64;
    Ok(threads * u64::from(rounds) * (2 * CHAINS) as u64)
}

/// `rounds` of bf16 products on the tensor cores, as [`fma`]; `out` becomes `64 rounds`.
///
/// # Errors
/// As [`fma`].
pub fn mma_bf16(driver: &dyn Driver, out: DeviceTensor<'_>, rounds: u32) -> Result<u64> {
    let grid = grid(out)?;
    // SAFETY: as in `fma`.
    unsafe { driver.launch(grid, ceiling_mma_bf16(out.ptr, rounds as i32))? };
    let warps = u64::from(grid.blocks[0]) * (THREADS / WARP) as u64;
    Ok(warps * u64::from(rounds) * (CHAINS * 2 * 16 * 16 * 8) as u64)
}

/// A thread for every element of `out`, in whole blocks.
fn grid(out: DeviceTensor<'_>) -> Result<Grid> {
    let blocks = out.desc.shape.len() / THREADS;
    if blocks == 0 || out.desc.dtype != DType::F32 {
        return Err(Error::shape("ceiling", "out", format!("f32, at least {THREADS} elements"), out.desc));
    }
    Ok(Grid::new([blocks as u32, 1, 1]))
}
