//! Ranges of the outermost dimension, which are the views: taken out of a tensor, seen in it, and put together again.

use crate::backend::cpu::CpuIo;
use crate::backend::cpu::arena::ALIGNMENT;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tape, Tensors, Traffic, ValueId};
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

/// The rows of [`SliceRows`] where they are: no copy. They have to begin at a multiple of the memory's alignment.
#[derive(Debug, Clone, Copy)]
struct ViewRows(SliceRows);

impl ViewRows {
    fn offset(&self, x: &TensorDesc) -> usize {
        self.0.start * row_elements(x) * x.dtype.size()
    }
}

impl Op for ViewRows {
    fn name(&self) -> &'static str {
        "view_rows"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let offset = self.offset(inputs[0]);
        if !offset.is_multiple_of(ALIGNMENT) {
            let expected = format!("at a multiple of {ALIGNMENT} bytes");
            return Err(Error::shape(self.name(), "first row", expected, offset));
        }
        self.0.infer(inputs)
    }

    fn is_view(&self) -> bool {
        true
    }

    fn view_offset(&self, x: &TensorDesc) -> usize {
        self.offset(x)
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        self.0.backward(g)
    }

    fn cpu(&self, _io: &mut CpuIo<'_>) -> Result<()> {
        Ok(())
    }

    fn cuda(&self, _io: &CudaIo<'_>) -> Result<()> {
        Ok(())
    }
}

/// Records `x[rows.start .. rows.start + rows.len]`: as a view where its place in memory is one that values may have, else as a
/// copy.
///
/// # Errors
/// [`Error::Shape`] when x has fewer rows.
pub fn record_rows(tape: &mut Tape, rows: SliceRows, x: ValueId) -> Result<ValueId> {
    match ViewRows(rows).offset(tape.desc(x)).is_multiple_of(ALIGNMENT) {
        true => tape.record_one(ViewRows(rows), &[x]),
        false => tape.record_one(rows, &[x]),
    }
}

/// `y`: the rows of a, then those of b, which are alike but for the outermost dimension.
#[derive(Debug, Clone, Copy)]
pub struct StackRows;

impl Op for StackRows {
    fn name(&self) -> &'static str {
        "stack_rows"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let rows = |desc: &TensorDesc| desc.shape.dims().first().copied().unwrap_or(0);
        let (a, b) = (inputs[0], inputs[1]);
        if a.shape.rank() == 0 || with_rows(a, rows(b)) != *b {
            return Err(Error::shape(self.name(), "b", format!("rows like those of {a}"), b));
        }
        Ok(vec![with_rows(a, rows(a) + rows(b))])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let (d_y, mut start) = (g.d_output(0)?, 0);
        for input in 0..2 {
            let len = g.tape().desc(g.input(input)).shape.dims()[0];
            if g.needs(input) {
                g.emit(SliceRows { start, len }, &[d_y], &[Some(input)])?;
            }
            start += len;
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let (a, b) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let (first, second) = io.outputs[0].get::<T>().split_at_mut(a.len());
            first.copy_from_slice(a);
            second.copy_from_slice(b);
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::stack(io)
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
        /// y = a, then b, of n elements together
        fn stack_rows[F32, Bf16, F16; 256](a: DevicePtr, b: DevicePtr, y: DevicePtr, of_a: i64, n: i64);
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

    pub fn stack(io: &CudaIo<'_>) -> Result<()> {
        let (a, b, y) = (&io.inputs[0], &io.inputs[1], &io.outputs[0]);
        let (of_a, n) = (a.desc.shape.len(), y.desc.shape.len());
        let call = stack_rows(io.dtype(), a.ptr, b.ptr, y.ptr, of_a as i64, n as i64);
        // SAFETY: `infer` made y of the rows of a and b, `n` elements, of which the first `of_a` are a's.
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
