//! Conversion between float types: the low-precision copies of master weights.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::{GradBuilder, Op};
use crate::tensor::{DType, TensorDesc};

/// `y = x` in another element type, rounded to nearest even, for each of the inputs, which are alike in theirs. On CUDA all
/// are rounded to 16 bits in one launch. Weight gradients are already in float32, so gradients pass through unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Cast {
    /// Element type of the outputs.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let one = |x: &&TensorDesc| match (x.dtype, self.to) {
            (from, _) if from != inputs[0].dtype => Err(Error::shape("cast", "element types", inputs[0].dtype, from)),
            (DType::F32, DType::Bf16 | DType::F16) | (DType::Bf16 | DType::F16, DType::F32) => {
                Ok(TensorDesc { dtype: self.to, ..(*x).clone() })
            }
            (from, to) => {
                let expected = "f32 to bf16 or f16, or back";
                Err(Error::shape("cast", "element types", expected, format!("{from} to {to}")))
            }
        };
        inputs.iter().map(one).collect()
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        for i in 0..g.input_count() {
            if g.needs(i) && g.reached(i) {
                let d_y = g.d_output(i)?;
                g.pass(i, d_y)?;
            }
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        for (x, y) in io.inputs.iter().zip(io.outputs.iter_mut()) {
            match (x.desc.dtype, self.to) {
                (DType::F32, to) => narrow(y.get(), x.get(), to),
                (DType::Bf16, _) => map(y.get(), x.get(), |x| bf16::from_bits(x).to_f32()),
                _ => map(y.get(), x.get(), |x| f16::from_bits(x).to_f32()),
            }
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

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, cast};
    use crate::error::Result;
    use crate::ops::sgd::cuda::{Launch, Parameter, Parameters};
    use crate::tensor::DType;

    kernels! { "cast";
        /// The copies of all weights of a table
        fn cast_all[Bf16, F16; 256](table: Parameters, count: i32);
    }

    pub fn convert(io: &CudaIo<'_>, to: DType) -> Result<()> {
        let pairs = io.inputs.iter().zip(&io.outputs);
        if to == DType::F32 {
            for (x, y) in pairs {
                let n = x.desc.shape.len();
                // SAFETY: `infer` made y of x's shape, so both have `n` elements, y in float32, and checked that each x is of
                // the 16-bit type of the first.
                unsafe { cast::widen(io.driver, io.dtype(), x.ptr, y.ptr, n, false)? };
            }
            return Ok(());
        }
        let copies: Vec<Parameter> = pairs.map(|(x, y)| Parameter::copied(x.ptr, y.ptr, x.desc.shape.len())).collect();
        for launch in Launch::all(&copies) {
            let call = cast_all(to, launch.table, launch.count as i32);
            // SAFETY: `infer` made each y of its x's shape, so both have the elements that the table says, x in float32 and y
            // in the kernel's type.
            unsafe { io.launch(launch.grid(), call)? };
        }
        Ok(())
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
        let mixed = [DType::Bf16, DType::F16].map(|dtype| TensorDesc::new([3], dtype));
        assert!(Cast { to: DType::F32 }.infer(&mixed.each_ref()).is_err());
    }
}
