//! Folds statistics, gamma and beta into the weight and a bias.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::Result;
use crate::graph::op::dispatch_real;
use crate::graph::{Again, Op};
use crate::ops::batch_norm::update_running;
use crate::tensor::{DType, TensorDesc};

use super::{cuda, expect, master_desc};

/// Inputs w `[c_out, 1, 1, c_in]`, T = w S `[groups, c_out, c_in]`, mean of z `[groups, c_in]`, gamma and beta `[c_out]`.
/// Outputs the folded weight F = gamma rstd o w `[groups, c_out, c_in]` in type `to`, the bias beta - F mean `[groups, c_out]`
/// and rstd `[groups, c_out]`. Updates the running statistics as `BatchNorm` does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fold {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    /// Whether z is centred where F is applied: the bias is then beta alone.
    pub centred: bool,
    pub eps: f64,
    pub momentum: f64,
    /// Element type of F.
    pub to: DType,
}

impl Op for Fold {
    fn name(&self) -> &'static str {
        "fold_norm"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (w, t) = (inputs[0], inputs[1]);
        let [c_out, _, _, c_in] = w.shape.expect("fold_norm", "w")?;
        expect("fold_norm", "w", w, &master_desc(&[c_out, 1, 1, c_in], self.to))?;
        expect("fold_norm", "t", t, &master_desc(&[self.groups, c_out, c_in], self.to))?;
        expect("fold_norm", "mean", inputs[2], &master_desc(&[self.groups, c_in], self.to))?;
        expect("fold_norm", "gamma", inputs[3], &master_desc(&[c_out], self.to))?;
        expect("fold_norm", "beta", inputs[4], &master_desc(&[c_out], self.to))?;
        let of_channels = master_desc(&[self.groups, c_out], self.to);
        Ok(vec![TensorDesc::new([self.groups, c_out, c_in], self.to), of_channels.clone(), of_channels])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn again(&self) -> Again {
        Again::Never
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("fold_norm", self.to, T => self.compute::<T>(io));
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::fold(io, self)
    }
}

impl Fold {
    fn compute<T: Real>(&self, io: &mut CpuIo<'_>) {
        let c_in = io.inputs[2].desc.shape.channels();
        let [w, t, mean, gamma, beta] = [0, 1, 2, 3, 4].map(|i| io.inputs[i].get::<T>());
        let c_out = gamma.len();
        io.updates[2].get::<i64>()[0] += self.groups as i64;
        let rows = self.rows as f64;
        for group in 0..self.groups {
            let (t, mean) = (&t[group * c_out * c_in..][..c_out * c_in], &mean[group * c_in..][..c_in]);
            let statistics: Vec<[f64; 2]> =
                w.par_chunks(c_in).zip(t.par_chunks(c_in)).map(|(w, t)| [dot(w, mean), dot(w, t).max(0.0)]).collect();
            let means: Vec<f64> = statistics.iter().map(|[mean, _]| *mean).collect();
            let unbiased: Vec<f64> = statistics.iter().map(|[_, variance]| variance * rows / (rows - 1.0)).collect();
            update_running(io.updates[0].get::<T>(), &means, self.momentum);
            update_running(io.updates[1].get::<T>(), &unbiased, self.momentum);
            let rstd = &mut io.outputs[2].get::<T>()[group * c_out..][..c_out];
            rstd.iter_mut().zip(&statistics).for_each(|(r, [_, v])| *r = T::of(1.0 / (v + self.eps).sqrt()));
            let scale: Vec<T> = rstd.iter().zip(gamma).map(|(r, g)| *g * *r).collect();
            let folded = &mut io.outputs[0].get::<T>()[group * c_out * c_in..][..c_out * c_in];
            folded.par_chunks_mut(c_in).zip(w.par_chunks(c_in)).zip(&scale).for_each(|((folded, w), scale)| {
                folded.iter_mut().zip(w).for_each(|(folded, w)| *folded = *scale * *w);
            });
            let offset = |folded: &[T]| if self.centred { 0.0 } else { dot(folded, mean) };
            let bias: Vec<T> =
                folded.chunks(c_in).zip(beta).map(|(folded, beta)| T::of(beta.to_f64() - offset(folded))).collect();
            io.outputs[1].get::<T>()[group * c_out..][..c_out].copy_from_slice(&bias);
        }
    }
}

/// Sums side by side, which a processor adds at once.
const LANES: usize = 8;

/// The sum of products, in float64.
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a_parts, b_parts) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
    for (a, b) in a_parts.zip(b_parts) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a.to_f64() * b.to_f64());
    }
    sums.iter().sum::<f64>() + rest
}
