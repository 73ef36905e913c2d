//! Batch norm once more, from the statistics that the first time has left: what it computed, bit for bit, in one pass.

use std::sync::Arc;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::recompute::{Repetition, Source};
use crate::graph::{Again, Op};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::{DType, TensorDesc};

use super::pooled::Windows;
use super::{BatchNorm, Fusion, Mask, check_inputs, cpu, cuda, mask_desc, pair, pooled};

/// How y, and the mask behind a residual and ReLU, are had again.
pub(super) fn of_batch_norm(op: &BatchNorm) -> Again {
    let &BatchNorm { groups, fusion, .. } = op;
    let affine: &[usize] = if fusion.affine { &[1, 2] } else { &[] };
    let residual = fusion.residual.then(|| fusion.residual_input());
    let rest = affine.iter().copied().chain(residual).map(Source::Input);
    let inputs = known().into_iter().chain(rest).collect();
    let outputs = if fusion.mask() == Mask::Stored { vec![0, 3] } else { vec![0] };
    Again::By(Repetition { op: Arc::new(BatchNormRepeat { groups, fusion }), inputs, outputs })
}

/// How y and what was taken of batch norm with max pooling are had again.
pub(super) fn of_pooled(groups: usize) -> Again {
    let inputs = known().into_iter().chain([1, 2].map(Source::Input)).collect();
    Again::By(Repetition { op: Arc::new(BatchNormMaxPoolRepeat { groups }), inputs, outputs: vec![0, 3] })
}

/// How y and the mask of two batch norms and their sum are had again.
pub(super) fn of_pair(groups: usize) -> Again {
    let rest = (1..8).map(Source::Input); // gamma, beta; r, its mean, rstd, gamma and beta
    let inputs = known().into_iter().chain(rest).collect();
    Again::By(Repetition { op: Arc::new(BatchNormPairRepeat { groups }), inputs, outputs: vec![0, 3] })
}

/// x, mean and rstd.
fn known() -> [Source; 3] {
    [Source::Input(0), Source::Output(1), Source::Output(2)]
}

/// Checks mean and rstd, inputs 1 and 2.
fn check_statistics(op: &str, groups: usize, inputs: &[&TensorDesc]) -> Result<()> {
    let x = inputs[0];
    let expected = TensorDesc::new([groups, x.shape.channels()], gradient_dtype(x.dtype));
    for (what, desc) in ["mean", "rstd"].into_iter().zip(&inputs[1..]) {
        if **desc != expected {
            return Err(Error::shape(op, what, expected, desc));
        }
    }
    match x.shape.dims()[0].is_multiple_of(groups) {
        true => Ok(()),
        false => Err(Error::shape(op, "first dimension of x", format!("a multiple of {groups} groups"), &x.shape)),
    }
}

/// Inputs of the forward op without the statistics.
fn without_statistics<'a>(inputs: &[&'a TensorDesc]) -> Vec<&'a TensorDesc> {
    std::iter::once(inputs[0]).chain(inputs[3..].iter().copied()).collect()
}

/// [`BatchNorm`] without its statistics: inputs x, mean, rstd, then gamma and beta if affine, then the residual if there is
/// one; outputs y, and behind a residual and ReLU the mask.
#[derive(Debug, Clone, Copy)]
struct BatchNormRepeat {
    groups: usize,
    fusion: Fusion,
}

impl Op for BatchNormRepeat {
    fn name(&self) -> &'static str {
        "batch_norm_repeat"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        check_inputs(self.name(), &without_statistics(inputs), self.fusion)?;
        check_statistics(self.name(), self.groups, inputs)?;
        let mask = (self.fusion.mask() == Mask::Stored).then(|| mask_desc(inputs[0]));
        Ok([inputs[0].clone()].into_iter().chain(mask).collect())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => cpu::repeat::<T>(self.fusion, self.groups, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        if self.fusion.affine { cuda::scale_bytes(inputs[0], self.groups) } else { 0 }
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::repeat(self.fusion, self.groups, io)
    }
}

/// [`pooled::BatchNormMaxPool`] without its statistics: inputs x, mean, rstd, gamma, beta; outputs y and what was taken.
#[derive(Debug, Clone, Copy)]
struct BatchNormMaxPoolRepeat {
    groups: usize,
}

impl Op for BatchNormMaxPoolRepeat {
    fn name(&self) -> &'static str {
        "batch_norm_max_pool_repeat"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let windows = Windows::new(inputs[0])?;
        let fusion = Fusion { affine: true, residual: false, relu: true };
        check_inputs(self.name(), &without_statistics(inputs), fusion)?;
        check_statistics(self.name(), self.groups, inputs)?;
        let y = [inputs[0].shape.dims()[0], windows.oh(), windows.ow(), windows.c];
        Ok(vec![TensorDesc::new(y, inputs[0].dtype), TensorDesc::new(y, DType::U8)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let windows = Windows::new(io.inputs[0].desc)?;
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let groups = cpu::known_statistics::<T>(1, true, self.groups, io);
            let x = io.inputs[0].get::<T>();
            let (head, tail) = io.outputs.split_at_mut(1);
            pooled::forward(windows, &groups, x, head[0].get::<T>(), tail[0].get::<u8>());
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::scale_bytes(inputs[0], self.groups)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        pooled::cuda::repeat(Windows::new(io.inputs[0].desc)?, self.groups, io)
    }
}

/// [`pair::BatchNormPair`] without its statistics: inputs x, mean, rstd, gamma, beta; r and the same of it. Outputs y and the mask.
#[derive(Debug, Clone, Copy)]
struct BatchNormPairRepeat {
    groups: usize,
}

impl Op for BatchNormPairRepeat {
    fn name(&self) -> &'static str {
        "batch_norm_pair_repeat"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let x = inputs[0];
        check_statistics(self.name(), self.groups, inputs)?;
        check_inputs(
            self.name(),
            &without_statistics(&inputs[..5]),
            Fusion { affine: true, residual: false, relu: true },
        )?;
        pair::check_shortcut(self.name(), x, self.groups, &inputs[5..])?;
        Ok(vec![x.clone(), mask_desc(x)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let [of_x, of_r] = [1, 6].map(|mean| cpu::known_statistics::<T>(mean, true, self.groups, io));
            pair::apply(io, [&of_x, &of_r], 5, 1);
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::scale_bytes(inputs[0], self.groups)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        pair::cuda::repeat(self.groups, io)
    }
}
