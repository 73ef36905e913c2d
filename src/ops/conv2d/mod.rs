//! 2-D convolution.

pub mod direct;
pub mod geometry;
pub mod reference;
