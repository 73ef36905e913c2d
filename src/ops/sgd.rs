//! SGD with momentum and weight decay, PyTorch's form, for all parameters in one node.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
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

    /// Description of the buffer: float64 on every device that computes on the host.
    pub fn desc() -> TensorDesc {
        TensorDesc::new([StepParam::COUNT], DType::F64)
    }
}

/// `v = momentum v + (d_w + weight_decay w)`, `w = w - lr v` (dampening 0, no Nesterov).
///
/// Inputs `step_params`, then a gradient per parameter; updates all weights, then all momentum buffers in the same order.
#[derive(Debug, Clone)]
pub struct SgdUpdate {
    /// Which learning rate each parameter takes.
    pub lr: Vec<StepParam>,
}

impl Op for SgdUpdate {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let n = self.lr.len();
        if *inputs[0] != StepParam::desc() {
            return Err(Error::shape("sgd", "step_params", StepParam::desc(), inputs[0]));
        }
        if inputs.len() != 1 + 3 * n {
            return Err(Error::shape("sgd", "tensors", 1 + 3 * n, inputs.len()));
        }
        for i in 0..n {
            let (gradient, weight, momentum) = (inputs[1 + i], inputs[1 + n + i], inputs[1 + 2 * n + i]);
            if gradient != weight || gradient != momentum {
                return Err(Error::shape("sgd", &format!("gradient and momentum {i}"), weight, gradient));
            }
        }
        Ok(Vec::new())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let params = io.inputs[0].get::<f64>();
        let (weights, momenta) = io.updates.split_at_mut(self.lr.len());
        for (i, lr) in self.lr.iter().enumerate() {
            let gradient = &io.inputs[1 + i];
            dispatch_real!("sgd", gradient.desc.dtype, T => {
                let hyper = [*lr, StepParam::Momentum, StepParam::WeightDecay].map(|p| params[p as usize] as T);
                update(weights[i].get::<T>(), momenta[i].get::<T>(), gradient.get::<T>(), hyper);
            });
        }
        Ok(())
    }
}

fn update<T: Real>(w: &mut [T], v: &mut [T], g: &[T], [lr, momentum, weight_decay]: [T; 3]) {
    let blocks = w.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)).zip(g.par_chunks(BLOCK));
    blocks.for_each(|((w, v), g)| {
        for ((w, v), g) in w.iter_mut().zip(v).zip(g) {
            *v = momentum * *v + (*g + weight_decay * *w);
            *w -= lr * *v;
        }
    });
}
