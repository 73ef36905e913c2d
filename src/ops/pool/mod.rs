//! Max pooling and global average pooling over NHWC, with their gradients.

pub(super) mod cuda;

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::TensorDesc;

/// Max pooling; x: `[n][h][w][c]`, y: `[n][oh][ow][c]`. Padding never wins. Among equal values the first in row-major order
/// takes the gradient, as in PyTorch.
#[derive(Debug, Clone, Copy)]
pub struct MaxPool {
    /// Window height and width.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Padding on every side; at most half the kernel.
    pub padding: usize,
}

/// Sizes of one pooling.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    h: usize,
    w: usize,
    c: usize,
    oh: usize,
    ow: usize,
}

impl MaxPool {
    fn geometry(&self, x: &TensorDesc) -> Result<Geometry> {
        let [_, h, w, c] = x.shape.expect("max_pool", "x")?;
        if self.stride == 0 || self.padding * 2 > self.kernel || h.min(w) + 2 * self.padding < self.kernel {
            let expected = format!("at least {} pixels a side with padding {}", self.kernel, self.padding);
            return Err(Error::shape("max_pool", "x", expected, &x.shape));
        }
        let out = |size: usize| (size + 2 * self.padding - self.kernel) / self.stride + 1;
        Ok(Geometry { h, w, c, oh: out(h), ow: out(w) })
    }

    /// The rows (or columns) of the window at output position `o`, clipped to the image.
    fn window(&self, o: usize, size: usize) -> std::ops::Range<usize> {
        let start = o * self.stride;
        start.saturating_sub(self.padding)..(start + self.kernel).saturating_sub(self.padding).min(size)
    }

    fn forward<T: Real>(&self, g: Geometry, x: &[T], y: &mut [T]) {
        let row = g.ow * g.c;
        y.par_chunks_mut(row).enumerate().for_each(|(i, y)| {
            let (image, oy) = (i / g.oh, i % g.oh);
            let x = &x[image * g.h * g.w * g.c..][..g.h * g.w * g.c];
            for (ox, y) in y.chunks_exact_mut(g.c).enumerate() {
                let mut first = true;
                for iy in self.window(oy, g.h) {
                    for ix in self.window(ox, g.w) {
                        let x = &x[(iy * g.w + ix) * g.c..][..g.c];
                        if std::mem::take(&mut first) {
                            y.copy_from_slice(x);
                        } else {
                            // NaN must win, and stay, or a diverged run would look healthy.
                            let larger = |y: T, x: T| if x <= y || y.to_f64().is_nan() { y } else { x };
                            y.iter_mut().zip(x).for_each(|(y, x)| *y = larger(*y, *x));
                        }
                    }
                }
            }
        });
    }

    fn backward_image<T: Real>(&self, g: Geometry, d_y: &[T], x: &[T], y: &[T], d_x: &mut [T]) {
        for oy in 0..g.oh {
            for ox in 0..g.ow {
                let out = (oy * g.ow + ox) * g.c;
                for c in 0..g.c {
                    let winner = self.window(oy, g.h).flat_map(|iy| self.window(ox, g.w).map(move |ix| (iy, ix)));
                    let mut positions = winner.map(|(iy, ix)| (iy * g.w + ix) * g.c + c);
                    if let Some(position) = positions.find(|&p| x[p] == y[out + c]) {
                        d_x[position] += d_y[out + c];
                    }
                }
            }
        }
    }
}

impl Op for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let g = self.geometry(inputs[0])?;
        Ok(vec![TensorDesc::new([inputs[0].shape.dims()[0], g.oh, g.ow, g.c], inputs[0].dtype)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let inputs = [g.d_output(0)?, g.input(0), g.output(0)];
        g.emit(MaxPoolBackward(*self), &inputs, &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc)?;
        dispatch_real!("max_pool", io.inputs[0].desc.dtype, T => {
            self.forward(g, io.inputs[0].get::<T>(), io.outputs[0].get::<T>());
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::max_pool_forward(self, io)
    }
}

/// d_x of [`MaxPool`]: inputs d_y, x and y; the position of each maximum is found again.
#[derive(Debug, Clone, Copy)]
struct MaxPoolBackward(MaxPool);

impl Op for MaxPoolBackward {
    fn name(&self) -> &'static str {
        "max_pool_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        if inputs[0] != inputs[2] {
            return Err(Error::shape("max_pool_backward", "d_y", inputs[2], inputs[0]));
        }
        Ok(vec![inputs[1].clone()])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.0.geometry(io.inputs[1].desc)?;
        dispatch_real!("max_pool_backward", io.inputs[0].desc.dtype, T => {
            let (d_y, x, y) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>(), io.inputs[2].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            let (image_in, image_out) = (g.h * g.w * g.c, g.oh * g.ow * g.c);
            io.outputs[0].get::<T>().par_chunks_mut(image_in).enumerate().for_each(|(i, d_x)| {
                if !accumulate {
                    d_x.fill(0.0);
                }
                let out = i * image_out..(i + 1) * image_out;
                self.0.backward_image(g, &d_y[out.clone()], &x[i * image_in..][..image_in], &y[out], d_x);
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::max_pool_gradient(&self.0, io)
    }
}

/// Mean over height and width; x: `[n][h][w][c]`, y: `[n][c]`.
#[derive(Debug, Clone, Copy)]
pub struct GlobalAvgPool;

impl Op for GlobalAvgPool {
    fn name(&self) -> &'static str {
        "global_avg_pool"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, _, _, c] = inputs[0].shape.expect("global_avg_pool", "x")?;
        Ok(vec![TensorDesc::new([n, c], inputs[0].dtype)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let [_, h, w, _] = g.tape().desc(g.input(0)).shape.expect("global_avg_pool", "x")?;
        let d_y = g.d_output(0)?;
        g.emit(GlobalAvgPoolBackward { size: [h, w] }, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [_, h, w, c] = io.inputs[0].desc.shape.expect("global_avg_pool", "x")?;
        dispatch_real!("global_avg_pool", io.inputs[0].desc.dtype, T => {
            let x = io.inputs[0].get::<T>();
            io.outputs[0].get::<T>().par_chunks_mut(c).enumerate().for_each(|(i, y)| {
                average_image(&x[i * h * w * c..][..h * w * c], y);
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::average(io)
    }
}

fn average_image<T: Real>(x: &[T], y: &mut [T]) {
    let pixels = x.len() / y.len();
    let mut sums = vec![0.0f64; y.len()];
    for pixel in x.chunks_exact(y.len()) {
        sums.iter_mut().zip(pixel).for_each(|(s, x)| *s += x.to_f64());
    }
    y.iter_mut().zip(sums).for_each(|(y, s)| *y = T::of(s / pixels as f64));
}

/// d_x of [`GlobalAvgPool`]: d_y / (h w) at every pixel.
#[derive(Debug, Clone, Copy)]
struct GlobalAvgPoolBackward {
    size: [usize; 2],
}

impl Op for GlobalAvgPoolBackward {
    fn name(&self) -> &'static str {
        "global_avg_pool_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, c] = inputs[0].shape.expect("global_avg_pool_backward", "d_y")?;
        Ok(vec![TensorDesc::new([n, self.size[0], self.size[1], c], inputs[0].dtype)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let c = io.inputs[0].desc.shape.channels();
        let pixels = self.size[0] * self.size[1];
        dispatch_real!("global_avg_pool_backward", io.inputs[0].desc.dtype, T => {
            let d_y = io.inputs[0].get::<T>();
            let accumulate = io.outputs[0].accumulate;
            io.outputs[0].get::<T>().par_chunks_mut(pixels * c).zip(d_y.par_chunks(c)).for_each(|(d_x, d_y)| {
                for pixel in d_x.chunks_exact_mut(c) {
                    for (d_x, d_y) in pixel.iter_mut().zip(d_y) {
                        let value = d_y / pixels as T;
                        *d_x = if accumulate { *d_x + value } else { value };
                    }
                }
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::average_gradient(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn nan_wins_wherever_it_stands_in_the_window() {
        let op = MaxPool { kernel: 2, stride: 1, padding: 0 };
        let geometry = op.geometry(&TensorDesc::new([1, 2, 2, 2], DType::F32)).unwrap();
        for position in 0..4 {
            let mut x = [3.0f32, -1.0, 2.0, -2.0, 5.0, -7.0, 4.0, -3.0];
            x[2 * position] = f32::NAN;
            let mut y = [0.0; 2];
            op.forward(geometry, &x, &mut y);
            assert!(y[0].is_nan() && y[1] == -1.0, "NaN at {position}: {y:?}");
        }
    }
}
