//! Sums of the columns of each group of rows, and their means.

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::Result;
use crate::graph::op::dispatch_real;
use crate::graph::{Again, Op};
use crate::ops::batch_norm::sums::{group_sums, workspace_bytes};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::TensorDesc;

/// The sums of each group's columns, in the type of weights.
pub(super) fn sums_desc(x: &TensorDesc, groups: usize) -> TensorDesc {
    TensorDesc::new([groups, x.shape.channels()], gradient_dtype(x.dtype))
}

/// Sums of the columns of each group of x, times `factor`.
fn column_sums<T: Real>(io: &mut CpuIo<'_>, groups: usize, factor: f64) {
    let (desc, x) = (io.inputs[0].desc, io.inputs[0].get::<T>());
    let (rows, channels) = (desc.shape.rows() / groups, desc.shape.channels());
    let sums = group_sums::<T, 1>(io.workspace, (groups, rows, channels), |_, row, [sums], _| {
        sums.iter_mut().zip(&x[row * channels..]).for_each(|(sum, x)| *sum += *x);
    });
    io.outputs[0].get::<T>().iter_mut().zip(&sums).for_each(|(out, sum)| *out = T::of(sum * factor));
}

/// The sums of the columns of each group, or their means: input x, output `[groups, c]`. Made for who has a gradient of the
/// whole; there is none here.
#[derive(Debug, Clone, Copy)]
pub struct GroupSums {
    /// Groups.
    pub groups: usize,
    /// Whether sums are divided by the number of rows.
    pub means: bool,
}

impl GroupSums {
    /// What a sum is multiplied by.
    fn factor(&self, x: &TensorDesc) -> f64 {
        if self.means { self.groups as f64 / x.shape.rows() as f64 } else { 1.0 }
    }
}

impl Op for GroupSums {
    fn name(&self) -> &'static str {
        if self.means { "group_means" } else { "group_sums" }
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        Ok(vec![sums_desc(inputs[0], self.groups)])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn again(&self) -> Again {
        Again::Never
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        workspace_bytes(1, inputs[0].shape.channels(), self.groups)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let factor = self.factor(io.inputs[0].desc);
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => column_sums::<T>(io, self.groups, factor));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::partials_bytes(inputs[0], self.groups)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::sums(io, self.groups, self.factor(io.inputs[0].desc))
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::ops::row_tiles::{RowTiles, Rows};
    use crate::tensor::TensorDesc;

    kernels! { "group_sums";
        /// Partial sums of the columns of x
        fn group_sums[F32, Bf16, F16; 256](x: DevicePtr, partials: DevicePtr, tiles: RowTiles);
        /// Adds partial sums up, times a factor
        fn group_sums_finish[; 256](partials: DevicePtr, chunks: i32, channels: i32, factor: f64, sums: DevicePtr);
    }

    /// Scratch for a sum of each channel and tile.
    pub fn partials_bytes(x: &TensorDesc, groups: usize) -> usize {
        let rows = Rows::new(x, groups);
        groups * rows.chunks(rows.summing()) * rows.channels * size_of::<f32>()
    }

    /// Sums of the columns of input 0 over the rows of each group, times `factor`, into output 0.
    pub fn sums(io: &CudaIo<'_>, groups: usize, factor: f64) -> Result<()> {
        let rows = Rows::new(io.inputs[0].desc, groups);
        let tiles = rows.summing();
        let call = group_sums(io.dtype(), io.inputs[0].ptr, io.workspace, tiles);
        // SAFETY: the tiles are those of x, and `cuda_workspace` counted a sum for each of their channels.
        unsafe { io.launch(rows.grid(tiles), call)? };
        // SAFETY: the launch before filled a sum of each channel and tile; `infer` made the result [groups, channels].
        unsafe { finish(io, &rows, io.workspace, factor, io.outputs[0].ptr) }
    }

    /// Adds up the partial sums of the `rows.summing()` tiles, times `factor`, into `sums` `[groups, channels]`.
    ///
    /// # Errors
    /// As `CudaIo::launch`.
    ///
    /// # Safety
    /// `partials` has a float32 for each channel of each of these tiles, and `sums` one for each group and channel.
    pub unsafe fn finish(
        io: &CudaIo<'_>,
        rows: &Rows,
        partials: DevicePtr,
        factor: f64,
        sums: DevicePtr,
    ) -> Result<()> {
        let (chunks, channels) = (rows.chunks(rows.summing()) as i32, rows.channels as i32);
        let call = group_sums_finish(partials, chunks, channels, factor, sums);
        let grid = Grid::new([rows.channels.div_ceil(32) as u32, rows.groups as u32, 1]);
        // SAFETY: the caller's promise.
        unsafe { io.launch(grid, call) }
    }
}
