//! What NVIDIA's libraries do on a device: prepared once there, and done by the CPU for an emulated device, in float32 and
//! rounded where the libraries round.

use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::cpu::{CpuIo, Input, Output, Tier};
use crate::backend::cuda::library::{Operands, Work};
use crate::backend::cuda::{CudaIo, DeviceOutput, DevicePtr, DeviceTensor, HostTask, HostView};
use crate::error::Result;
use crate::graph::Op;
use crate::tensor::{DType, TensorDesc};

/// Where the operands of an op's library work lie: its first two inputs, what is added after them; its output, sums after it.
pub(super) fn operands(io: &CudaIo<'_>) -> Operands {
    let input = |index: usize| io.inputs.get(index).map_or(DevicePtr::NULL, |input| input.ptr);
    Operands {
        inputs: [input(0), input(1)],
        added: [input(2), input(3)],
        out: io.outputs[0].ptr,
        sums: io.outputs.get(1).map_or(DevicePtr::NULL, |sums| sums.ptr),
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

    /// What is left of the values in `dtype`.
    fn round(&mut self, dtype: DType) {
        match dtype {
            DType::Bf16 => self.values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            DType::F16 => self.values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
            _ => {}
        }
    }

    fn add(&mut self, other: &Widened) {
        self.values.iter_mut().zip(&other.values).for_each(|(v, other)| *v += other);
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

/// Runs an op of a library on copies of its tensors. Sums are those of the values before they are rounded.
fn answer(op: &dyn Op, inputs: &[Place], outputs: &[Place], memory: &dyn HostView) -> Result<()> {
    let read = |places: &[Place]| places.iter().map(|place| Widened::read(memory, place)).collect::<Result<Vec<_>>>();
    let (mut operands, mut results) = (read(inputs)?, read(outputs)?);
    let descs: Vec<&TensorDesc> = inputs.iter().map(|place| &place.desc).collect();
    let accumulate = outputs.iter().any(|place| place.accumulate);
    // What a device converts on the way, see `Work::staging`: there too the result, or the bias, is in 16 bits for a while.
    let work = op.library_work(&descs).filter(|work| work.staging() > 0);
    let staged = match work {
        Some(Work::Convolution(convolution)) => Some(convolution.dtype),
        Some(Work::Product(product)) => {
            // The bias is the first of what is added.
            operands.iter_mut().skip(2).take(1).for_each(|bias| bias.round(product.out));
            None
        }
        None => None,
    };
    let before = if staged.is_some() && accumulate { read(outputs)? } else { Vec::new() };
    compute(op, &operands, &mut results, accumulate && staged.is_none())?;
    if let Some(dtype) = staged {
        results.iter_mut().for_each(|result| result.round(dtype));
        results.iter_mut().zip(&before).for_each(|(result, before)| result.add(before));
    }
    results.iter().zip(outputs).try_for_each(|(result, place)| result.write(memory, place))
}

/// Runs the op on the CPU, in float32.
fn compute<'a>(op: &dyn Op, inputs: &[Widened], results: &'a mut [Widened], accumulate: bool) -> Result<()> {
    let descs: Vec<&TensorDesc> = inputs.iter().map(|t| &t.desc).collect();
    // Of float64, for the alignment.
    let mut workspace = vec![0.0f64; op.workspace(&descs).div_ceil(size_of::<f64>())];
    let output = |t: &'a mut Widened| {
        let Widened { desc, values } = t;
        Output { desc, bytes: bytemuck::cast_slice_mut(values), accumulate }
    };
    op.cpu(&mut CpuIo {
        inputs: inputs.iter().map(|t| Input { desc: &t.desc, bytes: bytemuck::cast_slice(&t.values) }).collect(),
        outputs: results.iter_mut().map(output).collect(),
        updates: Vec::new(),
        workspace: bytemuck::cast_slice_mut(&mut workspace),
        tier: Tier::Direct,
    })
}
