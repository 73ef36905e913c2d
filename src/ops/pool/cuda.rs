//! Pooling on CUDA.
#![allow(unsafe_code)] // launches

use bytemuck::NoUninit;

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::{Error, Result};
use crate::ops::row_tiles::{RowTiles, Rows};
use crate::tensor::{DType, TensorDesc};

use super::{Geometry, MaxPool};

kernels! { "pool";
    /// y = the maximum of each window; the positions that were taken, where they are wanted
    fn max_pool[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, taken: DevicePtr, pooling: Pooling);
    /// d_x = the sum of d_y over the windows that took a position
    fn max_pool_backward[F32, Bf16, F16; 128](
        d_y: DevicePtr, taken: DevicePtr, d_x: DevicePtr, accumulate: i32, pooling: Pooling,
    );
    /// y = the mean over pixels
    fn global_avg_pool[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, tiles: RowTiles);
    /// d_x = d_y / pixels
    fn global_avg_pool_backward[F32, Bf16, F16; 256](d_y: DevicePtr, d_x: DevicePtr, accumulate: i32, tiles: RowTiles);
}

/// `Pooling` of `kernels/pool.cu`.
#[derive(Debug, Clone, Copy, NoUninit)]
#[repr(C)]
struct Pooling {
    images: i64,
    h: i32,
    w: i32,
    c: i32,
    oh: i32,
    ow: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
}

impl Pooling {
    fn new(op: &MaxPool, g: Geometry, x: &TensorDesc) -> Result<Pooling> {
        // The kernels count the elements of an image, and the positions around it, in 32 bits.
        if (g.h + op.kernel) * (g.w + op.kernel) * g.c > i32::MAX as usize {
            let what = format!("max_pool on CUDA of an image of {}x{} pixels with {} channels", g.h, g.w, g.c);
            return Err(Error::Unsupported { what, hint: None });
        }
        let [h, w, c, oh, ow] = [g.h, g.w, g.c, g.oh, g.ow].map(|n| n as i32);
        let [kernel, stride, padding] = [op.kernel, op.stride, op.padding].map(|n| n as i32);
        Ok(Pooling { images: x.shape.dims()[0] as i64, h, w, c, oh, ow, kernel, stride, padding })
    }
}

pub(super) fn max_pool_forward(op: &MaxPool, io: &CudaIo<'_>) -> Result<()> {
    let (x, y) = (&io.inputs[0], &io.outputs[0]);
    let pooling = Pooling::new(op, op.geometry(x.desc)?, x.desc)?;
    let taken = io.outputs.get(1).map_or(DevicePtr::NULL, |taken| taken.ptr);
    let call = max_pool(io.dtype(), x.ptr, y.ptr, taken, pooling);
    // SAFETY: the sizes are those of x, and `infer` made y, and `taken` where there is one, of the same images and channels
    // with oh x ow pixels; without one the kernel is told so.
    unsafe { io.launch(Grid::packs(y.desc.shape.len(), io.dtype()), call) }
}

pub(super) fn max_pool_gradient(op: &MaxPool, io: &CudaIo<'_>) -> Result<()> {
    let (d_y, taken, d_x) = (&io.inputs[0], &io.inputs[1], &io.outputs[0]);
    let pooling = Pooling::new(op, op.geometry(d_x.desc)?, d_x.desc)?;
    let call = max_pool_backward(io.dtype(), d_y.ptr, taken.ptr, d_x.ptr, i32::from(d_x.accumulate), pooling);
    // SAFETY: the sizes are those of d_x, which is like the forward op's x; d_y is like its y, of oh x ow pixels, and `infer`
    // checked that `taken` is of the same shape.
    unsafe { io.launch(gradient_grid(d_x.desc.shape.len(), io.dtype()), call) }
}

/// Blocks of 128 threads for `n` elements of d_x, of which a thread takes 4 packs where the kernel works in quads.
fn gradient_grid(n: usize, dtype: DType) -> Grid {
    Grid::stride(n.div_ceil(4 * 16 / dtype.size()), 128)
}

/// Each image is a group whose rows are its pixels.
fn pixels(x: &TensorDesc) -> Rows {
    Rows::new(x, x.shape.dims()[0])
}

pub(super) fn average(io: &CudaIo<'_>) -> Result<()> {
    let rows = pixels(io.inputs[0].desc);
    let tiles = rows.whole_groups();
    let call = global_avg_pool(io.dtype(), io.inputs[0].ptr, io.outputs[0].ptr, tiles);
    // SAFETY: the tiles are those of x, and `infer` made y [images, channels].
    unsafe { io.launch(rows.grid(tiles), call) }
}

pub(super) fn average_gradient(io: &CudaIo<'_>) -> Result<()> {
    let d_x = &io.outputs[0];
    let rows = pixels(d_x.desc);
    let tiles = rows.streaming();
    let call = global_avg_pool_backward(io.dtype(), io.inputs[0].ptr, d_x.ptr, i32::from(d_x.accumulate), tiles);
    // SAFETY: the tiles are those of d_x, which `infer` made of d_y's [images, channels] with pixels between.
    unsafe { io.launch(rows.grid(tiles), call) }
}
