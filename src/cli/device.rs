//! `--device` and `--dtype`.

use crate::error::{Error, Result};
use crate::tensor::DType;

/// Where it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Device {
    #[default]
    Cpu,
    Cuda,
}

/// Element type of the activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Precision {
    #[default]
    F32,
    /// With f32 weights, statistics and gradients of weights.
    Bf16,
    F64,
}

impl Precision {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::F64 => DType::F64,
        }
    }
}

/// Checks that this build can train on `device` in `precision`.
///
/// # Errors
/// [`Error::Unsupported`] for anything but f32 on the CPU.
pub fn check_available(device: Device, precision: Precision) -> Result<()> {
    let (what, hint) = match (device, precision) {
        (Device::Cpu, Precision::F32) => return Ok(()),
        (Device::Cuda, _) => ("--device cuda: this build trains on the CPU only".into(), "use --device cpu"),
        (Device::Cpu, other) => (format!("--dtype {}: the CPU trains in f32 only", other.dtype()), "use --dtype f32"),
    };
    Err(Error::Unsupported { what, hint: Some(hint.into()) })
}
