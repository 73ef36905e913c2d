//! The ops: one file (or folder) each, with shape inference, backward and the CPU implementation.

pub mod conv2d;
