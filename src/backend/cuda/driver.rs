//! What the engine asks of a CUDA device, whether it is one or emulated on the CPU.
#![allow(unsafe_code)] // declares launches, whose conditions callers discharge

use std::fmt::Debug;
use std::time::Duration;

use crate::error::Result;

use super::kernel::{Call, DevicePtr, Grid};

/// A device with one stream: everything runs in the order of the calls. Memory belongs to the driver until it is dropped.
pub trait Driver: Debug + Send + Sync {
    /// What the device is, for people: `NVIDIA H100 80GB HBM3` or `emulated on 2 CPU threads`.
    fn name(&self) -> String;

    /// Whether the device is the CPU in disguise.
    fn emulated(&self) -> bool;

    /// Reserves memory at a multiple of 256 bytes; its content is undefined.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] when there is not enough, with what was asked for and what is free.
    fn allocate(&self, bytes: usize) -> Result<DevicePtr>;

    /// Gives back what `allocate` returned.
    ///
    /// # Errors
    /// A fault of an earlier launch.
    fn free(&self, memory: DevicePtr) -> Result<()>;

    /// Sets `bytes` bytes of the device to `value`.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn fill(&self, to: DevicePtr, bytes: usize, value: u8) -> Result<()>;

    /// Copies host bytes to the device.
    ///
    /// # Errors
    /// [`crate::error::Error::Internal`] when `to` is no memory of this driver with room for `bytes`; a fault of an
    /// earlier launch.
    fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()>;

    /// Waits for all launches and copies bytes of the device to the host.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn download(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()>;

    /// Says that no kernel may touch these bytes from now on: a gap between buffers, on multiples of 8 bytes. A driver that
    /// can watch them reports who does; copies may still reach them.
    fn guard(&self, _from: DevicePtr, _bytes: usize) {}

    /// Takes `guard` back.
    fn unguard(&self, _from: DevicePtr, _bytes: usize) {}

    /// Starts a kernel.
    ///
    /// # Errors
    /// A launch that the device refuses; under the emulator also every fault that it finds in the kernel.
    ///
    /// # Safety
    /// With these arguments and this grid, the kernel must touch only memory of this driver that is allocated, in bounds of
    /// the buffers it is given, and that no other kernel of this launch order expects unchanged.
    unsafe fn launch(&self, grid: Grid, call: Call) -> Result<()>;

    /// How long the device takes for what `work` starts, without what came before it.
    ///
    /// # Errors
    /// Those of `work`; a fault of a launch.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration>;

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// A fault of an earlier launch.
    fn synchronize(&self) -> Result<()>;
}
