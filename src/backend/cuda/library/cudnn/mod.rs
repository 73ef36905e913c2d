//! cuDNN's graph interface, loaded at run time: an operation graph is asked for engines, an engine becomes a plan, a plan
//! runs on a pack of pointers.
#![allow(unsafe_code)] // calls of cuDNN

mod constants;
mod descriptor;
mod graph;
mod plan;

pub use graph::{ALIGNMENT, Epilogue, Graph, Tensor};
pub use plan::{Engine, Limits, Plan};

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

use super::search::{self, Library};
use super::table::functions;
use constants::{attribute, kind};
use descriptor::Descriptor;

/// A handle, a descriptor or a stream.
type Opaque = *mut c_void;

functions! {
    /// The functions of cuDNN 9 that are used.
    Functions {
        fn cudnnGetVersion() -> usize;
        fn cudnnGetErrorString(i32) -> *const c_char;
        fn cudnnGetLastErrorString(*mut c_char, usize);
        fn cudnnCreate(*mut Opaque) -> i32;
        fn cudnnDestroy(Opaque) -> i32;
        fn cudnnSetStream(Opaque, Opaque) -> i32;
        fn cudnnBackendCreateDescriptor(i32, *mut Opaque) -> i32;
        fn cudnnBackendDestroyDescriptor(Opaque) -> i32;
        fn cudnnBackendSetAttribute(Opaque, i32, i32, i64, *const c_void) -> i32;
        fn cudnnBackendGetAttribute(Opaque, i32, i32, i64, *mut i64, *mut c_void) -> i32;
        fn cudnnBackendFinalize(Opaque) -> i32;
        fn cudnnBackendExecute(Opaque, Opaque, Opaque) -> i32;
    }
}

/// cuDNN, loaded.
#[derive(Debug)]
pub struct Cudnn {
    functions: Functions,
    /// Where it was found.
    pub path: PathBuf,
}

impl Cudnn {
    /// Finds and loads it, and what its engines need.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is not there, or lacks a function.
    pub fn load() -> Result<Arc<Cudnn>> {
        // cuDNN asks for cuBLASLt by its bare name, which must be mapped then.
        search::find(Library::CublasLt)?;
        search::prepare_run_time_compilation();
        let found = search::find(Library::Cudnn)?;
        let functions = Functions::load(found.library, Library::Cudnn.name())?;
        Ok(Arc::new(Cudnn { functions, path: found.path }))
    }

    /// Its version: 91900 is 9.19.0.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing.
        unsafe { (self.functions.cudnnGetVersion)() }
    }

    /// An error unless `status` is success.
    fn check(&self, status: i32, action: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0u8; 512];
        // SAFETY: returns a constant string for every code.
        let name = unsafe { CStr::from_ptr((self.functions.cudnnGetErrorString)(status)) }.to_string_lossy();
        // SAFETY: writes at most so many bytes, with a zero at the end.
        unsafe { (self.functions.cudnnGetLastErrorString)(text.as_mut_ptr().cast(), text.len()) };
        let detail = CStr::from_bytes_until_nul(&text).map_or("".into(), CStr::to_string_lossy);
        let detail = detail.trim();
        let colon = if detail.is_empty() { "" } else { ": " };
        Err(Error::Unsupported { what: format!("cuDNN cannot {action}: {name} ({status}){colon}{detail}"), hint: None })
    }
}

/// A handle on the current device.
pub struct Handle {
    cudnn: Arc<Cudnn>,
    /// Used by one thread at a time.
    raw: Mutex<Opaque>,
}

// SAFETY: a handle may be used from any thread that has its context current, by one at a time: the mutex.
unsafe impl Send for Handle {}
// SAFETY: as for `Send`.
unsafe impl Sync for Handle {}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuDNN {}", self.cudnn.version())
    }
}

impl Handle {
    /// # Safety
    /// The context of `stream` is that of this thread, and both outlive the handle.
    unsafe fn new(cudnn: &Arc<Cudnn>, stream: Opaque) -> Result<Handle> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes the handle.
        cudnn.check(unsafe { (cudnn.functions.cudnnCreate)(&mut raw) }, "make a handle")?;
        let handle = Handle { cudnn: cudnn.clone(), raw: Mutex::new(raw) };
        // SAFETY: the handle was just made; the stream is the caller's promise.
        cudnn.check(unsafe { (cudnn.functions.cudnnSetStream)(raw, stream) }, "use the stream")?;
        Ok(handle)
    }

    fn raw(&self) -> std::sync::MutexGuard<'_, Opaque> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; plans that run on it keep it alive.
        unsafe { (self.cudnn.functions.cudnnDestroy)(*self.raw()) };
    }
}

/// What plans are made for.
#[derive(Debug, Clone)]
pub enum Target {
    /// A device, through its handle.
    Device(Arc<Handle>),
    /// A device that is described and need not be there: its plans cannot be run.
    Described(Arc<Descriptor>),
}

impl Target {
    /// The current device; its plans run on `stream`.
    ///
    /// # Errors
    /// A device that cuDNN refuses.
    ///
    /// # Safety
    /// The context of `stream` is that of this thread, and both outlive the target and its plans.
    pub unsafe fn device(cudnn: &Arc<Cudnn>, stream: *mut c_void) -> Result<Target> {
        // SAFETY: the caller's promise.
        Ok(Target::Device(Arc::new(unsafe { Handle::new(cudnn, stream) }?)))
    }

    /// The device that cuDNN's own description, in JSON, is of. Needs cuDNN 9.8, and no device.
    ///
    /// # Errors
    /// A description that cuDNN does not take.
    pub fn described(cudnn: &Arc<Cudnn>, json: &str) -> Result<Target> {
        let device = Descriptor::new(cudnn, constants::descriptor::DEVICEPROP)?;
        let device = device.set(attribute::DEVICEPROP_JSON_REPRESENTATION, kind::CHAR, json.as_bytes())?;
        Ok(Target::Described(Arc::new(device.finish("read the description of a device")?)))
    }
}

/// cuDNN's description, in JSON, of device number `ordinal`.
///
/// # Errors
/// A device that is not there.
pub fn describe(cudnn: &Arc<Cudnn>, ordinal: i32) -> Result<String> {
    let device = Descriptor::new(cudnn, constants::descriptor::DEVICEPROP)?;
    let device = device.set(attribute::DEVICEPROP_DEVICE_ID, kind::INT32, &[ordinal])?.finish("describe the device")?;
    let bytes: Vec<u8> = device.get_all(attribute::DEVICEPROP_JSON_REPRESENTATION, kind::CHAR)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string())
}
