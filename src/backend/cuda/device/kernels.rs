//! The compiled kernels on a device.
#![allow(unsafe_code)] // calls of the driver

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use super::context::Context;
use super::failure::{failed, unsupported};
use crate::backend::cuda::{Kernel, compiled_modules};
use crate::error::{Error, Result};

/// Dynamic shared memory that a kernel may have without asking for more.
const PLAIN_SHARED: u32 = 48 * 1024;

/// All modules of this build, loaded.
#[derive(Debug)]
pub(super) struct Kernels {
    modules: HashMap<&'static str, sys::CUmodule>,
    /// Looked up so far.
    functions: Mutex<HashMap<&'static str, Function>>,
    context: Arc<Context>,
}

#[derive(Debug, Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    /// Dynamic shared memory that it has been allowed.
    shared: u32,
}

// SAFETY: handles of the driver's, which is thread-safe; the context is made current before they are used.
unsafe impl Send for Kernels {}
// SAFETY: as for `Send`; the table of functions is behind a mutex.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads them in the current context, which is that of the device called `name`.
    pub fn load(context: &Arc<Context>, name: &str) -> Result<Kernels> {
        let (modules, functions) = (HashMap::new(), Mutex::default());
        let mut kernels = Kernels { modules, functions, context: context.clone() };
        for module in compiled_modules() {
            // SAFETY: a whole fatbin, 16-byte aligned, embedded in the program.
            let loaded = unsafe { result::module::load_data(module.fatbin.as_ptr().cast()) };
            let loaded = loaded.map_err(|e| cannot_load(name, module.name, module.archs, e))?;
            kernels.modules.insert(module.name, loaded);
        }
        Ok(kernels)
    }

    /// A variant of a kernel, allowed `shared` bytes of dynamic shared memory.
    pub fn function(&self, kernel: &'static Kernel, name: &'static str, shared: u32) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut function = match functions.get(name) {
            Some(function) => *function,
            None => Function { raw: self.look_up(kernel, name)?, shared: PLAIN_SHARED },
        };
        if shared > function.shared {
            allow_shared(function.raw, shared)?;
            function.shared = shared;
        }
        functions.insert(name, function);
        Ok(function.raw)
    }

    fn look_up(&self, kernel: &'static Kernel, name: &'static str) -> Result<sys::CUfunction> {
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
        Ok(function)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        for module in self.modules.values() {
            // SAFETY: loaded by `load`; the device has synchronised, so none of its kernels runs.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

fn cannot_load(device: &str, module: &str, archs: &[&str], error: DriverError) -> Error {
    let DriverError(code) = error;
    if code != CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU && code != CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION {
        return failed(&format!("load {module}"), error);
    }
    let what = format!("{device}: this build has no code for it, only for {}", archs.join(", "));
    unsupported(&what, "build with SIMSIAM_CUDA_ARCHS=<its generation>")
}

fn allow_shared(function: sys::CUfunction, bytes: u32) -> Result<()> {
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function's module is loaded.
    unsafe { result::function::set_function_attribute(function, attribute, bytes as i32) }
        .map_err(|e| failed(&format!("give a kernel {bytes} bytes of shared memory"), e))
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
