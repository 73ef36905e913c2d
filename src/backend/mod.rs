//! Mechanism of the devices: memory, threads, matrix products. Names no op.

pub mod cpu;
pub mod cuda;
