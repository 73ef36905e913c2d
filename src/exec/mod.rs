//! Executors: a planned tape on a device.

pub mod cpu;
pub mod cuda;
mod device;
mod program;

pub use cpu::CpuExecutor;
pub use cuda::CudaExecutor;
pub use device::Device;

use std::time::Duration;

use crate::error::Result;
use crate::graph::{Phase, Plan, Tape, ValueId};
use crate::tensor::HostTensor;

/// A prepared tape: memory placed, algorithms chosen, ready to replay.
pub trait Executor: Send {
    /// Runs every node of the given phase once.
    ///
    /// # Errors
    /// What a node finds wrong at run time.
    fn run_phase(&mut self, phase: Phase) -> Result<()>;

    /// Runs a whole step: forward, backward, update.
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn run_step(&mut self) -> Result<()> {
        [Phase::Forward, Phase::Backward, Phase::Update].into_iter().try_for_each(|phase| self.run_phase(phase))
    }

    /// Waits for all that was started. A device may still be at work when `run_step` returns.
    ///
    /// # Errors
    /// A fault of what was started.
    fn finish(&mut self) -> Result<()>;

    /// Runs a whole step node by node, and says how long each took, in the tape's order (nothing for views).
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn run_timed(&mut self) -> Result<Vec<Duration>>;

    /// Overwrites a persistent value; `bytes` are row-major and little-endian.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] when the length is wrong.
    fn write(&mut self, value: ValueId, bytes: &[u8]) -> Result<()>;

    /// The content of a persistent or kept value.
    ///
    /// # Errors
    /// [`crate::error::Error::Internal`] when the value's storage is reused within the step.
    fn read(&self, value: ValueId) -> Result<HostTensor>;

    /// What is being executed.
    fn tape(&self) -> &Tape;

    /// Where everything lies.
    fn plan(&self) -> &Plan;

    /// Runs the nodes of a phase one by one; stops at the first whose output has a NaN or an infinity and returns its name.
    /// A leaf that is not finite to begin with comes first.
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn first_non_finite(&mut self, phase: Phase) -> Result<Option<String>>;

    /// The first buffer behind which a byte was changed, when the executor was made to notice.
    ///
    /// # Errors
    /// What reading the memory finds wrong.
    fn overrun(&self) -> Result<Option<String>>;
}
