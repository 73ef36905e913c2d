//! The CPU: matrix products and arena memory.

pub mod gemm;

pub use gemm::{Mat, Real, gemm};
