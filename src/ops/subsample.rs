//! The pixels that a strided 1x1 convolution reads: every so many rows and columns of images.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tensors, Traffic};
use crate::tensor::TensorDesc;

/// `y[n, i, j] = x[n, stride i, stride j]`; x `[n, h, w, c]`, y `[n, ceil(h / stride), ceil(w / stride), c]`.
#[derive(Debug, Clone, Copy)]
pub struct Subsample {
    /// Pixels from one that is taken to the next, in both directions.
    pub stride: usize,
}

impl Op for Subsample {
    fn name(&self) -> &'static str {
        "subsample"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, h, w, c] = inputs[0].shape.expect("subsample", "x")?;
        if self.stride == 0 {
            return Err(Error::shape("subsample", "stride", "at least 1", 0));
        }
        Ok(vec![TensorDesc::new([n, h.div_ceil(self.stride), w.div_ceil(self.stride), c], inputs[0].dtype)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let [_, h, w, _] = g.tape().desc(g.input(0)).shape.expect("subsample", "x")?;
        let d_y = g.d_output(0)?;
        g.emit(SubsampleBackward { stride: self.stride, size: [h, w] }, &[d_y], &[Some(0)])
    }

    /// Only the pixels that are taken.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let taken = tensors.outputs[0].0.bytes() as u64;
        Traffic { read: taken, written: taken }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let grid = Grid::of(io.inputs[0].desc, self.stride)?;
        dispatch_real!("subsample", io.inputs[0].desc.dtype, T => {
            let (x, y) = (io.inputs[0].get::<T>(), io.outputs[0].get::<T>());
            grid.for_rows(y, |pixel, y| y.copy_from_slice(&x[pixel..][..grid.channels]));
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io, self.stride)
    }
}

/// d_x of [`Subsample`]: d_y at the pixels that were taken, 0 at all others; added, it touches the former alone.
#[derive(Debug, Clone, Copy)]
struct SubsampleBackward {
    stride: usize,
    /// Height and width of x.
    size: [usize; 2],
}

impl Op for SubsampleBackward {
    fn name(&self) -> &'static str {
        "subsample_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, oh, ow, c] = inputs[0].shape.expect("subsample_backward", "d_y")?;
        let [h, w] = self.size;
        if [oh, ow] != self.size.map(|side| side.div_ceil(self.stride)) {
            let expected = format!("every {} of {h}x{w}", self.stride);
            return Err(Error::shape("subsample_backward", "height and width of d_y", expected, format!("{oh}x{ow}")));
        }
        Ok(vec![TensorDesc::new([n, h, w, c], inputs[0].dtype)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let taken = tensors.inputs[0].bytes() as u64;
        match tensors.accumulates(0) {
            true => Traffic { read: 2 * taken, written: taken },
            false => tensors.once(),
        }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let grid = Grid::of(io.outputs[0].desc, self.stride)?;
        let accumulate = io.outputs[0].accumulate;
        dispatch_real!("subsample_backward", io.inputs[0].desc.dtype, T => {
            let d_y = io.inputs[0].get::<T>();
            let d_x = io.outputs[0].get::<T>();
            if !accumulate {
                d_x.fill(T::ZERO);
            }
            grid.scatter(d_x, d_y);
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(io, self.stride)
    }
}

/// Images whose pixels are taken.
#[derive(Debug, Clone, Copy)]
struct Grid {
    height: usize,
    width: usize,
    channels: usize,
    stride: usize,
}

impl Grid {
    fn of(x: &TensorDesc, stride: usize) -> Result<Grid> {
        let [_, height, width, channels] = x.shape.expect("subsample", "x")?;
        Ok(Grid { height, width, channels, stride })
    }

    /// Elements of a row of pixels of y.
    fn row(&self) -> usize {
        self.width.div_ceil(self.stride) * self.channels
    }

    /// First element in x of pixel `j` of row `row` of y, counted through all images.
    fn pixel(&self, row: usize, j: usize) -> usize {
        let rows = self.height.div_ceil(self.stride);
        ((row / rows * self.height + row % rows * self.stride) * self.width + j * self.stride) * self.channels
    }

    /// Calls `f` with the place in x and the channels of every pixel of y.
    fn for_rows<T: Real>(&self, y: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
        y.par_chunks_mut(self.row()).enumerate().for_each(|(row, y)| {
            y.chunks_exact_mut(self.channels).enumerate().for_each(|(j, y)| f(self.pixel(row, j), y));
        });
    }

    /// Adds the pixels of y to those of x they come from.
    fn scatter<T: Real>(&self, x: &mut [T], y: &[T]) {
        let image = self.height.div_ceil(self.stride) * self.row();
        x.par_chunks_mut(self.height * self.width * self.channels).zip(y.par_chunks(image)).for_each(|(x, y)| {
            for (row, y) in y.chunks_exact(self.row()).enumerate() {
                for (j, y) in y.chunks_exact(self.channels).enumerate() {
                    let x = &mut x[self.pixel(row, j)..][..self.channels];
                    x.iter_mut().zip(y).for_each(|(x, y)| *x += *y);
                }
            }
        });
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;

    kernels! { "subsample";
        /// y = every so many pixels of x
        fn subsample[F32, Bf16, F16; 256](
            x: DevicePtr, y: DevicePtr, images: i64, height: i32, width: i32, channels: i32, stride: i32,
        );
        /// d_x = d_y at the pixels that were taken, else 0; or added to them
        fn subsample_backward[F32, Bf16, F16; 256](
            d_y: DevicePtr, d_x: DevicePtr, images: i64, height: i32, width: i32, channels: i32, stride: i32,
            accumulate: i32,
        );
    }

    pub fn forward(io: &CudaIo<'_>, stride: usize) -> Result<()> {
        let (x, y) = (&io.inputs[0], &io.outputs[0]);
        let [n, h, w, c] = x.desc.shape.expect("subsample", "x")?;
        let call = subsample(io.dtype(), x.ptr, y.ptr, n as i64, h as i32, w as i32, c as i32, stride as i32);
        // SAFETY: `infer` made y of the pixels of x that are taken.
        unsafe { io.launch(Grid::packs(y.desc.shape.len(), io.dtype()), call) }
    }

    pub fn backward(io: &CudaIo<'_>, stride: usize) -> Result<()> {
        let (d_y, d_x) = (&io.inputs[0], &io.outputs[0]);
        let [n, h, w, c] = d_x.desc.shape.expect("subsample_backward", "d_x")?;
        let [height, width, channels, stride] = [h, w, c, stride].map(|n| n as i32);
        let accumulate = i32::from(d_x.accumulate);
        let call =
            subsample_backward(io.dtype(), d_y.ptr, d_x.ptr, n as i64, height, width, channels, stride, accumulate);
        // SAFETY: `infer` checked that d_y has the pixels of d_x that are taken.
        unsafe { io.launch(Grid::packs(d_x.desc.shape.len(), io.dtype()), call) }
    }
}
