//! A real device, through the CUDA driver: nothing of CUDA is linked, the driver's library is loaded when a device is opened.
#![allow(unsafe_code)] // calls of the driver

mod capture;
mod context;
mod facts;
mod failure;
mod kernels;
mod pinned;
mod stream;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use capture::{Capture, Executable};
pub(super) use context::Context;
pub use facts::DeviceFacts;
use failure::{failed, misuse, unsupported};
use kernels::Kernels;
use pinned::PinnedBlock;
use stream::{Mark, Queue};

use super::allocations::Allocations;
use super::kernel::{Call, DevicePtr, Grid};
use super::library::{CudaLibraries, Libraries};
use super::{DeviceMemory, Driver, Event, Graph, Pinned, Stream, compiled_modules};
use crate::error::Result;

/// An open device with its two streams. Events, graphs and pinned memory may outlive it.
#[derive(Debug)]
pub struct CudaDevice {
    name: String,
    capability: [u32; 2],
    /// Loaded when they are first asked for; their handles are given back before the streams.
    libraries: OnceLock<CudaLibraries>,
    allocations: Allocations,
    capture: Capture,
    kernels: Kernels,
    compute: Queue,
    copy: Queue,
    context: Arc<Context>,
}

impl CudaDevice {
    /// Opens device number `ordinal` and loads all kernels.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`], each with a hint: no driver is installed, it is too old, there is no such
    /// device, or this build has no kernels for it.
    pub fn open(ordinal: usize) -> Result<CudaDevice> {
        if compiled_modules().is_empty() {
            let hint = "run tools/install-nvcc.sh and build again";
            return Err(unsupported("this build has no CUDA kernels: nvcc was not found when it was made", hint));
        }
        facts::start()?;
        let device = facts::device(ordinal)?;
        let name = facts::name(device)?;
        let context = Context::of(device)?;
        context.bind()?;
        Ok(CudaDevice {
            libraries: OnceLock::new(),
            allocations: Allocations::default(),
            capture: Capture::default(),
            kernels: Kernels::load(&context, &name)?,
            compute: Queue::new(&context)?,
            copy: Queue::new(&context)?,
            name,
            capability: facts::capability(device)?,
            context,
        })
    }

    /// All devices that the driver shows; at least one.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`], each with a hint: no driver is installed, it is too old, or it shows no device.
    pub fn list() -> Result<Vec<DeviceFacts>> {
        facts::start()?;
        facts::list()
    }

    /// The newest CUDA that the installed driver supports: `[13, 0]`.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] when no driver is installed.
    pub fn driver_version() -> Result<[u32; 2]> {
        facts::driver_version()
    }

    /// Makes the context that of this thread, as NVIDIA's libraries want it.
    ///
    /// # Errors
    /// A fault of an earlier launch.
    pub fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    /// The driver's handle of a stream, for NVIDIA's libraries; valid as long as the device.
    pub fn raw_stream(&self, stream: Stream) -> sys::CUstream {
        self.queue(stream).raw
    }

    /// cuDNN and cuBLASLt on this device, loaded when they are first asked for.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] naming the library that is missing, or that refuses the device.
    pub fn loaded_libraries(&self) -> Result<&CudaLibraries> {
        if let Some(loaded) = self.libraries.get() {
            return Ok(loaded);
        }
        self.bind_outside_capture("load NVIDIA's libraries")?;
        // SAFETY: the stream is of the context, and outlives the libraries: see the order of the fields.
        let loaded = unsafe { CudaLibraries::new(&self.context, self.compute.raw, self.name.clone()) }?;
        Ok(self.libraries.get_or_init(|| loaded)) // one that another thread loaded meanwhile is as good
    }

    fn queue(&self, stream: Stream) -> &Queue {
        match stream {
            Stream::Compute => &self.compute,
            Stream::Copy => &self.copy,
        }
    }

    /// What every call does first that has no place in a capture.
    fn bind_outside_capture(&self, action: &'static str) -> Result<()> {
        self.capture.allow(action)?;
        self.bind()
    }

    fn mark<'a>(&self, event: &'a Event) -> Result<&'a Mark> {
        let mark = event.0.downcast_ref::<Mark>().filter(|mark| mark.is_of(&self.context));
        mark.ok_or_else(|| misuse("an event of another device was used"))
    }

    fn out_of_memory(&self, bytes: usize) -> crate::error::Error {
        let free = result::mem_get_info().map_or(0, |(free, _)| free);
        let gb = |bytes: usize| bytes as f64 / 1e9;
        let what = format!("{}: out of memory: {:.2} GB asked for, {:.2} GB free", self.name, gb(bytes), gb(free));
        unsupported(&what, "use a smaller --batch or --image-size; `simsiam-engine plan` shows what a setting needs")
    }
}

impl Driver for CudaDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn emulated(&self) -> bool {
        false
    }

    fn capability(&self) -> Option<[u32; 2]> {
        Some(self.capability)
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr> {
        self.bind_outside_capture("allocate memory")?;
        // SAFETY: the memory is used only through this driver, which gives it back when it is dropped.
        let memory = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => self.out_of_memory(bytes),
            other => failed("reserve memory", other),
        })?;
        self.allocations.insert(DevicePtr(memory), bytes);
        Ok(DevicePtr(memory))
    }

    fn free(&self, memory: DevicePtr) -> Result<()> {
        self.capture.allow("free memory")?;
        self.synchronize()?;
        self.allocations.remove(memory)?;
        // SAFETY: `allocate` reserved it, nothing runs, and it was taken out of the table: it is freed once.
        unsafe { result::free_sync(memory.0) }.map_err(|e| failed("give back memory", e))
    }

    fn fill(&self, to: DevicePtr, bytes: usize, value: u8) -> Result<()> {
        self.bind_outside_capture("fill memory")?;
        if bytes == 0 {
            return Ok(());
        }
        self.allocations.check("fill", to, bytes)?;
        // SAFETY: the range lies within reserved memory.
        unsafe { result::memset_d8_async(to.0, value, bytes, self.compute.raw) }.map_err(|e| failed("fill memory", e))
    }

    fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        self.bind_outside_capture("upload memory")?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.allocations.check("upload", to, bytes.len())?;
        // SAFETY: the range lies within reserved memory; the host's bytes are not needed after the synchronisation.
        unsafe { result::memcpy_htod_async(to.0, bytes, self.compute.raw) }.map_err(|e| failed("upload", e))?;
        self.compute.synchronize()
    }

    fn download(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        self.bind_outside_capture("download memory")?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.allocations.check("download", from, bytes.len())?;
        // SAFETY: the range lies within reserved memory; `bytes` is borrowed until the synchronisation.
        unsafe { result::memcpy_dtoh_async(bytes, from.0, self.compute.raw) }.map_err(|e| failed("download", e))?;
        self.compute.synchronize()
    }

    unsafe fn launch(&self, grid: Grid, mut call: Call) -> Result<()> {
        self.bind()?;
        let function = self.kernels.function(call.kernel, call.name, grid.shared)?;
        let [x, y, z] = grid.blocks;
        let block = (call.kernel.threads, 1, 1);
        // SAFETY: `function` has checked that the arguments are as many and as large as the kernel's parameters; what
        // they point to is the caller's promise.
        unsafe {
            let arguments = &mut call.argument_pointers();
            result::launch_kernel(function, (x, y, z), block, grid.shared, self.compute.raw, arguments)
        }
        .map_err(|e| failed(&format!("launch {} with {:?} blocks", call.name, grid.blocks), e))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.bind_outside_capture("measure time")?;
        let (start, end) = (self.event()?, self.event()?);
        self.record(&start, Stream::Compute)?;
        work()?;
        self.record(&end, Stream::Compute)?;
        self.finish(&end)?;
        self.elapsed(&start, &end)
    }

    fn synchronize(&self) -> Result<()> {
        self.bind_outside_capture("synchronise")?;
        self.compute.synchronize()?;
        self.copy.synchronize()
    }

    fn memory(&self) -> Result<DeviceMemory> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(|e| failed("say how much memory it has", e))?;
        Ok(DeviceMemory { free, total })
    }

    fn allocations(&self) -> u64 {
        self.allocations.made()
    }

    fn libraries(&self) -> Result<Option<&dyn Libraries>> {
        Ok(Some(self.loaded_libraries()?))
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>> {
        self.bind_outside_capture("allocate page-locked memory")?;
        self.allocations.count();
        Ok(Box::new(PinnedBlock::new(&self.context, bytes)?))
    }

    unsafe fn upload_later(&self, to: DevicePtr, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.allocations.check("upload", to, from.len())?;
        // SAFETY: the range lies within reserved memory; that `from` lasts is the caller's promise.
        unsafe { result::memcpy_htod_async(to.0, from, self.copy.raw) }.map_err(|e| failed("upload", e))
    }

    unsafe fn download_later(&self, from: DevicePtr, to: *mut u8, bytes: usize) -> Result<()> {
        self.bind_outside_capture("download memory")?;
        if bytes == 0 {
            return Ok(());
        }
        self.allocations.check("download", from, bytes)?;
        // SAFETY: the range lies within reserved memory; that `to` has room and lasts is the caller's promise.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, bytes, self.compute.raw) }
            .result()
            .map_err(|e| failed("download", e))
    }

    fn event(&self) -> Result<Event> {
        self.bind()?;
        self.allocations.count();
        Ok(Event(Box::new(Mark::new(&self.context)?)))
    }

    fn record(&self, event: &Event, stream: Stream) -> Result<()> {
        let mark = self.mark(event)?;
        self.bind_outside_capture("record an event")?;
        self.queue(stream).record(mark)
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        let mark = self.mark(event)?;
        self.bind_outside_capture("wait for an event")?;
        self.queue(stream).wait(mark)
    }

    fn finish(&self, event: &Event) -> Result<()> {
        let mark = self.mark(event)?;
        self.bind_outside_capture("wait for an event")?;
        mark.synchronize()
    }

    fn elapsed(&self, start: &Event, end: &Event) -> Result<Duration> {
        let (start, end) = (self.mark(start)?, self.mark(end)?);
        self.bind_outside_capture("measure time")?;
        start.elapsed_until(end)
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        self.capture.begin(&self.compute)
    }

    fn end_capture(&self) -> Result<Graph> {
        self.bind()?;
        let recorded = self.capture.end(&self.compute)?;
        self.allocations.count();
        Ok(Graph(Box::new(Executable::new(&recorded, &self.context, &self.compute)?)))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let executable = graph.0.downcast_ref::<Executable>().filter(|graph| graph.is_of(&self.context));
        let executable = executable.ok_or_else(|| misuse("a graph of another device was replayed"))?;
        self.bind_outside_capture("replay a graph")?;
        executable.launch(&self.compute)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // What goes wrong here has been reported by the call that failed before; a capture that goes on was forgotten.
        let _ = self.bind();
        let _ = self.capture.end(&self.compute);
        let _ = self.synchronize();
        for (memory, _) in self.allocations.drain() {
            // SAFETY: reserved by `allocate` and not freed since.
            let _ = unsafe { result::free_sync(memory.0) };
        }
    }
}
