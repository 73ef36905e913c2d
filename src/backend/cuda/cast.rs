//! Conversion between float32 and the 16-bit element types.
#![allow(unsafe_code)] // launches

use crate::error::Result;
use crate::tensor::DType;

use super::kernel::kernels;
use super::{DevicePtr, Driver, Grid};

kernels! { "elementwise";
    /// y = x, rounded
    fn cast_to[Bf16, F16; 256](x: DevicePtr, y: DevicePtr, n: i64);
    /// y = x, widened to float32, or y += x
    fn cast_from[Bf16, F16; 256](x: DevicePtr, y: DevicePtr, n: i64, accumulate: i32);
}

/// y = x, float32 rounded to the 16-bit type `to`.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// x has `n` float32 and y `n` elements of `to`, at multiples of 64 bytes.
pub unsafe fn narrow(driver: &dyn Driver, to: DType, x: DevicePtr, y: DevicePtr, n: usize) -> Result<()> {
    // SAFETY: the kernel reads `n` elements of x and writes as many of y: the caller's promise.
    unsafe { driver.launch(Grid::packs(n, to), cast_to(to, x, y, n as i64)) }
}

/// y = x, or y += x: the 16-bit type `from` widened to float32.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// x has `n` elements of `from` and y `n` float32, at multiples of 64 bytes.
pub unsafe fn widen(
    driver: &dyn Driver,
    from: DType,
    x: DevicePtr,
    y: DevicePtr,
    n: usize,
    accumulate: bool,
) -> Result<()> {
    let call = cast_from(from, x, y, n as i64, accumulate.into());
    // SAFETY: as in `narrow`.
    unsafe { driver.launch(Grid::packs(n, from), call) }
}
