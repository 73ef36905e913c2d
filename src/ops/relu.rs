//! ReLU on its own, where no batch norm precedes it (the heads without batch norm).

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::TensorDesc;

/// `y = max(x, 0)`.
#[derive(Debug, Clone, Copy)]
pub struct Relu;

impl Op for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let inputs = [g.d_output(0)?, g.output(0)];
        g.emit(ReluBackward, &inputs, &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("relu", io.inputs[0].desc.dtype, T => {
            let x = io.inputs[0].get::<T>();
            io.outputs[0].get::<T>().iter_mut().zip(x).for_each(|(y, &x)| *y = if x > 0.0 { x } else { 0.0 });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io)
    }
}

/// `d_x = d_y` where y > 0, else 0.
#[derive(Debug, Clone, Copy)]
struct ReluBackward;

impl Op for ReluBackward {
    fn name(&self) -> &'static str {
        "relu_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        if inputs[0] != inputs[1] {
            return Err(Error::shape("relu_backward", "d_y", inputs[1], inputs[0]));
        }
        Ok(vec![inputs[0].clone()])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("relu_backward", io.inputs[0].desc.dtype, T => {
            let (d_y, y) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            for ((d_x, d_y), y) in io.outputs[0].get::<T>().iter_mut().zip(d_y).zip(y) {
                *d_x = if *y > 0.0 { *d_y } else { 0.0 };
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(io)
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;

    kernels! { "relu";
        /// y = max(x, 0)
        fn relu[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, n: i64);
        /// d_x = d_y where y > 0, else 0
        fn relu_backward[F32, Bf16, F16; 256](d_y: DevicePtr, y: DevicePtr, d_x: DevicePtr, n: i64);
    }

    pub fn forward(io: &CudaIo<'_>) -> Result<()> {
        let n = io.inputs[0].desc.shape.len();
        let call = relu(io.dtype(), io.inputs[0].ptr, io.outputs[0].ptr, n as i64);
        // SAFETY: `infer` made y like x, so both have `n` elements.
        unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
    }

    pub fn backward(io: &CudaIo<'_>) -> Result<()> {
        let n = io.inputs[0].desc.shape.len();
        let call = relu_backward(io.dtype(), io.inputs[0].ptr, io.inputs[1].ptr, io.outputs[0].ptr, n as i64);
        // SAFETY: `infer` checked that d_y and y are alike and made d_x like them, so all have `n` elements.
        unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
    }
}
