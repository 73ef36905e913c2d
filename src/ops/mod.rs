//! The ops: one file (or folder) each, with shape inference, backward and the CPU implementation. `augment` is none of a
//! tape: it makes views on a device, for which `data` has no words.

pub mod augment;
pub mod batch_norm;
pub mod cast;
pub mod conv2d;
pub mod linear;
pub mod pool;
pub mod relu;
pub mod sgd;
pub mod similarity;
pub mod slice_rows;
pub mod z_std;

use crate::backend::cuda::Kernel;

/// The declarations of all CUDA kernels.
pub fn cuda_kernels() -> Vec<&'static Kernel> {
    [augment::cuda::KERNELS, relu::cuda::KERNELS].concat()
}
