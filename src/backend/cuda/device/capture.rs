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

/// The capture of the compute stream, if one goes on. The driver throws a capture away when something is called that has no
/// place in it, and says so only at the end; asking here first names the call.
#[derive(Debug, Default)]
pub(super) struct Capture(Mutex<Option<Ongoing>>);

#[derive(Debug)]
struct Ongoing {
    thread: ThreadId,
    /// The first call that a capture does not allow.
    broken_by: Option<&'static str>,
}

impl Capture {
    fn state(&self) -> MutexGuard<'_, Option<Ongoing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that `action` is not done while a graph is captured.
    pub fn allow(&self, action: &'static str) -> Result<()> {
        let mut state = self.state();
        let Some(ongoing) = &mut *state else { return Ok(()) };
        ongoing.broken_by.get_or_insert(action);
        Err(misuse(format!("cannot {action} while a graph is captured")))
    }

    pub fn begin(&self, queue: &Queue) -> Result<()> {
        let mut state = self.state();
        if state.is_some() {
            return Err(misuse("cannot begin a capture: one goes on already"));
        }
        // Other threads go on: they may reserve memory of their own meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(queue.raw, mode) }.map_err(|e| failed("begin a capture", e))?;
        *state = Some(Ongoing { thread: thread::current().id(), broken_by: None });
        Ok(())
    }

    /// Ends the capture, whatever became of it.
    pub fn end(&self, queue: &Queue) -> Result<Recorded> {
        let mut state = self.state();
        // The driver ends a capture only where it was begun.
        if state.as_ref().is_some_and(|ongoing| ongoing.thread != thread::current().id()) {
            return Err(misuse("cannot end a capture on another thread than it was begun on"));
        }
        let ended = state.take().ok_or_else(|| misuse("cannot end a capture: none has begun"))?;
        // SAFETY: the stream lives.
        let graph = unsafe { result::stream::end_capture(queue.raw) };
        // Destroyed here if it is not to be used.
        let graph = graph.map(Recorded).map_err(|error| misuse(format!("the capture was lost: {}", said(error))));
        match ended.broken_by {
            Some(action) => Err(misuse(format!("the capture was lost when something tried to {action}"))),
            None => graph,
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
