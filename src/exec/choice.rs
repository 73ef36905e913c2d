//! What a user asks for: `--device` and `--dtype`.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::cpu::Tier;
use crate::backend::cuda::library::Choice;
use crate::backend::cuda::{CudaDevice, Driver};
use crate::choice::written_as_text;
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::tensor::DType;

/// Where it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU if it can be used, else the CPU.
    Auto,
    /// The host.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
    /// The CUDA kernels, run on the CPU: slow, for finding faults.
    CudaEmulated,
}

/// A device that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The device.
    pub device: Device,
    /// Why it is the CPU where [`DeviceChoice::Auto`] looked for a GPU.
    pub instead_of_gpu: Option<Error>,
}

impl DeviceChoice {
    /// Opens it; `tier` is for the CPU.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with a hint when it is not there.
    pub fn open(self, tier: Tier) -> Result<Opened> {
        let cpu = Device::Cpu(tier);
        Ok(match (self, self.driver()) {
            (DeviceChoice::Auto, Err(error)) => Opened { device: cpu, instead_of_gpu: Some(error) },
            (_, driver) => Opened { device: driver?.map_or(cpu, Device::Cuda), instead_of_gpu: None },
        })
    }

    /// The driver of a CUDA device, real or emulated; none for the CPU.
    ///
    /// # Errors
    /// As [`DeviceChoice::open`]; with [`DeviceChoice::Auto`] when there is no GPU.
    pub fn driver(self) -> Result<Option<Arc<dyn Driver>>> {
        Ok(match self {
            DeviceChoice::Cpu => None,
            DeviceChoice::Auto => Some(Arc::new(CudaDevice::open(0)?)),
            DeviceChoice::Cuda(ordinal) => Some(Arc::new(CudaDevice::open(ordinal)?)),
            DeviceChoice::CudaEmulated => Some(emulator()?),
        })
    }
}

#[cfg(feature = "emulator")]
fn emulator() -> Result<Arc<dyn Driver>> {
    Ok(Arc::new(crate::backend::cuda::Emulator::from_environment()?))
}

#[cfg(not(feature = "emulator"))]
fn emulator() -> Result<Arc<dyn Driver>> {
    let what = "--device cuda-emulated: this build has no emulator".into();
    Err(Error::Unsupported { what, hint: Some("build with --features emulator".into()) })
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceChoice, String> {
        match text.split_once(':') {
            None => match text {
                "auto" => Ok(DeviceChoice::Auto),
                "cpu" => Ok(DeviceChoice::Cpu),
                "cuda" => Ok(DeviceChoice::Cuda(0)),
                "cuda-emulated" => Ok(DeviceChoice::CudaEmulated),
                _ => Err("expected auto, cpu, cuda, cuda:N or cuda-emulated".into()),
            },
            Some(("cuda", number)) => match number.parse() {
                Ok(ordinal) => Ok(DeviceChoice::Cuda(ordinal)),
                Err(_) => Err(format!("expected the number of a device after \"cuda:\", got {number:?}")),
            },
            Some(_) => Err("expected auto, cpu, cuda, cuda:N or cuda-emulated".into()),
        }
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(0) => f.write_str("cuda"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceChoice::CudaEmulated => f.write_str("cuda-emulated"),
        }
    }
}

written_as_text!(DeviceChoice);

/// In what it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Float32 throughout: the reference.
    #[default]
    F32,
    /// Float32 whose products are rounded to 10 bits before they are added (CUDA only).
    Tf32,
    /// Activations in bfloat16; weights, statistics, gradients of weights and loss in float32.
    Bf16,
    /// The same with float16, and dynamic loss scaling.
    #[value(alias = "f16")]
    Fp16,
    /// Float64: for checks on the CPU.
    F64,
}

impl Precision {
    /// Element type of the activations.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 | Precision::Tf32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::Fp16 => DType::F16,
            Precision::F64 => DType::F64,
        }
    }

    /// What `train` takes when nothing else is asked for.
    pub fn default_on(device: &Device) -> Precision {
        match device {
            Device::Cpu(_) => Precision::F32,
            Device::Cuda(_) => Precision::Bf16,
        }
    }

    /// Checks that `device` trains in it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what it does train in.
    pub fn check_trainable_on(self, device: &Device) -> Result<()> {
        let (name, hint) = match (device, self) {
            (Device::Cpu(_), Precision::F32) => return Ok(()),
            (Device::Cpu(_), _) => ("the CPU", "use --dtype f32"),
            (Device::Cuda(_), Precision::F64) => ("a CUDA device", "use --dtype bf16, fp16, tf32 or f32"),
            (Device::Cuda(_), _) => return Ok(()),
        };
        let what = format!("--dtype {self}: {name} does not train in it");
        Err(Error::Unsupported { what, hint: Some(hint.into()) })
    }

    /// How libraries choose their algorithms for it.
    pub fn choice(self, autotune: bool) -> Choice {
        Choice { tf32: self == Precision::Tf32, autotune }
    }
}

impl Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
            Precision::Fp16 => "fp16",
            Precision::F64 => "f64",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda", "cuda:7", "cuda-emulated"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda:0".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        for text in ["gpu", "cuda:", "cuda:-1", "cpu:0", "CUDA", "cuda0", ""] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().starts_with("expected"), "{text}");
        }
    }
}
