//! The driver's library, and the devices that it shows.
#![allow(unsafe_code)] // calls of the driver

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::failure::{failed, unsupported};
use crate::backend::cuda::{compiled_modules, reason};
use crate::error::Result;

/// CUDA 13.0, which the kernels are compiled with, as `cuDriverGetVersion` counts.
const OLDEST_DRIVER: i32 = 13_000;
/// What brings a driver for it.
const GET_DRIVER: &str = "install NVIDIA's driver 580 or newer, or use --device cpu";

/// A device, as the driver describes it before it is opened.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DeviceFacts {
    /// Its number: what `--device cuda:N` means.
    pub ordinal: usize,
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its compute capability: `[9, 0]`.
    pub capability: [u32; 2],
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory; how much of it is free, [`super::CudaDevice`] knows when it is open.
    pub memory: usize,
    /// The code of this build that it runs, `sm_90a`, if there is any.
    pub code: Option<&'static str>,
}

/// Loads and starts the driver.
pub(super) fn start() -> Result<()> {
    load_library()?;
    let [major, minor] = version()?;
    if (major * 1000 + minor * 10) < OLDEST_DRIVER as u32 {
        let what = format!("the CUDA driver is too old: it supports CUDA {major}.{minor}, the kernels need 13.0");
        return Err(unsupported(&what, GET_DRIVER));
    }
    match result::init() {
        // The count says it, with the number that was asked for.
        Ok(()) | Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(()),
        Err(error) => Err(failed("start", error)),
    }
}

/// The newest CUDA that the installed driver supports: `[13, 0]`.
///
/// # Errors
/// [`crate::error::Error::Unsupported`] when no driver is installed.
pub(super) fn driver_version() -> Result<[u32; 2]> {
    load_library()?;
    version()
}

/// How many devices a started driver shows.
pub(super) fn count() -> Result<usize> {
    match result::device::get_count() {
        Ok(count) => Ok(count as usize),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_NOT_INITIALIZED)) => Ok(0),
        Err(error) => Err(failed("count the devices", error)),
    }
}

/// The handle of a device; the driver is started.
pub(super) fn device(ordinal: usize) -> Result<sys::CUdevice> {
    let count = count()?;
    if ordinal < count {
        return result::device::get(ordinal as i32).map_err(|e| failed("open the device", e));
    }
    let what = match count {
        0 => "there is no CUDA device: the driver shows none".to_string(),
        _ => format!("there is no CUDA device {ordinal}: the driver shows {count}, counted from 0"),
    };
    Err(unsupported(&what, "`nvidia-smi` lists them; CUDA_VISIBLE_DEVICES can hide them, and so can a container"))
}

/// All devices of a started driver.
pub(super) fn list() -> Result<Vec<DeviceFacts>> {
    (0..count()?.max(1)).map(|ordinal| facts(ordinal, device(ordinal)?)).collect()
}

fn facts(ordinal: usize, device: sys::CUdevice) -> Result<DeviceFacts> {
    let capability = capability(device)?;
    let archs = compiled_modules().first().map_or(&[][..], |module| module.archs);
    Ok(DeviceFacts {
        ordinal,
        name: name(device)?,
        capability,
        multiprocessors: attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: the driver has named the device.
        memory: unsafe { result::device::total_mem(device) }.map_err(|e| failed("describe the device", e))?,
        code: code_for(capability, archs),
    })
}

fn attribute(device: sys::CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    // SAFETY: the driver has named the device.
    let value = unsafe { result::device::get_attribute(device, attribute) };
    value.map(|value| value as u32).map_err(|e| failed("describe the device", e))
}

/// The compute capability of a device.
pub(super) fn capability(device: sys::CUdevice) -> Result<[u32; 2]> {
    Ok([
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ])
}

pub(super) fn name(device: sys::CUdevice) -> Result<String> {
    result::device::get_name(device).map_err(|e| failed("name the device", e))
}

/// Of the code that a fatbin holds, that which a device of this compute capability runs: machine code before PTX, and the
/// newest of it.
fn code_for(capability: [u32; 2], archs: &[&'static str]) -> Option<&'static str> {
    let [major, minor] = capability;
    let own = major * 10 + minor;
    let suited = |arch: &&'static str| {
        let (kind, generation) = arch.split_once('_')?;
        let digits = generation.trim_end_matches(['a', 'f']);
        let number: u32 = digits.parse().ok()?;
        let same_major = number / 10 == major;
        let runs = match &generation[digits.len()..] {
            "a" => number == own,
            "f" => same_major && number <= own,
            _ => number <= own && (same_major || kind == "compute"),
        };
        runs.then_some((kind == "sm", number, *arch))
    };
    archs.iter().filter_map(suited).max().map(|(_, _, arch)| arch)
}

/// Loads the driver's library under the name that is sure to exist; cudarc, which panics where there is none, then finds it.
fn load_library() -> Result<()> {
    // SAFETY: NVIDIA's library has initialisers only of its own.
    match unsafe { libloading::Library::new("libcuda.so.1") } {
        Ok(library) => {
            std::mem::forget(library); // for as long as the program runs
            Ok(())
        }
        Err(error) => Err(unsupported(&format!("no CUDA driver: {}", reason(&error)), GET_DRIVER)),
    }
}

/// As [`driver_version`], of a library that is loaded.
fn version() -> Result<[u32; 2]> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("say its driver's version", e))?;
    Ok([version as u32 / 1000, version as u32 % 1000 / 10])
}

#[cfg(test)]
mod tests {
    use super::code_for;

    #[test]
    fn devices_run_machine_code_of_their_generation_or_older_ptx() {
        let all = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80", "compute_120"];
        for (capability, expected) in [
            ([7, 5], None),
            ([8, 0], Some("sm_80")),
            ([8, 7], Some("sm_86")),
            ([8, 9], Some("sm_89")),
            ([9, 0], Some("sm_90a")),
            ([10, 3], Some("sm_100")),
            ([11, 0], Some("compute_80")),
            ([12, 1], Some("sm_120")),
            ([13, 0], Some("compute_120")),
        ] {
            assert_eq!(code_for(capability, &all), expected, "{capability:?}");
        }
        assert_eq!(code_for([9, 0], &["compute_90a"]), Some("compute_90a"));
        assert_eq!(code_for([10, 0], &["sm_90a", "compute_90a"]), None);
        assert_eq!(code_for([10, 3], &["sm_100f"]), Some("sm_100f"));
        assert_eq!(code_for([12, 0], &["sm_100f"]), None);
    }
}
