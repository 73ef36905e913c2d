//! The ops that the graph itself needs: stop-gradient, constants, and addition into an existing gradient.

pub(crate) mod cuda;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::{DType, TensorDesc};

/// The identity whose input gets no gradient (SimSiam, section 4.1: the target branch is a constant).
#[derive(Debug, Clone, Copy)]
pub struct StopGradient;

impl Op for StopGradient {
    fn name(&self) -> &'static str {
        "stop_gradient"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        Ok(vec![inputs[0].clone()])
    }

    fn is_view(&self) -> bool {
        true
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn cpu(&self, _io: &mut CpuIo<'_>) -> Result<()> {
        Ok(())
    }

    fn cuda(&self, _io: &CudaIo<'_>) -> Result<()> {
        Ok(())
    }
}

/// A scalar with a fixed value; the seed of the backward pass.
#[derive(Debug, Clone, Copy)]
pub struct Constant {
    /// The value.
    pub value: f64,
    /// Element type of the scalar.
    pub dtype: DType,
}

impl Op for Constant {
    fn name(&self) -> &'static str {
        "constant"
    }

    fn infer(&self, _inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        Ok(vec![TensorDesc::new([], self.dtype)])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("constant", self.dtype, T => io.outputs[0].get::<T>()[0] = self.value as T);
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::constant(io, self.value)
    }
}

/// `y = x`, or `y += x`: joins a gradient whose producer cannot accumulate.
#[derive(Debug, Clone, Copy)]
pub struct Copy;

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        Ok(vec![inputs[0].clone()])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        g.emit(Copy, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("copy", io.inputs[0].desc.dtype, T => {
            let x = io.inputs[0].get::<T>();
            let accumulate = io.outputs[0].accumulate;
            let y = io.outputs[0].get::<T>();
            if accumulate {
                y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
            } else {
                y.copy_from_slice(x);
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::copy_or_add(io)
    }
}

/// Element-wise `y = a + b`.
#[derive(Debug, Clone, Copy)]
pub struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        if inputs[0] != inputs[1] {
            return Err(Error::shape("add", "b", inputs[0], inputs[1]));
        }
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        for input in 0..2 {
            if g.needs(input) {
                g.emit(Copy, &[d_y], &[Some(input)])?;
            }
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("add", io.inputs[0].desc.dtype, T => {
            let (a, b) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            for ((y, a), b) in io.outputs[0].get::<T>().iter_mut().zip(a).zip(b) {
                *y = a + b;
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::sum(io)
    }
}
