//! Executors: a planned tape on a device.

pub mod choice;
pub mod compare;
pub mod cpu;
pub mod cuda;
mod device;
mod program;

pub use choice::{DeviceChoice, Opened, Precision};
pub use cpu::CpuExecutor;
pub use cuda::{CudaExecutor, Options, room};
pub use device::Device;

use std::fmt::Debug;
use std::time::Duration;

use crate::error::Result;
use crate::graph::{Phase, Plan, Tape, ValueId};
use crate::tensor::HostTensor;

/// A prepared tape: memory placed, algorithms chosen, ready to replay.
pub trait Executor: Debug + Send {
    /// Runs every node of the given phase once.
    ///
    /// # Errors
    /// What a node finds wrong at run time.
    fn run_phase(&mut self, phase: Phase) -> Result<()>;

    /// Runs a whole step: forward, backward, update. A device may still be at work when this returns, with the step before
    /// too.
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn run_step(&mut self) -> Result<()>;

    /// Runs a whole step and looks at the output of every node of the phases `checked`; stops at the first that is not finite
    /// and returns its name.
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn check_step(&mut self, checked: &[Phase]) -> Result<Option<String>>;

    /// Runs one node, by its number on the tape.
    ///
    /// # Errors
    /// As [`Executor::run_phase`].
    fn run_node(&mut self, index: usize) -> Result<()>;

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

    /// Gives the next step the first bytes of an input, which may travel while the step before is at work.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] when `value` is no input, or has less room.
    fn stage(&mut self, value: ValueId, bytes: &[u8]) -> Result<()>;

    /// Names the persistent or kept values that [`Executor::collect`] returns.
    ///
    /// # Errors
    /// As [`Executor::read`].
    fn watch(&mut self, values: &[ValueId]) -> Result<()>;

    /// The watched values as the oldest step left them that was not collected yet, when more than `in_flight` steps were
    /// not; waits for that step. Of a device no more than two steps are under way: a third one overtakes the oldest.
    ///
    /// # Errors
    /// A fault of the step.
    fn collect(&mut self, in_flight: usize) -> Result<Option<Vec<HostTensor>>>;

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

    /// What lies in a value's storage now, whoever has it: right after the value's node has run, its content.
    ///
    /// # Errors
    /// What reading the memory finds wrong.
    fn peek(&self, value: ValueId) -> Result<HostTensor>;

    /// Overwrites what lies in a value's storage now.
    ///
    /// # Errors
    /// As [`Executor::peek`].
    fn poke(&mut self, value: ValueId, bytes: &[u8]) -> Result<()>;

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
