//! 2-D convolution over NHWC, weights `[c_out][kh][kw][c_in]`, and its two gradients.

pub mod direct;
pub mod reference;
pub mod stem;

use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::{CpuIo, Real, Tier};
use crate::backend::cuda::CudaIo;
use crate::backend::cuda::library::{Convolution, Direction, Fused, Work};
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{GradBuilder, Op, Tensors, Traffic, ValueId};
use crate::ops::batch_norm::sums::{group_sums, workspace_bytes};
use crate::tensor::{DType, TensorDesc};

use stem::Stem;

/// How the gradient of a convolution's input joins one that is there already: that of a residual branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Join {
    /// It is added in place as it is computed (cuDNN's beta = 1).
    #[default]
    Accumulate,
    /// It is written to a place of its own, and added by an op of its own.
    Separate,
    /// The op takes the other one as an input and writes their sum to a new place, which cuDNN does in one graph. Not in
    /// place: cuDNN's operation graphs are functions of different tensors, and nothing in their documentation says that two of
    /// them may lie in the same memory.
    Fused,
}

/// `y = conv(x, w)`; x: `[n][h][w][c_in]`, w: `[c_out][kh][kw][c_in]`, y: `[n][oh][ow][c_out]`. No bias: a batch norm follows.
/// With `statistics` there is a second output for it, the sums of y and of y^2 over each group's part of the batch,
/// `[groups][2][c_out]` in float32 (float64 of float64): only batch norm, whose own gradient accounts for them, may take it.
#[derive(Debug, Clone, Copy)]
pub struct Conv2d {
    /// Stride, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zero padding on both sides, vertical and horizontal.
    pub padding: [usize; 2],
    /// Statistics groups of the second output, if there is one.
    pub statistics: Option<usize>,
    /// How the gradient of x joins another one.
    pub join: Join,
}

impl Conv2d {
    /// One with nothing fused.
    pub const fn new(stride: [usize; 2], padding: [usize; 2]) -> Conv2d {
        Conv2d { stride, padding, statistics: None, join: Join::Accumulate }
    }

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
        let mut outputs = vec![TensorDesc::new([g.n, g.oh(), g.ow(), g.c_out], inputs[0].dtype)];
        if let Some(groups) = self.statistics {
            if !g.n.is_multiple_of(groups) {
                let expected = format!("a multiple of {groups} groups");
                return Err(Error::shape("conv2d", "first dimension of x", expected, g.n));
            }
            outputs.push(TensorDesc::new([groups, 2, g.c_out], gradient_dtype(inputs[0].dtype)));
        }
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        match (self.statistics, self.geometry(inputs[0], inputs[1])) {
            (Some(groups), Ok(g)) => workspace_bytes(2, g.c_out, groups),
            _ => 0,
        }
    }

    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        if self.statistics.is_some() && g.d_output(1).is_ok() {
            let what =
                "conv2d: the statistics have no gradient of their own, and something other than batch norm uses them";
            return Err(Error::Unsupported { what: what.into(), hint: None });
        }
        let (x, w, d_y) = (g.input(0), g.input(1), g.d_output(0)?);
        if g.needs(1) {
            let kernel = g.tape().desc(w).shape.expect::<4>("conv2d", "w")?;
            g.emit(Conv2dWgrad { forward: *self, kernel: [kernel[1], kernel[2]] }, &[x, d_y], &[Some(1)])?;
        }
        if g.needs(0) {
            let [_, h, width, _] = g.tape().desc(x).shape.expect("conv2d", "x")?;
            let addend = if self.join == Join::Fused { g.take_gradient(0) } else { None };
            let inputs: Vec<ValueId> = [d_y, w].into_iter().chain(addend).collect();
            g.emit(Conv2dDgrad { forward: *self, size: [h, width] }, &inputs, &[Some(0)])?;
        }
        Ok(())
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let (geometry, dtype) = (self.geometry(inputs[0], inputs[1]).ok()?, inputs[0].dtype);
        // The kernels of our own compute no statistics.
        let own = self.statistics.is_none() && Stem::of(&geometry, dtype).is_some();
        let fused = self.statistics.map_or(Fused::Nothing, |groups| Fused::Statistics { groups });
        let plain = Convolution::new(Direction::Forward, geometry, dtype);
        (!own).then_some(Work::Convolution(Convolution { fused, ..plain }))
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        Stem::of(&g, io.dtype()).ok_or_else(|| left_to_a_library(self.name()))?.forward(io)
    }

    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let [x, w] = [tensors.inputs[0], tensors.inputs[1]];
        let read = self.geometry(x, w).map_or(x.bytes(), |g| x_read(&g, x.dtype, self.statistics.is_none()));
        Traffic { read: tensors.once().read - x.bytes() as u64 + read as u64, ..tensors.once() }
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!("conv2d", io.inputs[0].desc.dtype, T => {
            let (x, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let (y, sums) = io.outputs.split_at_mut(1);
            let y = y[0].get::<T>();
            match io.tier {
                Tier::Reference => reference::forward(&g, x, w, y),
                Tier::Direct => direct::forward(&g, x, w, y),
            }
            if let (Some(groups), [sums]) = (self.statistics, sums) {
                statistics(y, (groups, g.c_out), io.workspace, sums.get::<T>());
            }
        });
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.geometry(inputs[0], inputs[1]).map_or(0, |g| g.flops())
    }
}

/// The sums of y and of y^2 over the rows of each group, `[groups][2][channels]`.
fn statistics<T: Real>(y: &[T], (groups, channels): (usize, usize), workspace: &mut [u8], sums: &mut [T]) {
    let group_rows = y.len() / channels / groups;
    let totals = group_sums::<T, 2>(workspace, (groups, group_rows, channels), |_, row, [first, second], _| {
        let y = &y[row * channels..][..channels];
        let (first, second) = (&mut first[..channels], &mut second[..channels]);
        for c in 0..channels {
            first[c] += y[c];
            second[c] += y[c] * y[c];
        }
    });
    sums.iter_mut().zip(&totals).for_each(|(sum, total)| *sum = T::of(*total));
}

/// The gradient of [`Conv2d`]'s input: inputs d_y and w, and like d_x what is added to it if anything is; output d_x.
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
        let d_x = TensorDesc::new([g.n, g.h, g.w, g.c_in], inputs[0].dtype);
        match inputs.get(2) {
            Some(addend) if **addend != d_x => Err(Error::shape("conv2d_dgrad", "what is added", d_x, addend)),
            _ => Ok(vec![d_x]),
        }
    }

    fn accumulates(&self) -> bool {
        self.forward.join != Join::Separate
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let geometry = self.geometry(inputs[0], inputs[1]).ok()?;
        let fused = if inputs.len() > 2 { Fused::Addition } else { Fused::Nothing };
        let plain = Convolution::new(Direction::DataGradient, geometry, inputs[0].dtype);
        Some(Work::Convolution(Convolution { fused, ..plain }))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let g = self.geometry(io.inputs[0].desc, io.inputs[1].desc)?;
        dispatch_real!("conv2d_dgrad", io.inputs[0].desc.dtype, T => {
            let (d_y, w) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
            let mut accumulate = io.outputs[0].accumulate;
            let d_x = io.outputs[0].get::<T>();
            if let Some(addend) = io.inputs.get(2) {
                d_x.copy_from_slice(addend.get::<T>());
                accumulate = true;
            }
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
        let work = Work::Convolution(Convolution::new(Direction::WeightGradient, geometry, dtype));
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

    /// The sums of the stem's blocks are as large as a cache.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let x = tensors.inputs[0];
        let read = self.geometry(x, tensors.inputs[1]).map_or(x.bytes(), |g| x_read(&g, x.dtype, true));
        let traffic = Traffic { read: tensors.once().read - x.bytes() as u64 + read as u64, ..tensors.once() };
        traffic.staging(self.cuda_workspace(&tensors.inputs))
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

/// Bytes of x that a convolution reads: the pixels that its windows cover, once; the stem's kernels for each of their tiles of
/// channels, if they do it.
fn x_read(g: &ConvGeometry, dtype: DType, stem: bool) -> usize {
    let passes = if stem { Stem::of(g, dtype).map_or(1, |stem| stem.channel_tiles()) } else { 1 };
    passes * g.x_covered() * dtype.size()
}

fn left_to_a_library(op: &str) -> Error {
    Error::Unsupported { what: format!("{op} of these sizes has no CUDA kernel: cuDNN computes it"), hint: None }
}

/// Weight gradients are never shorter than float32.
pub fn gradient_dtype(activations: DType) -> DType {
    if activations == DType::F64 { DType::F64 } else { DType::F32 }
}
