//! Parameters between an executor and the world outside, where they have PyTorch's names and layout.

use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::graph::ValueId;
use crate::nn::ParamInfo;
use crate::nn::layout::{krsc_to_oihw, oihw_to_krsc};
use crate::nn::simsiam::LOSS_SCALE;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{HostTensor, TensorDesc};
use crate::train::checkpoint::Checkpoint;

/// Prefix of the momentum buffers among a checkpoint's tensors.
pub const MOMENTUM: &str = "momentum/";

/// Every parameter and buffer of `params`, under `<prefix><name>`, in PyTorch's layout.
///
/// # Errors
/// Faults of the executor.
pub fn read_params(exec: &dyn Executor, params: &[ParamInfo]) -> Result<NamedTensors> {
    params.iter().map(|p| Ok((p.name.clone(), to_torch(exec.read(p.value)?)?))).collect()
}

/// Writes the start values for `seed` into an executor.
///
/// # Errors
/// Faults of the executor.
pub fn write_initial(exec: &mut dyn Executor, params: &[ParamInfo], seed: u64) -> Result<()> {
    params.iter().try_for_each(|p| exec.write(p.value, p.initial(seed).bytes()))
}

/// Writes tensors in PyTorch's layout into an executor; `find` looks one up by name.
///
/// # Errors
/// What `find` reports, and [`Error::Shape`] when a tensor's shape is not the parameter's.
pub fn write_params(
    exec: &mut dyn Executor,
    params: &[ParamInfo],
    mut find: impl FnMut(&str, &TensorDesc) -> Result<HostTensor>,
) -> Result<()> {
    for p in params {
        let expected = TensorDesc { shape: p.torch_shape(), dtype: p.desc.dtype };
        let tensor = find(&p.name, &expected)?;
        if *tensor.desc() != expected {
            return Err(Error::shape("load", &p.name, expected, tensor.desc()));
        }
        exec.write(p.value, to_engine(tensor)?.bytes())?;
    }
    Ok(())
}

/// Every momentum buffer as a tensor of a checkpoint.
///
/// # Errors
/// Faults of the executor.
pub fn read_momenta(exec: &dyn Executor, momenta: &[(String, ValueId)]) -> Result<NamedTensors> {
    momenta.iter().map(|(name, value)| Ok((format!("{MOMENTUM}{name}"), to_torch(exec.read(*value)?)?))).collect()
}

/// Writes what a checkpoint holds into an executor. It may come from another device and element type: the scale of the
/// loss, which only float16 has, starts anew then.
///
/// # Errors
/// [`Error::Format`] about missing or ill-shaped tensors.
pub fn restore<S>(
    exec: &mut dyn Executor,
    params: &[ParamInfo],
    momenta: &[(String, ValueId)],
    checkpoint: &mut Checkpoint<S>,
) -> Result<()> {
    let kept = |p: &&ParamInfo| !p.name.starts_with(LOSS_SCALE) || checkpoint.has(&p.name);
    let there: Vec<ParamInfo> = params.iter().filter(kept).cloned().collect();
    write_params(exec, &there, |name, desc| checkpoint.take(name, desc))?;
    checkpoint.forget(LOSS_SCALE);
    for (name, value) in momenta {
        let Some(param) = params.iter().find(|p| p.name == *name) else { continue };
        let desc = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
        let tensor = to_engine(checkpoint.take(&format!("{MOMENTUM}{name}"), &desc)?)?;
        exec.write(*value, tensor.bytes())?;
    }
    Ok(())
}

/// From the engine's layout to PyTorch's.
///
/// # Errors
/// None for tensors of the engine.
pub fn to_torch(tensor: HostTensor) -> Result<HostTensor> {
    if tensor.desc().shape.rank() == 4 { krsc_to_oihw(&tensor) } else { Ok(tensor) }
}

/// From PyTorch's layout to the engine's.
///
/// # Errors
/// None for tensors of PyTorch.
pub fn to_engine(tensor: HostTensor) -> Result<HostTensor> {
    if tensor.desc().shape.rank() == 4 { oihw_to_krsc(&tensor) } else { Ok(tensor) }
}
