//! The CPU: matrix products and arena memory.

pub mod blocks;
pub mod gemm;
pub mod kernel;
pub mod panels;
pub mod scratch;

pub use blocks::{Block, gemm_blocks, par_blocks};
pub use gemm::{Mat, Real, gemm};
pub use panels::Panels;
