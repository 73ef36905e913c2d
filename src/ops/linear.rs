//! Fully connected layer and its gradients.

use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::{CpuIo, Mat, gemm_blocks};
use crate::backend::cuda::library::{Convolution, Direction, Product, Work};
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::ops::bias::SumRows;
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::TensorDesc;

/// `y = x w^T + b`; x: `[m][k]`, w: `[n][k]` (PyTorch's layout), optional b: `[n]`, y: `[m][n]`.
#[derive(Debug, Clone, Copy)]
pub struct Linear;

fn dims(op: &str, what: &str, desc: &TensorDesc) -> Result<[usize; 2]> {
    desc.shape.expect(op, what)
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let ([m, k], [n, wk]) = (dims("linear", "x", inputs[0])?, dims("linear", "w", inputs[1])?);
        if k != wk || inputs[0].dtype != inputs[1].dtype {
            let expected = TensorDesc::new([n, k], inputs[0].dtype);
            return Err(Error::shape("linear", "w", expected, inputs[1]));
        }
        let bias = TensorDesc::new([n], gradient_dtype(inputs[0].dtype));
        if inputs.get(2).is_some_and(|b| **b != bias) {
            return Err(Error::shape("linear", "bias", bias, inputs[2]));
        }
        Ok(vec![TensorDesc::new([m, n], inputs[0].dtype)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let (x, w, d_y) = (g.input(0), g.input(1), g.d_output(0)?);
        if g.needs(1) {
            g.emit(LinearWgrad, &[x, d_y], &[Some(1)])?;
        }
        if g.input_count() > 2 && g.needs(2) {
            g.emit(SumRows, &[d_y], &[Some(2)])?;
        }
        if g.needs(0) {
            g.emit(LinearDgrad, &[d_y, w], &[Some(0)])?;
        }
        Ok(())
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let ([m, k], [n, _]) = (dims("linear", "x", inputs[0]).ok()?, dims("linear", "w", inputs[1]).ok()?);
        let dtype = inputs[0].dtype;
        let bias = inputs.len() > 2;
        Some(Work::Product(Product { bias, ..Product::new([m, n, k], [false, true], dtype, dtype) }))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let ([m, k], [n, _]) = (dims("linear", "x", io.inputs[0].desc)?, dims("linear", "w", io.inputs[1].desc)?);
        dispatch_real!("linear", io.inputs[0].desc.dtype, T => {
            let (x, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let bias = io.inputs.get(2).map(|b| b.get::<T>());
            let y = io.outputs[0].get::<T>();
            if let Some(bias) = bias {
                y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
            }
            gemm_blocks(Mat::row_major(y, m, n), Mat::row_major(x, m, k), Mat::row_major(w, n, k).t(), bias.is_some());
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        2 * (inputs[0].shape.len() * inputs[1].shape.dims()[0]) as u64
    }
}

/// `d_x = d_y w`.
#[derive(Debug, Clone, Copy)]
struct LinearDgrad;

impl Op for LinearDgrad {
    fn name(&self) -> &'static str {
        "linear_dgrad"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let ([m, n], [wn, k]) = (dims("linear_dgrad", "d_y", inputs[0])?, dims("linear_dgrad", "w", inputs[1])?);
        if n != wn {
            return Err(Error::shape("linear_dgrad", "columns of d_y", wn, n));
        }
        Ok(vec![TensorDesc::new([m, k], inputs[0].dtype)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let [m, n] = dims("linear_dgrad", "d_y", inputs[0]).ok()?;
        let [_, k] = dims("linear_dgrad", "w", inputs[1]).ok()?;
        let dtype = inputs[0].dtype;
        Some(Work::Product(Product::new([m, k, n], [false, false], dtype, dtype)))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, n] = dims("linear_dgrad", "d_y", io.inputs[0].desc)?;
        let [_, k] = dims("linear_dgrad", "w", io.inputs[1].desc)?;
        dispatch_real!("linear_dgrad", io.inputs[0].desc.dtype, T => {
            let (d_y, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            let d_x = Mat::row_major(io.outputs[0].get::<T>(), m, k);
            gemm_blocks(d_x, Mat::row_major(d_y, m, n), Mat::row_major(w, n, k), accumulate);
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        2 * (inputs[0].shape.dims()[0] * inputs[1].shape.len()) as u64
    }
}

/// `d_w = d_y^T x`; inputs x and d_y.
#[derive(Debug, Clone, Copy)]
struct LinearWgrad;

impl Op for LinearWgrad {
    fn name(&self) -> &'static str {
        "linear_wgrad"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let ([m, k], [dm, n]) = (dims("linear_wgrad", "x", inputs[0])?, dims("linear_wgrad", "d_y", inputs[1])?);
        if m != dm {
            return Err(Error::shape("linear_wgrad", "rows of d_y", m, dm));
        }
        Ok(vec![TensorDesc::new([n, k], gradient_dtype(inputs[0].dtype))])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let [m, k] = dims("linear_wgrad", "x", inputs[0]).ok()?;
        let [_, n] = dims("linear_wgrad", "d_y", inputs[1]).ok()?;
        // That of a 1x1 convolution over m images of one pixel, whose operands come in this order.
        let (kernel, stride, padding) = ([1, 1], [1, 1], [0, 0]);
        let geometry = ConvGeometry { n: m, h: 1, w: 1, c_in: k, c_out: n, kernel, stride, padding };
        Some(Work::Convolution(Convolution::new(Direction::WeightGradient, geometry, inputs[0].dtype)))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, k] = dims("linear_wgrad", "x", io.inputs[0].desc)?;
        let [_, n] = dims("linear_wgrad", "d_y", io.inputs[1].desc)?;
        dispatch_real!("linear_wgrad", io.inputs[0].desc.dtype, T => {
            let (x, d_y) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            let d_w = Mat::row_major(io.outputs[0].get::<T>(), n, k);
            gemm_blocks(d_w, Mat::row_major(d_y, m, n).t(), Mat::row_major(x, m, k), accumulate);
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        2 * (inputs[0].shape.len() * inputs[1].shape.channels()) as u64
    }
}
