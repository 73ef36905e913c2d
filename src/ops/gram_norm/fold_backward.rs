//! The gradients of weight, gamma and beta, and what is left for that of the input.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::Op;
use crate::graph::op::dispatch_real;
use crate::tensor::TensorDesc;

use super::{cuda, expect, master_desc};

/// Inputs R = g^T z in parts of each group, `[groups x splits, c_out, c_in]`, s = sum g `[groups, c_out]`, mean of z
/// `[groups, c_in]`, T = w S `[groups, c_out, c_in]`, w `[c_out, 1, 1, c_in]`, gamma `[c_out]`, rstd `[groups, c_out]`.
/// Outputs d_w, d_gamma, d_beta, and Q = -diag(gamma rstd^2 d_gamma / rows) w `[groups, c_out, c_in]` with each group's own
/// d_gamma.
#[derive(Debug, Clone, Copy)]
pub(super) struct FoldBackward {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    /// Whether z has a mean of 0, which is then nothing to be taken off R.
    pub centred: bool,
}

impl Op for FoldBackward {
    fn name(&self) -> &'static str {
        "fold_norm_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        const OP: &str = "fold_norm_backward";
        let (r, w, gamma) = (inputs[0], inputs[4], inputs[5]);
        let [parts, c_out, c_in] = r.shape.expect(OP, "r")?;
        let of = |dims: &[usize]| master_desc(dims, r.dtype);
        if !parts.is_multiple_of(self.groups) {
            return Err(Error::shape(OP, "first dimension of r", format!("a multiple of {}", self.groups), parts));
        }
        let (of_weights, of_channels) = (of(&[self.groups, c_out, c_in]), of(&[self.groups, c_out]));
        expect(OP, "s", inputs[1], &of_channels)?;
        expect(OP, "mean", inputs[2], &of(&[self.groups, c_in]))?;
        expect(OP, "t", inputs[3], &of_weights)?;
        expect(OP, "w", w, &of(&[c_out, 1, 1, c_in]))?;
        expect(OP, "gamma", gamma, &of(&[c_out]))?;
        expect(OP, "rstd", inputs[6], &of_channels)?;
        Ok(vec![w.clone(), gamma.clone(), gamma.clone(), of_weights])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("fold_norm_backward", io.inputs[0].desc.dtype, T => self.compute::<T>(io));
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::fold_backward(io, self)
    }
}

impl FoldBackward {
    fn compute<T: Real>(&self, io: &mut CpuIo<'_>) {
        let [parts, c_out, c_in] = [0, 1, 2].map(|i| io.inputs[0].desc.shape.dims()[i]);
        let (groups, splits, rows) = (self.groups, parts / self.groups, self.rows as f64);
        let [r, s, mean, t, w, gamma, rstd] = [0, 1, 2, 3, 4, 5, 6].map(|i| io.inputs[i].get::<T>());
        let accumulate = io.outputs[0].accumulate;
        // For each channel, d_gamma of each group.
        let d_gammas: Vec<Vec<f64>> = io.outputs[0]
            .get::<T>()
            .par_chunks_mut(c_in)
            .enumerate()
            .map(|(k, d_w)| {
                let w = &w[k * c_in..][..c_in];
                let mut total: Vec<f64> = d_w.iter().map(|d| if accumulate { d.to_f64() } else { 0.0 }).collect();
                let mut centred = vec![0.0; c_in];
                let of_group = |group: usize| {
                    let (i, mean) = (group * c_out + k, &mean[group * c_in..][..c_in]);
                    let s = if self.centred { 0.0 } else { s[i].to_f64() };
                    centred.iter_mut().zip(mean).for_each(|(centred, mean)| *centred = -s * mean.to_f64());
                    for split in 0..splits {
                        let part = &r[((group * splits + split) * c_out + k) * c_in..][..c_in];
                        centred.iter_mut().zip(part).for_each(|(centred, r)| *centred += r.to_f64());
                    }
                    let rstd = rstd[i].to_f64();
                    let d_gamma = rstd * centred.iter().zip(w).map(|(r, w)| r * w.to_f64()).sum::<f64>();
                    let scale = gamma[k].to_f64() * rstd;
                    let terms = total.iter_mut().zip(&centred).zip(&t[i * c_in..][..c_in]);
                    terms.for_each(|((total, r), t)| *total += scale * (r - rstd * d_gamma * t.to_f64()));
                    d_gamma
                };
                let d_gamma = (0..groups).map(of_group).collect();
                d_w.iter_mut().zip(&total).for_each(|(d, total)| *d = T::of(*total));
                d_gamma
            })
            .collect();
        let d_gamma: Vec<f64> = d_gammas.iter().map(|of_groups| of_groups.iter().sum()).collect();
        let d_beta: Vec<f64> = (0..c_out).map(|k| s[k..].iter().step_by(c_out).map(|s| s.to_f64()).sum()).collect();
        for (output, values) in [(1, d_gamma), (2, d_beta)] {
            let accumulate = io.outputs[output].accumulate;
            for (out, value) in io.outputs[output].get::<T>().iter_mut().zip(values) {
                *out = T::of(if accumulate { out.to_f64() + value } else { value });
            }
        }
        io.outputs[3].get::<T>().par_chunks_mut(c_in).enumerate().for_each(|(i, q)| {
            let (k, group, rstd) = (i % c_out, i / c_out, rstd[i].to_f64());
            let factor = -gamma[k].to_f64() * rstd * rstd * d_gammas[k][group] / rows;
            q.iter_mut().zip(&w[k * c_in..]).for_each(|(q, w)| *q = T::of(factor * w.to_f64()));
        });
    }
}
