//! A bias added to every row, and the gradient of a bias.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::TensorDesc;

/// `y = x + b` in each row; x: `[m][n]`, b: `[n]`. Where a matrix product precedes it and can add the bias itself, that is
/// [`crate::ops::linear::Linear`].
#[derive(Debug, Clone, Copy)]
pub struct AddBias;

impl Op for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [_, n] = inputs[0].shape.expect("add_bias", "x")?;
        let bias = TensorDesc::new([n], gradient_dtype(inputs[0].dtype));
        if *inputs[1] != bias {
            return Err(Error::shape("add_bias", "bias", bias, inputs[1]));
        }
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let d_y = g.d_output(0)?;
        if g.needs(1) {
            g.emit(SumRows, &[d_y], &[Some(1)])?;
        }
        if g.needs(0) {
            g.pass(0, d_y)?;
        }
        Ok(())
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("add_bias", io.inputs[0].desc.dtype, T => {
            let (x, bias) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let n = bias.len().max(1);
            for (y, x) in io.outputs[0].get::<T>().chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                y.iter_mut().zip(x).zip(bias).for_each(|((y, x), b)| *y = x + b);
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::add(io)
    }
}

/// The gradient of a bias: the sums of d_y's columns, combined in float64.
#[derive(Debug, Clone, Copy)]
pub(super) struct SumRows;

impl Op for SumRows {
    fn name(&self) -> &'static str {
        "sum_rows"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [_, n] = inputs[0].shape.expect("sum_rows", "d_y")?;
        Ok(vec![TensorDesc::new([n], gradient_dtype(inputs[0].dtype))])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!("sum_rows", io.inputs[0].desc.dtype, T => {
            let d_y = io.inputs[0].get::<T>();
            let accumulate = io.outputs[0].accumulate;
            column_sums(io.outputs[0].get::<T>(), d_y, accumulate);
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        cuda::Cover::of(inputs[0]).parts * inputs[0].shape.channels() * size_of::<f64>()
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::sum_columns(io)
    }
}

fn column_sums<T: Real>(d_b: &mut [T], d_y: &[T], accumulate: bool) {
    let n = d_b.len();
    d_b.par_iter_mut().enumerate().for_each(|(c, d_b)| {
        let sum: f64 = d_y.iter().skip(c).step_by(n).map(|v| v.to_f64()).sum();
        *d_b = T::of(if accumulate { d_b.to_f64() + sum } else { sum });
    });
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::tensor::TensorDesc;

    kernels! { "bias";
        /// y = x + bias in each row
        fn add_bias[F32, Bf16, F16; 256](x: DevicePtr, bias: DevicePtr, y: DevicePtr, rows: i64, n: i32);
        /// Sums of the columns by part of the rows, in float64
        fn sum_rows[F32, Bf16, F16; 256](x: DevicePtr, partial: DevicePtr, rows: i64, n: i32, rows_per_block: i64);
        /// Sums of the parts
        fn sum_rows_finish[; 256](partial: DevicePtr, d_bias: DevicePtr, parts: i32, n: i32, accumulate: i32);
    }

    /// Rows that one thread sums in float32 where the matrix is not too long for `MAX_PARTS`.
    const CHAIN: usize = 16;
    const MAX_PARTS: usize = 1024;

    /// How blocks cover a matrix, as `Cover` in kernels/bias.cu.
    pub struct Cover {
        /// Blocks along a row.
        pub tiles: usize,
        /// Blocks along a column.
        pub parts: usize,
    }

    impl Cover {
        pub fn of(matrix: &TensorDesc) -> Cover {
            let (rows, n, width) = (matrix.shape.rows(), matrix.shape.channels(), 16 / matrix.dtype.size());
            let pack = if n.is_multiple_of(width) { width } else { 1 };
            let lanes = n.div_ceil(pack).next_power_of_two().min(32);
            let rows_at_once = 256 / lanes;
            Cover { tiles: n.div_ceil(lanes * pack), parts: rows.div_ceil(CHAIN * rows_at_once).clamp(1, MAX_PARTS) }
        }

        fn grid(&self) -> Grid {
            Grid::new([self.tiles.max(1) as u32, self.parts as u32, 1])
        }
    }

    pub fn add(io: &CudaIo<'_>) -> Result<()> {
        let x = &io.inputs[0];
        let (rows, n) = (x.desc.shape.rows() as i64, x.desc.shape.channels() as i32);
        let call = add_bias(io.dtype(), x.ptr, io.inputs[1].ptr, io.outputs[0].ptr, rows, n);
        // SAFETY: `infer` made y like x, `rows` of `n`, and checked that the bias is float32 and has `n`.
        unsafe { io.launch(Cover::of(x.desc).grid(), call) }
    }

    pub fn sum_columns(io: &CudaIo<'_>) -> Result<()> {
        let (x, y) = (&io.inputs[0], &io.outputs[0]);
        let (rows, n, cover) = (x.desc.shape.rows(), x.desc.shape.channels(), Cover::of(x.desc));
        let rows_per_block = rows.div_ceil(cover.parts) as i64;
        let call = sum_rows(io.dtype(), x.ptr, io.workspace, rows as i64, n as i32, rows_per_block);
        // SAFETY: x has `rows` of `n`; the workspace holds `parts` times `n` float64, a row for each block along a column.
        unsafe { io.launch(cover.grid(), call)? };
        let call = sum_rows_finish(io.workspace, y.ptr, cover.parts as i32, n as i32, i32::from(y.accumulate));
        // SAFETY: the launch before filled `parts` times `n` values; `infer` made d_bias float32 with `n`.
        unsafe { io.launch(Grid::new([n.div_ceil(32).max(1) as u32, 1, 1]), call) }
    }
}
