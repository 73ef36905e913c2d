//! LARS around SGD with momentum, for training a linear classifier in large batches.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Op, Tensors, Traffic};
use crate::ops::sgd::{Hyper, StepParam, check_tensors, update};
use crate::tensor::TensorDesc;

/// Elements whose squares are summed in one chain.
const BLOCK: usize = 4096;

/// LARS (You, Gitman, Ginsburg, arXiv 1708.03888) as NVIDIA's apex computes it in `LARC` without clipping: for each adapted
/// parameter whose weight and gradient both have a norm above 0,
///
/// ```text
/// ratio = trust |w| / (|d_w| + weight_decay |w| + eps)
/// v = momentum v + ratio (d_w + weight_decay w),   w = w - lr v
/// ```
///
/// and for all others, as there, `v = momentum v + d_w` without weight decay. Inputs and updates are those of
/// [`crate::ops::sgd::SgdUpdate`] without copies.
#[derive(Debug, Clone)]
pub struct LarsUpdate {
    /// Which learning rate each parameter takes.
    pub lr: Vec<StepParam>,
    /// Whether each parameter is adapted. The SimSiam reference adapts all; others leave out biases and norms.
    pub adapted: Vec<bool>,
    /// The trust coefficient: 0.001 in the recipe.
    pub trust: f64,
    /// Keeps the ratio finite: 1e-8 in apex.
    pub eps: f64,
}

impl LarsUpdate {
    /// The factor of a gradient with its weight decay, and that weight decay.
    fn scale(&self, i: usize, w: f64, d_w: f64, weight_decay: f64) -> [f64; 2] {
        match self.adapted[i] && w > 0.0 && d_w > 0.0 {
            true => [self.trust * w / (d_w + w * weight_decay + self.eps), weight_decay],
            false => [1.0, 0.0],
        }
    }
}

impl Op for LarsUpdate {
    fn name(&self) -> &'static str {
        "lars"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        check_tensors("lars", self.lr.len(), inputs)?;
        if self.adapted.len() != self.lr.len() {
            return Err(Error::shape("lars", "adapted", self.lr.len(), self.adapted.len()));
        }
        Ok(Vec::new())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let params = io.inputs[0].get::<f64>();
        let (weights, momenta) = io.updates.split_at_mut(self.lr.len());
        for (i, lr) in self.lr.iter().enumerate() {
            let gradient = &io.inputs[1 + i];
            dispatch_real!("lars", gradient.desc.dtype, T => {
                let (w, d_w) = (weights[i].get::<T>(), gradient.get::<T>());
                let [scale, decay] = self.scale(i, norm(w), norm(d_w), params[StepParam::WeightDecay as usize]);
                update(w, momenta[i].get::<T>(), d_w, Hyper::of(params, *lr, decay, scale));
            });
        }
        Ok(())
    }

    /// Weights and gradients are read again once their norms are known.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let n = self.lr.len();
        let again = tensors.inputs[1..=n].iter().chain(&tensors.updates[..n]);
        again.fold(tensors.once(), |traffic, tensor| traffic.reading(tensor))
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::workspace(&inputs[1..=self.lr.len()])
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::update(io, self)
    }
}

/// The Euclidean norm, in float64.
fn norm<T: Real>(x: &[T]) -> f64 {
    let squares = |block: &[T]| block.iter().map(|v| v.to_f64() * v.to_f64()).sum::<f64>();
    let blocks: Vec<f64> = x.par_chunks(BLOCK).map(squares).collect();
    blocks.iter().sum::<f64>().sqrt()
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::LarsUpdate;
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::ops::sgd::cuda::{Launch, Parameters, chunks, parameters};
    use crate::tensor::TensorDesc;

    kernels! { "lars";
        /// Sums of the squares of weights and gradients, by chunk
        fn lars_squares[; 256](table: Parameters, count: i32, squares: DevicePtr);
        /// Ratio and weight decay of each parameter
        fn lars_scales[; 256](
            table: Parameters, squares: DevicePtr, scales: DevicePtr, step_params: DevicePtr, trust: f64, eps: f64,
        );
        /// The update
        fn lars[; 256](table: Parameters, count: i32, scales: DevicePtr, step_params: DevicePtr);
    }

    /// Bytes of the sums of a chunk: two float64.
    const SQUARES: usize = 16;
    /// Bytes of ratio and weight decay: two float32.
    const SCALE: usize = 8;

    pub fn workspace(gradients: &[&TensorDesc]) -> usize {
        gradients.iter().map(|gradient| chunks(gradient.shape.len()) * SQUARES + SCALE).sum()
    }

    pub fn update(io: &CudaIo<'_>, op: &LarsUpdate) -> Result<()> {
        let mut parameters = parameters(io, "lars", &op.lr)?;
        parameters.iter_mut().zip(&op.adapted).for_each(|(parameter, adapted)| parameter.adapted = u16::from(*adapted));
        let step_params = io.inputs[0].ptr;
        for launch in Launch::all(&parameters) {
            let (table, count) = (launch.table, launch.count as i32);
            let (squares, scales) = (io.workspace, io.workspace.offset(launch.chunks * SQUARES));
            let call = lars_squares(table, count, squares);
            // SAFETY: `infer` checked that weight and gradient of each parameter have its `n` elements; the workspace has
            // room for the sums of every chunk, and behind them for a scale of every parameter.
            unsafe { io.launch(launch.grid(), call)? };
            let call = lars_scales(table, squares, scales, step_params, op.trust, op.eps);
            // SAFETY: as before, a block for each of the `count` entries; `step_params` has all of `StepParam`.
            unsafe { io.launch(Grid::new([launch.count as u32, 1, 1]), call)? };
            let call = lars(table, count, scales, step_params);
            // SAFETY: as before; `infer` checked that momenta are like their weights.
            unsafe { io.launch(launch.grid(), call)? };
        }
        Ok(())
    }
}
