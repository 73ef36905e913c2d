//! What the graph asks of an op.

use std::any::Any;
use std::fmt::Debug;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::backend::cuda::library::Work;
use crate::error::{Error, Result};
use crate::graph::{Again, GradBuilder, Tensors, Traffic};
use crate::tensor::TensorDesc;

/// One operation. Backward passes are ordinary ops, so an op that exists only to compute a gradient has no `backward`. It is
/// [`Any`], so that who translates a tape into another program's graph can look at its attributes.
pub trait Op: Any + Debug + Send + Sync {
    /// Name in dumps and error messages, e.g. `conv2d`.
    fn name(&self) -> &'static str;

    /// The outputs for `inputs`. Every check of shape and dtype lives here; `cpu` relies on it.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the op and the offending input.
    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>>;

    /// Bytes of scratch that `cpu` may use. Must not depend on the number of threads.
    fn workspace(&self, _inputs: &[&TensorDesc]) -> usize {
        0
    }

    /// Whether output 0 is input 0, or a part of it, under another name: no storage, nothing to run.
    fn is_view(&self) -> bool {
        false
    }

    /// For a view: bytes of input 0 before output 0.
    fn view_offset(&self, _x: &TensorDesc) -> usize {
        0
    }

    /// How outputs that were not kept are had again for the backward pass; bit for bit, and without the updates.
    fn again(&self) -> Again {
        Again::Same
    }

    /// Whether every output may be added into an existing tensor (`Output::accumulate`).
    fn accumulates(&self) -> bool {
        false
    }

    /// Whether gradients flow through this op at all.
    fn differentiable(&self) -> bool {
        true
    }

    /// Appends the ops that compute the gradients of this op's inputs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for ops that have no gradient.
    fn backward(&self, _g: &mut GradBuilder<'_>) -> Result<()> {
        Err(Error::Unsupported { what: format!("{} has no gradient", self.name()), hint: None })
    }

    /// Runs on the CPU.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for element types that the CPU does not compute in.
    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()>;

    /// Bytes of scratch that `cuda` may use.
    fn cuda_workspace(&self, _inputs: &[&TensorDesc]) -> usize {
        0
    }

    /// Launches the op's kernels on a CUDA device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for ops and element types without a kernel; what a launch finds wrong.
    fn cuda(&self, _io: &CudaIo<'_>) -> Result<()> {
        Err(Error::Unsupported { what: format!("{} has no CUDA kernel", self.name()), hint: None })
    }

    /// What a library of NVIDIA's (cuDNN, cuBLASLt) is asked for on CUDA devices in place of a kernel of our own, if one is.
    /// The op's first two inputs are the operands, a third one what is added; its output is the result, a second one its sums.
    fn library_work(&self, _inputs: &[&TensorDesc]) -> Option<Work> {
        None
    }

    /// Floating-point operations of one execution; 0 where memory traffic is all that counts.
    fn flops(&self, _inputs: &[&TensorDesc]) -> u64 {
        0
    }

    /// Bytes that one execution of `cuda`, or of its library work, moves through memory, as [`crate::graph::ledger`] counts:
    /// every tensor once, unless an op reads one again after all of it was seen, or only a part of it.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        tensors.once()
    }
}

/// Runs `$body` with `$T` bound to the CPU's compute type for `$dtype` (f32 or f64); any other dtype is an error.
macro_rules! dispatch_real {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::DType::F64 => {
                type $T = f64;
                $body
            }
            other => {
                return Err($crate::error::Error::Unsupported {
                    what: format!("{}: the CPU computes in f32, not in {other}", $op),
                    hint: Some("use --dtype f32".into()),
                });
            }
        }
    };
}
pub(crate) use dispatch_real;
