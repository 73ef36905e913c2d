//! Batch norm over the innermost dimension (Ioffe and Szegedy 2015), with separate statistics per view, an optional
//! residual added before an optional ReLU, and the gradient of all of it.

mod cpu;
pub(super) mod cuda;
pub mod pair;
pub mod pooled;
mod repeat;
mod statistics;
pub(super) mod sums;

pub(super) use cpu::update_running;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Again, GradBuilder, Op, Tensors, Traffic};
use crate::ops::conv2d::gradient_dtype;
use crate::ops::group_sums::cuda::partials_bytes;
use crate::ops::row_tiles::Rows;
use crate::tensor::{DType, TensorDesc};

pub use statistics::BatchNormStatistics;

/// What is fused around the normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fusion {
    /// Whether there are gamma and beta.
    pub affine: bool,
    /// Whether a residual is added: `y = act(bn(x) + residual)`.
    pub residual: bool,
    /// Whether the activation is ReLU (else the identity).
    pub relu: bool,
}

impl Fusion {
    /// Which input of [`BatchNorm`] the residual is.
    fn residual_input(self) -> usize {
        if self.affine { 3 } else { 1 }
    }

    /// Where the gradient finds the outputs that are greater than 0. Neither way takes a pass over y: without a residual x
    /// and the statistics say as much, with one the forward pass has left a bit for each of them.
    fn mask(self) -> Mask {
        match (self.relu, self.residual) {
            (false, _) => Mask::None,
            (true, false) => Mask::OfX,
            (true, true) => Mask::Stored,
        }
    }
}

/// Which elements of a gradient pass the ReLU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mask {
    /// All: there is no ReLU.
    None,
    /// Those with `(x - mean) scale + beta > 0`, computed with the forward pass's roundings.
    OfX,
    /// Those whose bit is set: see [`mask_desc`].
    Stored,
}

/// The stored mask of a tensor like x, `[rows, packs]`: a byte for each pack of channels, which is what a thread of the
/// kernels loads at once (16 bytes where rows are a multiple of that, else one element), with the first channel as its
/// lowest bit.
fn mask_desc(x: &TensorDesc) -> TensorDesc {
    TensorDesc::new([x.shape.rows(), x.shape.channels() / pack(x)], DType::U8)
}

/// Channels that share a byte of a mask.
fn pack(x: &TensorDesc) -> usize {
    let widest = 16 / x.dtype.size();
    if x.shape.channels().is_multiple_of(widest) { widest } else { 1 }
}

/// Training-mode batch norm.
///
/// Inputs x `[n, ..., c]`, then gamma `[c]` and beta `[c]` if affine, then the residual (like x) if there is one. The
/// outermost dimension is split into `groups` equal parts (the views), each normalised by its own mean and biased variance.
/// With `sums_given` the last input is `[groups, 2, c]`: the sums of x and of x^2, which the convolution that made x has
/// computed (see `Conv2d`). Without a shift they cancel in the variance where a mean is many times the spread.
/// Outputs y (like x), mean `[groups, c]`, rstd `[groups, c]`; behind a residual and ReLU the mask y > 0 as well; with `means`
/// the means of y `[groups, c]`, over the rows of each group.
/// Updates running_mean `[c]` and running_var `[c]` once per group in order (`r = (1 - momentum) r + momentum s`, with the
/// unbiased variance), and num_batches_tracked by the number of groups: PyTorch's behaviour for one forward per view.
#[derive(Debug, Clone, Copy)]
pub struct BatchNorm {
    /// Number of statistics groups.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// PyTorch's momentum: the weight of the new value.
    pub momentum: f64,
    /// What is fused.
    pub fusion: Fusion,
    /// Whether the sums of x and of x^2 come as an input.
    pub sums_given: bool,
    /// Whether the means of y are an output, which whoever goes on from them (`gram_norm`) needs no pass over y for.
    pub means: bool,
}

/// Checks x and the optional tensors that start at `inputs[1]`; returns the channel count.
fn check_inputs(op: &str, inputs: &[&TensorDesc], fusion: Fusion) -> Result<usize> {
    let x = inputs[0];
    let channels = x.shape.channels();
    if x.shape.rank() < 2 {
        return Err(Error::shape(op, "x", "at least 2 dimensions", &x.shape));
    }
    let mut next = 1;
    if fusion.affine {
        for (what, desc) in [("gamma", inputs[1]), ("beta", inputs[2])] {
            let expected = TensorDesc::new([channels], gradient_dtype(x.dtype));
            if *desc != expected {
                return Err(Error::shape(op, what, expected, desc));
            }
        }
        next = 3;
    }
    if fusion.residual && inputs[next] != x {
        return Err(Error::shape(op, "residual", x, inputs[next]));
    }
    Ok(channels)
}

impl Op for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let channels = check_inputs("batch_norm", inputs, self.fusion)?;
        let x = inputs[0];
        let n = x.shape.dims()[0];
        if !n.is_multiple_of(self.groups) || x.shape.rows() / self.groups < 2 {
            let expected = format!("a multiple of {} groups with at least 2 values per channel and group", self.groups);
            return Err(Error::shape("batch_norm", "first dimension of x", expected, &x.shape));
        }
        let statistics = TensorDesc::new([self.groups, channels], gradient_dtype(x.dtype));
        if self.sums_given {
            let expected = TensorDesc::new([self.groups, 2, channels], statistics.dtype);
            match inputs.last() {
                Some(sums) if **sums == expected => {}
                sums => return Err(Error::shape("batch_norm", "sums", expected, sums.unwrap_or(&x))),
            }
        }
        if self.means && self.fusion.residual {
            return Err(Error::shape("batch_norm", "means of y", "none behind a residual", "a residual"));
        }
        let means = self.means.then(|| statistics.clone());
        let mut outputs = vec![x.clone(), statistics.clone(), statistics];
        outputs.extend((self.fusion.mask() == Mask::Stored).then(|| mask_desc(x)));
        outputs.extend(means);
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        sums::workspace_bytes(2, inputs[0].shape.channels(), self.groups)
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let (affine, mask) = (self.fusion.affine, self.fusion.mask());
        let residual = self.fusion.residual && g.needs(self.fusion.residual_input());
        let op = BatchNormBackward { groups: self.groups, affine, mask, residual };
        let mut inputs = vec![g.d_output(0)?, g.input(0), g.output(1), g.output(2)];
        let mut targets = vec![Some(0)];
        if affine {
            inputs.extend([g.input(1), g.input(2)]);
            targets.extend([Some(1), Some(2)]);
        }
        if mask == Mask::Stored {
            inputs.push(g.output(3));
        }
        if residual {
            targets.push(Some(self.fusion.residual_input()));
        }
        g.emit(op, &inputs, &targets)
    }

    fn again(&self) -> Again {
        repeat::of_batch_norm(self)
    }

    /// x is read again once its statistics are known, unless their sums were given.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        if self.sums_given { tensors.once() } else { tensors.once().reading(tensors.inputs[0]) }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("batch_norm", io.inputs[0].desc.dtype, T => cpu::forward::<T>(self, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        match self.sums_given {
            true if self.means => cuda::scale_bytes(inputs[0], self.groups) + partials_bytes(inputs[0], self.groups),
            true => cuda::scale_bytes(inputs[0], self.groups),
            false => cuda::workspace_bytes(&Rows::new(inputs[0], self.groups), 1),
        }
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(self, io)
    }
}

/// The gradient of [`BatchNorm`].
///
/// Inputs d_y, x, mean, rstd, then gamma and beta if affine, then the mask if it is a stored one. Outputs d_x, then d_gamma
/// and d_beta if affine, then d_residual (the masked d_y) if it is wanted.
#[derive(Debug, Clone, Copy)]
struct BatchNormBackward {
    groups: usize,
    affine: bool,
    mask: Mask,
    /// Whether the gradient of a residual is wanted.
    residual: bool,
}

impl Op for BatchNormBackward {
    fn name(&self) -> &'static str {
        "batch_norm_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (d_y, x) = (inputs[0], inputs[1]);
        if d_y != x {
            return Err(Error::shape("batch_norm_backward", "d_y", x, d_y));
        }
        let mut outputs = vec![x.clone()];
        if self.affine {
            outputs.extend([inputs[4].clone(), inputs[4].clone()]);
        }
        if self.residual {
            outputs.push(x.clone());
        }
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        sums::workspace_bytes(2, inputs[0].shape.channels(), self.groups)
    }

    fn accumulates(&self) -> bool {
        true
    }

    /// Once their sums are known x is read again, and d_y with its mask, or in their stead the residual's gradient if the first
    /// pass has written it.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let [d_y, x] = [tensors.inputs[0], tensors.inputs[1]];
        let traffic = tensors.once().reading(x).reading(d_y);
        let masked = self.residual && !tensors.accumulates(tensors.outputs.len() - 1);
        match tensors.inputs.last() {
            Some(mask) if self.mask == Mask::Stored && !masked => traffic.reading(mask),
            _ => traffic,
        }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("batch_norm_backward", io.inputs[0].desc.dtype, T => cpu::backward::<T>(self, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::workspace_bytes(&Rows::new(inputs[1], self.groups), 3)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(self, io)
    }
}

/// Evaluation-mode batch norm: inputs x, running_mean, running_var, then gamma and beta if affine, then the residual if
/// there is one; output y.
#[derive(Debug, Clone, Copy)]
pub struct BatchNormEval {
    /// Added to the variance.
    pub eps: f64,
    /// What is fused.
    pub fusion: Fusion,
}

impl Op for BatchNormEval {
    fn name(&self) -> &'static str {
        "batch_norm_eval"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let without_statistics: Vec<&TensorDesc> =
            std::iter::once(inputs[0]).chain(inputs[3..].iter().copied()).collect();
        let channels = check_inputs("batch_norm_eval", &without_statistics, self.fusion)?;
        let expected = TensorDesc::new([channels], gradient_dtype(inputs[0].dtype));
        for (what, desc) in [("running_mean", inputs[1]), ("running_var", inputs[2])] {
            if *desc != expected {
                return Err(Error::shape("batch_norm_eval", what, &expected, desc));
            }
        }
        Ok(vec![inputs[0].clone()])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("batch_norm_eval", io.inputs[0].desc.dtype, T => cpu::eval::<T>(self, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::eval_workspace_bytes(inputs[0])
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::eval(self, io)
    }
}

/// Shape and element type of the per-channel tensors of a batch norm over activations of `dtype`.
pub fn channel_desc(channels: usize, dtype: DType) -> TensorDesc {
    TensorDesc::new([channels], gradient_dtype(dtype))
}
