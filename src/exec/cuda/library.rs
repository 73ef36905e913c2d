//! What NVIDIA's libraries do on a device: prepared once there, and done by the CPU for an emulated device, in float32 and
//! rounded to the element types of the outputs.

use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::cpu::{CpuIo, Input, Output, Tier};
use crate::backend::cuda::library::Operands;
use crate::backend::cuda::{CudaIo, DeviceOutput, DevicePtr, DeviceTensor, HostTask, HostView};
use crate::error::Result;
use crate::graph::Op;
use crate::tensor::{DType, TensorDesc};

/// Where the operands of an op's library work lie: its first two inputs, a bias after them, its output.
pub(super) fn operands(io: &CudaIo<'_>) -> Operands {
    Operands {
        inputs: [io.inputs[0].ptr, io.inputs[1].ptr],
        bias: io.inputs.get(2).map_or(DevicePtr::NULL, |bias| bias.ptr),
        out: io.outputs[0].ptr,
        accumulate: io.outputs[0].accumulate,
        workspace: io.workspace,
    }
}

/// Puts the CPU's answer into the stream of an emulated device.
///
/// # Errors
/// Those of the op and of the copies.
pub(super) fn answer_on_host(op: &Arc<dyn Op>, io: &CudaIo<'_>) -> Result<()> {
    let input = |t: &DeviceTensor<'_>| Place { desc: t.desc.clone(), ptr: t.ptr, accumulate: false };
    let output = |t: &DeviceOutput<'_>| Place { desc: t.desc.clone(), ptr: t.ptr, accumulate: t.accumulate };
    let inputs: Vec<Place> = io.inputs.iter().map(input).collect();
    let outputs: Vec<Place> = io.outputs.iter().map(output).collect();
    let op = op.clone();
    let task: HostTask = Arc::new(move |memory| answer(&*op, &inputs, &outputs, memory));
    io.driver.host_task(task)
}

/// A tensor in the memory of the emulated device.
#[derive(Debug)]
struct Place {
    desc: TensorDesc,
    ptr: DevicePtr,
    accumulate: bool,
}

/// A tensor in host memory, widened to float32.
struct Widened {
    desc: TensorDesc,
    values: Vec<f32>,
}

impl Widened {
    fn read(memory: &dyn HostView, place: &Place) -> Result<Widened> {
        let mut bytes = vec![0; place.desc.bytes()];
        memory.read(place.ptr, &mut bytes)?;
        let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values = match place.desc.dtype {
            DType::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            DType::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            _ => bytemuck::pod_collect_to_vec(&bytes),
        };
        Ok(Widened { desc: TensorDesc { dtype: DType::F32, ..place.desc.clone() }, values })
    }

    fn write(&self, memory: &dyn HostView, place: &Place) -> Result<()> {
        let bytes: Vec<u8> = match place.desc.dtype {
            DType::Bf16 => self.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            DType::F16 => self.values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => bytemuck::cast_slice(&self.values).to_vec(),
        };
        memory.write(place.ptr, &bytes)
    }
}

/// Runs an op of a library on copies of its tensors.
fn answer(op: &dyn Op, inputs: &[Place], outputs: &[Place], memory: &dyn HostView) -> Result<()> {
    let read = |places: &[Place]| places.iter().map(|place| Widened::read(memory, place)).collect::<Result<Vec<_>>>();
    let (inputs, mut results) = (read(inputs)?, read(outputs)?);
    let descs: Vec<&TensorDesc> = inputs.iter().map(|t| &t.desc).collect();
    // Of float64, for the alignment.
    let mut workspace = vec![0.0f64; op.workspace(&descs).div_ceil(size_of::<f64>())];
    op.cpu(&mut CpuIo {
        inputs: inputs.iter().map(|t| Input { desc: &t.desc, bytes: bytemuck::cast_slice(&t.values) }).collect(),
        outputs: results
            .iter_mut()
            .zip(outputs)
            .map(|(t, place)| Output {
                desc: &t.desc,
                bytes: bytemuck::cast_slice_mut(&mut t.values),
                accumulate: place.accumulate,
            })
            .collect(),
        updates: Vec::new(),
        workspace: bytemuck::cast_slice_mut(&mut workspace),
        tier: Tier::Direct,
    })?;
    results.iter().zip(outputs).try_for_each(|(result, place)| result.write(memory, place))
}
