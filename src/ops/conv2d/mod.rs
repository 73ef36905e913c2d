//! 2-D convolution over NHWC, weights `[c_out][kh][kw][c_in]`, and its two gradients.

pub mod direct;
pub mod reference;
pub mod stem;

use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::{CpuIo, Real, Tier};
use crate::backend::cuda::CudaIo;
use crate::backend::cuda::library::{Convolution, Direction, Work};
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op};
use crate::tensor::{DType, TensorDesc};

use stem::Stem;

/// `y = conv(x, w)`; x: `[n][h][w][c_in]`, w: `[c_out][kh][kw][c_in]`, y: `[n][oh][ow][c_out]`. No bias: a batch norm follows.
#[derive(Debug, Clone, Copy)]
pub struct Conv2d {
    /// Stride, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zero padding on both sides, vertical and horizontal.
    pub padding: [usize; 2],
}

impl Conv2d {
    fn geometry(&self, x: &TensorDesc, w: &TensorDesc) -> Result<ConvGeometry> {
        let [n, h, width, c_in] = x.shape.expect("conv2d", "x")?;
        let [c_out, kh, kw, w_in] = w.shape.expect("conv2d", "w")?;
        if w_in != c_in {
            return Err(Error::shape("conv2d", "input channels of w", c_in, w_in));
        }
        if x.dtype != w.dtype {
            return Err(Error::shape("conv2d", "element type of w", x.dtype, w.dtype));
        }
        if h + 2 * self.padding[0] < kh || width + 2 * self.padding[1] < kw || self.stride.contains(&0) {
            let expected = format!("at least the kernel, {kh}x{kw}, with padding {:?} and stride >= 1", self.padding);
            return Err(Error::shape("conv2d", "height and width of x", expected, format!("{h}x{width}")));
        }
        let (stride, padding) = (self.stride, self.padding);
        Ok(ConvGeometry { n, h, w: width, c_in, c_out, kernel: [kh, kw], stride, padding })
    }
}

impl Op for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let g = self.geometry(inputs[0], inputs[1])?;
        Ok(vec![TensorDesc::new([g.n, g.oh(), g.ow(), g.c_out], inputs[0].dtype)])
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let (x, w, d_y) = (g.input(0), g.input(1), g.d_output(0)?);
        if g.needs(1) {
            let kernel = g.tape().desc(w).shape.expect::<4>("conv2d", "w")?;
            g.emit(Conv2dWgrad { forward: *self, kernel: [kernel[1], kernel[2]] }, &[x, d_y], &[Some(1)])?;
        }
        if g.needs(0) {
            let [_, h, width, _] = g.tape().desc(x).shape.expect("conv2d", "x")?;
            g.emit(Conv2dDgrad { forward: *self, size: [h, width] }, &[d_y, w], &[Some(0)])?;
        }
        Ok(())
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let (geometry, dtype) = (self.geometry(inputs[0], inputs[1]).ok()?, inputs[0].dtype);
        let work = Work::Convolution(Convolution { direction: Direction::Forward, geometry, dtype });
        Stem::of(&geometry, dtype).is_none().then_some(work)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        Stem::of(&g, io.dtype()).ok_or_else(|| left_to_a_library(self.name()))?.forward(io)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!("conv2d", io.inputs[0].desc.dtype, T => {
            let (x, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let y = io.outputs[0].get::<T>();
            match io.tier {
                Tier::Reference => reference::forward(&g, x, w, y),
                Tier::Direct => direct::forward(&g, x, w, y),
            }
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.geometry(inputs[0], inputs[1]).map_or(0, |g| g.flops())
    }
}

/// The gradient of [`Conv2d`]'s input: inputs d_y and w, output d_x.
#[derive(Debug, Clone, Copy)]
struct Conv2dDgrad {
    forward: Conv2d,
    /// Height and width of x, which d_y does not determine when the stride is not 1.
    size: [usize; 2],
}

impl Conv2dDgrad {
    fn geometry(&self, d_y: &TensorDesc, w: &TensorDesc) -> Result<ConvGeometry> {
        let n = d_y.shape.expect::<4>("conv2d_dgrad", "d_y")?[0];
        let c_in = w.shape.expect::<4>("conv2d_dgrad", "w")?[3];
        self.forward.geometry(&TensorDesc::new([n, self.size[0], self.size[1], c_in], d_y.dtype), w)
    }
}

impl Op for Conv2dDgrad {
    fn name(&self) -> &'static str {
        "conv2d_dgrad"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let g = self.geometry(inputs[0], inputs[1])?;
        let expected = TensorDesc::new([g.n, g.oh(), g.ow(), g.c_out], inputs[0].dtype);
        if *inputs[0] != expected {
            return Err(Error::shape("conv2d_dgrad", "d_y", expected, inputs[0]));
        }
        Ok(vec![TensorDesc::new([g.n, g.h, g.w, g.c_in], inputs[0].dtype)])
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let geometry = self.geometry(inputs[0], inputs[1]).ok()?;
        Some(Work::Convolution(Convolution { direction: Direction::DataGradient, geometry, dtype: inputs[0].dtype }))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!("conv2d_dgrad", io.inputs[0].desc.dtype, T => {
            let (d_y, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            let d_x = io.outputs[0].get::<T>();
            match io.tier {
                Tier::Reference => reference::dgrad(&g, d_y, w, d_x, accumulate),
                Tier::Direct => direct::dgrad(&g, d_y, w, d_x, accumulate),
            }
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.geometry(inputs[0], inputs[1]).map_or(0, |g| g.flops())
    }
}

/// The gradient of [`Conv2d`]'s weight: inputs x and d_y, output d_w, in float32 whenever the activations are shorter.
#[derive(Debug, Clone, Copy)]
struct Conv2dWgrad {
    forward: Conv2d,
    kernel: [usize; 2],
}

impl Conv2dWgrad {
    fn geometry(&self, x: &TensorDesc, d_y: &TensorDesc) -> Result<ConvGeometry> {
        let c_in = x.shape.expect::<4>("conv2d_wgrad", "x")?[3];
        let c_out = d_y.shape.expect::<4>("conv2d_wgrad", "d_y")?[3];
        self.forward.geometry(x, &TensorDesc::new([c_out, self.kernel[0], self.kernel[1], c_in], x.dtype))
    }

    fn workspace_bytes<T: Real>(g: &ConvGeometry) -> usize {
        reference::wgrad_workspace(g).max(direct::wgrad_workspace(g)) * size_of::<T>()
    }
}

impl Op for Conv2dWgrad {
    fn name(&self) -> &'static str {
        "conv2d_wgrad"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let g = self.geometry(inputs[0], inputs[1])?;
        let expected = TensorDesc::new([g.n, g.oh(), g.ow(), g.c_out], inputs[0].dtype);
        if *inputs[1] != expected {
            return Err(Error::shape("conv2d_wgrad", "d_y", expected, inputs[1]));
        }
        Ok(vec![TensorDesc::new([g.c_out, g.kernel[0], g.kernel[1], g.c_in], gradient_dtype(inputs[0].dtype))])
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        let Ok(g) = self.geometry(inputs[0], inputs[1]) else { return 0 };
        match inputs[0].dtype {
            DType::F64 => Self::workspace_bytes::<f64>(&g),
            _ => Self::workspace_bytes::<f32>(&g),
        }
    }

    fn accumulates(&self) -> bool {
        true
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let (geometry, dtype) = (self.geometry(inputs[0], inputs[1]).ok()?, inputs[0].dtype);
        let work = Work::Convolution(Convolution { direction: Direction::WeightGradient, geometry, dtype });
        Stem::of(&geometry, dtype).is_none().then_some(work)
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        let stem = self.geometry(inputs[0], inputs[1]).ok().and_then(|g| Stem::of(&g, inputs[0].dtype));
        stem.map_or(0, |stem| stem.workspace())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        Stem::of(&g, io.dtype()).ok_or_else(|| left_to_a_library(self.name()))?.weight_gradient(io)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!("conv2d_wgrad", io.inputs[0].desc.dtype, T => {
            let (x, d_y) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let accumulate = io.outputs[0].accumulate;
            let d_w = io.outputs[0].get::<T>();
            let workspace = bytemuck::cast_slice_mut(io.workspace);
            match io.tier {
                Tier::Reference => reference::wgrad(&g, x, d_y, d_w, accumulate, workspace),
                Tier::Direct => direct::wgrad(&g, x, d_y, d_w, accumulate, workspace),
            }
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.geometry(inputs[0], inputs[1]).map_or(0, |g| g.flops())
    }
}

fn left_to_a_library(op: &str) -> Error {
    Error::Unsupported { what: format!("{op} of these sizes has no CUDA kernel: cuDNN computes it"), hint: None }
}

/// Weight gradients are never shorter than float32.
pub fn gradient_dtype(activations: DType) -> DType {
    if activations == DType::F64 { DType::F64 } else { DType::F32 }
}
