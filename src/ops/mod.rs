//! The ops: one file (or folder) each, with shape inference, backward and the CPU implementation. `augment`
//! makes views on a device, for which `data` has no words.

pub mod augment;
pub mod batch_norm;
pub mod bias;
pub mod cast;
pub mod conv2d;
pub mod cosine_loss;
pub mod cross_entropy;
pub mod gram_norm;
pub mod group_sums;
pub mod knn;
pub mod lars;
pub mod layout;
pub mod linear;
pub mod loss_scale;
pub mod matmul;
pub mod pad_channels;
pub mod pool;
pub mod relu;
mod row_teams;
mod row_tiles;
pub mod sgd;
pub mod similarity;
pub mod slice_rows;
pub mod subsample;
pub mod z_std;

use crate::backend::cuda::{self, Kernel};
use crate::graph::builtin;

/// The declarations of all CUDA kernels: those of the ops here, of the graph's own and of the backend.
pub fn cuda_kernels() -> Vec<&'static Kernel> {
    [
        augment::cuda::KERNELS,
        batch_norm::cuda::KERNELS,
        batch_norm::pair::cuda::KERNELS,
        batch_norm::pooled::cuda::KERNELS,
        bias::cuda::KERNELS,
        cast::cuda::KERNELS,
        conv2d::stem::KERNELS,
        cosine_loss::cuda::KERNELS,
        cross_entropy::cuda::KERNELS,
        gram_norm::KERNELS,
        group_sums::cuda::KERNELS,
        knn::cuda::KERNELS,
        lars::cuda::KERNELS,
        loss_scale::cuda::KERNELS,
        layout::cuda::KERNELS,
        pad_channels::cuda::KERNELS,
        pool::cuda::KERNELS,
        relu::cuda::KERNELS,
        row_teams::KERNELS,
        sgd::cuda::KERNELS,
        similarity::cuda::KERNELS,
        slice_rows::cuda::KERNELS,
        subsample::cuda::KERNELS,
        z_std::cuda::KERNELS,
        builtin::cuda::KERNELS,
        &cuda::kernels(),
    ]
    .concat()
}
