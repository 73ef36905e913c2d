//! What NVIDIA's libraries do on a device, done by the CPU for an emulated one: in float32, rounded to the element types of
//! the outputs.

use half::{bf16, f16};

use crate::backend::cpu::{CpuIo, Input, Output, Tier};
use crate::backend::cuda::{CudaIo, DevicePtr, Driver};
use crate::error::Result;
use crate::graph::Op;
use crate::tensor::{DType, TensorDesc};

/// A tensor in host memory, widened to float32.
struct Widened {
    desc: TensorDesc,
    values: Vec<f32>,
}

impl Widened {
    fn download(driver: &dyn Driver, desc: &TensorDesc, ptr: DevicePtr) -> Result<Widened> {
        let mut bytes = vec![0; desc.bytes()];
        driver.download(ptr, &mut bytes)?;
        let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values = match desc.dtype {
            DType::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            DType::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            _ => bytemuck::pod_collect_to_vec(&bytes),
        };
        Ok(Widened { desc: TensorDesc { dtype: DType::F32, ..desc.clone() }, values })
    }

    fn upload(&self, driver: &dyn Driver, dtype: DType, ptr: DevicePtr) -> Result<()> {
        let bytes: Vec<u8> = match dtype {
            DType::Bf16 => self.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            DType::F16 => self.values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => bytemuck::cast_slice(&self.values).to_vec(),
        };
        driver.upload(ptr, &bytes)
    }
}

/// Runs an op of a library on copies of its tensors.
///
/// # Errors
/// Those of the op and of the copies.
pub(super) fn run_on_host(op: &dyn Op, io: &CudaIo<'_>) -> Result<()> {
    let inputs = io.inputs.iter().map(|t| Widened::download(io.driver, t.desc, t.ptr));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let outputs = io.outputs.iter().map(|t| Widened::download(io.driver, t.desc, t.ptr));
    let mut outputs = outputs.collect::<Result<Vec<_>>>()?;
    let descs: Vec<&TensorDesc> = inputs.iter().map(|t| &t.desc).collect();
    // Of float64, for the alignment.
    let mut workspace = vec![0.0f64; op.workspace(&descs).div_ceil(size_of::<f64>())];
    op.cpu(&mut CpuIo {
        inputs: inputs.iter().map(|t| Input { desc: &t.desc, bytes: bytemuck::cast_slice(&t.values) }).collect(),
        outputs: outputs
            .iter_mut()
            .zip(&io.outputs)
            .map(|(t, o)| Output {
                desc: &t.desc,
                bytes: bytemuck::cast_slice_mut(&mut t.values),
                accumulate: o.accumulate,
            })
            .collect(),
        updates: Vec::new(),
        workspace: bytemuck::cast_slice_mut(&mut workspace),
        tier: Tier::Direct,
    })?;
    outputs.iter().zip(&io.outputs).try_for_each(|(t, o)| t.upload(io.driver, o.desc.dtype, o.ptr))
}
