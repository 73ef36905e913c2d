//! What the engine asks of a CUDA device, whether it is one or emulated on the CPU.
#![allow(unsafe_code)] // declares launches, whose conditions callers discharge

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};

use super::kernel::{Call, DevicePtr, Grid};
use super::library::Libraries;

/// A queue of the device: what is started on one runs in order, what is started on two runs in any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Kernels, libraries, and every copy that does not say otherwise.
    Compute,
    /// Copies of the next step's inputs, beside the kernels of this step.
    Copy,
}

/// A mark in a stream, of the driver that made it.
#[derive(Debug)]
pub struct Event(pub Box<dyn Any + Send + Sync>);

/// A captured list of work, ready to be replayed, of the driver that captured it.
#[derive(Debug)]
pub struct Graph(pub Box<dyn Any + Send + Sync>);

/// Page-locked host memory: the device copies from and to it while the host goes on.
pub trait Pinned: Debug + Send {
    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Device memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct DeviceMemory {
    /// What can still be reserved.
    pub free: usize,
    /// All of it.
    pub total: usize,
}

/// The memory of an emulated device, for work that the host does in place of a kernel.
pub trait HostView {
    /// Copies bytes out of it.
    ///
    /// # Errors
    /// [`Error::Internal`] when so many are not reserved there.
    fn read(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()>;

    /// Copies bytes into it.
    ///
    /// # Errors
    /// As [`HostView::read`].
    fn write(&self, to: DevicePtr, bytes: &[u8]) -> Result<()>;
}

/// Work that the host does in place of a kernel, each time the stream comes to it.
pub type HostTask = Arc<dyn Fn(&dyn HostView) -> Result<()> + Send + Sync>;

/// A device with two streams. What does not name one goes to [`Stream::Compute`] and runs in the order of the calls there.
/// Memory belongs to the driver until it is dropped.
pub trait Driver: Debug + Send + Sync {
    /// What the device is, for people: `NVIDIA H100 80GB HBM3` or `emulated on 2 CPU threads`.
    fn name(&self) -> String;

    /// Whether the device is the CPU in disguise.
    fn emulated(&self) -> bool;

    /// Its compute capability, `[9, 0]`; none where it is the CPU in disguise.
    fn capability(&self) -> Option<[u32; 2]> {
        None
    }

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

    /// Bytes of device memory, free and in all.
    ///
    /// # Errors
    /// A device that does not say.
    fn memory(&self) -> Result<DeviceMemory>;

    /// How many allocations it has made for its caller, given back or not: of device memory and page-locked memory, events and
    /// graphs.
    fn allocations(&self) -> u64;

    /// NVIDIA's libraries on this device; none where the host answers in their place.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the library that is missing, and where it was looked for.
    fn libraries(&self) -> Result<Option<&dyn Libraries>> {
        Ok(None)
    }

    /// Puts work of the host into the compute stream, in place of a library's kernel.
    ///
    /// # Errors
    /// [`Error::Internal`] on a real device, whose memory the host cannot reach; what the task reports.
    fn host_task(&self, _task: HostTask) -> Result<()> {
        let message = "host work was asked of a real device".into();
        Err(Error::Internal { thread: self.name(), message })
    }

    /// Reserves page-locked host memory, filled with zeros.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the system has not enough.
    fn pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>>;

    /// Starts a copy of `from` to the device, on the copy stream, and returns.
    ///
    /// # Errors
    /// [`Error::Internal`] when `to` is no memory of this driver with room for it.
    ///
    /// # Safety
    /// `from` is memory of [`Driver::pinned`], and is neither changed nor dropped before the copy has run.
    unsafe fn upload_later(&self, to: DevicePtr, from: &[u8]) -> Result<()>;

    /// Starts a copy of device bytes to `to`, on the compute stream, and returns.
    ///
    /// # Errors
    /// As [`Driver::upload_later`].
    ///
    /// # Safety
    /// `to` is memory of [`Driver::pinned`] with room for `bytes`, and is neither read, written nor dropped before the copy
    /// has run.
    unsafe fn download_later(&self, from: DevicePtr, to: *mut u8, bytes: usize) -> Result<()>;

    /// Makes an event, which counts as passed until it is recorded.
    ///
    /// # Errors
    /// A device that refuses.
    fn event(&self) -> Result<Event>;

    /// Marks the end of what was started on `stream`; it is passed when all of that has run.
    ///
    /// # Errors
    /// A fault of an earlier launch.
    fn record(&self, event: &Event, stream: Stream) -> Result<()>;

    /// What is started on `stream` from now on waits until `event`, as it was recorded last, is passed.
    ///
    /// # Errors
    /// As [`Driver::record`].
    fn wait(&self, stream: Stream, event: &Event) -> Result<()>;

    /// The host waits until the event is passed.
    ///
    /// # Errors
    /// As [`Driver::record`].
    fn finish(&self, event: &Event) -> Result<()>;

    /// The time between two events that are passed.
    ///
    /// # Errors
    /// [`Error::Internal`] when one is not.
    fn elapsed(&self, start: &Event, end: &Event) -> Result<Duration>;

    /// From now on launches on the compute stream are written down instead of run. Until `end_capture` nothing may be
    /// allocated, freed, copied at once, timed or waited for.
    ///
    /// # Errors
    /// [`Error::Internal`] when a capture goes on already.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the capture; what was written down becomes a graph.
    ///
    /// # Errors
    /// [`Error::Internal`] without a capture, or when something was done in between that a graph cannot hold.
    fn end_capture(&self) -> Result<Graph>;

    /// Starts all that a graph holds on the compute stream.
    ///
    /// # Errors
    /// A graph of another driver; as [`Driver::launch`].
    fn replay(&self, graph: &Graph) -> Result<()>;
}
