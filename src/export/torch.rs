//! Weights as `torch.save` writes them: a zip archive with a pickle that names each tensor's storage, and the storages. Nothing is
//! in the pickle that `torch.load(weights_only=True)` would refuse.

use std::io::{self, Write};
use std::path::Path;

use super::pickle::Value;
use super::zip;
use crate::error::{Error, Result};
use crate::import;
use crate::import::pickle::Id;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, TensorDesc};

/// The folder within the archive.
const FOLDER: &str = "archive";
const PROTOCOL: u8 = 2;

/// Writes a `dict` of tensors.
///
/// # Errors
/// What `out` reports; files of 4 GiB and more.
pub fn write(tensors: &NamedTensors, out: &mut dyn Write) -> io::Result<()> {
    let items = tensors.iter().enumerate();
    let items = items.map(|(i, (name, tensor))| (Value::text(name), rebuild(&i.to_string(), tensor.desc())));
    let mut pickle = Vec::new();
    Value::Dict(items.collect()).write(PROTOCOL, &mut pickle)?;
    let entry = |name: String, content| (format!("{FOLDER}/{name}"), content);
    let mut entries = vec![entry("data.pkl".into(), pickle.as_slice()), entry("byteorder".into(), b"little")];
    entries.extend(tensors.values().enumerate().map(|(i, tensor)| entry(format!("data/{i}"), tensor.bytes())));
    entries.push(entry("version".into(), b"3\n"));
    zip::write(&entries, out)
}

/// The call that makes a dense tensor of the storage `key`.
fn rebuild(key: &str, desc: &TensorDesc) -> Value<'static> {
    let (dims, count) = (desc.shape.dims(), desc.shape.len() as i64);
    let class = Value::global("torch", storage_class(desc.dtype));
    let storage = vec![Value::text("storage"), class, Value::text(key), Value::text("cpu"), Value::Int(count)];
    let hooks = Value::call(Value::global("collections", "OrderedDict"), vec![]);
    let arguments = vec![
        Value::Persistent(Box::new(Value::Tuple(storage))),
        Value::Int(0),
        Value::sizes(dims),
        Value::sizes(&strides(dims)),
        Value::Bool(false),
        hooks,
    ];
    Value::call(Value::global("torch._utils", "_rebuild_tensor_v2"), arguments)
}

fn strides(dims: &[usize]) -> Vec<usize> {
    (1..=dims.len()).map(|next| dims[next..].iter().product()).collect()
}

fn storage_class(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "DoubleStorage",
        DType::F32 => "FloatStorage",
        DType::Bf16 => "BFloat16Storage",
        DType::F16 => "HalfStorage",
        DType::I64 => "LongStorage",
        DType::U8 => "ByteStorage",
    }
}

/// The tensors in a file that [`write`] wrote, by the reader of files that come from elsewhere.
///
/// # Errors
/// [`Error::Format`] for what is cut, damaged, or no `dict` of tensors.
pub fn read(path: &Path, file: Vec<u8>) -> Result<NamedTensors> {
    let file = import::torch::read(path, file)?;
    let fault = || Error::format(path, None, "something else than tensors under their names");
    let tensor = |(name, value): &(Id, Id)| {
        let (name, tensor) = file.values.text(*name).zip(file.tensor(*value)).ok_or_else(fault)?;
        Ok((name.to_string(), file.elements(tensor)?))
    };
    file.values.entries(file.root).ok_or_else(fault)?.iter().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(tensors: &NamedTensors) -> Vec<u8> {
        let mut file = Vec::new();
        write(tensors, &mut file).unwrap();
        file
    }

    #[test]
    fn is_read_back_as_it_was_meant() {
        let tensors = crate::export::tests::awkward_tensors();
        assert_eq!(read(Path::new("x.pth"), written(&tensors)).unwrap(), tensors);
        assert_eq!(strides(&[2, 3, 5]), [15, 5, 1]);
        assert!(strides(&[]).is_empty());
    }

    #[test]
    fn fewer_tensors_and_a_cut_are_noticed() {
        let tensors = crate::export::tests::awkward_tensors();
        let mut file = written(&tensors);
        let fewer: NamedTensors = tensors.into_iter().take(1).collect();
        assert_eq!(read(Path::new("x.pth"), written(&fewer)).unwrap(), fewer);
        file.pop();
        assert!(read(Path::new("x.pth"), file).unwrap_err().to_string().contains("cut"));
    }
}
