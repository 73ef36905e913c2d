//! Work that is written down once and started as a whole.
#![allow(unsafe_code)] // calls of the driver

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use cudarc::driver::result;
use cudarc::driver::sys;

use super::context::Context;
use super::failure::{failed, misuse, said};
use super::stream::Queue;
use crate::error::Result;

/// Whether a capture goes on, and on which thread. The driver invalidates a capture when something is called that has no
/// place in it, and says so at the end; asking here first names the call.
#[derive(Debug, Default)]
pub(super) struct Capture(Mutex<Option<ThreadId>>);

impl Capture {
    fn state(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses `call` while a capture goes on.
    pub fn refuse(&self, call: &str) -> Result<()> {
        match *self.state() {
            None => Ok(()),
            Some(_) => Err(misuse(format!("{call} was called during a capture"))),
        }
    }

    pub fn begin(&self, queue: &Queue) -> Result<()> {
        let mut state = self.state();
        if state.is_some() {
            return Err(misuse("begin_capture was called during a capture"));
        }
        // Other threads go on: they may reserve memory of their own meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(queue.raw, mode) }.map_err(|e| failed("begin a capture", e))?;
        *state = Some(thread::current().id());
        Ok(())
    }

    /// Ends the capture, whatever became of it.
    pub fn end(&self, queue: &Queue) -> Result<Recorded> {
        let mut state = self.state();
        match *state {
            None => return Err(misuse("end_capture was called without a capture")),
            // The driver ends a capture only where it was begun.
            Some(thread) if thread != thread::current().id() => {
                return Err(misuse("end_capture was called on another thread than begin_capture"));
            }
            Some(_) => *state = None,
        }
        // SAFETY: the stream lives.
        let graph = unsafe { result::stream::end_capture(queue.raw) };
        match graph {
            Ok(graph) if !graph.is_null() => Ok(Recorded(graph)),
            Ok(_) => Err(misuse("the capture was invalidated")),
            Err(error) => Err(misuse(format!("the capture cannot become a graph: {}", said(error)))),
        }
    }
}

/// What a capture wrote down.
#[derive(Debug)]
pub(super) struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: made by `end`, destroyed once; what was instantiated from it stays.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// A graph that can be launched.
#[derive(Debug)]
pub(super) struct Executable {
    raw: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a handle of the driver's; launches go through one stream, and the driver puts those of one graph in order.
unsafe impl Send for Executable {}
// SAFETY: as for `Send`.
unsafe impl Sync for Executable {}

impl Executable {
    /// Prepares a graph, and brings it to the device so that the first launch is as quick as the others.
    pub fn new(recorded: &Recorded, context: &Arc<Context>, queue: &Queue) -> Result<Executable> {
        // SAFETY: the graph lives.
        let raw = unsafe { result::graph::instantiate(recorded.0, sys::CUgraphInstantiate_flags(0)) };
        let raw = raw.map_err(|e| failed("instantiate a graph", e))?;
        let executable = Executable { raw, context: context.clone() };
        // SAFETY: graph and stream live.
        unsafe { result::graph::upload(raw, queue.raw) }.map_err(|e| failed("upload a graph", e))?;
        Ok(executable)
    }

    /// Whether it was captured on the device whose context this is.
    pub fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    pub fn launch(&self, queue: &Queue) -> Result<()> {
        // SAFETY: graph and stream live; the kernels' conditions were promised when they were captured.
        unsafe { result::graph::launch(self.raw, queue.raw) }.map_err(|e| failed("launch a graph", e))
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; the driver waits with it until a launch that still runs is done.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}
