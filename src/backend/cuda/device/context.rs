//! The driver's context of a device, which everything made on the device belongs to.
#![allow(unsafe_code)] // calls of the driver

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::failure::failed;
use crate::error::Result;

/// A use of the device's primary context, given back when the last one who holds it is gone. NVIDIA's libraries work in the
/// primary context too.
#[derive(Debug)]
pub(in crate::backend::cuda) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a handle of the driver's, which is thread-safe.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of a device that the driver has named.
    pub fn of(device: sys::CUdevice) -> Result<Arc<Context>> {
        // SAFETY: `device` is valid; the context is released when `Context` is dropped.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("make a context", e))?;
        Ok(Arc::new(Context { device, raw }))
    }

    /// Makes it that of this thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.raw) }.map_err(|e| failed("use the context", e))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `of`, and nobody uses it any more. What fails has been reported by the call that failed before.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}
