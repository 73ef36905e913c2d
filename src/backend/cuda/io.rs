//! What a CUDA op is handed: places in device memory, and the driver to launch on.
#![allow(unsafe_code)] // hands launches on

use crate::error::Result;
use crate::tensor::{DType, TensorDesc};

use super::{Call, DevicePtr, Driver, Grid};

/// A tensor that an op reads or changes in place.
#[derive(Debug, Clone, Copy)]
pub struct DeviceTensor<'a> {
    /// Shape and element type.
    pub desc: &'a TensorDesc,
    /// The elements, at a multiple of 256 bytes.
    pub ptr: DevicePtr,
}

/// A tensor that an op writes.
#[derive(Debug, Clone, Copy)]
pub struct DeviceOutput<'a> {
    /// Shape and element type.
    pub desc: &'a TensorDesc,
    /// The elements, at a multiple of 256 bytes.
    pub ptr: DevicePtr,
    /// Whether to add to what is there instead of overwriting it (the planner's choice, see `Op::accumulates`).
    pub accumulate: bool,
}

/// Everything one node works on.
#[derive(Debug)]
pub struct CudaIo<'a> {
    /// Inputs, in the op's order.
    pub inputs: Vec<DeviceTensor<'a>>,
    /// Outputs, in the op's order.
    pub outputs: Vec<DeviceOutput<'a>>,
    /// Tensors changed in place, in the op's order.
    pub updates: Vec<DeviceTensor<'a>>,
    /// Scratch of the size that the op declared, at a multiple of 256 bytes; content undefined.
    pub workspace: DevicePtr,
    /// Where kernels run.
    pub driver: &'a dyn Driver,
}

impl CudaIo<'_> {
    /// Element type of input 0, which is that of the activations.
    pub fn dtype(&self) -> DType {
        self.inputs[0].desc.dtype
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    ///
    /// # Safety
    /// As [`Driver::launch`]: the pointers are those of this node, and the kernel stays within the shapes that the op's
    /// `infer` has checked.
    pub unsafe fn launch(&self, grid: Grid, call: Call) -> Result<()> {
        // SAFETY: the caller's promise is the driver's condition.
        unsafe { self.driver.launch(grid, call) }
    }
}
