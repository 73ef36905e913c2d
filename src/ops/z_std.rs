//! The collapse figure of the paper (section 4.1): the standard deviation of the l2-normalised output.

use crate::backend::cpu::{CpuIo, Real};
use crate::error::{Error, Result};
use crate::graph::Op;
use crate::graph::op::dispatch_real;
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
}

/// `sums` holds the mean and the squared deviation of each dimension, updated row by row (Welford 1962).
fn mean_std<T: Real>(z: &[T], d: usize, sums: &mut [f64]) -> f64 {
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
