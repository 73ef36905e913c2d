//! A range of the outermost dimension: view 1 alone, for the asymmetric loss.

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tensors, Traffic};
use crate::tensor::TensorDesc;

/// `y = x[start .. start + len]` along the outermost dimension.
#[derive(Debug, Clone, Copy)]
pub struct SliceRows {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
}

fn with_rows(desc: &TensorDesc, rows: usize) -> TensorDesc {
    let mut dims = desc.shape.dims().to_vec();
    dims[0] = rows;
    TensorDesc::new(&dims[..], desc.dtype)
}

fn row_elements(desc: &TensorDesc) -> usize {
    desc.shape.dims()[1..].iter().product()
}

impl Op for SliceRows {
    fn name(&self) -> &'static str {
        "slice_rows"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let rows = inputs[0].shape.dims().first().copied().unwrap_or(0);
        if self.start + self.len > rows {
            let expected = format!("at least {} rows", self.start + self.len);
            return Err(Error::shape("slice_rows", "x", expected, inputs[0]));
        }
        Ok(vec![with_rows(inputs[0], self.len)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let rows = g.tape().desc(g.input(0)).shape.dims()[0];
        let d_y = g.d_output(0)?;
        g.emit(SliceRowsBackward { start: self.start, rows }, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let first = self.start * row_elements(io.inputs[0].desc);
        dispatch_real!("slice_rows", io.inputs[0].desc.dtype, T => {
            let x = io.inputs[0].get::<T>();
            let y = io.outputs[0].get::<T>();
            y.copy_from_slice(&x[first..first + y.len()]);
        });
        Ok(())
    }

    /// Of x the rows of y.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let y = tensors.outputs[0].0.bytes();
        Traffic::default().staging(y)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io, self.start * row_elements(io.inputs[0].desc))
    }
}

/// d_x of [`SliceRows`]: d_y in its place, zero elsewhere.
#[derive(Debug, Clone, Copy)]
struct SliceRowsBackward {
    start: usize,
    rows: usize,
}

impl Op for SliceRowsBackward {
    fn name(&self) -> &'static str {
        "slice_rows_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let len = inputs[0].shape.dims().first().copied().unwrap_or(0);
        if self.start + len > self.rows {
            let expected = format!("at most {} rows", self.rows - self.start.min(self.rows));
            return Err(Error::shape("slice_rows_backward", "d_y", expected, inputs[0]));
        }
        Ok(vec![with_rows(inputs[0], self.rows)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let first = self.start * row_elements(io.inputs[0].desc);
        dispatch_real!("slice_rows_backward", io.inputs[0].desc.dtype, T => {
            let d_y = io.inputs[0].get::<T>();
            let accumulate = io.outputs[0].accumulate;
            let d_x = io.outputs[0].get::<T>();
            if !accumulate {
                d_x.fill(0.0);
            }
            d_x[first..].iter_mut().zip(d_y).for_each(|(d_x, d_y)| *d_x += d_y);
        });
        Ok(())
    }

    /// Where it is added, the other rows of d_x are left alone.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let d_y = tensors.inputs[0];
        if tensors.accumulates(0) { Traffic::default().staging(d_y.bytes()).reading(d_y) } else { tensors.once() }
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(io, self.start * row_elements(io.inputs[0].desc))
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;

    kernels! { "elementwise";
        /// y = x[first .. first + n]
        fn slice_rows[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, first: i64, n: i64);
        /// d_x[first .. first + len] = d_y, zero in the rest of its n elements; or added
        fn slice_rows_backward[F32, Bf16, F16; 256](
            d_y: DevicePtr, d_x: DevicePtr, first: i64, len: i64, n: i64, accumulate: i32,
        );
    }

    pub fn forward(io: &CudaIo<'_>, first: usize) -> Result<()> {
        let n = io.outputs[0].desc.shape.len();
        let call = slice_rows(io.dtype(), io.inputs[0].ptr, io.outputs[0].ptr, first as i64, n as i64);
        // SAFETY: `infer` checked that the rows from `start` on, `n` elements from `first` on, lie within x.
        unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
    }

    pub fn backward(io: &CudaIo<'_>, first: usize) -> Result<()> {
        let (d_y, d_x) = (&io.inputs[0], &io.outputs[0]);
        let (len, n) = (d_y.desc.shape.len(), d_x.desc.shape.len());
        let accumulate = i32::from(d_x.accumulate);
        let call = slice_rows_backward(io.dtype(), d_y.ptr, d_x.ptr, first as i64, len as i64, n as i64, accumulate);
        // SAFETY: `infer` checked that all rows of d_y, `len` elements, fit into the `n` of d_x from `first` on.
        unsafe { io.launch(Grid::packs(n, io.dtype()), call) }
    }
}
