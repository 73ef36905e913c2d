//! Random words made on a device, the same as [`crate::rng::Stream`] draws on the host.
#![allow(unsafe_code)] // a launch

use super::kernel::kernels;
use super::{DevicePtr, DeviceTensor, Driver, Grid};
use crate::error::{Error, Result};
use crate::tensor::DType;

kernels! { "philox";
    /// The first `n` words of the stream (seed, domain, index)
    fn philox_stream[; 256](words: DevicePtr, n: u32, seed: u64, domain: u32, index: u64);
}

/// Fills a tensor of any type that has whole words with the first of those that `Stream::new(seed, domain, index)` draws.
///
/// # Errors
/// [`Error::Shape`] when the tensor is no whole number of words, or more than 2^32; a launch that the device refuses.
pub fn fill(driver: &dyn Driver, to: DeviceTensor<'_>, seed: u64, domain: u32, index: u64) -> Result<()> {
    let bytes = to.desc.bytes();
    let words = u32::try_from(bytes / 4).ok().filter(|_| bytes.is_multiple_of(4));
    let Some(words) = words else {
        return Err(Error::shape("random", "tensor", "a whole number of 32-bit words, below 2^32", to.desc));
    };
    let grid = Grid::packs(words as usize, DType::F32);
    // SAFETY: the tensor has `words` words.
    unsafe { driver.launch(grid, philox_stream(to.ptr, words, seed, domain, index)) }
}
