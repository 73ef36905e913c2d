//! The ops: one file (or folder) each, with shape inference, backward and the CPU implementation.

pub mod batch_norm;
pub mod cast;
pub mod conv2d;
pub mod cosine_loss;
pub mod cross_entropy;
pub mod knn;
pub mod linear;
pub mod pool;
pub mod relu;
mod rows;
pub mod sgd;
pub mod similarity;
pub mod slice_rows;
pub mod z_std;

use crate::backend::cuda::Kernel;

/// The declarations of all CUDA kernels.
pub fn cuda_kernels() -> Vec<&'static Kernel> {
    [
        cosine_loss::cuda::KERNELS,
        cross_entropy::cuda::KERNELS,
        knn::cuda::KERNELS,
        relu::cuda::KERNELS,
        rows::KERNELS,
        similarity::cuda::KERNELS,
        z_std::cuda::KERNELS,
    ]
    .concat()
}
