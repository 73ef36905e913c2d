//! A CUDA device emulated on the CPU: the same kernels, compiled by a C++ compiler (`kernels/emulator/README.md`).
//!
//! The library is part of this binary; `SIMSIAM_EMULATOR=FILE` names another one, such as a build for a sanitizer.
#![allow(unsafe_code)] // calls into a C library and hands it pointers

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, io, slice};

use libloading::Library;

use crate::error::{Error, Result};

use super::allocations::Allocations;
use super::{Call, DevicePtr, Driver, Grid, Kernel};

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

/// The device. Launches have run to their end when they return, so every fault comes from the launch that made it.
#[derive(Debug)]
pub struct Emulator {
    api: &'static Api,
    options: Options,
    memory: Allocations,
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

    fn of(api: &'static Api, options: Options) -> Emulator {
        Emulator { api, options, memory: Allocations::default() }
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
        // SAFETY: takes any size.
        let address = unsafe { (self.api.allocate)(bytes) } as u64;
        if address == 0 {
            return Err(unsupported(format!("the emulated device has no memory for {bytes} more bytes")));
        }
        self.memory.insert(DevicePtr(address), bytes);
        Ok(DevicePtr(address))
    }

    fn free(&self, memory: DevicePtr) -> Result<()> {
        self.memory.remove(memory)?;
        // SAFETY: the library allocated it, and the table has just forgotten it.
        unsafe { (self.api.free)(memory.0 as *mut c_void) };
        Ok(())
    }

    fn fill(&self, to: DevicePtr, bytes: usize, value: u8) -> Result<()> {
        let block = vec![value; bytes.min(FILLED_AT_ONCE)];
        for first in (0..bytes).step_by(FILLED_AT_ONCE) {
            self.upload(to.offset(first), &block[..block.len().min(bytes - first)])?;
        }
        Ok(())
    }

    fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        self.memory.check("upload", to, bytes.len())?;
        // SAFETY: so many bytes are reserved at `to`, and they are not the host's.
        unsafe { (self.api.copy)(to.0 as *mut c_void, bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    fn download(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        self.memory.check("download", from, bytes.len())?;
        // SAFETY: so many bytes are reserved at `from`, and they are not the host's. Allocation has filled them, so none is
        // uninitialised.
        unsafe { (self.api.copy)(bytes.as_mut_ptr().cast(), from.0 as *const c_void, bytes.len()) };
        Ok(())
    }

    fn guard(&self, from: DevicePtr, bytes: usize) {
        // SAFETY: marks addresses, and touches no memory.
        unsafe { (self.api.guard)(from.0 as *const c_void, bytes) };
    }

    fn unguard(&self, from: DevicePtr, bytes: usize) {
        // SAFETY: as `guard`.
        unsafe { (self.api.unguard)(from.0 as *const c_void, bytes) };
    }

    unsafe fn launch(&self, grid: Grid, mut call: Call) -> Result<()> {
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
        // as `call`; what the kernel does with them is the caller's promise. The message ends with 0.
        let went_well = unsafe { (self.api.launch)(&launch, message.as_mut_ptr(), message.len()) };
        if went_well {
            return Ok(());
        }
        // SAFETY: the library wrote a string that ends with 0 within the buffer.
        let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
        Err(fault(call.name, message))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> Result<super::DeviceMemory> {
        Err(not_yet("memory"))
    }

    fn pinned(&self, _bytes: usize) -> Result<Box<dyn super::Pinned>> {
        Err(not_yet("pinned"))
    }

    unsafe fn upload_later(&self, _to: DevicePtr, _from: &[u8]) -> Result<()> {
        Err(not_yet("upload_later"))
    }

    unsafe fn download_later(&self, _from: DevicePtr, _to: *mut u8, _bytes: usize) -> Result<()> {
        Err(not_yet("download_later"))
    }

    fn event(&self) -> Result<super::Event> {
        Err(not_yet("event"))
    }

    fn record(&self, _event: &super::Event, _stream: super::Stream) -> Result<()> {
        Err(not_yet("record"))
    }

    fn wait(&self, _stream: super::Stream, _event: &super::Event) -> Result<()> {
        Err(not_yet("wait"))
    }

    fn finish(&self, _event: &super::Event) -> Result<()> {
        Err(not_yet("finish"))
    }

    fn elapsed(&self, _start: &super::Event, _end: &super::Event) -> Result<Duration> {
        Err(not_yet("elapsed"))
    }

    fn begin_capture(&self) -> Result<()> {
        Err(not_yet("begin_capture"))
    }

    fn end_capture(&self) -> Result<super::Graph> {
        Err(not_yet("end_capture"))
    }

    fn replay(&self, _graph: &super::Graph) -> Result<()> {
        Err(not_yet("replay"))
    }
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

fn not_yet(what: &str) -> Error {
    Error::Unsupported { what: what.into(), hint: None }
}
