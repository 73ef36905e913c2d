//! The covariance of z from sums of products of its columns.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Again, GradBuilder, Op};
use crate::ops::batch_norm::sums::block_rows;
use crate::tensor::TensorDesc;

use super::{cuda, expect, master_desc};

/// `y = x - mean`: inputs x and its means `[groups, c]`. For ops to which a constant makes no difference.
#[derive(Debug, Clone, Copy)]
pub(super) struct Centre {
    pub groups: usize,
}

impl Op for Centre {
    fn name(&self) -> &'static str {
        "centre"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let x = inputs[0];
        expect("centre", "mean", inputs[1], &master_desc(&[self.groups, x.shape.channels()], x.dtype))?;
        Ok(vec![x.clone()])
    }

    /// What follows does not depend on the mean, so that its gradient is that of x as it is.
    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        g.pass(0, d_y)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("centre", io.inputs[0].desc.dtype, T => {
            let channels = io.inputs[0].desc.shape.channels();
            let (x, mean) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let group = x.len() / self.groups;
            let block = block_rows(group / channels) * channels;
            let groups = io.outputs[0].get::<T>().chunks_mut(group).zip(x.chunks(group)).zip(mean.chunks(channels));
            groups.for_each(|((y, x), mean)| {
                y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
                    for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                        y.iter_mut().zip(x).zip(mean).for_each(|((y, x), mean)| *y = *x - *mean);
                    }
                });
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::centre(io, self.groups)
    }
}

/// The covariance of the columns of z, `[groups, c, c]`: inputs sums `[groups x splits, c, c]` of products of pairs of columns
/// over parts of each group, and the means `[groups, c]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Covariance {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    /// Whether the columns were centred before they were multiplied; else the means are taken off here.
    pub centred: bool,
}

impl Op for Covariance {
    fn name(&self) -> &'static str {
        "covariance"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [parts, rows, c] = inputs[0].shape.expect("covariance", "sums")?;
        if rows != c || !parts.is_multiple_of(self.groups) {
            let expected = format!("squares, in a multiple of {} groups", self.groups);
            return Err(Error::shape("covariance", "sums", expected, &inputs[0].shape));
        }
        expect("covariance", "mean", inputs[1], &master_desc(&[self.groups, c], inputs[0].dtype))?;
        Ok(vec![master_desc(&[self.groups, c, c], inputs[0].dtype)])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn again(&self) -> Again {
        Again::Never
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("covariance", io.inputs[0].desc.dtype, T => self.compute::<T>(io));
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::covariance(io, self)
    }
}

impl Covariance {
    fn compute<T: Real>(&self, io: &mut CpuIo<'_>) {
        let c = io.inputs[0].desc.shape.channels();
        let (sums, mean) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
        let rows = self.rows as f64;
        let groups = sums.chunks(sums.len() / self.groups).zip(mean.chunks(c));
        for (covariance, (sums, mean)) in io.outputs[0].get::<T>().chunks_mut(c * c).zip(groups) {
            covariance.par_chunks_mut(c).enumerate().for_each(|(i, covariance)| {
                for (j, out) in covariance.iter_mut().enumerate() {
                    let sum: f64 = sums.chunks(c * c).map(|part| part[i * c + j].to_f64()).sum();
                    let of_means = if self.centred { 0.0 } else { mean[i].to_f64() * mean[j].to_f64() };
                    *out = T::of(sum / rows - of_means);
                }
            });
        }
    }
}
