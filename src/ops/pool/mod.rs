//! Max pooling and global average pooling over NHWC, with their gradients.

pub(super) mod cuda;

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::{DType, TensorDesc};

/// What is written in the place of a position where a window's gradient goes nowhere.
pub(in crate::ops) const NONE: u8 = u8::MAX;

/// Max pooling; x: `[n][h][w][c]`, y: `[n][oh][ow][c]`. Padding never wins, NaN always does.
///
/// With `taken` there is a second output, a byte for each element of y: the position in its window, row by row, that the
/// gradient goes to, which is the first of the maxima as in PyTorch, or 255 for none, where y is NaN. The gradient reads
/// nothing else.
#[derive(Debug, Clone, Copy)]
pub struct MaxPool {
    /// Window height and width.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Padding on every side; at most half the kernel.
    pub padding: usize,
    /// Whether to write what was taken, without which there is no gradient.
    pub taken: bool,
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

    /// The positions of the window at output position `o` of an axis that lie within its `size`, each with where that is.
    fn window(&self, o: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
        let start = o * self.stride;
        let inside = self.padding.saturating_sub(start)..self.kernel.min(size + self.padding - start);
        let padding = self.padding;
        inside.map(move |within| (within, start + within - padding))
    }

    /// The windows of an axis with so many that position `i` lies in.
    fn windows_over(&self, i: usize, windows: usize) -> std::ops::Range<usize> {
        let padded = i + self.padding;
        (padded + self.stride).saturating_sub(self.kernel) / self.stride..(padded / self.stride + 1).min(windows)
    }

    fn forward<T: Real>(&self, g: Geometry, x: &[T], y: &mut [T], taken: Option<&mut [u8]>) {
        let row = g.ow * g.c;
        match taken {
            Some(taken) => y
                .par_chunks_mut(row)
                .zip(taken.par_chunks_mut(row))
                .enumerate()
                .for_each(|(i, (y, taken))| self.forward_row(g, i, x, y, Some(taken))),
            None => y.par_chunks_mut(row).enumerate().for_each(|(i, y)| self.forward_row(g, i, x, y, None)),
        }
    }

    /// Row `i` of y, counted through all images.
    fn forward_row<T: Real>(&self, g: Geometry, i: usize, x: &[T], y: &mut [T], mut taken: Option<&mut [u8]>) {
        let (image, oy) = (i / g.oh, i % g.oh);
        let x = &x[image * g.h * g.w * g.c..][..g.h * g.w * g.c];
        for (ox, y) in y.chunks_exact_mut(g.c).enumerate() {
            let mut taken = taken.as_mut().map(|taken| &mut taken[ox * g.c..][..g.c]);
            y.fill(T::of(f64::NEG_INFINITY));
            let mut first = true;
            for (ky, iy) in self.window(oy, g.h) {
                for (kx, ix) in self.window(ox, g.w) {
                    let x = &x[(iy * g.w + ix) * g.c..][..g.c];
                    if let Some(taken) = &mut taken {
                        let position = (ky * self.kernel + kx) as u8;
                        match std::mem::take(&mut first) {
                            true => taken.fill(position), // where all is -infinity nothing is greater
                            false => mark(taken, position, x, y),
                        }
                    }
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = if wins(*x, *y) { *x } else { *y });
                }
            }
            if let Some(taken) = taken {
                let nan = |y: T| u8::from(y.to_f64().is_nan()).wrapping_neg();
                taken.iter_mut().zip(y).for_each(|(taken, y)| *taken |= NONE & nan(*y));
            }
        }
    }
}

/// Whether x takes the place of y, the maximum so far. NaN must win, and stay, or a diverged run would look healthy.
fn wins<T: Real>(x: T, y: T) -> bool {
    !(x <= y || y.to_f64().is_nan())
}

/// Notes `position` where x takes the place of y. Without a branch, which would be guessed wrong, and in a loop of its own: in
/// one with the maxima neither is vectorised.
fn mark<T: Real>(taken: &mut [u8], position: u8, x: &[T], y: &[T]) {
    for ((taken, x), y) in taken.iter_mut().zip(x).zip(y) {
        let mask = u8::from(wins(*x, *y)).wrapping_neg();
        *taken = position & mask | *taken & !mask;
    }
}

/// Which position of each window the gradient goes to.
pub(in crate::ops) struct Taken<'a> {
    pooling: MaxPool,
    geometry: Geometry,
    taken: &'a [u8],
}

impl<'a> Taken<'a> {
    /// What `pooling` took of `x`.
    pub fn new(pooling: MaxPool, x: &TensorDesc, taken: &'a [u8]) -> Result<Taken<'a>> {
        Ok(Taken { pooling, geometry: pooling.geometry(x)?, taken })
    }

    /// Adds to d_x, of the pixel `number` through all images, d_y of the windows that took it.
    pub fn add<T: Real>(&self, d_x: &mut [T], d_y: &[T], number: usize) {
        let (MaxPool { kernel, stride, padding, .. }, Geometry { h, w, c, oh, ow }) = (self.pooling, self.geometry);
        let (image, iy, ix) = (number / (h * w), number / w % h, number % w);
        for oy in self.pooling.windows_over(iy, oh) {
            for ox in self.pooling.windows_over(ix, ow) {
                let here = ((iy + padding - oy * stride) * kernel + ix + padding - ox * stride) as u8;
                let window = ((image * oh + oy) * ow + ox) * c;
                let (d_y, taken) = (&d_y[window..][..c], &self.taken[window..][..c]);
                for ((d_x, d_y), taken) in d_x.iter_mut().zip(d_y).zip(taken) {
                    *d_x += d_y.when(*taken == here);
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
        if self.taken && self.kernel * self.kernel > NONE.into() {
            let what = format!("the gradient of a max_pool of {0}x{0} windows, expected at most 15x15", self.kernel);
            return Err(Error::Unsupported { what, hint: None });
        }
        let y = TensorDesc::new([inputs[0].shape.dims()[0], g.oh, g.ow, g.c], inputs[0].dtype);
        let taken = self.taken.then(|| TensorDesc { dtype: DType::U8, ..y.clone() });
        Ok([y].into_iter().chain(taken).collect())
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        if !self.taken {
            let what = "the gradient of a max_pool that does not write what it takes".into();
            return Err(Error::Unsupported { what, hint: None });
        }
        let [_, h, w, _] = g.tape().desc(g.input(0)).shape.expect("max_pool", "x")?;
        let inputs = [g.d_output(0)?, g.output(1)];
        g.emit(MaxPoolBackward { pooling: *self, size: [h, w] }, &inputs, &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc)?;
        dispatch_real!("max_pool", io.inputs[0].desc.dtype, T => {
            let (y, taken) = io.outputs.split_at_mut(1);
            let taken = taken.first_mut().map(|taken| taken.get::<u8>());
            self.forward(g, io.inputs[0].get::<T>(), y[0].get::<T>(), taken);
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::max_pool_forward(self, io)
    }
}

/// d_x of [`MaxPool`]: inputs d_y and what was taken.
#[derive(Debug, Clone, Copy)]
struct MaxPoolBackward {
    pooling: MaxPool,
    /// Height and width of x.
    size: [usize; 2],
}

impl Op for MaxPoolBackward {
    fn name(&self) -> &'static str {
        "max_pool_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (d_y, taken) = (inputs[0], inputs[1]);
        if d_y.shape != taken.shape {
            return Err(Error::shape("max_pool_backward", "d_y", &taken.shape, &d_y.shape));
        }
        let ([n, _, _, c], [h, w]) = (d_y.shape.expect("max_pool_backward", "d_y")?, self.size);
        Ok(vec![TensorDesc::new([n, h, w, c], d_y.dtype)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let taken = Taken::new(self.pooling, io.outputs[0].desc, io.inputs[1].get::<u8>())?;
        dispatch_real!("max_pool_backward", io.inputs[0].desc.dtype, T => {
            let (d_y, accumulate) = (io.inputs[0].get::<T>(), io.outputs[0].accumulate);
            let Geometry { w, c, .. } = taken.geometry;
            io.outputs[0].get::<T>().par_chunks_mut(w * c).enumerate().for_each(|(row, d_x)| {
                if !accumulate {
                    d_x.fill(T::ZERO);
                }
                d_x.chunks_exact_mut(c).enumerate().for_each(|(ix, d_x)| taken.add(d_x, d_y, row * w + ix));
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::max_pool_gradient(&self.pooling, io)
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
    use crate::graph::{Role, Tape, backward};

    #[test]
    fn nan_wins_wherever_it_stands_in_the_window() {
        let op = MaxPool { kernel: 2, stride: 1, padding: 0, taken: false };
        let geometry = op.geometry(&TensorDesc::new([1, 2, 2, 2], DType::F32)).unwrap();
        for position in 0..4 {
            let mut x = [3.0f32, -1.0, 2.0, -2.0, 5.0, -7.0, 4.0, -3.0];
            x[2 * position] = f32::NAN;
            let mut y = [0.0; 2];
            op.forward(geometry, &x, &mut y, None);
            assert!(y[0].is_nan() && y[1] == -1.0, "NaN at {position}: {y:?}");
        }
    }
    #[test]
    fn a_byte_has_room_for_15_x_15_positions() {
        let x = TensorDesc::new([1, 16, 16, 3], DType::F32);
        let infer = |kernel, taken| MaxPool { kernel, stride: 1, padding: 0, taken }.infer(&[&x]);
        assert_eq!(infer(15, true).unwrap()[1], TensorDesc::new([1, 2, 2, 3], DType::U8));
        assert_eq!(infer(16, false).unwrap(), [TensorDesc::new([1, 1, 1, 3], DType::F32)]);
        let message = infer(16, true).unwrap_err().to_string();
        assert!(message.contains("the gradient of a max_pool of 16x16 windows, expected at most 15x15"), "{message}");
    }

    #[test]
    fn what_is_not_written_cannot_be_differentiated() {
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new([1, 4, 4, 2], DType::F32), Role::Input, true);
        let y = tape.record_one(MaxPool { kernel: 2, stride: 2, padding: 0, taken: false }, &[x]).unwrap();
        let d_y = tape.leaf("d_y", tape.desc(y).clone(), Role::Input, false);
        let message = backward(&mut tape, &[(y, d_y)]).unwrap_err().to_string();
        assert!(message.contains("a max_pool that does not write what it takes"), "{message}");
    }
}
