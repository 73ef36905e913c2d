//! What the checks of a run ask of a tensor in device memory: one kernel, and a wait for its answer.
#![allow(unsafe_code)] // launches

use bytemuck::{Pod, Zeroable};

use super::kernel::kernels;
use super::{DevicePtr, DeviceTensor, Driver, Grid};
use crate::error::{Error, Result};
use crate::tensor::DType;

kernels! { "check";
    /// The index of the first element that is not finite, if it is below the one that is there
    fn non_finite[F32, Bf16, F16; 256](x: DevicePtr, n: i64, first: DevicePtr);
    /// A summary for each block
    fn summarise[F32, Bf16, F16; 256](x: DevicePtr, n: i64, parts: DevicePtr);
}

/// Blocks of `summary`, at most.
const PARTS: usize = 512;

/// Bytes of device memory, at a multiple of 8, that these functions are lent.
pub const SCRATCH: usize = PARTS * size_of::<Summary>();

/// Index of the tensor's first NaN or infinity; `None` too for integers.
///
/// # Errors
/// A fault of this or an earlier launch.
pub fn first_non_finite(driver: &dyn Driver, tensor: DeviceTensor<'_>, scratch: DevicePtr) -> Result<Option<usize>> {
    let (n, dtype) = (tensor.desc.shape.len(), tensor.desc.dtype);
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => {
            driver.upload(scratch, &u64::MAX.to_le_bytes())?;
            let call = non_finite(dtype, tensor.ptr, n as i64, scratch);
            // SAFETY: the tensor has `n` elements, and the scratch room for the index.
            unsafe { driver.launch(Grid::packs(n, dtype), call)? };
            let mut first = [0; 8];
            driver.download(scratch, &mut first)?;
            Ok(Some(u64::from_le_bytes(first)).filter(|first| *first != u64::MAX).map(|first| first as usize))
        }
        DType::F64 => {
            // Hyper-parameters: a handful of values, which no kernel is worth.
            let mut values = vec![0_f64; n];
            driver.download(tensor.ptr, bytemuck::cast_slice_mut(&mut values))?;
            Ok(values.iter().position(|value| !value.is_finite()))
        }
        DType::I64 | DType::U8 => Ok(None),
    }
}

/// Reductions over all elements of a tensor, in float64.
#[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Summary {
    /// The sum.
    pub sum: f64,
    /// The sum of the squares.
    pub squares: f64,
    /// The largest absolute value, NaNs left out.
    pub largest: f64,
}

/// The summary of a tensor, the same bits on every device.
///
/// # Errors
/// [`Error::Unsupported`] for element types other than f32, bf16 and f16; a fault of this or an earlier launch.
pub fn summary(driver: &dyn Driver, tensor: DeviceTensor<'_>, scratch: DevicePtr) -> Result<Summary> {
    let (n, dtype) = (tensor.desc.shape.len(), tensor.desc.dtype);
    if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
        return Err(Error::Unsupported { what: format!("a summary of {}", tensor.desc), hint: None });
    }
    let blocks = Grid::packs(n, dtype).blocks[0].min(PARTS as u32);
    let call = summarise(dtype, tensor.ptr, n as i64, scratch);
    // SAFETY: the tensor has `n` elements, and the scratch room for the summaries of `PARTS` blocks.
    unsafe { driver.launch(Grid::new([blocks, 1, 1]), call)? };
    let mut parts = vec![Summary::default(); blocks as usize];
    driver.download(scratch, bytemuck::cast_slice_mut(&mut parts))?;
    Ok(parts.iter().fold(Summary::default(), |total, part| Summary {
        sum: total.sum + part.sum,
        squares: total.squares + part.squares,
        largest: total.largest.max(part.largest),
    }))
}
