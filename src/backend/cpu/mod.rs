//! The CPU: matrix products, arena memory and what an op is handed.

pub mod arena;
pub mod blocks;
pub mod gemm;
pub mod io;
pub mod kernel;
pub mod long;
pub mod panels;
pub mod rows;
pub mod scratch;

pub use blocks::{Block, gemm_blocks, par_blocks};
pub use gemm::{Mat, Real, gemm};
pub use io::{CpuIo, Input, Output, Tier};
pub use long::{long_workspace, multiply_long};
pub use panels::Panels;
pub use rows::{Epilogue, multiply_rows};
