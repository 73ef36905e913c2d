//! Streams of a device, and marks in them.
#![allow(unsafe_code)] // calls of the driver

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use super::context::Context;
use super::failure::{failed, misuse, said};
use crate::error::Result;

/// A stream that waits for no other: the default stream of the process, which libraries may use, does not hold it up.
#[derive(Debug)]
pub(super) struct Queue {
    pub raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a handle of the driver's, which is thread-safe; its context is made current before it is used.
unsafe impl Send for Queue {}
// SAFETY: as for `Send`.
unsafe impl Sync for Queue {}

impl Queue {
    /// The context must be current, here and below.
    pub fn new(context: &Arc<Context>) -> Result<Queue> {
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Queue { raw: raw.map_err(|e| failed("make a stream", e))?, context: context.clone() })
    }

    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.raw) }.map_err(|e| failed("finish what was launched", e))
    }

    pub fn record(&self, mark: &Mark) -> Result<()> {
        // SAFETY: both belong to the current context.
        unsafe { result::event::record(mark.raw, self.raw) }.map_err(|e| failed("record an event", e))
    }

    pub fn wait(&self, mark: &Mark) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live; the driver keeps what it needs of an event that is destroyed while it is waited for.
        unsafe { result::stream::wait_event(self.raw, mark.raw, flags) }.map_err(|e| failed("wait for an event", e))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; the driver finishes what is still in it.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// An event, with the time at which it is passed.
#[derive(Debug)]
pub(super) struct Mark {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: a handle of the driver's, which is thread-safe; its context is made current before it is used.
unsafe impl Send for Mark {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mark {}

impl Mark {
    /// Who waits for it sleeps: the cores of the host decode images meanwhile, and a step takes thousands of times longer
    /// than waking up.
    pub fn new(context: &Arc<Context>) -> Result<Mark> {
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC);
        Ok(Mark { raw: raw.map_err(|e| failed("make an event", e))?, context: context.clone() })
    }

    /// Whether it was made on the device whose context this is.
    pub fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        unsafe { result::event::synchronize(self.raw) }.map_err(|e| failed("finish what was launched", e))
    }

    pub fn elapsed_until(&self, end: &Mark) -> Result<Duration> {
        // SAFETY: both events live, and keep times.
        match unsafe { result::event::elapsed(self.raw, end.raw) } {
            Ok(milliseconds) => Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3)),
            Err(e @ DriverError(CUresult::CUDA_ERROR_NOT_READY | CUresult::CUDA_ERROR_INVALID_HANDLE)) => {
                Err(misuse(format!("the time between events that are not both passed was asked for: {}", said(e))))
            }
            Err(e) => Err(failed("read the time", e)),
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; the driver waits with it until the event is passed.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
