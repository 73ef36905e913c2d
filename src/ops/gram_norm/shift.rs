//! What the gradient of the input takes besides its main term.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::Result;
use crate::graph::Op;
use crate::graph::op::dispatch_real;
use crate::tensor::TensorDesc;

use super::{cuda, expect, master_desc};

/// Inputs M `[groups, c_in, c_in]`, s = sum g `[groups, c_out]`, the folded weight F `[groups, c_out, c_in]`, mean
/// `[groups, c_in]`. Outputs M in the type of F, and the bias `-(s / rows) F - mean M` `[groups, c_in]` of the rounded matrices:
/// the sum over a group's rows of g F + z M + bias is then 0, as that of batch norm's gradient is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shift {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    /// Whether z has a mean of 0, which then needs no correction.
    pub centred: bool,
}

impl Op for Shift {
    fn name(&self) -> &'static str {
        "shift_norm"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [groups, c_out, c_in] = inputs[2].shape.expect("shift_norm", "folded weight")?;
        let to = inputs[2].dtype;
        let of = |dims: &[usize]| master_desc(dims, to);
        expect("shift_norm", "m", inputs[0], &of(&[groups, c_in, c_in]))?;
        expect("shift_norm", "s", inputs[1], &of(&[self.groups, c_out]))?;
        expect("shift_norm", "mean", inputs[3], &of(&[self.groups, c_in]))?;
        Ok(vec![TensorDesc::new([groups, c_in, c_in], to), of(&[groups, c_in])])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("shift_norm", io.inputs[2].desc.dtype, T => self.compute::<T>(io));
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::shift(io, self)
    }
}

impl Shift {
    fn compute<T: Real>(&self, io: &mut CpuIo<'_>) {
        let (c_out, c_in) = (io.inputs[1].desc.shape.channels(), io.inputs[3].desc.shape.channels());
        let [m, s, f, mean] = [0, 1, 2, 3].map(|i| io.inputs[i].get::<T>());
        io.outputs[0].get::<T>().copy_from_slice(m);
        io.outputs[1].get::<T>().par_chunks_mut(c_in).enumerate().for_each(|(group, bias)| {
            let (s, mean) = (&s[group * c_out..][..c_out], &mean[group * c_in..][..c_in]);
            let mut total = vec![0.0; c_in];
            let mut add = |factor: f64, row: &[T]| {
                total.iter_mut().zip(row).for_each(|(total, value)| *total += factor * value.to_f64());
            };
            let folded = f[group * c_out * c_in..].chunks(c_in);
            s.iter().zip(folded).for_each(|(s, f)| add(-s.to_f64() / self.rows as f64, f));
            let of_group = if self.centred { &[] } else { &m[group * c_in * c_in..][..c_in * c_in] };
            mean.iter().zip(of_group.chunks(c_in)).for_each(|(mean, m)| add(-mean.to_f64(), m));
            bias.iter_mut().zip(&total).for_each(|(bias, total)| *bias = T::of(*total));
        });
    }
}
