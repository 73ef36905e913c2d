//! SimSiam's loss as one node: the negative cosine to a constant target, its gradient, and the collapse figure.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tensors, Traffic};
use crate::ops::conv2d::gradient_dtype;
use crate::ops::similarity::{add_cosine_gradient, negative_cosine, paired};
use crate::ops::z_std::cuda::column_tiles;
use crate::ops::z_std::mean_std;
use crate::tensor::TensorDesc;

/// Loss, gradient and z std from one pass over p and z.
///
/// Inputs p `[m][d]`, z `[r][d]` with `m <= r` and `r >= 2`, and the scalar `d_loss`, the gradient that will arrive at
/// the loss: 1, or the scale that keeps small gradients representable. Row i of p is paired with row `(i + z_shift) mod
/// r` of z.
///
/// Outputs: the scalar loss, the mean of `-cos(p_i, z_pair)`; the scalar z std (see [`crate::ops::z_std::ZStd`]); and
/// d_p, the gradient of the loss times `d_loss`. As `d_loss` is known beforehand, d_p needs no second pass, and is
/// rounded to the element type of p once, after scaling.
///
/// There is no gradient for z: it must be the output of a stop-gradient, or another constant.
#[derive(Debug, Clone, Copy)]
pub struct CosineLoss {
    /// Offset between a row of p and its target.
    pub z_shift: usize,
}

impl CosineLoss {
    fn unsupported<T>(what: &str, hint: &str) -> Result<T> {
        Err(Error::Unsupported { what: format!("cosine_loss: {what}"), hint: Some(hint.into()) })
    }
}

impl Op for CosineLoss {
    fn name(&self) -> &'static str {
        "cosine_loss"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [_, r, _] = paired(self.name(), inputs[0], inputs[1])?;
        if r < 2 {
            return Err(Error::shape(self.name(), "rows of z", "at least 2", r));
        }
        let scalar = TensorDesc::new([], gradient_dtype(inputs[0].dtype));
        if *inputs[2] != scalar {
            return Err(Error::shape(self.name(), "d_loss", scalar, inputs[2]));
        }
        Ok(vec![scalar.clone(), scalar, inputs[0].clone()])
    }

    /// The loss of each row, and two figures of each dimension.
    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        (inputs[0].shape.rows() + 2 * inputs[0].shape.channels()) * size_of::<f64>()
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        if g.needs(1) {
            return Self::unsupported("no gradient for z", "put z behind stop_gradient, or use negative_cosine");
        }
        if g.d_output(0)? != g.input(2) {
            return Self::unsupported("a gradient of the loss other than its input d_loss", "use negative_cosine");
        }
        if g.needs(0) {
            g.pass(0, g.output(2))?;
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, r, d] = paired(self.name(), io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let (p, z) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let scale = io.inputs[2].get::<T>()[0].to_f64() / m as f64;
            let (losses, sums) = bytemuck::cast_slice_mut::<u8, f64>(io.workspace).split_at_mut(m);
            let rows = io.outputs[2].get::<T>().par_chunks_mut(d).zip(p.par_chunks(d)).zip(losses.par_iter_mut());
            rows.enumerate().for_each(|(i, ((d_p, p), loss))| {
                let z = &z[(i + self.z_shift) % r * d..][..d];
                *loss = negative_cosine(p, z);
                d_p.fill(0.0);
                add_cosine_gradient(d_p, p, z, -scale);
            });
            io.outputs[0].get::<T>()[0] = (losses.iter().sum::<f64>() / m as f64) as T;
            io.outputs[1].get::<T>()[0] = mean_std(z, d, sums) as T;
        });
        Ok(())
    }

    /// z is read again once the norms of its rows are known.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        tensors.once().reading(tensors.inputs[1])
    }

    /// Of each row of p the loss and of each of z the reciprocal norm, then what `z_std` needs.
    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        let floats = inputs[0].shape.rows() + inputs[1].shape.rows() + column_tiles(inputs[1]);
        floats * size_of::<f32>()
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(*self, io)
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::CosineLoss;
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr};
    use crate::error::Result;
    use crate::graph::Op as _;
    use crate::ops::row_teams::{Mean, count, row_grid, take_means};
    use crate::ops::similarity::paired;
    use crate::ops::z_std::cuda::spread;

    kernels! { "cosine_loss";
        /// d_p, the loss of each row of p, and the reciprocal norm of each row of z
        fn cosine_loss[F32, Bf16, F16; 256](
            d_loss: DevicePtr, p: DevicePtr, z: DevicePtr, d_p: DevicePtr, rows: DevicePtr, rnorm: DevicePtr,
            m: i32, r: i32, d: i32, shift: i32,
        );
    }

    pub fn forward(op: CosineLoss, io: &CudaIo<'_>) -> Result<()> {
        let ([p, z, d_loss], [loss, z_std, d_p]) = ([0, 1, 2].map(|i| io.inputs[i]), [0, 1, 2].map(|i| io.outputs[i]));
        let [m, r, d] = paired(op.name(), p.desc, z.desc)?;
        let rows = io.workspace;
        let rnorm = rows.offset(m * size_of::<f32>());
        let spreads = rnorm.offset(r * size_of::<f32>());
        let [m_count, r_count, length, shift] = [count(m)?, count(r)?, count(d)?, count(op.z_shift % r)?];
        let call =
            cosine_loss(io.dtype(), d_loss.ptr, p.ptr, z.ptr, d_p.ptr, rows, rnorm, m_count, r_count, length, shift);
        // SAFETY: `infer` checked that p is [m][d] and z [r][d] with m <= r, and made d_p like p; shift < r; the
        // workspace holds m and r floats here.
        unsafe { io.launch(row_grid(r, d), call)? };
        // SAFETY: the first launch wrote r reciprocal norms; behind them is room for a float per tile of columns.
        let z_std = unsafe { spread(io, z, rnorm, spreads, z_std.ptr)? };
        let loss = Mean { of: rows, n: m, per: m, to: loss.ptr };
        // SAFETY: a float for each row of p, all written as m <= r, and the spreads; both results are scalars of float.
        unsafe { take_means(io, loss, Some(z_std)) }
    }
}
