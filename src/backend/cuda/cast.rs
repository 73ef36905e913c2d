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

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use half::{bf16, f16};

    use super::super::Emulator;
    use super::super::emulator::Options;
    use super::*;

    /// Odd, so that packs and single elements are both there; more than one block has.
    const N: usize = 2_061;

    fn numbers(scale: f32) -> Vec<f32> {
        (0..N).map(|i| scale * ((i * 37 % 101) as f32 - 50.3)).collect()
    }

    fn rounded(x: f32, dtype: DType) -> (u16, f32) {
        match dtype {
            DType::Bf16 => (bf16::from_f32(x).to_bits(), bf16::from_f32(x).to_f32()),
            _ => (f16::from_f32(x).to_bits(), f16::from_f32(x).to_f32()),
        }
    }

    #[test]
    fn float32_is_rounded_and_comes_back_overwriting_or_added() {
        let device = Emulator::new(Options { threads: 2, seed: 3 }).unwrap();
        let upload = |values: &[f32]| {
            let to = device.allocate(N * 4).unwrap();
            device.upload(to, bytemuck::cast_slice(values)).unwrap();
            to
        };
        let download = |from, bytes: usize| {
            let mut out = vec![0; bytes];
            device.download(from, &mut out).unwrap();
            out
        };
        for dtype in [DType::Bf16, DType::F16] {
            let (values, old) = (numbers(0.37), numbers(-1.9));
            let (x, narrowed, y) = (upload(&values), upload(&old), upload(&old));
            // SAFETY: all three have room for `N` float32.
            unsafe { narrow(&device, dtype, x, narrowed, N) }.unwrap();
            let bits: Vec<u16> = bytemuck::pod_collect_to_vec(&download(narrowed, N * 2));
            let expected: Vec<(u16, f32)> = values.iter().map(|&v| rounded(v, dtype)).collect();
            assert!(bits.iter().eq(expected.iter().map(|(bits, _)| bits)), "{dtype}");
            for accumulate in [true, false] {
                // SAFETY: as above.
                unsafe { widen(&device, dtype, narrowed, y, N, accumulate) }.unwrap();
                let got: Vec<f32> = bytemuck::pod_collect_to_vec(&download(y, N * 4));
                let expected = expected.iter().zip(&old).map(|((_, v), old)| if accumulate { v + old } else { *v });
                assert!(got.into_iter().eq(expected), "{dtype}, accumulate: {accumulate}");
            }
        }
    }
}
