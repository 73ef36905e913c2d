//! The collapse figure of the paper (section 4.1): the standard deviation of the l2-normalised output.

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Op, Tensors, Traffic};
use crate::tensor::TensorDesc;

/// Mean over dimensions of the unbiased standard deviation, over the rows, of `z / ||z||`. Input z `[m][d]`, output a
/// scalar: about `1 / sqrt(d)` when healthy, 0 when collapsed.
#[derive(Debug, Clone, Copy)]
pub struct ZStd;

impl Op for ZStd {
    fn name(&self) -> &'static str {
        "z_std"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [m, _] = inputs[0].shape.expect("z_std", "z")?;
        if m < 2 {
            return Err(Error::shape("z_std", "rows of z", "at least 2", m));
        }
        Ok(vec![TensorDesc::new([], super::conv2d::gradient_dtype(inputs[0].dtype))])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        2 * inputs[0].shape.channels() * size_of::<f64>()
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let d = io.inputs[0].desc.shape.channels();
        dispatch_real!("z_std", io.inputs[0].desc.dtype, T => {
            let std = mean_std(io.inputs[0].get::<T>(), d, bytemuck::cast_slice_mut(io.workspace));
            io.outputs[0].get::<T>()[0] = std as T;
        });
        Ok(())
    }

    /// z is read again once the norms of its rows are known.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        tensors.once().reading(tensors.inputs[0])
    }

    /// The reciprocal norm of each row, then what each tile of columns adds.
    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        (inputs[0].shape.rows() + cuda::column_tiles(inputs[0])) * size_of::<f32>()
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io)
    }
}

/// `sums` holds the mean and the squared deviation of each dimension, updated row by row (Welford 1962).
pub(super) fn mean_std<T: Real>(z: &[T], d: usize, sums: &mut [f64]) -> f64 {
    let (mean, deviation) = sums[..2 * d].split_at_mut(d);
    mean.fill(0.0);
    deviation.fill(0.0);
    for (row, z) in z.chunks_exact(d).enumerate() {
        let norm = z.iter().map(|v| v.to_f64().powi(2)).sum::<f64>().sqrt().max(1e-12);
        let count = (row + 1) as f64;
        for c in 0..d {
            let value = z[c].to_f64() / norm;
            let delta = value - mean[c];
            mean[c] += delta / count;
            deviation[c] += delta * (value - mean[c]);
        }
    }
    let rows = (z.len() / d) as f64;
    deviation.iter().map(|q| (q / (rows - 1.0)).sqrt()).sum::<f64>() / d as f64
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, DeviceTensor, Grid};
    use crate::error::Result;
    use crate::ops::row_teams::{Mean, count, row_grid, take_means};
    use crate::tensor::TensorDesc;

    kernels! { "z_std";
        /// 1 / max(|z|, 1e-12) of each row
        fn row_rnorms[F32, Bf16, F16; 256](z: DevicePtr, rnorm: DevicePtr, rows: i32, d: i32);
        /// the sum of the standard deviations of each tile of columns
        fn column_spreads[F32, Bf16, F16; 256](z: DevicePtr, rnorm: DevicePtr, spread: DevicePtr, rows: i32, d: i32);
    }

    /// Packs of columns in a tile, `TILE_PACKS` in the kernel.
    const TILE_PACKS: usize = 4;

    /// Tiles of columns of z: four packs of 16 bytes each where those divide a row, else of one element.
    pub fn column_tiles(z: &TensorDesc) -> usize {
        let (d, width) = (z.shape.channels(), 16 / z.dtype.size());
        d.div_ceil(TILE_PACKS * if d.is_multiple_of(width) { width } else { 1 })
    }

    /// Starts the computation of z std from the rows' reciprocal norms; it ends with the mean that is returned.
    ///
    /// # Safety `rnorm` holds a float for each row of the matrix z, `spreads` has room for one for each of its
    /// `column_tiles`, and `to` for one.
    pub unsafe fn spread(
        io: &CudaIo<'_>,
        z: DeviceTensor<'_>,
        rnorm: DevicePtr,
        spreads: DevicePtr,
        to: DevicePtr,
    ) -> Result<Mean> {
        let [rows, d] = z.desc.shape.expect("z_std", "z")?;
        let tiles = column_tiles(z.desc);
        let call = column_spreads(z.desc.dtype, z.ptr, rnorm, spreads, count(rows)?, count(d)?);
        // SAFETY: z is [rows][d] as just read; the rest is the caller's promise.
        unsafe { io.launch(Grid::new([tiles as u32, 1, 1]), call)? };
        Ok(Mean { of: spreads, n: tiles, per: d, to })
    }

    pub fn forward(io: &CudaIo<'_>) -> Result<()> {
        let z = io.inputs[0];
        let [rows, d] = z.desc.shape.expect("z_std", "z")?;
        let rnorm = io.workspace;
        let call = row_rnorms(z.desc.dtype, z.ptr, rnorm, count(rows)?, count(d)?);
        // SAFETY: `infer` checked that z is [rows][d]; the workspace begins with a float for each row.
        unsafe { io.launch(row_grid(rows, d), call)? };
        // SAFETY: the launch before wrote `rows` floats, behind which the workspace has room for one for each tile.
        let mean = unsafe { spread(io, z, rnorm, rnorm.offset(rows * size_of::<f32>()), io.outputs[0].ptr)? };
        // SAFETY: the spreads are written by the launch before, and the output is a scalar of float.
        unsafe { take_means(io, mean, None) }
    }
}
