//! The end of a residual block whose shortcut is a projection: both batch norms, the sum of the two and the ReLU in one op. The
//! normalised shortcut and its gradient, tensors as large as the result, are never written.

mod cpu;
pub(in crate::ops) mod cuda;

pub(super) use cpu::apply;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Again, GradBuilder, Op, Tensors, Traffic};
use crate::ops::row_tiles::Rows;
use crate::tensor::TensorDesc;

use super::cuda::workspace_bytes;
use super::{BatchNorm, Fusion, channel_desc, mask_desc, repeat, sums};

/// The first of the inputs that belong to the shortcut: r, its mean and rstd, its gamma and beta.
const R: usize = 3;
/// How many they are.
const OF_R: usize = 5;

/// `y = relu(batch_norm(x) + batch_norm(r))`, training mode: as [`BatchNorm`] of r, and then that of x with it as the residual, bit
/// for bit, gradients too.
///
/// Inputs x `[n, ..., c]`, gamma `[c]`, beta `[c]`; r (like x), its mean and rstd `[groups, c]` of
/// [`super::BatchNormStatistics`], its gamma and beta; then the sums of x if they are given. Outputs y (like x), mean and rstd of x
/// `[groups, c]`, the mask y > 0. Updates as [`BatchNorm`] of x.
#[derive(Debug, Clone, Copy)]
pub struct BatchNormPair {
    norm: BatchNorm,
}

impl BatchNormPair {
    /// With the constants of a batch norm, and whether the sums of x come as an input: see [`BatchNorm`].
    pub fn new(groups: usize, eps: f64, momentum: f64, sums_given: bool) -> BatchNormPair {
        let fusion = Fusion { affine: true, residual: false, relu: true };
        BatchNormPair { norm: BatchNorm { groups, eps, momentum, fusion, sums_given, means: false } }
    }
}

/// Checks r and what belongs to it, the first of `inputs`, against x.
pub(super) fn check_shortcut(op: &str, x: &TensorDesc, groups: usize, inputs: &[&TensorDesc]) -> Result<()> {
    let parameter = channel_desc(x.shape.channels(), x.dtype);
    let statistics = TensorDesc::new([groups, x.shape.channels()], parameter.dtype);
    let expected = [x, &statistics, &statistics, &parameter, &parameter];
    for ((what, expected), &got) in
        ["r", "mean of r", "rstd of r", "gamma of r", "beta of r"].iter().zip(expected).zip(inputs)
    {
        if got != expected {
            return Err(Error::shape(op, what, expected, got));
        }
    }
    Ok(())
}

impl Op for BatchNormPair {
    fn name(&self) -> &'static str {
        "batch_norm_pair"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let of_x: Vec<&TensorDesc> = inputs[..R].iter().chain(&inputs[R + OF_R..]).copied().collect();
        let mut outputs = self.norm.infer(&of_x)?;
        check_shortcut(self.name(), inputs[0], self.norm.groups, &inputs[R..][..OF_R])?;
        outputs.push(mask_desc(inputs[0]));
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.workspace(inputs)
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let [x, gamma] = [g.input(0), g.input(1)];
        let [r, mean, rstd, gamma_of_r] = [0, 1, 2, 3].map(|i| g.input(R + i));
        let inputs = [g.d_output(0)?, x, g.output(1), g.output(2), gamma, r, mean, rstd, gamma_of_r, g.output(3)];
        let op = BatchNormPairBackward { groups: self.norm.groups };
        g.emit(op, &inputs, &[Some(0), Some(1), Some(2), Some(R), Some(R + 3), Some(R + 4)])
    }

    fn again(&self) -> Again {
        repeat::of_pair(self.norm.groups)
    }

    /// x is read again once its statistics are known, unless their sums were given.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        self.norm.traffic(tensors)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => cpu::forward::<T>(&self.norm, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.cuda_workspace(inputs)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(&self.norm, io)
    }
}

/// The gradient of [`BatchNormPair`].
///
/// Inputs d_y; x, its mean, rstd and gamma; r, its mean, rstd and gamma; the mask. Outputs d_x, d_gamma and d_beta, and the same
/// of r. Both betas have one gradient, the sums of the masked d_y.
#[derive(Debug, Clone, Copy)]
struct BatchNormPairBackward {
    groups: usize,
}

/// Inputs of the gradient that belong to x and to r, and the first of each one's outputs.
const BRANCHES: [Branch; 2] = [Branch { x: 1, d_x: 0 }, Branch { x: 5, d_x: 3 }];
const MASK: usize = 9;

/// The inputs and outputs of one branch: x, mean, rstd and gamma from `x` on; d_x, d_gamma and d_beta from `d_x` on.
#[derive(Debug, Clone, Copy)]
struct Branch {
    x: usize,
    d_x: usize,
}

impl Op for BatchNormPairBackward {
    fn name(&self) -> &'static str {
        "batch_norm_pair_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (d_y, x) = (inputs[0], inputs[1]);
        if d_y != x {
            return Err(Error::shape("batch_norm_pair_backward", "d_y", x, d_y));
        }
        let of_branch = BRANCHES.map(|branch| [branch.x, branch.x + 3, branch.x + 3]);
        Ok(of_branch.as_flattened().iter().map(|&i| inputs[i].clone()).collect())
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        sums::workspace_bytes(cpu::SUMS, inputs[0].shape.channels(), self.groups)
    }

    fn accumulates(&self) -> bool {
        true
    }

    /// Once their sums are known d_y, its mask, x and r are read again.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let again = [0, BRANCHES[0].x, BRANCHES[1].x, MASK];
        again.into_iter().fold(tensors.once(), |traffic, i| traffic.reading(tensors.inputs[i]))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => cpu::backward::<T>(self.groups, io));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        BRANCHES.len() * workspace_bytes(&Rows::new(inputs[1], self.groups), 3)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(self.groups, io)
    }
}
