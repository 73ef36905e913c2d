//! Batch norm, ReLU and the max pooling of the ResNet stem in one op, which never writes what lies between them: it is four
//! times as large as the result.

pub(in crate::ops) mod cuda;

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Again, GradBuilder, Op, Tensors, Traffic};
use crate::ops::pool::{MaxPool, NONE, Taken};
use crate::tensor::{DType, TensorDesc};

use super::cpu::Coefficients;
use super::{BatchNorm, BatchNormBackward, Fusion, Mask, cpu, repeat};

/// Windows of 3x3 with stride 2 and padding 1.
const SIZE: usize = 3;
const STRIDE: usize = 2;
const PADDING: usize = 1;
const POOLING: MaxPool = MaxPool { kernel: SIZE, stride: STRIDE, padding: PADDING, taken: true };

/// `y = max_pool(relu(batch_norm(x)))`, training mode: as [`BatchNorm`] with ReLU and [`crate::ops::pool::MaxPool`] of 3x3 windows
/// with stride 2 and padding 1 one after the other, bit for bit; in its gradient sums over pixels are in another order.
///
/// Inputs x `[n][h][w][c]`, gamma `[c]`, beta `[c]`, then the sums if they are given. Outputs y `[n][oh][ow][c]`, mean `[groups, c]`, rstd `[groups, c]`, and for
/// each element of y a byte: the position in its window, row by row, that the gradient goes to, or 255 for none. Updates as
/// [`BatchNorm`].
#[derive(Debug, Clone, Copy)]
pub struct BatchNormMaxPool {
    norm: BatchNorm,
}

impl BatchNormMaxPool {
    /// With the constants of a batch norm, and whether the sums come as an input: see [`BatchNorm`].
    pub fn new(groups: usize, eps: f64, momentum: f64, sums_given: bool) -> BatchNormMaxPool {
        let fusion = Fusion { affine: true, residual: false, relu: true };
        BatchNormMaxPool { norm: BatchNorm { groups, eps, momentum, fusion, sums_given, means: false } }
    }
}

/// The windows over an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Windows {
    pub h: usize,
    pub w: usize,
    pub c: usize,
}

impl Windows {
    pub fn new(x: &TensorDesc) -> Result<Windows> {
        let [_, h, w, c] = x.shape.expect("batch_norm_max_pool", "x")?;
        if h.min(w) == 0 {
            return Err(Error::shape("batch_norm_max_pool", "x", "at least one pixel", &x.shape));
        }
        Ok(Windows { h, w, c })
    }

    fn down(size: usize) -> usize {
        (size + 2 * PADDING - SIZE) / STRIDE + 1
    }

    pub fn oh(&self) -> usize {
        Windows::down(self.h)
    }

    pub fn ow(&self) -> usize {
        Windows::down(self.w)
    }
}

impl Op for BatchNormMaxPool {
    fn name(&self) -> &'static str {
        "batch_norm_max_pool"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let windows = Windows::new(inputs[0])?;
        let mut outputs = self.norm.infer(inputs)?;
        let y = [inputs[0].shape.dims()[0], windows.oh(), windows.ow(), windows.c];
        outputs[0] = TensorDesc::new(y, inputs[0].dtype);
        outputs.push(TensorDesc::new(y, DType::U8));
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.workspace(inputs)
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let op = BatchNormMaxPoolBackward { groups: self.norm.groups };
        let inputs = [g.d_output(0)?, g.input(0), g.output(1), g.output(2), g.input(1), g.output(3)];
        g.emit(op, &inputs, &[Some(0), Some(1), Some(2)])
    }

    fn again(&self) -> Again {
        repeat::of_pooled(self.norm.groups)
    }

    /// x is read again once its statistics are known, unless their sums were given.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        self.norm.traffic(tensors)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let windows = Windows::new(io.inputs[0].desc)?;
        dispatch_real!("batch_norm_max_pool", io.inputs[0].desc.dtype, T => {
            let groups = cpu::statistics::<T>(&self.norm, io, 1);
            let x = io.inputs[0].get::<T>();
            let (head, tail) = io.outputs.split_at_mut(3);
            forward(windows, &groups, x, head[0].get::<T>(), tail[0].get::<u8>());
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm.cuda_workspace(inputs)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(&self.norm, Windows::new(io.inputs[0].desc)?, io)
    }
}

pub(super) fn forward<T: Real>(windows: Windows, groups: &[Coefficients<T>], x: &[T], y: &mut [T], taken: &mut [u8]) {
    let Windows { h, w, c } = windows;
    let (row, image) = (windows.ow() * c, h * w * c);
    let group_images = x.len() / image / groups.len();
    y.par_chunks_mut(row).zip(taken.par_chunks_mut(row)).enumerate().for_each(|(i, (y, taken))| {
        let (number, oy) = (i / windows.oh(), i % windows.oh());
        let (x, k) = (&x[number * image..][..image], &groups[number / group_images]);
        y.fill(T::ZERO);
        taken.fill(NONE);
        for (ox, (y, taken)) in y.chunks_exact_mut(c).zip(taken.chunks_exact_mut(c)).enumerate() {
            for position in 0..SIZE * SIZE {
                let at =
                    |o: usize, within: usize, size| (o * STRIDE + within).checked_sub(PADDING).filter(|&i| i < size);
                let (iy, ix) = (at(oy, position / SIZE, h), at(ox, position % SIZE, w));
                let (Some(iy), Some(ix)) = (iy, ix) else { continue };
                for (channel, &x) in x[(iy * w + ix) * c..][..c].iter().enumerate() {
                    let value = k.normalised(channel, x);
                    if value > y[channel] {
                        (y[channel], taken[channel]) = (value, position as u8);
                    }
                }
            }
        }
    });
}

/// The gradient of [`BatchNormMaxPool`]: inputs d_y, x, mean, rstd, gamma and what was taken; outputs d_x, d_gamma, d_beta.
#[derive(Debug, Clone, Copy)]
struct BatchNormMaxPoolBackward {
    groups: usize,
}

impl BatchNormMaxPoolBackward {
    /// What is left once the gradient in front of the pooling is known.
    fn norm(&self) -> BatchNormBackward {
        BatchNormBackward { groups: self.groups, affine: true, mask: Mask::None, residual: false }
    }
}

impl Op for BatchNormMaxPoolBackward {
    fn name(&self) -> &'static str {
        "batch_norm_max_pool_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (d_y, taken) = (inputs[0], inputs[5]);
        if d_y.shape != taken.shape {
            return Err(Error::shape("batch_norm_max_pool_backward", "d_y", &taken.shape, d_y));
        }
        Ok(vec![inputs[1].clone(), inputs[4].clone(), inputs[4].clone()])
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.norm().workspace(inputs)
    }

    fn accumulates(&self) -> bool {
        true
    }

    /// d_y, x and what was taken are read again once their sums are known.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        [0, 1, 5].into_iter().fold(tensors.once(), |traffic, i| traffic.reading(tensors.inputs[i]))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let pooled = Pooled(Taken::new(POOLING, io.inputs[1].desc, io.inputs[5].get::<u8>())?);
        dispatch_real!("batch_norm_max_pool_backward", io.inputs[1].desc.dtype, T => {
            cpu::pooled_backward::<T>(&self.norm(), io, pooled);
        });
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        Windows::new(inputs[1]).map_or(0, |windows| cuda::backward_workspace(windows, inputs[1], self.groups))
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(&self.norm(), Windows::new(io.inputs[1].desc)?, io)
    }
}

/// The gradient that comes through the pooling.
pub(super) struct Pooled<'a>(Taken<'a>);

impl Pooled<'_> {
    /// The gradient in front of the pooling for row `row` of x: that of the windows that took it.
    pub fn gather<T: Real>(&self, g: &mut [T], d_y: &[T], row: usize) {
        g.fill(T::ZERO);
        self.0.add(g, d_y, row);
    }
}
