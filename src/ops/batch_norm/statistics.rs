//! The statistics of a batch norm whose output another op makes.

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::Result;
use crate::graph::op::dispatch_real;
use crate::graph::{Again, Op, Tensors, Traffic};
use crate::ops::row_tiles::Rows;
use crate::tensor::TensorDesc;

use super::{BatchNorm, Fusion, cpu, cuda};

/// Statistics of [`BatchNorm`] alone: input x, then the sums if they are given; outputs mean `[groups, c]` and rstd
/// `[groups, c]`; updates as [`BatchNorm`]. The gradient is with whoever normalises with them ([`super::pair`]).
#[derive(Debug, Clone, Copy)]
pub struct BatchNormStatistics {
    norm: BatchNorm,
}

impl BatchNormStatistics {
    /// With the constants of a batch norm, and whether the sums come as an input: see [`BatchNorm`].
    pub fn new(groups: usize, eps: f64, momentum: f64, sums_given: bool) -> BatchNormStatistics {
        let fusion = Fusion { affine: false, residual: false, relu: false };
        BatchNormStatistics { norm: BatchNorm { groups, eps, momentum, fusion, sums_given, means: false } }
    }
}

impl Op for BatchNormStatistics {
    fn name(&self) -> &'static str {
        "batch_norm_statistics"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let mut outputs = self.norm.infer(inputs)?;
        outputs.remove(0);
        Ok(outputs)
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.workspace(inputs)
    }

    fn again(&self) -> Again {
        Again::Never
    }

    /// Where its sums are given, x is not read.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        if self.norm.sums_given { tensors.once().sparing(tensors.inputs[0]) } else { tensors.once() }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            cpu::statistics::<T>(&self.norm, io, 0);
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.cuda_workspace(inputs)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::statistics(&self.norm, &Rows::new(io.inputs[0].desc, self.norm.groups), io, 0)?;
        Ok(())
    }
}
