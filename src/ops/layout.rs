//! Between NCHW in float32, as images come from elsewhere, and NHWC in the activations' type, with channels added or left out
//! on the way. The two ops are each other's gradient.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::{DType, TensorDesc};

/// x: `[n][c][h][w]` in float32 (float64 when `to` is that), y: `[n][h][w][channels]` with zeros in the channels that x does
/// not have.
#[derive(Debug, Clone, Copy)]
pub struct NchwToNhwc {
    /// Channels of y.
    pub channels: usize,
    /// Element type of y.
    pub to: DType,
}

/// x: `[n][h][w][c]`, y: `[n][channels][h][w]` in float32 (float64 when x is that); x's channels behind those are left out.
#[derive(Debug, Clone, Copy)]
pub struct NhwcToNchw {
    /// Channels of y.
    pub channels: usize,
}

impl Op for NchwToNhwc {
    fn name(&self) -> &'static str {
        "nchw_to_nhwc"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, c, h, w] = inputs[0].shape.expect("nchw_to_nhwc", "x")?;
        let expected = TensorDesc::new([n, c, h, w], gradient_dtype(self.to));
        if *inputs[0] != expected || c > self.channels || !is_float(self.to) {
            let expected = format!("{expected} with at most {} channels", self.channels);
            return Err(Error::shape("nchw_to_nhwc", "x", expected, format!("{} to {}", inputs[0], self.to)));
        }
        Ok(vec![TensorDesc::new([n, h, w, self.channels], self.to)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let channels = g.tape().desc(g.input(0)).shape.dims()[1];
        let d_y = g.d_output(0)?;
        g.emit(NhwcToNchw { channels }, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [_, channels, h, w] = io.inputs[0].desc.shape.expect("nchw_to_nhwc", "x")?;
        let image = Image { pixels: h * w, channels, padded: self.channels };
        let (x, y) = (&io.inputs[0], &mut io.outputs[0]);
        match self.to {
            DType::F64 => image.to_nhwc(x.get(), y.get(), |v: f64| v),
            DType::Bf16 => image.to_nhwc(x.get(), y.get(), |v| bf16::from_f32(v).to_bits()),
            DType::F16 => image.to_nhwc(x.get(), y.get(), |v| f16::from_f32(v).to_bits()),
            _ => image.to_nhwc(x.get(), y.get(), |v: f32| v),
        }
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::to_nhwc(io)
    }
}

impl Op for NhwcToNchw {
    fn name(&self) -> &'static str {
        "nhwc_to_nchw"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [n, h, w, c] = inputs[0].shape.expect("nhwc_to_nchw", "x")?;
        if c < self.channels || !is_float(inputs[0].dtype) {
            let expected = format!("floats in at least {} channels", self.channels);
            return Err(Error::shape("nhwc_to_nchw", "x", expected, inputs[0]));
        }
        Ok(vec![TensorDesc::new([n, self.channels, h, w], gradient_dtype(inputs[0].dtype))])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let x = g.tape().desc(g.input(0));
        let op = NchwToNhwc { channels: x.shape.channels(), to: x.dtype };
        let d_y = g.d_output(0)?;
        g.emit(op, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [_, h, w, padded] = io.inputs[0].desc.shape.expect("nhwc_to_nchw", "x")?;
        let image = Image { pixels: h * w, channels: self.channels, padded };
        let (x, y) = (&io.inputs[0], &mut io.outputs[0]);
        dispatch_real!("nhwc_to_nchw", x.desc.dtype, T => image.to_nchw(x.get::<T>(), y.get::<T>()));
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::to_nchw(io)
    }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::Bf16 | DType::F16)
}

/// One image in both layouts: `[channels][pixels]` and `[pixels][padded]`.
#[derive(Clone, Copy)]
struct Image {
    pixels: usize,
    channels: usize,
    padded: usize,
}

impl Image {
    fn to_nhwc<X: Copy + Sync, Y: bytemuck::Pod + Send>(self, x: &[X], y: &mut [Y], f: impl Fn(X) -> Y + Sync) {
        let Image { pixels, channels, padded } = self;
        let images = y.par_chunks_exact_mut((pixels * padded).max(1));
        images.zip(x.par_chunks_exact((pixels * channels).max(1))).for_each(|(y, x)| {
            for (p, y) in y.chunks_exact_mut(padded).enumerate() {
                let value = |c| if c < channels { f(x[c * pixels + p]) } else { Y::zeroed() };
                y.iter_mut().enumerate().for_each(|(c, y)| *y = value(c));
            }
        });
    }

    fn to_nchw<T: Copy + Send + Sync>(self, x: &[T], y: &mut [T]) {
        let Image { pixels, channels, padded } = self;
        let images = y.par_chunks_exact_mut((pixels * channels).max(1));
        images.zip(x.par_chunks_exact((pixels * padded).max(1))).for_each(|(y, x)| {
            for (c, y) in y.chunks_exact_mut(pixels).enumerate() {
                y.iter_mut().enumerate().for_each(|(p, y)| *y = x[p * padded + c]);
            }
        });
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::tensor::TensorDesc;

    kernels! { "layout";
        /// y = x with channels innermost, padded with zeros
        fn nchw_to_nhwc[F32, Bf16, F16; 256](
            x: DevicePtr, y: DevicePtr, images: i64, pixels: i64, channels: i32, padded: i32,
        );
        /// y = the first channels of x, outermost in each image
        fn nhwc_to_nchw[F32, Bf16, F16; 256](
            x: DevicePtr, y: DevicePtr, images: i64, pixels: i64, channels: i32, padded: i32,
        );
    }

    /// Elements and channels of a tile, as in kernels/layout.cu.
    const TILE: usize = 1024;
    const TILE_CHANNELS: usize = 32;

    /// Tiles of pixels, tiles of channels, images.
    fn grid(nhwc: [usize; 4]) -> Grid {
        let [images, h, w, channels] = nhwc.map(|dim| dim.max(1));
        let tile = channels.min(TILE_CHANNELS);
        let blocks = [(h * w).div_ceil(TILE / tile), channels.div_ceil(tile), images.min(65_535)];
        Grid::new(blocks.map(|blocks| blocks as u32))
    }

    fn dims(desc: &TensorDesc) -> Result<[usize; 4]> {
        desc.shape.expect("layout", "image")
    }

    pub fn to_nhwc(io: &CudaIo<'_>) -> Result<()> {
        let (x, y) = (&io.inputs[0], &io.outputs[0]);
        let ([n, c, h, w], nhwc) = (dims(x.desc)?, dims(y.desc)?);
        let call = nchw_to_nhwc(y.desc.dtype, x.ptr, y.ptr, n as i64, (h * w) as i64, c as i32, nhwc[3] as i32);
        // SAFETY: `infer` checked that x is float32 and made y of as many images and pixels, with at least x's channels.
        unsafe { io.launch(grid(nhwc), call) }
    }

    pub fn to_nchw(io: &CudaIo<'_>) -> Result<()> {
        let (x, y) = (&io.inputs[0], &io.outputs[0]);
        let (nhwc, [n, c, h, w]) = (dims(x.desc)?, dims(y.desc)?);
        let call = nhwc_to_nchw(x.desc.dtype, x.ptr, y.ptr, n as i64, (h * w) as i64, c as i32, nhwc[3] as i32);
        // SAFETY: `infer` made y float32, of as many images and pixels as x, and checked that x has at least its channels.
        unsafe { io.launch(grid(nhwc), call) }
    }
}
