//! SimSiam's two similarities between predictions p and targets z, as losses, with their gradients.
//!
//! Row i of p is paired with row `(i + z_shift) mod rows(z)` of z. With both views stacked (`[view 1; view 2]`, 2N rows) and
//! a shift of N the mean over all rows is the symmetric loss, `1/2 D(p1, z2) + 1/2 D(p2, z1)`.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tensors, Traffic};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::TensorDesc;

/// Clamp of each norm, as in `torch.nn.functional.cosine_similarity`.
const EPS: f64 = 1e-8;

/// Which distance D(p, z).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Negative cosine (paper, equation 1).
    #[default]
    Cosine,
    /// Cross-entropy of softmaxes, `-softmax(z) . log softmax(p)` (paper, section 4.5).
    SoftmaxXent,
}

/// Inputs p `[m][d]` and z `[r][d]` with m <= r; output the scalar loss, the mean of D over the rows of p.
#[derive(Debug, Clone, Copy)]
pub struct Similarity {
    /// The distance.
    pub kind: Kind,
    /// Offset between a row of p and its target.
    pub z_shift: usize,
}

/// m, r and d of p `[m][d]` and z `[r][d]`, which must fit together.
pub(super) fn paired(op: &str, p: &TensorDesc, z: &TensorDesc) -> Result<[usize; 3]> {
    let ([m, d], [r, zd]) = (p.shape.expect(op, "p")?, z.shape.expect(op, "z")?);
    if zd != d || r < m || p.dtype != z.dtype || m == 0 {
        return Err(Error::shape(op, "z", format!("{}[at least {m}, {d}]", p.dtype), z));
    }
    Ok([m, r, d])
}

impl Op for Similarity {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Cosine => "negative_cosine",
            Kind::SoftmaxXent => "softmax_xent",
        }
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        paired(self.name(), inputs[0], inputs[1])?;
        Ok(vec![TensorDesc::new([], gradient_dtype(inputs[0].dtype))])
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        inputs[0].shape.rows() * size_of::<f64>()
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let inputs = [g.d_output(0)?, g.input(0), g.input(1)];
        for (input, wrt) in [(0, Side::P), (1, Side::Z)] {
            if g.needs(input) {
                g.emit(SimilarityBackward { forward: *self, wrt }, &inputs, &[Some(input)])?;
            }
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, r, d] = paired(self.name(), io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let (p, z) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let losses: &mut [f64] = &mut bytemuck::cast_slice_mut(io.workspace)[..m];
            losses.par_iter_mut().enumerate().for_each(|(i, loss)| {
                let z = &z[(i + self.z_shift) % r * d..][..d];
                *loss = match self.kind {
                    Kind::Cosine => negative_cosine(&p[i * d..][..d], z),
                    Kind::SoftmaxXent => cross_entropy(&p[i * d..][..d], z),
                };
            });
            io.outputs[0].get::<T>()[0] = (losses.iter().sum::<f64>() / m as f64) as T;
        });
        Ok(())
    }

    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let alone = unpaired(tensors.inputs[0], tensors.inputs[1]);
        Traffic { read: tensors.once().read - alone, ..tensors.once() }
    }

    /// The loss of each row.
    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        inputs[0].shape.rows() * size_of::<f32>()
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(*self, io)
    }
}

/// The input that a gradient is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    P,
    Z,
}

/// Inputs d_loss (scalar), p, z; output d_p or d_z.
#[derive(Debug, Clone, Copy)]
struct SimilarityBackward {
    forward: Similarity,
    wrt: Side,
}

impl SimilarityBackward {
    /// Adds the gradient of one pair, scaled, to `out`.
    fn add_row<T: Real>(&self, out: &mut [T], p: &[T], z: &[T], scale: f64) {
        match (self.forward.kind, self.wrt) {
            (Kind::Cosine, Side::P) => add_cosine_gradient(out, p, z, -scale),
            (Kind::Cosine, Side::Z) => add_cosine_gradient(out, z, p, -scale),
            (Kind::SoftmaxXent, Side::P) => add_prediction_gradient(out, p, z, scale),
            (Kind::SoftmaxXent, Side::Z) => add_target_gradient(out, p, z, scale),
        }
    }
}

impl Op for SimilarityBackward {
    fn name(&self) -> &'static str {
        match self.forward.kind {
            Kind::Cosine => "negative_cosine_backward",
            Kind::SoftmaxXent => "softmax_xent_backward",
        }
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        paired(self.name(), inputs[1], inputs[2])?;
        Ok(vec![if self.wrt == Side::P { inputs[1].clone() } else { inputs[2].clone() }])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, r, d] = paired(self.name(), io.inputs[1].desc, io.inputs[2].desc)?;
        let shift = self.forward.z_shift;
        dispatch_real!(self.name(), io.inputs[1].desc.dtype, T => {
            let scale = io.inputs[0].get::<T>()[0].to_f64() / m as f64;
            let (p, z) = (io.inputs[1].get::<T>(), io.inputs[2].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            io.outputs[0].get::<T>().par_chunks_mut(d).enumerate().for_each(|(row, out)| {
                if !accumulate {
                    out.fill(0.0);
                }
                // The pair that this row belongs to; with m < r some rows of z belong to none.
                let i = if self.wrt == Side::P { row } else { (row + r - shift % r) % r };
                if i < m {
                    self.add_row(out, &p[i * d..][..d], &z[(i + shift) % r * d..][..d], scale);
                }
            });
        });
        Ok(())
    }

    /// Of z's gradient the rows without a partner are zeros; where it is added they are left alone.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let alone = unpaired(tensors.inputs[1], tensors.inputs[2]);
        let left = if self.wrt == Side::Z && tensors.accumulates(0) { alone } else { 0 };
        let Traffic { read, written } = tensors.once();
        Traffic { read: read - alone - left, written: written - left }
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(*self, io)
    }
}

/// Bytes of the rows of z that no row of p is paired with: they are not read.
fn unpaired(p: &TensorDesc, z: &TensorDesc) -> u64 {
    (z.bytes() - p.bytes()) as u64
}

fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

pub(super) fn negative_cosine<T: Real>(p: &[T], z: &[T]) -> f64 {
    let norm = |v: &[T]| dot(v, v).sqrt().max(EPS);
    -dot(p, z) / (norm(p) * norm(z))
}

/// Adds `scale * d cos(a, b) / d a`. The clamp of the norms has no gradient, as in PyTorch.
pub(super) fn add_cosine_gradient<T: Real>(out: &mut [T], a: &[T], b: &[T], scale: f64) {
    let true_norm = dot(a, a).sqrt();
    let (norm_a, norm_b) = (true_norm.max(EPS), dot(b, b).sqrt().max(EPS));
    let along_b = scale / (norm_a * norm_b);
    let along_a = if true_norm > 0.0 { -along_b * dot(a, b) / (norm_a * true_norm) } else { 0.0 };
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out += T::of(along_b * b.to_f64() + along_a * a.to_f64());
    }
}

/// Maximum and logarithm of the sum of exponentials: `log softmax(v)_k = v_k - lse`.
fn log_sum_exp<T: Real>(v: &[T]) -> f64 {
    let max = v.iter().map(|v| v.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    max + v.iter().map(|v| (v.to_f64() - max).exp()).sum::<f64>().ln()
}

fn cross_entropy<T: Real>(p: &[T], z: &[T]) -> f64 {
    let (lse_p, lse_z) = (log_sum_exp(p), log_sum_exp(z));
    -p.iter().zip(z).map(|(p, z)| (z.to_f64() - lse_z).exp() * (p.to_f64() - lse_p)).sum::<f64>()
}

/// d_p = softmax(p) - softmax(z).
fn add_prediction_gradient<T: Real>(out: &mut [T], p: &[T], z: &[T], scale: f64) {
    let (lse_p, lse_z) = (log_sum_exp(p), log_sum_exp(z));
    for ((out, p), z) in out.iter_mut().zip(p).zip(z) {
        *out += T::of(scale * ((p.to_f64() - lse_p).exp() - (z.to_f64() - lse_z).exp()));
    }
}

/// With s = softmax(z) and l = log softmax(p): d_z = -s (l - s . l).
fn add_target_gradient<T: Real>(out: &mut [T], p: &[T], z: &[T], scale: f64) {
    let (lse_p, lse_z) = (log_sum_exp(p), log_sum_exp(z));
    let expected = -cross_entropy(p, z);
    for ((out, p), z) in out.iter_mut().zip(p).zip(z) {
        *out += T::of(-scale * (z.to_f64() - lse_z).exp() * (p.to_f64() - lse_p - expected));
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::{Kind, Side, Similarity, SimilarityBackward, paired};
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr};
    use crate::error::Result;
    use crate::graph::Op as _;
    use crate::ops::row_teams::{Mean, count, row_grid, take_means};

    kernels! { "similarity";
        /// the negative cosine of each row of p
        fn negative_cosine[F32, Bf16, F16; 256](
            p: DevicePtr, z: DevicePtr, rows: DevicePtr, m: i32, r: i32, d: i32, shift: i32,
        );
        /// its gradient for a, which is p or z; b is the other
        fn negative_cosine_backward[F32, Bf16, F16; 256](
            d_loss: DevicePtr, a: DevicePtr, b: DevicePtr, d_a: DevicePtr,
            m: i32, a_rows: i32, b_rows: i32, r: i32, d: i32, shift: i32, accumulate: u32,
        );
        /// the cross-entropy of each row of p
        fn softmax_xent[F32, Bf16, F16; 256](
            p: DevicePtr, z: DevicePtr, rows: DevicePtr, m: i32, r: i32, d: i32, shift: i32,
        );
        /// its gradient for p
        fn softmax_xent_backward_p[F32, Bf16, F16; 256](
            d_loss: DevicePtr, p: DevicePtr, z: DevicePtr, d_p: DevicePtr,
            m: i32, r: i32, d: i32, shift: i32, accumulate: u32,
        );
        /// its gradient for z
        fn softmax_xent_backward_z[F32, Bf16, F16; 256](
            d_loss: DevicePtr, p: DevicePtr, z: DevicePtr, d_z: DevicePtr,
            m: i32, r: i32, d: i32, shift: i32, accumulate: u32,
        );
    }

    pub fn forward(op: Similarity, io: &CudaIo<'_>) -> Result<()> {
        let [m, r, d] = paired(op.name(), io.inputs[0].desc, io.inputs[1].desc)?;
        let kernel = match op.kind {
            Kind::Cosine => negative_cosine,
            Kind::SoftmaxXent => softmax_xent,
        };
        let ([p, z], rows) = ([io.inputs[0].ptr, io.inputs[1].ptr], io.workspace);
        let call = kernel(io.dtype(), p, z, rows, count(m)?, count(r)?, count(d)?, count(op.z_shift % r)?);
        // SAFETY: `infer` checked that p is [m][d] and z [r][d] with m <= r; shift < r; the workspace holds m floats.
        unsafe { io.launch(row_grid(m, d), call)? };
        // SAFETY: the launch before wrote m floats, and the output is a scalar of float.
        unsafe { take_means(io, Mean { of: rows, n: m, per: m, to: io.outputs[0].ptr }, None) }
    }

    pub(in crate::ops::similarity) fn backward(op: SimilarityBackward, io: &CudaIo<'_>) -> Result<()> {
        let (d_loss, [p, z], out) = (io.inputs[0].ptr, [io.inputs[1], io.inputs[2]], io.outputs[0]);
        let [m, r, d] = paired(op.name(), p.desc, z.desc)?;
        let (dtype, accumulate, length) = (p.desc.dtype, u32::from(out.accumulate), count(d)?);
        let (p, z, d_out, shift) = (p.ptr, z.ptr, out.ptr, op.forward.z_shift % r);
        let (rows, back, shift) = (if op.wrt == Side::P { m } else { r }, count(r - shift)?, count(shift)?);
        let (m, r) = (count(m)?, count(r)?);
        let call = match (op.forward.kind, op.wrt) {
            (Kind::Cosine, Side::P) => {
                negative_cosine_backward(dtype, d_loss, p, z, d_out, m, m, r, r, length, shift, accumulate)
            }
            (Kind::Cosine, Side::Z) => {
                negative_cosine_backward(dtype, d_loss, z, p, d_out, m, r, m, r, length, back, accumulate)
            }
            (Kind::SoftmaxXent, Side::P) => {
                softmax_xent_backward_p(dtype, d_loss, p, z, d_out, m, r, length, shift, accumulate)
            }
            (Kind::SoftmaxXent, Side::Z) => {
                softmax_xent_backward_z(dtype, d_loss, p, z, d_out, m, r, length, shift, accumulate)
            }
        };
        // SAFETY: `infer` checked that p is [m][d] and z [r][d] with m <= r, and made the output like the one whose gradient
        // it is, which has `rows` rows; both shifts are at most r.
        unsafe { io.launch(row_grid(rows, d), call) }
    }
}
