//! Conversion between float types: the low-precision copy of a master weight.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
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
            (DType::F32, DType::Bf16 | DType::F16) | (DType::Bf16 | DType::F16, DType::F32) => {
                Ok(vec![TensorDesc { dtype: self.to, ..inputs[0].clone() }])
            }
            (from, to) => {
                let expected = "f32 to bf16 or f16, or back";
                Err(Error::shape("cast", "element types", expected, format!("{from} to {to}")))
            }
        }
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        g.pass(0, d_y)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        match (io.inputs[0].desc.dtype, self.to) {
            (DType::F32, to) => narrow(io.outputs[0].get(), io.inputs[0].get(), to),
            (DType::Bf16, _) => map(io.outputs[0].get(), io.inputs[0].get(), |x| bf16::from_bits(x).to_f32()),
            _ => map(io.outputs[0].get(), io.inputs[0].get(), |x| f16::from_bits(x).to_f32()),
        }
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::convert(io, self.to)
    }
}

/// `y = x` rounded to bf16 or f16, as bits.
pub(super) fn narrow(y: &mut [u16], x: &[f32], to: DType) {
    match to {
        DType::Bf16 => map(y, x, |x| bf16::from_f32(x).to_bits()),
        _ => map(y, x, |x| f16::from_f32(x).to_bits()),
    }
}

fn map<X: Copy + Sync, Y: Send>(y: &mut [Y], x: &[X], f: impl Fn(X) -> Y + Sync) {
    y.par_iter_mut().zip(x).for_each(|(y, x)| *y = f(*x));
}

mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::{CudaIo, cast};
    use crate::error::Result;
    use crate::tensor::DType;

    pub fn convert(io: &CudaIo<'_>, to: DType) -> Result<()> {
        let n = io.inputs[0].desc.shape.len();
        let (x, y) = (io.inputs[0].ptr, io.outputs[0].ptr);
        // SAFETY: `infer` made y of x's shape, so both have `n` elements, one side float32 and the other of the 16-bit type.
        unsafe {
            match to {
                DType::F32 => cast::widen(io.driver, io.dtype(), x, y, n, false),
                _ => cast::narrow(io.driver, to, x, y, n),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even_and_what_is_too_large_to_infinity() {
        let x = [1.0 + 2_f32.powi(-8), 1.0 + 3.0 * 2_f32.powi(-8), 65_520.0, -1e-8, 3.4e38, f32::NEG_INFINITY];
        let mut y = [0; 6];
        narrow(&mut y, &x, DType::Bf16);
        assert_eq!(y, [0x3f80, 0x3f82, 0x4780, 0xb22c, 0x7f80, 0xff80]);
        narrow(&mut y, &x, DType::F16);
        assert_eq!(y, [0x3c04, 0x3c0c, 0x7c00, 0x8000, 0x7c00, 0xfc00]);
    }

    #[test]
    fn only_between_float32_and_the_narrow_types() {
        let infer = |from, to| Cast { to }.infer(&[&TensorDesc::new([3], from)]);
        assert_eq!(infer(DType::F32, DType::F16).unwrap(), [TensorDesc::new([3], DType::F16)]);
        assert_eq!(infer(DType::F16, DType::F32).unwrap(), [TensorDesc::new([3], DType::F32)]);
        let message = infer(DType::Bf16, DType::F16).unwrap_err().to_string();
        assert!(message.contains("expected f32 to bf16 or f16, or back, got bf16 to f16"), "{message}");
        assert!(infer(DType::F32, DType::F32).is_err() && infer(DType::F64, DType::Bf16).is_err());
    }
}
