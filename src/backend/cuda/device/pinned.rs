//! Page-locked host memory.
#![allow(unsafe_code)] // calls of the driver, and memory that it hands out

use std::slice;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUresult;

use super::context::Context;
use super::failure::{failed, unsupported};
use crate::backend::cuda::Pinned;
use crate::error::Result;

/// A block of it.
#[derive(Debug)]
pub(super) struct PinnedBlock {
    start: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: memory that this alone hands out, through references to itself.
unsafe impl Send for PinnedBlock {}

impl PinnedBlock {
    /// The context must be current.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedBlock> {
        // SAFETY: takes any size but 0; freed when the block is dropped.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let what = format!("the system has no {bytes} bytes of page-locked memory");
                unsupported(&what, "`ulimit -l` and the container's memory bound it; a smaller --batch needs less")
            }
            other => failed("reserve page-locked memory", other),
        })?;
        let start = start.cast::<u8>();
        // SAFETY: so many bytes are reserved there.
        unsafe { start.write_bytes(0, bytes) };
        Ok(PinnedBlock { start, bytes, context: context.clone() })
    }
}

impl Pinned for PinnedBlock {
    fn bytes(&self) -> &[u8] {
        // SAFETY: reserved and written by `new`, and borrowed like `self`. The device writes there only between the calls of
        // `download_later` and what waits for it, while the caller has promised not to look.
        unsafe { slice::from_raw_parts(self.start, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and `self` is borrowed alone.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: reserved by `new`, freed once.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}
