//! Mechanism of the devices: memory, threads, matrix products, the sizes of convolutions. Names no op.

pub mod conv;
pub mod cpu;
pub mod cuda;
