//! Dynamic loss scaling (Micikevicius et al. 2018, "Mixed precision training"): gradients that float16 would round to 0 are
//! kept by scaling the loss. The rule is that of PyTorch's `GradScaler`; it is decided on the device, step by step.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Input, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::Op;
use crate::graph::op::dispatch_real;
use crate::tensor::{DType, TensorDesc};

/// How the scale starts and changes; the default is PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScaling {
    /// The scale of the first step.
    pub init: f64,
    /// What it is multiplied by after `interval` good steps in a row.
    pub growth: f64,
    /// What it is multiplied by after a step whose loss or gradients are not finite.
    pub backoff: f64,
    /// Good steps until it grows.
    pub interval: u64,
}

impl Default for LossScaling {
    fn default() -> LossScaling {
        LossScaling { init: 65_536.0, growth: 2.0, backoff: 0.5, interval: 2000 }
    }
}

/// Judges the gradients of a step and changes the scale.
///
/// Inputs the scalar loss, then all gradients, times the scale. Output the scalar to multiply them by: 1 / scale, or NaN when
/// the loss or one of them is not finite, in which case there must be no update ([`crate::ops::sgd::Guard::Unscale`]).
/// Updates the scale, and the number of good steps since it changed.
#[derive(Debug, Clone, Copy)]
pub struct LossScaleUpdate {
    /// How the scale changes.
    pub scaling: LossScaling,
}

impl LossScaleUpdate {
    /// Scale and good steps after a step.
    fn next(&self, scale: f64, good_steps: i64, finite: bool) -> (f64, i64) {
        let LossScaling { growth, backoff, interval, .. } = self.scaling;
        match good_steps + 1 {
            _ if !finite => (scale * backoff, 0),
            good if good == interval as i64 => (scale * growth, 0),
            good => (scale, good),
        }
    }
}

impl Op for LossScaleUpdate {
    fn name(&self) -> &'static str {
        "loss_scale"
    }

    fn infer(&self, tensors: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [loss, gradients @ .., scale, good_steps] = tensors else {
            return Err(Error::shape("loss_scale", "tensors", "at least 3", tensors.len()));
        };
        let scalar = TensorDesc::new([], if loss.dtype == DType::F64 { DType::F64 } else { DType::F32 });
        let counter = TensorDesc::new([], DType::I64);
        for (what, expected, got) in
            [("loss", &scalar, loss), ("scale", &scalar, scale), ("good steps", &counter, good_steps)]
        {
            if *got != expected {
                return Err(Error::shape("loss_scale", what, expected, got));
            }
        }
        if let Some(other) = gradients.iter().find(|gradient| gradient.dtype != scalar.dtype) {
            return Err(Error::shape("loss_scale", "element type of a gradient", scalar.dtype, other.dtype));
        }
        Ok(vec![scalar])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("loss_scale", io.inputs[0].desc.dtype, T => {
            let finite = io.inputs.iter().all(all_finite::<T>);
            let (scale, good_steps) = (io.updates[0].get::<T>()[0], io.updates[1].get::<i64>()[0]);
            io.outputs[0].get::<T>()[0] = if finite { T::of(1.0 / scale.to_f64()) } else { T::of(f64::NAN) };
            let (next, good_steps) = self.next(scale.to_f64(), good_steps, finite);
            let next = T::of(next);
            io.updates[0].get::<T>()[0] = if next.to_f64().is_finite() { next } else { scale };
            io.updates[1].get::<i64>()[0] = good_steps;
        });
        Ok(())
    }

    /// A figure for each chunk of a gradient.
    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::chunks_of(inputs) * size_of::<f32>()
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::update(self.scaling, io)
    }
}

fn all_finite<T: Real>(tensor: &Input<'_>) -> bool {
    tensor.get::<T>().par_iter().all(|v| v.to_f64().is_finite())
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::LossScaling;
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::ops::sgd::cuda::{Launch, Parameter, Parameters, chunks};
    use crate::tensor::TensorDesc;

    kernels! { "loss_scale";
        /// Whether each chunk has a gradient that is not finite
        fn non_finite_chunks[; 256](table: Parameters, count: i32, found: DevicePtr);
        /// The factor of the gradients, and the next scale
        fn loss_scale_update[; 256](
            found: DevicePtr, chunks: i64, loss: DevicePtr, scale: DevicePtr, good_steps: DevicePtr, unscale: DevicePtr,
            growth: f64, backoff: f64, interval: i64,
        );
    }

    /// Chunks of all gradients; `inputs` are those of the op.
    pub fn chunks_of(inputs: &[&TensorDesc]) -> usize {
        inputs[1..].iter().map(|gradient| chunks(gradient.shape.len())).sum()
    }

    pub fn update(scaling: LossScaling, io: &CudaIo<'_>) -> Result<()> {
        let (found, gradients) = (io.workspace, io.inputs[1..].iter());
        let gradients: Vec<Parameter> =
            gradients.map(|d_w| Parameter::gradient(d_w.ptr, d_w.desc.shape.len())).collect();
        let mut chunks = 0;
        for launch in Launch::all(&gradients) {
            let call = non_finite_chunks(launch.table, launch.count as i32, found.offset(chunks * size_of::<f32>()));
            // SAFETY: each gradient is float32, as `infer` checked and CUDA executors have no float64, and has its `n`
            // elements; `cuda_workspace` counted a float for each chunk of each.
            unsafe { io.launch(launch.grid(), call)? };
            chunks += launch.chunks;
        }
        let [loss, scale, good_steps] = [io.inputs[0].ptr, io.updates[0].ptr, io.updates[1].ptr];
        let LossScaling { growth, backoff, interval, .. } = scaling;
        let (chunks, unscale, interval) = (chunks as i64, io.outputs[0].ptr, interval as i64);
        let call = loss_scale_update(found, chunks, loss, scale, good_steps, unscale, growth, backoff, interval);
        // SAFETY: the launches before wrote `chunks` floats; `infer` checked that loss and scale are scalars of float32 and
        // good_steps one of int64, and made unscale like the loss.
        unsafe { io.launch(Grid::new([1, 1, 1]), call) }
    }
}
