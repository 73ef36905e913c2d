//! Batch norm with the max pooling of the stem on CUDA: statistics and sums as in batch norm, kernels of its own around them.
#![allow(unsafe_code)] // launches

use bytemuck::NoUninit;

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::{Error, Result};
use crate::ops::row_tiles::{RowTiles, Rows};
use crate::tensor::TensorDesc;

use super::super::cuda::{
    Affine, Statistics, Sums, finish_backward, known_statistics, partials_bytes, statistics, workspace_bytes,
};
use super::super::{BatchNorm, BatchNormBackward};
use super::Windows;

kernels! { "batch_norm_pool";
    /// y = the maximum of each window behind batch norm and ReLU; the positions that were taken
    fn batch_norm_max_pool[F32, Bf16, F16; 256](
        x: DevicePtr, mean: DevicePtr, scale: DevicePtr, beta: DevicePtr, y: DevicePtr, taken: DevicePtr,
        pooling: StemPooling,
    );
    /// Partial sums of the gathered gradient and of its product with x - mean
    fn batch_norm_max_pool_reduce[F32, Bf16, F16; 256](
        d_y: DevicePtr, taken: DevicePtr, x: DevicePtr, mean: DevicePtr, partials: DevicePtr, pooling: StemPooling,
        tiles: RowTiles,
    );
    /// d_x
    fn batch_norm_max_pool_backward[F32, Bf16, F16; 256](
        d_y: DevicePtr, taken: DevicePtr, x: DevicePtr, mean: DevicePtr, coefficients: DevicePtr, all: i64,
        d_x: DevicePtr, accumulate: i32, pooling: StemPooling, tiles: RowTiles,
    );
}

/// `StemPooling` of `kernels/batch_norm_pool.cu`.
#[derive(Debug, Clone, Copy, NoUninit)]
#[repr(C)]
struct StemPooling {
    images: i64,
    of_group: i32,
    h: i32,
    w: i32,
    c: i32,
    oh: i32,
    ow: i32,
}

impl StemPooling {
    fn new(windows: Windows, x: &TensorDesc, groups: usize) -> Result<StemPooling> {
        let Windows { h, w, c } = windows;
        let images = x.shape.dims()[0];
        // The kernels count pixels, and the elements of an image, in 32 bits.
        if (images * h * w).max((h + 2) * (w + 2) * c) > i32::MAX as usize {
            let what = format!("batch_norm_max_pool on CUDA of {}", x.shape);
            return Err(Error::Unsupported { what, hint: Some("use a smaller batch".into()) });
        }
        let [of_group, h, w, c, oh, ow] = [images / groups, h, w, c, windows.oh(), windows.ow()].map(|n| n as i32);
        Ok(StemPooling { images: images as i64, of_group, h, w, c, oh, ow })
    }
}

pub(super) fn forward(op: &BatchNorm, windows: Windows, io: &CudaIo<'_>) -> Result<()> {
    let pooling = StemPooling::new(windows, io.inputs[0].desc, op.groups)?;
    let rows = Rows::new(io.inputs[0].desc, op.groups);
    let statistics = statistics(op, &rows, io, 1)?;
    // SAFETY: `infer` made y and `taken`, outputs 0 and 3, and the statistics are [groups, channels].
    unsafe { apply(pooling, statistics, [0, 3], io) }
}

/// Writes y and what was taken, the outputs of these numbers, from x, the first input.
///
/// # Safety
/// They are of the same images and channels as x with oh x ow positions, and the statistics are those of its groups.
unsafe fn apply(pooling: StemPooling, by: Statistics, [y, taken]: [usize; 2], io: &CudaIo<'_>) -> Result<()> {
    let (y, taken, Statistics { mean, scale, beta }) = (&io.outputs[y], io.outputs[taken].ptr, by);
    let call = batch_norm_max_pool(io.dtype(), io.inputs[0].ptr, mean, scale, beta, y.ptr, taken, pooling);
    // SAFETY: the sizes are those of x; the rest is the caller's promise.
    unsafe { io.launch(Grid::packs(y.desc.shape.len().div_ceil(2), io.dtype()), call) }
}

/// The same from statistics that are known: inputs x, mean, rstd, gamma and beta; outputs y and what was taken.
pub(in super::super) fn repeat(windows: Windows, groups: usize, io: &CudaIo<'_>) -> Result<()> {
    let pooling = StemPooling::new(windows, io.inputs[0].desc, groups)?;
    let statistics = known_statistics(true, groups, io)?;
    // SAFETY: `infer` made y and `taken`, outputs 0 and 1, and checked that the statistics are [groups, channels].
    unsafe { apply(pooling, statistics, [0, 1], io) }
}

/// Quads of pixels, two by two, as rows of channels: what a thread of the gradient's kernels takes at once.
fn quads(windows: Windows, x: &TensorDesc, groups: usize) -> Rows {
    let quads = x.shape.dims()[0] / groups * windows.oh() * windows.ow();
    Rows { rows: quads, ..Rows::new(x, groups) }
}

/// Scratch of the gradient: as batch norm's.
pub(super) fn backward_workspace(windows: Windows, x: &TensorDesc, groups: usize) -> usize {
    workspace_bytes(&quads(windows, x, groups), 3)
}

pub(super) fn backward(op: &BatchNormBackward, windows: Windows, io: &CudaIo<'_>) -> Result<()> {
    let x = &io.inputs[1];
    let pooling = StemPooling::new(windows, x.desc, op.groups)?;
    let quads = quads(windows, x.desc, op.groups);
    let dtype = io.dtype();
    let [d_y, x, mean, _, _, taken] = [0, 1, 2, 3, 4, 5].map(|i| io.inputs[i].ptr);
    let (partials, coefficients) = (io.workspace, io.workspace.offset(partials_bytes(&quads)));

    let tiles = quads.summing();
    let call = batch_norm_max_pool_reduce(dtype, d_y, taken, x, mean, partials, pooling, tiles);
    // SAFETY: the sizes and tiles are those of x; d_y and `taken` are like the forward op's y, mean is its [groups, channels];
    // `backward_workspace` counted two sums for each channel of the tiles.
    unsafe { io.launch(quads.grid(tiles), call)? };

    let rows = Rows::new(io.inputs[1].desc, op.groups).rows;
    let sums = Sums { rows, summed: &quads, partials, coefficients };
    finish_backward(sums, Affine { rstd: 3, gamma: Some(4), d_gamma: 1 }, io)?;

    let (tiles, d_x) = (quads.streaming(), &io.outputs[0]);
    let (all, accumulate) = ((quads.groups * quads.channels) as i64, i32::from(d_x.accumulate));
    let call = batch_norm_max_pool_backward(
        dtype,
        d_y,
        taken,
        x,
        mean,
        coefficients,
        all,
        d_x.ptr,
        accumulate,
        pooling,
        tiles,
    );
    // SAFETY: as for the first pass; `infer` made d_x like x, and the coefficients are there.
    unsafe { io.launch(quads.grid(tiles), call) }
}
