//! A CUDA device emulated on the CPU: the same kernels, compiled by a C++ compiler (`kernels/emulator/README.md`).
//!
//! The library is part of this binary; `SIMSIAM_EMULATOR=FILE` names another one, such as a build for a sanitizer.
#![allow(unsafe_code)] // calls into a C library and hands it pointers

mod streams;

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, io, slice};

use libloading::Library;

use crate::error::{Error, Result};

use self::streams::{HostRange, Machine, Mark, Streams, Task};
use super::allocations::Allocations;
use super::{Call, DeviceMemory, DevicePtr, Driver, Event, Graph, Grid, HostTask, HostView, Kernel, Pinned, Stream};

/// The library of `kernels/emulator/build.sh`.
static EMBEDDED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/emulator.so"));

/// Bytes of the block that memory is filled from.
const FILLED_AT_ONCE: usize = 1 << 20;

/// How an emulated device works. Neither changes a result, unless a kernel is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Threads of the CPU that blocks are spread over.
    pub threads: u32,
    /// Shuffles the order of blocks, warps and lanes; 0 keeps their natural order.
    pub seed: u64,
}

impl Options {
    /// Those of `SIMSIAM_EMULATOR_THREADS` and `SIMSIAM_EMULATOR_SEED`; all CPUs and the natural order without them.
    ///
    /// # Errors
    /// [`Error::Config`] when one of them is no number, or there are no threads.
    pub fn from_environment() -> Result<Options> {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let threads = number("SIMSIAM_EMULATOR_THREADS")?.unwrap_or(cpus);
        match u32::try_from(threads) {
            Ok(threads) if threads > 0 => Ok(Options { threads, seed: number("SIMSIAM_EMULATOR_SEED")?.unwrap_or(0) }),
            _ => Err(Error::config("SIMSIAM_EMULATOR_THREADS", format!("{threads} threads, expected 1 or more"))),
        }
    }
}

/// The number that an environment variable holds, if it is set.
fn number(variable: &str) -> Result<Option<u64>> {
    let Some(text) = env::var_os(variable) else { return Ok(None) };
    let parsed = text.to_str().and_then(|text| text.parse().ok());
    parsed.map(Some).ok_or_else(|| Error::config(variable, format!("{text:?} is no whole number")))
}

/// The device. A launch has run to its end when it returns, so that a fault comes from the launch that made it, unless it
/// has to wait for the other stream.
#[derive(Debug)]
pub struct Emulator {
    api: &'static Api,
    options: Options,
    memory: Allocations,
    /// Bytes that it has; all that the host can give when it is not said.
    capacity: Option<usize>,
    streams: Streams,
}

impl Emulator {
    /// A device of the kernels in this binary, or in the library that `SIMSIAM_EMULATOR` names.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when that library cannot be loaded.
    pub fn new(options: Options) -> Result<Emulator> {
        // One for the process: a library is never unloaded, and each has stacks of its own.
        static DEFAULT: OnceLock<Result<Api, String>> = OnceLock::new();
        let api = DEFAULT.get_or_init(|| match env::var_os("SIMSIAM_EMULATOR") {
            Some(path) => Api::load(&path),
            None => Api::load_embedded(),
        });
        Ok(Emulator::of(api.as_ref().map_err(|message| unsupported(message.clone()))?, options))
    }

    /// A device as the environment describes it: [`Options::from_environment`], and `SIMSIAM_EMULATOR_MEMORY` bytes of memory.
    ///
    /// # Errors
    /// As [`Options::from_environment`] and [`Emulator::new`].
    pub fn from_environment() -> Result<Emulator> {
        let emulator = Emulator::new(Options::from_environment()?)?;
        Ok(match number("SIMSIAM_EMULATOR_MEMORY")? {
            Some(bytes) => emulator.with_memory(bytes as usize),
            None => emulator,
        })
    }

    /// A device of the kernels in a library that `kernels/emulator/build.sh` has built. The library stays loaded.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it cannot be loaded.
    pub fn with_library(path: &Path, options: Options) -> Result<Emulator> {
        let api = Api::load(&path.into()).map_err(unsupported)?;
        Ok(Emulator::of(Box::leak(Box::new(api)), options))
    }

    /// Compares a declaration with the compiled kernels, all variants of it.
    ///
    /// # Errors
    /// [`Error::Internal`] when a variant is missing, or has other parameters or another size of blocks.
    pub fn check(&self, kernel: &Kernel) -> Result<()> {
        kernel.variants.iter().try_for_each(|(_, name)| self.compiled(kernel, name).map(|_| ()))
    }

    /// The names of all compiled kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.api.kernels.keys().map(String::as_str)
    }

    fn compiled(&self, kernel: &Kernel, name: &str) -> Result<&Compiled> {
        let compiled = self.api.kernels.get(name).ok_or_else(|| fault(name, "the emulator's library lacks it"))?;
        compiled.agrees_with(kernel).map_err(|message| fault(name, message))?;
        Ok(compiled)
    }

    fn run_kernel(&self, grid: Grid, mut call: Call) -> Result<()> {
        let compiled = self.compiled(call.kernel, call.name)?;
        let arguments = call.argument_pointers();
        let launch = RawLaunch {
            kernel: compiled.raw,
            arguments: arguments.as_ptr(),
            grid: grid.blocks,
            block: [call.kernel.threads, 1, 1],
            shared_bytes: grid.shared,
            threads: self.options.threads,
            seed: self.options.seed,
        };
        let mut message = [0 as c_char; 1024];
        // SAFETY: the arguments have the number and sizes of the kernel's parameters, as was just checked, and live as long
        // as `call`; what the kernel does with them was promised when it was started. The message ends with 0.
        let went_well = unsafe { (self.api.launch)(&launch, message.as_mut_ptr(), message.len()) };
        if went_well {
            return Ok(());
        }
        // SAFETY: the library wrote a string that ends with 0 within the buffer.
        let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
        Err(fault(call.name, message))
    }

    fn of(api: &'static Api, options: Options) -> Emulator {
        let (memory, streams) = (Allocations::default(), Streams::new(options.seed));
        Emulator { api, options, memory, capacity: None, streams }
    }

    /// The same device with so many bytes of memory.
    pub fn with_memory(mut self, bytes: usize) -> Emulator {
        self.capacity = Some(bytes);
        self
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        for (memory, _) in self.memory.drain() {
            // SAFETY: the library allocated it, and nobody has freed it.
            unsafe { (self.api.free)(memory.0 as *mut c_void) };
        }
    }
}

impl Driver for Emulator {
    fn name(&self) -> String {
        let threads = self.options.threads;
        format!("emulated on {threads} CPU thread{}", if threads == 1 { "" } else { "s" })
    }

    fn emulated(&self) -> bool {
        true
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr> {
        self.streams.allow("allocate memory")?;
        if let Some(capacity) =
            self.capacity.filter(|&capacity| bytes > capacity.saturating_sub(self.memory.reserved()))
        {
            let (asked, free) = (bytes as f64 / 1e9, capacity.saturating_sub(self.memory.reserved()) as f64 / 1e9);
            let what = format!("the emulated device is out of memory: {asked:.2} GB asked for, {free:.2} GB free");
            return Err(unsupported(what));
        }
        // SAFETY: takes any size.
        let address = unsafe { (self.api.allocate)(bytes) } as u64;
        if address == 0 {
            return Err(unsupported(format!("the emulated device has no memory for {bytes} more bytes")));
        }
        self.memory.insert(DevicePtr(address), bytes);
        Ok(DevicePtr(address))
    }

    fn free(&self, memory: DevicePtr) -> Result<()> {
        self.streams.allow("free memory")?;
        let ended = self.synchronize();
        self.memory.remove(memory)?;
        // SAFETY: the library allocated it, and the table has just forgotten it.
        unsafe { (self.api.free)(memory.0 as *mut c_void) };
        ended
    }

    fn fill(&self, to: DevicePtr, bytes: usize, value: u8) -> Result<()> {
        let block = vec![value; bytes.min(FILLED_AT_ONCE)];
        for first in (0..bytes).step_by(FILLED_AT_ONCE) {
            self.upload(to.offset(first), &block[..block.len().min(bytes - first)])?;
        }
        Ok(())
    }

    fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        self.streams.allow("upload memory")?;
        self.streams.drain(Stream::Compute, self)?;
        self.write(to, bytes)
    }

    fn download(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        self.streams.allow("download memory")?;
        self.streams.drain(Stream::Compute, self)?;
        self.read(from, bytes)
    }

    fn guard(&self, from: DevicePtr, bytes: usize) {
        // SAFETY: marks addresses, and touches no memory.
        unsafe { (self.api.guard)(from.0 as *const c_void, bytes) };
    }

    fn unguard(&self, from: DevicePtr, bytes: usize) {
        // SAFETY: as `guard`.
        unsafe { (self.api.unguard)(from.0 as *const c_void, bytes) };
    }

    unsafe fn launch(&self, grid: Grid, call: Call) -> Result<()> {
        self.compiled(call.kernel, call.name)?;
        self.streams.start(Stream::Compute, Task::Launch(grid, call), self)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.synchronize()?;
        let start = Instant::now();
        work()?;
        self.streams.drain(Stream::Compute, self)?;
        Ok(start.elapsed())
    }

    fn synchronize(&self) -> Result<()> {
        self.streams.allow("synchronise")?;
        self.streams.drain(Stream::Compute, self)?;
        self.streams.drain(Stream::Copy, self)
    }

    fn memory(&self) -> Result<DeviceMemory> {
        let total = match self.capacity {
            Some(bytes) => bytes,
            None => host_memory()?,
        };
        Ok(DeviceMemory { free: total.saturating_sub(self.memory.reserved()), total })
    }

    fn allocations(&self) -> u64 {
        self.memory.made()
    }

    fn host_task(&self, task: HostTask) -> Result<()> {
        self.streams.start(Stream::Compute, Task::Host(task), self)
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>> {
        self.streams.allow("allocate page-locked memory")?;
        self.memory.count();
        Ok(Box::new(HostBytes(vec![0; bytes].into_boxed_slice())))
    }

    unsafe fn upload_later(&self, to: DevicePtr, from: &[u8]) -> Result<()> {
        self.memory.check("upload", to, from.len())?;
        let from = HostRange { address: from.as_ptr() as u64, bytes: from.len() };
        self.streams.start(Stream::Copy, Task::Upload { to, from }, self)
    }

    unsafe fn download_later(&self, from: DevicePtr, to: *mut u8, bytes: usize) -> Result<()> {
        self.streams.allow("download memory")?;
        self.memory.check("download", from, bytes)?;
        let to = HostRange { address: to as u64, bytes };
        self.streams.start(Stream::Compute, Task::Download { from, to }, self)
    }

    fn event(&self) -> Result<Event> {
        self.memory.count();
        Ok(Mark::event())
    }

    fn record(&self, event: &Event, stream: Stream) -> Result<()> {
        self.streams.record(event, stream, self)
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        self.streams.wait(stream, event, self)
    }

    fn finish(&self, event: &Event) -> Result<()> {
        self.streams.finish(event, self)
    }

    fn elapsed(&self, start: &Event, end: &Event) -> Result<Duration> {
        self.streams.elapsed(start, end)
    }

    fn begin_capture(&self) -> Result<()> {
        self.streams.begin_capture()
    }

    fn end_capture(&self) -> Result<Graph> {
        self.memory.count();
        self.streams.end_capture()
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.streams.replay(graph, self)
    }
}

impl HostView for Emulator {
    fn read(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        self.memory.check("read", from, bytes.len())?;
        // SAFETY: so many bytes are reserved at `from`, and they are not the host's. Allocation has filled them, so none is
        // uninitialised.
        unsafe { (self.api.copy)(bytes.as_mut_ptr().cast(), from.0 as *const c_void, bytes.len()) };
        Ok(())
    }

    fn write(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        self.memory.check("write", to, bytes.len())?;
        // SAFETY: so many bytes are reserved at `to`, and they are not the host's.
        unsafe { (self.api.copy)(to.0 as *mut c_void, bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }
}

impl Machine for Emulator {
    fn run(&self, task: &Task) -> Result<()> {
        match task {
            Task::Launch(grid, call) => self.run_kernel(*grid, call.clone()),
            Task::Host(task) => task(self),
            Task::Upload { to, from } => {
                // SAFETY: the memory lives and is left alone until this copy has run: the promise of `upload_later`.
                let bytes = unsafe { slice::from_raw_parts(from.address as *const u8, from.bytes) };
                self.write(*to, bytes)
            }
            Task::Download { from, to } => {
                // SAFETY: as above, the promise of `download_later`.
                let bytes = unsafe { slice::from_raw_parts_mut(to.address as *mut u8, to.bytes) };
                self.read(*from, bytes)
            }
            Task::Record(..) | Task::Wait(..) => Ok(()),
        }
    }
}

/// Pinned memory, of which an emulated device has no other kind.
#[derive(Debug)]
struct HostBytes(Box<[u8]>);

impl Pinned for HostBytes {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Memory of the host that is to be had, in bytes.
fn host_memory() -> Result<usize> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    kilobytes.map(|kb| kb << 10).ok_or_else(|| Error::format(path, None, "it does not say MemAvailable in kB"))
}

/// What is wrong with a kernel or its launch, and so with this program.
fn fault(kernel: &str, message: impl Into<String>) -> Error {
    Error::Internal { thread: format!("kernel {kernel}"), message: message.into() }
}

fn unsupported(what: String) -> Error {
    Error::Unsupported { what, hint: None }
}

/// `emulator::Kernel` of kernels/emulator/registry.h.
#[repr(C)]
struct RawKernel {
    name: *const c_char,
    threads: u32,
    parameters: u32,
    parameter_bytes: *const u64,
    run: *const c_void,
}

/// `emulator::Launch` of kernels/emulator/launch.h.
#[repr(C)]
struct RawLaunch {
    kernel: *const RawKernel,
    arguments: *const *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    threads: u32,
    seed: u64,
}

/// A kernel as it was compiled.
#[derive(Debug)]
struct Compiled {
    raw: *const RawKernel,
    threads: u32,
    parameters: Vec<usize>,
}

impl Compiled {
    /// Whether the declaration in Rust is that of the compiled code.
    fn agrees_with(&self, declared: &Kernel) -> Result<(), String> {
        if self.parameters != declared.parameters {
            let (declared, compiled) = (declared.parameters, &self.parameters);
            return Err(format!("declared with parameters of {declared:?} bytes, but compiled with {compiled:?}"));
        }
        if self.threads != declared.threads {
            let (declared, compiled) = (declared.threads, self.threads);
            return Err(format!("declared for blocks of {declared} threads, but compiled for {compiled}"));
        }
        Ok(())
    }
}

/// The functions of a library (kernels/emulator/launch.h) and its kernels by name.
#[derive(Debug)]
struct Api {
    launch: unsafe extern "C" fn(*const RawLaunch, *mut c_char, usize) -> bool,
    allocate: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    copy: unsafe extern "C" fn(*mut c_void, *const c_void, usize),
    guard: unsafe extern "C" fn(*const c_void, usize),
    unguard: unsafe extern "C" fn(*const c_void, usize),
    kernels: HashMap<String, Compiled>,
    /// All of the above lies in it.
    _library: Library,
}

// SAFETY: the library serialises its functions itself; its table of kernels never changes after it was loaded.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

impl Api {
    /// Loads the embedded library from a file that is gone again afterwards.
    fn load_embedded() -> Result<Api, String> {
        let write = || -> io::Result<_> {
            let mut file = tempfile::Builder::new().prefix("simsiam-emulator-").suffix(".so").tempfile()?;
            io::Write::write_all(&mut file, EMBEDDED)?;
            Ok(file.into_temp_path())
        };
        let file =
            write().map_err(|e| format!("cannot write the CUDA emulator to {}: {e}", env::temp_dir().display()))?;
        Api::load(&file.as_os_str().to_owned())
    }

    fn load(path: &OsString) -> Result<Api, String> {
        let failed = |e: libloading::Error| format!("cannot load the CUDA emulator: {}", super::reason(&e));
        // SAFETY: its constructors fill the table of kernels, and do nothing else.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        // SAFETY: the types are those that launch.h declares; the library lives as long as the functions, in one struct.
        unsafe {
            Ok(Api {
                launch: *library.get(b"simsiam_emulator_launch").map_err(failed)?,
                allocate: *library.get(b"simsiam_emulator_allocate").map_err(failed)?,
                free: *library.get(b"simsiam_emulator_free").map_err(failed)?,
                copy: *library.get(b"simsiam_emulator_copy").map_err(failed)?,
                guard: *library.get(b"simsiam_emulator_guard").map_err(failed)?,
                unguard: *library.get(b"simsiam_emulator_unguard").map_err(failed)?,
                kernels: kernels(&library).map_err(failed)?,
                _library: library,
            })
        }
    }
}

/// The kernels that a library has registered.
///
/// # Safety
/// The library is one of `build.sh`, and stays loaded.
unsafe fn kernels(library: &Library) -> Result<HashMap<String, Compiled>, libloading::Error> {
    // SAFETY: the types are those of launch.h.
    let (count, kernel) = unsafe {
        let count = library.get::<unsafe extern "C" fn() -> u32>(b"simsiam_emulator_kernels")?;
        (count, library.get::<unsafe extern "C" fn(u32) -> *const RawKernel>(b"simsiam_emulator_kernel")?)
    };
    // SAFETY: takes nothing.
    let indices = 0..unsafe { count() };
    Ok(indices
        .map(|index| {
            // SAFETY: below the count, so it points into the table, whose names end with 0 and whose sizes are as many as
            // `parameters` says.
            unsafe {
                let raw = kernel(index);
                let name = CStr::from_ptr((*raw).name).to_string_lossy().into_owned();
                let sizes = slice::from_raw_parts((*raw).parameter_bytes, (*raw).parameters as usize);
                let parameters = sizes.iter().map(|&bytes| bytes as usize).collect();
                (name, Compiled { raw, threads: (*raw).threads, parameters })
            }
        })
        .collect())
}
