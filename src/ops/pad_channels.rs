//! More channels, all zero: convolutions on CUDA want a multiple of 8, and an image has 3.

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::TensorDesc;

/// `y[.., c] = x[.., c]` for the channels that x has, 0 for the others up to `channels`. Pads an image, and as well the
/// weights `[c_out][kh][kw][c_in]` of the convolution over it.
#[derive(Debug, Clone, Copy)]
pub struct PadChannels {
    /// Channels of y.
    pub channels: usize,
}

fn with_channels(desc: &TensorDesc, channels: usize) -> TensorDesc {
    let mut dims = desc.shape.dims().to_vec();
    if let Some(innermost) = dims.last_mut() {
        *innermost = channels;
    }
    TensorDesc::new(&dims[..], desc.dtype)
}

impl Op for PadChannels {
    fn name(&self) -> &'static str {
        "pad_channels"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        if inputs[0].shape.rank() == 0 || inputs[0].shape.channels() > self.channels {
            let expected = format!("1 to {} channels", self.channels);
            return Err(Error::shape("pad_channels", "x", expected, inputs[0]));
        }
        Ok(vec![with_channels(inputs[0], self.channels)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let channels = g.tape().desc(g.input(0)).shape.channels();
        let d_y = g.d_output(0)?;
        g.emit(PadChannelsBackward { channels }, &[d_y], &[Some(0)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let row_bytes = |desc: &TensorDesc| (desc.shape.channels() * desc.dtype.size()).max(1);
        let (from, to) = (row_bytes(io.inputs[0].desc), row_bytes(io.outputs[0].desc));
        for (y, x) in io.outputs[0].bytes.chunks_exact_mut(to).zip(io.inputs[0].bytes.chunks_exact(from)) {
            let (copied, added) = y.split_at_mut(from);
            copied.copy_from_slice(x);
            added.fill(0); // zero in every element type
        }
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::forward(io)
    }
}

/// d_x of [`PadChannels`]: the first `channels` of d_y.
#[derive(Debug, Clone, Copy)]
struct PadChannelsBackward {
    channels: usize,
}

impl Op for PadChannelsBackward {
    fn name(&self) -> &'static str {
        "pad_channels_backward"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        if inputs[0].shape.rank() == 0 || inputs[0].shape.channels() < self.channels {
            let expected = format!("at least {} channels", self.channels);
            return Err(Error::shape("pad_channels_backward", "d_y", expected, inputs[0]));
        }
        Ok(vec![with_channels(inputs[0], self.channels)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let padded = io.inputs[0].desc.shape.channels().max(1);
        dispatch_real!("pad_channels_backward", io.inputs[0].desc.dtype, T => {
            let d_y = io.inputs[0].get::<T>();
            let accumulate = io.outputs[0].accumulate;
            let d_x = io.outputs[0].get::<T>();
            for (d_x, d_y) in d_x.chunks_exact_mut(self.channels.max(1)).zip(d_y.chunks_exact(padded)) {
                for (d_x, d_y) in d_x.iter_mut().zip(d_y) {
                    *d_x = if accumulate { *d_x + d_y } else { *d_y };
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::backward(io)
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;

    kernels! { "layout";
        /// y = x with zeros after its channels
        fn pad_channels[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, rows: i64, channels: i32, padded: i32);
        /// d_x = the first channels of d_y, or added
        fn pad_channels_backward[F32, Bf16, F16; 256](
            d_y: DevicePtr, d_x: DevicePtr, rows: i64, channels: i32, padded: i32, accumulate: i32,
        );
    }

    pub fn forward(io: &CudaIo<'_>) -> Result<()> {
        let (x, y) = (io.inputs[0].desc, io.outputs[0].desc);
        let (channels, padded) = (x.shape.channels() as i32, y.shape.channels() as i32);
        let (from, to) = (io.inputs[0].ptr, io.outputs[0].ptr);
        let call = pad_channels(io.dtype(), from, to, y.shape.rows() as i64, channels, padded);
        // SAFETY: `infer` made y of as many rows as x, with at least its channels.
        unsafe { io.launch(Grid::packs(y.shape.len(), io.dtype()), call) }
    }

    pub fn backward(io: &CudaIo<'_>) -> Result<()> {
        let (d_y, d_x) = (&io.inputs[0], &io.outputs[0]);
        let (channels, padded) = (d_x.desc.shape.channels() as i32, d_y.desc.shape.channels() as i32);
        let (rows, accumulate) = (d_y.desc.shape.rows() as i64, i32::from(d_x.accumulate));
        let call = pad_channels_backward(io.dtype(), d_y.ptr, d_x.ptr, rows, channels, padded, accumulate);
        // SAFETY: `infer` checked that d_y has at least d_x's channels, and made d_x of as many rows.
        unsafe { io.launch(Grid::stride(d_x.desc.shape.len(), 256), call) }
    }
}
