//! SGD with momentum and weight decay, PyTorch's form, for all parameters in one node.

pub(super) mod cuda;

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Input, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::Op;
use crate::graph::op::dispatch_real;
use crate::tensor::{DType, TensorDesc};

/// Elements that one task updates.
const BLOCK: usize = 1 << 15;

/// Positions in the `step_params` buffer, which the caller writes before every step: nothing that changes per step is an
/// attribute of an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepParam {
    /// Learning rate of the encoder.
    Lr,
    /// Learning rate of the predictor.
    PredictorLr,
    /// Momentum.
    Momentum,
    /// Weight decay.
    WeightDecay,
}

impl StepParam {
    /// Number of entries of the buffer.
    pub const COUNT: usize = 4;

    /// Description of the buffer: float64 on every device.
    pub fn desc() -> TensorDesc {
        TensorDesc::new([StepParam::COUNT], DType::F64)
    }
}

/// On which condition an update happens. It is decided on the device: the host sees a step's loss when the next one runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guard {
    /// Always.
    #[default]
    None,
    /// When the scalar behind the gradients in the inputs, the loss, is finite.
    Finite,
    /// The same, and gradients are multiplied by that scalar: see [`crate::ops::loss_scale`].
    Unscale,
}

/// `v = momentum v + (d_w + weight_decay w)`, `w = w - lr v` (dampening 0, no Nesterov).
///
/// Inputs `step_params`, then a gradient per parameter, then the scalar of a guard if there is one; updates all weights, then
/// all momentum buffers in the same order. Where the guard forbids it, none of them changes.
#[derive(Debug, Clone)]
pub struct SgdUpdate {
    /// Which learning rate each parameter takes.
    pub lr: Vec<StepParam>,
    /// On which condition anything is changed.
    pub guard: Guard,
}

impl SgdUpdate {
    /// What gradients are multiplied by; `None` when nothing is to be changed.
    fn factor(&self, guard: Option<&Input<'_>>) -> Option<f64> {
        let value = guard.map_or(1.0, |scalar| match scalar.desc.dtype {
            DType::F64 => scalar.get::<f64>()[0],
            _ => f64::from(scalar.get::<f32>()[0]),
        });
        value.is_finite().then_some(if self.guard == Guard::Unscale { value } else { 1.0 })
    }
}

impl Op for SgdUpdate {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let n = self.lr.len();
        let mut inputs = inputs.to_vec();
        if self.guard != Guard::None && inputs.len() > 1 + n {
            let guard = inputs.remove(1 + n);
            let scalar = TensorDesc::new([], if guard.dtype == DType::F64 { DType::F64 } else { DType::F32 });
            if *guard != scalar {
                return Err(Error::shape("sgd", "guard", scalar, guard));
            }
        }
        check_tensors("sgd", n, &inputs)?;
        Ok(Vec::new())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let params = io.inputs[0].get::<f64>();
        let n = self.lr.len();
        let Some(factor) = self.factor(io.inputs.get(1 + n)) else { return Ok(()) };
        let (weights, momenta) = io.updates.split_at_mut(n);
        for (i, lr) in self.lr.iter().enumerate() {
            let gradient = &io.inputs[1 + i];
            dispatch_real!("sgd", gradient.desc.dtype, T => {
                let hyper = Hyper::of(params, *lr, params[StepParam::WeightDecay as usize], 1.0);
                let hyper = Hyper { unscale: T::of(factor), ..hyper };
                update(weights[i].get::<T>(), momenta[i].get::<T>(), gradient.get::<T>(), hyper);
            });
        }
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::update(io, self)
    }
}

/// Checks what every optimiser takes: `step_params`, `n` gradients, `n` weights and `n` momentum buffers alike.
pub(super) fn check_tensors(op: &str, n: usize, tensors: &[&TensorDesc]) -> Result<()> {
    if *tensors[0] != StepParam::desc() {
        return Err(Error::shape(op, "step_params", StepParam::desc(), tensors[0]));
    }
    if tensors.len() != 1 + 3 * n {
        return Err(Error::shape(op, "tensors", 1 + 3 * n, tensors.len()));
    }
    for i in 0..n {
        let (gradient, weight, momentum) = (tensors[1 + i], tensors[1 + n + i], tensors[1 + 2 * n + i]);
        if gradient != weight || gradient != momentum {
            return Err(Error::shape(op, &format!("gradient and momentum {i}"), weight, gradient));
        }
    }
    Ok(())
}

/// What one parameter's update takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hyper<T> {
    lr: T,
    momentum: T,
    weight_decay: T,
    /// Of the gradient.
    unscale: T,
    /// Of the gradient with its weight decay. 1 changes no bit of either.
    scale: T,
}

impl<T: Real> Hyper<T> {
    pub fn of(step_params: &[f64], lr: StepParam, weight_decay: f64, scale: f64) -> Hyper<T> {
        let param = |p: StepParam| T::of(step_params[p as usize]);
        let [lr, momentum] = [lr, StepParam::Momentum].map(param);
        Hyper { lr, momentum, weight_decay: T::of(weight_decay), unscale: T::ONE, scale: T::of(scale) }
    }
}

/// `v = momentum v + scale (unscale d_w + weight_decay w)`, `w = w - lr v`.
pub(super) fn update<T: Real>(w: &mut [T], v: &mut [T], d_w: &[T], hyper: Hyper<T>) {
    let Hyper { lr, momentum, weight_decay, unscale, scale } = hyper;
    let blocks = w.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)).zip(d_w.par_chunks(BLOCK));
    blocks.for_each(|((w, v), d_w)| {
        for ((w, v), d_w) in w.iter_mut().zip(v).zip(d_w) {
            *v = momentum * *v + scale * (unscale * *d_w + weight_decay * *w);
            *w -= lr * *v;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_and_momenta_are_like_their_weights() {
        let (a, b) = (TensorDesc::new([3, 5], DType::F32), TensorDesc::new([7], DType::F32));
        let infer = |tensors: &[&TensorDesc]| {
            let op = SgdUpdate { lr: vec![StepParam::Lr, StepParam::PredictorLr], guard: Guard::None };
            op.infer(&[&[&StepParam::desc()], tensors].concat())
        };
        infer(&[&a, &b, &a, &b, &a, &b]).unwrap();
        for tensors in [&[&a, &b, &a, &b, &a][..], &[&a, &b, &a, &b, &b, &a], &[&b, &b, &a, &b, &a, &b]] {
            assert!(infer(tensors).is_err(), "{tensors:?}");
        }
    }
}
