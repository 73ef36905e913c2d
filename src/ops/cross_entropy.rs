//! Softmax cross-entropy against labels: the loss of a linear classifier on the features.

use std::cmp::Ordering;

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::{DType, TensorDesc};

/// Inputs logits `[m][classes]` and labels `[m]` (I64).
///
/// Outputs: the scalar loss, the mean of `-log softmax(logits)[label]`; the number of rows whose label is first and the
/// number whose label is among the first five by logit, `[2]` (I64; of equal logits the lower class ranks first); and,
/// saved for the backward pass, each row's largest logit and the reciprocal sum of its exponentials, `[m][2]`.
///
/// Labels are data, which `infer` cannot see: one outside `0..classes` makes the loss NaN, and its row of the gradient
/// too, and counts as wrong.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy;

/// m and the number of classes.
fn dims(op: &str, logits: &TensorDesc, labels: &TensorDesc) -> Result<[usize; 2]> {
    let [m, classes] = logits.shape.expect(op, "logits")?;
    let expected = TensorDesc::new([m], DType::I64);
    if *labels != expected {
        return Err(Error::shape(op, "labels", expected, labels));
    }
    if m == 0 || classes == 0 {
        return Err(Error::shape(op, "logits", "at least one row and one class", logits));
    }
    Ok([m, classes])
}

/// Where a label stands in its row.
fn class_of(label: i64, classes: usize) -> Option<usize> {
    usize::try_from(label).ok().filter(|&class| class < classes)
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [m, _] = dims(self.name(), inputs[0], inputs[1])?;
        let dtype = gradient_dtype(inputs[0].dtype);
        Ok(vec![TensorDesc::new([], dtype), TensorDesc::new([2], DType::I64), TensorDesc::new([m, 2], dtype)])
    }

    /// The loss of each row, and the rank of its label.
    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        inputs[0].shape.rows() * (size_of::<f64>() + size_of::<u64>())
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let inputs = [g.d_output(0)?, g.input(0), g.input(1), g.output(2)];
        g.emit(CrossEntropyBackward, &inputs, &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, classes] = dims(self.name(), io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!(self.name(), io.inputs[0].desc.dtype, T => {
            let (logits, labels) = (io.inputs[0].get::<T>(), io.inputs[1].get::<i64>());
            let (losses, ranks) = io.workspace.split_at_mut(m * size_of::<f64>());
            let losses: &mut [f64] = bytemuck::cast_slice_mut(losses);
            let ranks: &mut [u64] = &mut bytemuck::cast_slice_mut(ranks)[..m];
            let rows = logits.par_chunks(classes).zip(labels).zip(io.outputs[2].get::<T>().par_chunks_mut(2));
            rows.zip(losses.par_iter_mut()).zip(ranks.par_iter_mut()).for_each(|((((v, &label), saved), loss), rank)| {
                let max = v.iter().map(|v| v.to_f64()).fold(f64::NEG_INFINITY, f64::max);
                let sum = v.iter().map(|v| (v.to_f64() - max).exp()).sum::<f64>();
                saved.copy_from_slice(&[T::of(max), T::of(1.0 / sum)]);
                let class = class_of(label, classes);
                *loss = class.map_or(f64::NAN, |class| sum.ln() - (v[class].to_f64() - max));
                *rank = class.map_or(u64::MAX, |class| rank_of(v, class));
            });
            io.outputs[0].get::<T>()[0] = (losses.iter().sum::<f64>() / m as f64) as T;
            let correct = [1, 5].map(|top| ranks.iter().filter(|&&rank| rank < top).count() as i64);
            io.outputs[1].get::<i64>().copy_from_slice(&correct);
        });
        Ok(())
    }

    /// The loss of each row, and the rank of its label.
    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        inputs[0].shape.rows() * (size_of::<f32>() + size_of::<i32>())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io)
    }
}

/// How many classes come before `class`; a NaN comes before everything.
fn rank_of<T: Real>(logits: &[T], class: usize) -> u64 {
    let before = |&(k, v): &(usize, &T)| match v.partial_cmp(&logits[class]) {
        Some(Ordering::Less) => false,
        Some(Ordering::Equal) => k < class,
        Some(Ordering::Greater) | None => true,
    };
    logits.iter().enumerate().filter(before).count() as u64
}

/// Inputs d_loss (scalar), logits, labels and what [`CrossEntropy`] saved; output
/// `d_logits = d_loss / m (softmax(logits) - one_hot(label))`.
#[derive(Debug, Clone, Copy)]
struct CrossEntropyBackward;

impl Op for CrossEntropyBackward {
    fn name(&self) -> &'static str {
        "cross_entropy_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [m, _] = dims(self.name(), inputs[1], inputs[2])?;
        let saved = TensorDesc::new([m, 2], gradient_dtype(inputs[1].dtype));
        if *inputs[3] != saved {
            return Err(Error::shape(self.name(), "saved", saved, inputs[3]));
        }
        Ok(vec![inputs[1].clone()])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [m, classes] = dims(self.name(), io.inputs[1].desc, io.inputs[2].desc)?;
        dispatch_real!(self.name(), io.inputs[1].desc.dtype, T => {
            let scale = io.inputs[0].get::<T>()[0].to_f64() / m as f64;
            let (logits, labels) = (io.inputs[1].get::<T>(), io.inputs[2].get::<i64>());
            let (saved, accumulate) = (io.inputs[3].get::<T>(), io.outputs[0].accumulate);
            let rows = io.outputs[0].get::<T>().par_chunks_mut(classes).zip(logits.par_chunks(classes)).zip(labels);
            rows.zip(saved.par_chunks(2)).for_each(|(((d_logits, logits), &label), saved)| {
                let class = class_of(label, classes);
                let (max, per_sum) = (saved[0].to_f64(), class.map_or(f64::NAN, |_| saved[1].to_f64()));
                for (k, (d, v)) in d_logits.iter_mut().zip(logits).enumerate() {
                    let probability = (v.to_f64() - max).exp() * per_sum;
                    let gradient = T::of(scale * (probability - f64::from(class == Some(k))));
                    *d = if accumulate { *d + gradient } else { gradient };
                }
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(io)
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::dims;
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::ops::row_teams::{count, row_grid};

    kernels! { "cross_entropy";
        /// loss and rank of each row, and what the backward pass needs
        fn cross_entropy[F32, Bf16, F16; 256](
            logits: DevicePtr, labels: DevicePtr, rows: DevicePtr, rank: DevicePtr, softmax: DevicePtr,
            m: i32, classes: i32,
        );
        /// d_logits
        fn cross_entropy_backward[F32, Bf16, F16; 256](
            d_loss: DevicePtr, logits: DevicePtr, labels: DevicePtr, softmax: DevicePtr, d_logits: DevicePtr,
            m: i32, classes: i32, accumulate: u32,
        );
        /// the mean loss and how many ranks are below 1 and 5
        fn cross_entropy_totals[; 256](rows: DevicePtr, rank: DevicePtr, loss: DevicePtr, correct: DevicePtr, m: i32);
    }

    pub fn forward(io: &CudaIo<'_>) -> Result<()> {
        let [m, classes] = dims("cross_entropy", io.inputs[0].desc, io.inputs[1].desc)?;
        let [logits, labels] = [0, 1].map(|i| io.inputs[i].ptr);
        let [loss, correct, softmax] = [0, 1, 2].map(|i| io.outputs[i].ptr);
        let (rows, rank) = (io.workspace, io.workspace.offset(m * size_of::<f32>()));
        let length = count(classes)?;
        let call = cross_entropy(io.dtype(), logits, labels, rows, rank, softmax, count(m)?, length);
        // SAFETY: `infer` checked that logits are [m][classes] and labels [m], and made the saved output [m][2] of
        // float; the workspace holds m floats and m ranks; the kernel reads a logit by label only where the label is a
        // class.
        unsafe { io.launch(row_grid(m, classes), call)? };
        let call = cross_entropy_totals(rows, rank, loss, correct, count(m)?);
        // SAFETY: m losses and ranks were written by the launch before; `infer` made a scalar of float and two I64.
        unsafe { io.launch(Grid::new([1, 1, 1]), call) }
    }

    pub fn backward(io: &CudaIo<'_>) -> Result<()> {
        let [m, classes] = dims("cross_entropy_backward", io.inputs[1].desc, io.inputs[2].desc)?;
        let [d_loss, logits, labels, softmax] = [0, 1, 2, 3].map(|i| io.inputs[i].ptr);
        let (out, dtype, length) = (&io.outputs[0], io.inputs[1].desc.dtype, count(classes)?);
        let accumulate = u32::from(out.accumulate);
        let call =
            cross_entropy_backward(dtype, d_loss, logits, labels, softmax, out.ptr, count(m)?, length, accumulate);
        // SAFETY: `infer` checked that logits are [m][classes], labels [m] and the saved values [m][2], and made the
        // output like the logits.
        unsafe { io.launch(row_grid(m, classes), call) }
    }
}
