//! A real device, through the CUDA driver: nothing of CUDA is linked, the driver's library is loaded when a device is opened.
#![allow(unsafe_code)] // calls of the driver

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

use super::allocations::Allocations;
use super::library::{CudaLibraries, Libraries};
use super::kernel::{Call, DevicePtr, Grid, Kernel};
use super::{Driver, compiled_modules};

/// CUDA 13.0, which the kernels are compiled with, as `cuDriverGetVersion` counts.
const OLDEST_DRIVER: i32 = 13_000;
/// Dynamic shared memory that a kernel may have without asking for more.
const PLAIN_SHARED: u32 = 48 * 1024;

/// An open device with one stream.
#[derive(Debug)]
pub struct CudaDevice {
    name: String,
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: HashMap<&'static str, sys::CUmodule>,
    /// Kernels looked up so far.
    functions: Mutex<HashMap<&'static str, Function>>,
    allocations: Allocations,
    /// Loaded when they are first asked for.
    libraries: OnceLock<CudaLibraries>,
}

/// A handle of the driver's, usable from every thread that has the context current.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the handles are the driver's, which is thread-safe; every method makes the context current first.
unsafe impl Send for Function {}
// SAFETY: as for `Send`; the tables in it are behind mutexes.
unsafe impl Send for CudaDevice {}
// SAFETY: as for `Send`.
unsafe impl Sync for CudaDevice {}

impl CudaDevice {
    /// Opens device number `ordinal` and loads all kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`], each with a hint: no driver is installed, it is too old, there is no such device, or this
    /// build has no kernels for it.
    pub fn open(ordinal: usize) -> Result<CudaDevice> {
        if compiled_modules().is_empty() {
            let hint = "run tools/install-nvcc.sh and build again";
            return Err(unsupported("this build has no CUDA kernels: nvcc was not found when it was made", hint));
        }
        load_library()?;
        // Its answer is given again, better, by the count of devices.
        let _ = result::init();
        check_version()?;
        let count = match result::device::get_count() {
            Ok(count) => count,
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_NOT_INITIALIZED)) => 0,
            Err(error) => return Err(failed("count the devices", error)),
        };
        if ordinal >= count as usize {
            let what = format!("there is no CUDA device {ordinal}: the driver shows {count}");
            return Err(unsupported(&what, "`nvidia-smi` lists them; CUDA_VISIBLE_DEVICES can hide them"));
        }
        CudaDevice::with(ordinal as i32)
    }

    fn with(ordinal: i32) -> Result<CudaDevice> {
        let device = result::device::get(ordinal).map_err(|e| failed("open the device", e))?;
        let name = result::device::get_name(device).map_err(|e| failed("name the device", e))?;
        // SAFETY: `device` is valid; the context is released when the device is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("make a context", e))?;
        // SAFETY: `context` was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(|e| failed("use the context", e))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let stream = stream.map_err(|e| failed("make a stream", e))?;
        let mut opened = CudaDevice {
            name,
            ordinal: device,
            context,
            stream,
            modules: HashMap::new(),
            functions: Mutex::default(),
            allocations: Allocations::default(),
            libraries: OnceLock::new(),
        };
        for module in compiled_modules() {
            // SAFETY: a whole fatbin, 16-byte aligned, embedded in the program.
            let loaded = unsafe { result::module::load_data(module.fatbin.as_ptr().cast()) };
            let loaded = loaded.map_err(|e| opened.cannot_load(module.name, module.archs, e))?;
            opened.modules.insert(module.name, loaded);
        }
        Ok(opened)
    }

    fn cannot_load(&self, module: &str, archs: &[&str], error: DriverError) -> Error {
        let DriverError(code) = error;
        if code != CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU && code != CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION {
            return failed(&format!("load {module}"), error);
        }
        let what = format!("{}: this build has no code for it, only for {}", self.name, archs.join(", "));
        unsupported(&what, "build with SIMSIAM_CUDA_ARCHS=<its generation>")
    }

    /// Makes the context that of this thread.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("use the context", e))
    }

    fn function(&self, kernel: &'static Kernel, name: &'static str) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let broken = |message: String| Error::Internal { thread: "CUDA kernels".into(), message };
        let module = self.modules.get(kernel.file).ok_or_else(|| broken(format!("no file {}.cu", kernel.file)))?;
        let symbol = CString::new(name).map_err(|e| broken(e.to_string()))?;
        // SAFETY: the module stays loaded as long as `self` lives.
        let function = unsafe { result::module::get_function(*module, symbol) };
        let function = function.map_err(|e| failed(&format!("find kernel {name}"), e))?;
        let compiled = parameter_sizes(function);
        if compiled != kernel.parameters {
            let declared = kernel.parameters;
            return Err(broken(format!("{name}: parameters of {compiled:?} bytes compiled, {declared:?} declared")));
        }
        functions.insert(name, Function(function));
        Ok(Function(function))
    }

    /// Lets `function` have `bytes` of dynamic shared memory.
    fn allow_shared(&self, function: Function, bytes: u32) -> Result<()> {
        if bytes <= PLAIN_SHARED {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function's module is loaded.
        unsafe { result::function::set_function_attribute(function.0, attribute, bytes as i32) }
            .map_err(|e| failed(&format!("give a kernel {bytes} bytes of shared memory"), e))
    }

    fn record(&self) -> Result<Event> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = Event(event.map_err(|e| failed("make an event", e))?);
        // SAFETY: event and stream belong to the current context.
        unsafe { result::event::record(event.0, self.stream) }.map_err(|e| failed("record an event", e))?;
        Ok(event)
    }
}

/// A point of the stream.
struct Event(sys::CUevent);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Driver for CudaDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn emulated(&self) -> bool {
        false
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr> {
        self.bind()?;
        // SAFETY: the memory is used only through this driver, which gives it back when it is dropped.
        let memory = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let gb = |bytes: usize| bytes as f64 / 1e9;
                let what =
                    format!("{}: out of memory: {:.2} GB asked for, {:.2} GB free", self.name, gb(bytes), gb(free));
                unsupported(
                    &what,
                    "use a smaller --batch or --image-size; `simsiam-engine plan` shows what a setting needs",
                )
            }
            other => failed("reserve memory", other),
        })?;
        self.allocations.insert(DevicePtr(memory), bytes);
        Ok(DevicePtr(memory))
    }

    fn free(&self, memory: DevicePtr) -> Result<()> {
        self.synchronize()?;
        self.allocations.remove(memory)?;
        // SAFETY: `allocate` reserved it, nothing runs, and it was taken out of the table: it is freed once.
        unsafe { result::free_sync(memory.0) }.map_err(|e| failed("give back memory", e))
    }

    fn fill(&self, to: DevicePtr, bytes: usize, value: u8) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.allocations.check("fill", to, bytes)?;
        // SAFETY: the range lies within reserved memory.
        unsafe { result::memset_d8_async(to.0, value, bytes, self.stream) }.map_err(|e| failed("fill memory", e))
    }

    fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.allocations.check("upload", to, bytes.len())?;
        // SAFETY: the range lies within reserved memory; the host's bytes are not needed after the synchronisation.
        unsafe { result::memcpy_htod_async(to.0, bytes, self.stream) }.map_err(|e| failed("upload", e))?;
        self.synchronize()
    }

    fn download(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.allocations.check("download", from, bytes.len())?;
        // SAFETY: the range lies within reserved memory; `bytes` is borrowed until the synchronisation.
        unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream) }.map_err(|e| failed("download", e))?;
        self.synchronize()
    }

    unsafe fn launch(&self, grid: Grid, mut call: Call) -> Result<()> {
        self.bind()?;
        let function = self.function(call.kernel, call.name)?;
        self.allow_shared(function, grid.shared)?;
        let [x, y, z] = grid.blocks;
        let block = (call.kernel.threads, 1, 1);
        // SAFETY: `function` has checked that the arguments are as many and as large as the kernel's parameters; what
        // they point to is the caller's promise.
        unsafe {
            let arguments = &mut call.argument_pointers();
            result::launch_kernel(function.0, (x, y, z), block, grid.shared, self.stream, arguments)
        }
        .map_err(|e| failed(&format!("launch {} with {:?} blocks", call.name, grid.blocks), e))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.bind()?;
        let start = self.record()?;
        work()?;
        let end = self.record()?;
        self.synchronize()?;
        // SAFETY: both events were recorded on this stream, which is idle now.
        let milliseconds = unsafe { result::event::elapsed(start.0, end.0) }.map_err(|e| failed("read the time", e))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("finish what was launched", e))
    }

    fn memory(&self) -> Result<super::DeviceMemory> {
        Err(not_yet("memory"))
    }

    fn libraries(&self) -> Result<Option<&dyn Libraries>> {
        if self.libraries.get().is_none() {
            // SAFETY: the stream is of the context, and both outlive the libraries: see `drop`.
            let loaded = unsafe { CudaLibraries::new(self.context, self.stream, self.name.clone()) }?;
            let _ = self.libraries.set(loaded); // one that another thread loaded meanwhile is as good
        }
        Ok(self.libraries.get().map(|libraries| libraries as &dyn Libraries))
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

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // What goes wrong here has been reported by the call that failed before.
        let _ = self.synchronize();
        drop(self.libraries.take()); // handles are given back while their context lives
        for (memory, _) in self.allocations.drain() {
            // SAFETY: reserved by `allocate` and not freed since.
            let _ = unsafe { result::free_sync(memory.0) };
        }
        for module in self.modules.values() {
            // SAFETY: loaded by `with`; none of its kernels runs.
            let _ = unsafe { result::module::unload(*module) };
        }
        // SAFETY: made by `with`, idle, used by nobody any more.
        let _ = unsafe { result::stream::destroy(self.stream) };
        // SAFETY: retained by `with`.
        let _ = unsafe { result::primary_ctx::release(self.ordinal) };
    }
}

/// Loads the driver's library under the name that is sure to exist; cudarc, which panics where there is none, then finds it.
fn load_library() -> Result<()> {
    // SAFETY: NVIDIA's library has initialisers only of its own.
    match unsafe { libloading::Library::new("libcuda.so.1") } {
        Ok(library) => {
            std::mem::forget(library); // for as long as the program runs
            Ok(())
        }
        Err(error) => {
            let what = format!("no CUDA driver: {}", super::reason(&error));
            Err(unsupported(&what, "install NVIDIA's driver 580 or newer, or use --device cpu"))
        }
    }
}

fn check_version() -> Result<()> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("ask the driver's version", e))?;
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        let what = format!("the CUDA driver is too old: it supports CUDA {major}.{minor}, the kernels need 13.0");
        return Err(unsupported(&what, "install NVIDIA's driver 580 or newer"));
    }
    Ok(())
}

/// Size in bytes of each parameter of a compiled kernel, in order.
fn parameter_sizes(function: sys::CUfunction) -> Vec<usize> {
    let size_of = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function's module is loaded; writes two integers, and says no behind the last parameter.
        let known = unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) };
        (known == CUresult::CUDA_SUCCESS).then_some(size)
    };
    (0..).map_while(size_of).collect()
}

fn unsupported(what: &str, hint: &str) -> Error {
    Error::Unsupported { what: what.into(), hint: Some(hint.into()) }
}

/// The driver said no. Faults inside a kernel show at whatever call comes next.
fn failed(action: &str, error: DriverError) -> Error {
    let text =
        |s: std::result::Result<&std::ffi::CStr, _>| s.map_or("unknown".into(), |s| s.to_string_lossy().into_owned());
    let (name, meaning) = (text(error.error_name()), text(error.error_string()));
    let hint = "`compute-sanitizer` finds the fault if it lies in a kernel";
    unsupported(&format!("the CUDA device cannot {action}: {name} ({meaning})"), hint)
}

fn not_yet(what: &str) -> Error {
    Error::Unsupported { what: what.into(), hint: None }
}
