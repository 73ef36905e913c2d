//! `--device` and `--dtype`.

use std::sync::Arc;

use crate::backend::cpu::Tier;
use crate::backend::cuda::{CudaDevice, Driver};
use crate::error::{Error, Result};
use crate::exec;
use crate::tensor::DType;

/// Where it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Device {
    #[default]
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
    /// The CUDA kernels, run on the CPU: slow, for finding faults.
    CudaEmulated,
}

impl Device {
    /// Opens it; `tier` is for the CPU.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with a hint when it is not there.
    pub fn open(self, tier: Tier) -> Result<exec::Device> {
        match self.driver()? {
            Some(driver) => Ok(exec::Device::Cuda(driver)),
            None => Ok(exec::Device::Cpu(tier)),
        }
    }

    /// The driver of a CUDA device, real or emulated; none for the CPU.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn driver(self) -> Result<Option<Arc<dyn Driver>>> {
        Ok(match self {
            Device::Cpu => None,
            Device::Cuda => Some(Arc::new(CudaDevice::open(0)?)),
            Device::CudaEmulated => Some(emulator()?),
        })
    }
}

#[cfg(feature = "emulator")]
fn emulator() -> Result<Arc<dyn Driver>> {
    use crate::backend::cuda::emulator::{Emulator, Options};
    Ok(Arc::new(Emulator::new(Options::from_environment()?)?))
}

#[cfg(not(feature = "emulator"))]
fn emulator() -> Result<Arc<dyn Driver>> {
    let what = "--device cuda-emulated: this build has no emulator".into();
    Err(Error::Unsupported { what, hint: Some("build with --features emulator".into()) })
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
pub fn check_trainable(device: Device, precision: Precision) -> Result<()> {
    let (what, hint) = match (device, precision) {
        (Device::Cpu, Precision::F32) => return Ok(()),
        (Device::Cpu, other) => (format!("--dtype {}: the CPU trains in f32 only", other.dtype()), "use --dtype f32"),
        _ => ("--device: this build trains on the CPU only".into(), "use --device cpu; selftest runs the kernels"),
    };
    Err(Error::Unsupported { what, hint: Some(hint.into()) })
}
