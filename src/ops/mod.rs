//! The ops: one file (or folder) each, with shape inference, backward and the CPU implementation.

pub mod batch_norm;
pub mod cast;
pub mod conv2d;
pub mod linear;
pub mod pool;
pub mod relu;
mod row_tiles;
pub mod sgd;
pub mod similarity;
pub mod slice_rows;
pub mod z_std;

use crate::backend::cuda::Kernel;

/// The declarations of all CUDA kernels.
pub fn cuda_kernels() -> Vec<&'static Kernel> {
    [batch_norm::cuda::KERNELS, pool::cuda::KERNELS, relu::cuda::KERNELS].concat()
}
