//! What a device can do at best, measured in the run that is held against it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::ops::{fill_inputs, time_once};
use crate::backend::cuda::{DevicePtr, DeviceTensor, Driver, ceilings, random};
use crate::error::Result;
use crate::exec::{Device, Executor, Options, Precision};
use crate::graph::{Phase, Role, Tape, builtin};
use crate::ops::linear::Linear;
use crate::tensor::{DType, TensorDesc};

/// Float32 elements that are copied: many times any cache on a GPU, enough for a figure elsewhere.
const COPIED: [usize; 2] = [4 << 20, 256 << 20];
/// Threads and rounds of the arithmetic kernels: enough to fill a GPU for some hundred microseconds.
const THREADS: [usize; 2] = [1 << 12, 1 << 20];
const ROUNDS: [u32; 2] = [32, 4096];
/// Rows and columns of the matrices of the large product: on a CPU, and on a GPU.
const PRODUCT: [usize; 2] = [1024, 8192];

/// The bars.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct Ceilings {
    /// GB/s read and written by a copy.
    pub copy: f64,
    /// TFLOP/s of float32 multiply-adds; none on the CPU.
    fma: Option<f64>,
    /// TFLOP/s of bf16 tensor-core products; none on the CPU.
    mma: Option<f64>,
}

impl Ceilings {
    /// Measures, each figure the best of `repeat` runs.
    pub fn measure(device: &Device, repeat: usize) -> Result<Ceilings> {
        let size = usize::from(device.is_gpu());
        match device {
            Device::Cpu(_) => Ok(Ceilings { copy: copy_on_host(device, repeat)?, fma: None, mma: None }),
            Device::Cuda(driver) => {
                let memory = Memory::new(driver, COPIED[size].max(THREADS[size]))?;
                let best = |work: &dyn Fn() -> Result<u64>| best(device, repeat, work);
                let copy = best(&|| memory.copy(COPIED[size]))? / 1e9;
                let fma = best(&|| memory.arithmetic(ceilings::fma, THREADS[size], ROUNDS[size]))? / 1e12;
                let mma = best(&|| memory.arithmetic(ceilings::mma_bf16, THREADS[size], ROUNDS[size]))? / 1e12;
                Ok(Ceilings { copy, fma: Some(fma), mma: Some(mma) })
            }
        }
    }

    /// TFLOP/s of the engine's own arithmetic in `dtype`; none on the CPU.
    pub fn arithmetic(&self, dtype: DType) -> Option<f64> {
        if dtype == DType::F32 { self.fma } else { self.mma }
    }

    pub fn json(&self) -> Value {
        json!({ "copy_gb_per_s": self.copy, "f32_fma_tflop_per_s": self.fma, "bf16_mma_tflop_per_s": self.mma })
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "copy {:.1} GB/s", self.copy)?;
        if let (Some(fma), Some(mma)) = (self.fma, self.mma) {
            write!(f, ", float32 multiply-add {fma:.3} TFLOP/s, bf16 mma.sync {mma:.3} TFLOP/s")?;
        }
        Ok(())
    }
}

/// TFLOP/s of a large product of matrices in `precision`: what convolutions and linear layers are held against.
///
/// # Errors
/// Faults of the device; on a GPU also [`crate::error::Error::Unsupported`] when NVIDIA's libraries are missing.
pub(in crate::cli) fn matrix_product(device: &Device, precision: Precision, repeat: usize) -> Result<f64> {
    let n = PRODUCT[usize::from(device.is_gpu())];
    let mut tape = Tape::new();
    let [x, w] = ["x", "w"].map(|name| tape.leaf(name, TensorDesc::new([n, n], precision.dtype()), Role::Input, false));
    tape.record_one(Linear, &[x, w])?;
    let options = Options { choice: precision.choice(true), ..Options::default() };
    let mut executor = device.executor_with(tape, options)?;
    fill_inputs(&mut *executor)?;
    let fastest = fastest_phase(device, &mut *executor, repeat)?;
    Ok(2.0 * (n as f64).powi(3) / fastest.as_secs_f64() / 1e12)
}

/// The shortest forward pass of some, of which the first does not count.
fn fastest_phase(device: &Device, executor: &mut dyn Executor, repeat: usize) -> Result<Duration> {
    executor.run_phase(Phase::Forward)?;
    let mut fastest = Duration::MAX;
    for _ in 0..repeat {
        fastest = fastest.min(time_once(device, &mut || executor.run_phase(Phase::Forward))?);
    }
    Ok(fastest)
}

/// The most that `work` does a second, by what it says it has done.
fn best(device: &Device, repeat: usize, work: &dyn Fn() -> Result<u64>) -> Result<f64> {
    let mut fastest = Duration::MAX;
    let mut done = work()?;
    for _ in 0..repeat {
        let time = time_once(device, &mut || {
            done = work()?;
            Ok(())
        })?;
        fastest = fastest.min(time);
    }
    Ok(done as f64 / fastest.as_secs_f64())
}

/// A copy by the op that copies.
fn copy_on_host(device: &Device, repeat: usize) -> Result<f64> {
    let mut tape = Tape::new();
    let desc = TensorDesc::new([COPIED[0]], DType::F32);
    let bytes = 2 * desc.bytes();
    let x = tape.leaf("x", desc, Role::Input, false);
    tape.record_one(builtin::Copy, &[x])?;
    let mut executor = device.executor(tape)?;
    Ok(bytes as f64 / fastest_phase(device, &mut *executor, repeat)?.as_secs_f64() / 1e9)
}

/// Two tensors of float32 on a device.
struct Memory<'a> {
    driver: &'a Arc<dyn Driver>,
    from: DevicePtr,
    to: DevicePtr,
}

impl<'a> Memory<'a> {
    fn new(driver: &'a Arc<dyn Driver>, elements: usize) -> Result<Memory<'a>> {
        let bytes = elements * size_of::<f32>();
        let (from, to) = (driver.allocate(bytes)?, driver.allocate(bytes)?);
        let memory = Memory { driver, from, to };
        // Zeros cost less energy to move, and a device at its power limit then runs faster than on real data.
        let desc = &TensorDesc::new([elements], DType::F32);
        random::fill(&**driver, DeviceTensor { desc, ptr: from }, 4, 0, 0)?;
        Ok(memory)
    }

    fn copy(&self, elements: usize) -> Result<u64> {
        let desc = &TensorDesc::new([elements], DType::F32);
        let tensor = |ptr| DeviceTensor { desc, ptr };
        ceilings::copy(&**self.driver, tensor(self.from), tensor(self.to))
    }

    fn arithmetic(
        &self,
        kernel: impl Fn(&dyn Driver, DeviceTensor<'_>, u32) -> Result<u64>,
        threads: usize,
        rounds: u32,
    ) -> Result<u64> {
        let desc = &TensorDesc::new([threads], DType::F32);
        kernel(&**self.driver, DeviceTensor { desc, ptr: self.to }, rounds)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        for memory in [self.from, self.to] {
            if let Err(error) = self.driver.free(memory) {
                tracing::warn!("device memory was not given back: {error}");
            }
        }
    }
}
