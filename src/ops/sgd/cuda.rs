//! The table of all parameters, which goes to a kernel by value, of the optimisers and of the copies of weights; SGD by it.
#![allow(unsafe_code)] // launches

use bytemuck::{Pod, Zeroable};

use super::{Guard, SgdUpdate, StepParam};
use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::{Error, Result};
use crate::tensor::DType;

kernels! { "sgd";
    /// The update of all parameters of a table
    fn sgd[; 256](table: Parameters, count: i32, step_params: DevicePtr, guard: DevicePtr, unscale: i32);
}

// As in kernels/update.cuh.
const CAPACITY: usize = 512;
const CHUNK: usize = 4096;

/// A parameter as kernels see it.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(in crate::ops) struct Parameter {
    w: DevicePtr,
    v: DevicePtr,
    d_w: DevicePtr,
    copy: DevicePtr,
    n: i64,
    first_chunk: u32,
    lr: u16,
    /// Whether LARS scales its gradient.
    pub adapted: u16,
}

impl Parameter {
    /// Nothing but a gradient of `n` elements.
    pub fn gradient(d_w: DevicePtr, n: usize) -> Parameter {
        Parameter { d_w, n: n as i64, ..Parameter::zeroed() }
    }

    /// Nothing but a weight of `n` elements and its copy.
    pub fn copied(w: DevicePtr, copy: DevicePtr, n: usize) -> Parameter {
        Parameter { w, copy, n: n as i64, ..Parameter::zeroed() }
    }

    pub fn chunks(&self) -> usize {
        chunks(self.n as usize)
    }
}

/// Blocks that update `n` elements.
pub(in crate::ops) fn chunks(n: usize) -> usize {
    n.div_ceil(CHUNK)
}

/// The table of a launch: just under the 32 KB that a kernel's parameters may have.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(in crate::ops) struct Parameters([Parameter; CAPACITY]);

/// What one launch works on.
pub(in crate::ops) struct Launch {
    pub table: Parameters,
    /// Parameters in the table.
    pub count: usize,
    /// Their chunks, a block each.
    pub chunks: usize,
}

impl Launch {
    /// A block for every chunk.
    pub fn grid(&self) -> Grid {
        Grid::new([self.chunks as u32, 1, 1])
    }

    /// As many launches as the parameters need; one for every network but the very deepest.
    pub fn all(parameters: &[Parameter]) -> Vec<Launch> {
        let nonempty: Vec<Parameter> = parameters.iter().filter(|p| p.n > 0).copied().collect();
        nonempty.chunks(CAPACITY).map(Launch::of).collect()
    }

    fn of(parameters: &[Parameter]) -> Launch {
        let (mut table, mut chunks) = (Parameters::zeroed(), 0);
        for (entry, parameter) in table.0.iter_mut().zip(parameters) {
            *entry = Parameter { first_chunk: chunks as u32, ..*parameter };
            chunks += parameter.chunks();
        }
        Launch { table, count: parameters.len(), chunks }
    }
}

/// The parameters of an optimiser's node: gradients behind `step_params` in the inputs, weights and momenta in the updates.
///
/// # Errors
/// [`Error::Unsupported`] for parameters that are not float32.
pub(in crate::ops) fn parameters(io: &CudaIo<'_>, op: &str, lr: &[StepParam]) -> Result<Vec<Parameter>> {
    let parameter = |(i, &which): (usize, &StepParam)| {
        let (d_w, w, v) = (&io.inputs[1 + i], &io.updates[i], &io.updates[lr.len() + i]);
        if w.desc.dtype != DType::F32 {
            let what = format!("{op}: CUDA keeps parameters in f32, not in {}", w.desc.dtype);
            return Err(Error::Unsupported { what, hint: None });
        }
        let (n, copy) = (w.desc.shape.len() as i64, DevicePtr::NULL);
        Ok(Parameter { w: w.ptr, v: v.ptr, d_w: d_w.ptr, copy, n, first_chunk: 0, lr: which as u16, adapted: 0 })
    };
    lr.iter().enumerate().map(parameter).collect()
}

pub(super) fn update(io: &CudaIo<'_>, SgdUpdate { lr, guard }: &SgdUpdate) -> Result<()> {
    let parameters = parameters(io, "sgd", lr)?;
    let scalar = io.inputs.get(1 + lr.len()).map_or(DevicePtr::NULL, |scalar| scalar.ptr);
    let unscale = i32::from(*guard == Guard::Unscale);
    for launch in Launch::all(&parameters) {
        let call = sgd(launch.table, launch.count as i32, io.inputs[0].ptr, scalar, unscale);
        // SAFETY: `infer` checked that gradient, weight and momentum of each parameter have its `n` elements, that
        // `step_params` has a value at every position of `StepParam`, and that a guard is a scalar of float32 where parameters
        // are.
        unsafe { io.launch(launch.grid(), call)? };
    }
    Ok(())
}
