//! Conversion between float types: the low-precision copy of a master weight.

use half::bf16;
use rayon::prelude::*;

use crate::backend::cpu::CpuIo;
use crate::error::{Error, Result};
use crate::graph::{GradBuilder, Op};
use crate::tensor::{DType, TensorDesc};

/// `y = x` in another element type, rounded to nearest even. Weight gradients are already in float32, so the gradient
/// passes through unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Cast {
    /// Element type of y.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        match (inputs[0].dtype, self.to) {
            (DType::F32, DType::Bf16) | (DType::Bf16, DType::F32) => {
                Ok(vec![TensorDesc { dtype: self.to, ..inputs[0].clone() }])
            }
            (from, to) => Err(Error::shape("cast", "element types", "f32 to bf16 or back", format!("{from} to {to}"))),
        }
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        g.pass(0, d_y)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        match self.to {
            DType::Bf16 => {
                let (x, y) = (io.inputs[0].get::<f32>(), io.outputs[0].get::<u16>());
                y.par_iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_f32(*x).to_bits());
            }
            _ => {
                let (x, y) = (io.inputs[0].get::<u16>(), io.outputs[0].get::<f32>());
                y.par_iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_bits(*x).to_f32());
            }
        }
        Ok(())
    }
}
