//! 2-D convolution.

pub mod direct;
mod gather;
pub mod geometry;
pub mod reference;
