//! Where a tape is executed.

use std::sync::Arc;

use crate::backend::cpu::Tier;
use crate::backend::cuda::Driver;
use crate::error::{Error, Result};
use crate::exec::cuda::Options;
use crate::exec::{CpuExecutor, CudaExecutor, Executor};
use crate::graph::Tape;
use crate::graph::plan::Target;

/// A device that executors can be made for.
#[derive(Debug, Clone)]
pub enum Device {
    /// The host, with the chosen implementation of expensive ops.
    Cpu(Tier),
    /// A CUDA device, real or emulated.
    Cuda(Arc<dyn Driver>),
}

impl Device {
    /// An executor of `tape`.
    ///
    /// # Errors
    /// As [`Device::executor_with`].
    pub fn executor(&self, tape: Tape) -> Result<Box<dyn Executor>> {
        self.executor_with(tape, Options::default())
    }

    /// An executor of `tape` that works as `options` say on a CUDA device.
    ///
    /// # Errors
    /// Faults of the tape; [`crate::error::Error::OutOfMemory`] when there is not enough memory.
    pub fn executor_with(&self, tape: Tape, options: Options) -> Result<Box<dyn Executor>> {
        Ok(match self {
            Device::Cpu(tier) => Box::new(CpuExecutor::new(tape, *tier)?),
            Device::Cuda(driver) => Box::new(CudaExecutor::new(tape, driver.clone(), options)?),
        })
    }

    /// Whether it is a GPU, and not the CPU by itself or in disguise.
    pub fn is_gpu(&self) -> bool {
        matches!(self, Device::Cuda(driver) if !driver.emulated())
    }

    /// Which kind of plan it takes.
    pub fn target(&self) -> Target {
        match self {
            Device::Cpu(_) => Target::Cpu,
            Device::Cuda(_) => Target::Cuda,
        }
    }

    /// What it is, for people.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(_) => format!("the CPU ({} threads)", rayon::current_num_threads()),
            Device::Cuda(driver) => driver.name(),
        }
    }

    /// Whether convolutions and matrix products are to be had on it.
    pub fn has_libraries(&self) -> bool {
        self.missing_libraries().is_none()
    }

    /// Why they are not.
    pub fn missing_libraries(&self) -> Option<Error> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(driver) => driver.libraries().err(),
        }
    }

    /// An executor for finding faults: its memory starts as NaN, and [`Executor::overrun`] sees writes behind a buffer.
    ///
    /// # Errors
    /// As [`Device::executor`].
    pub fn poisoned_executor(&self, tape: Tape) -> Result<Box<dyn Executor>> {
        Ok(match self {
            Device::Cpu(tier) => Box::new(CpuExecutor::poisoned(tape, *tier)?),
            Device::Cuda(driver) => Box::new(CudaExecutor::poisoned(tape, driver.clone(), Options::default())?),
        })
    }
}
