//! Weights as `torch.save` writes them: a zip archive with a pickle that names each tensor's storage, and the storages. Nothing is
//! in the pickle that `torch.load(weights_only=True)` would refuse.

use std::collections::BTreeMap;
use std::io::{self, Write};

use crate::export::pickle::Value;
use crate::export::zip;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, Shape, TensorDesc};

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

/// The tensors in a file that [`write`] wrote.
///
/// # Errors
/// What is wrong with it.
pub fn read(file: &[u8]) -> Result<NamedTensors, String> {
    let entries: BTreeMap<String, &[u8]> = zip::read(file)?.into_iter().collect();
    let find = |name: &str| {
        let path = format!("{FOLDER}/{name}");
        entries.get(&path).copied().ok_or_else(|| format!("there is no entry {path} in it"))
    };
    let Value::Dict(items) = Value::read(find("data.pkl")?)? else { return Err("its pickle is no dict".into()) };
    items.into_iter().map(|(name, value)| tensor(name, &value, &find)).collect()
}

fn tensor<'a>(
    name: Value<'_>,
    value: &Value<'_>,
    find: &dyn Fn(&str) -> Result<&'a [u8], String>,
) -> Result<(String, HostTensor), String> {
    let Value::Str(name) = name else { return Err("a tensor without a name".into()) };
    let fault = || format!("{name} is no tensor of a known kind");
    let (key, desc) = described(value).ok_or_else(fault)?;
    if *value != rebuild(&key, &desc) {
        return Err(fault());
    }
    let tensor = HostTensor::from_bytes(desc, find(&format!("data/{key}"))?.to_vec());
    Ok((name, tensor.map_err(|error| error.to_string())?))
}

/// Key of the storage, shape and element type; [`rebuild`] tells whether the rest is as expected.
fn described(value: &Value<'_>) -> Option<(String, TensorDesc)> {
    let Value::Call(call) = value else { return None };
    let Value::Tuple(arguments) = &call[1] else { return None };
    let [Value::Persistent(storage), _, Value::Tuple(dims), ..] = arguments.as_slice() else { return None };
    let Value::Tuple(storage) = &**storage else { return None };
    let [_, Value::Global(_, class), Value::Str(key), ..] = storage.as_slice() else { return None };
    let dtypes = [DType::F64, DType::F32, DType::Bf16, DType::F16, DType::I64, DType::U8];
    let dtype = dtypes.into_iter().find(|&dtype| storage_class(dtype) == class)?;
    Some((key.clone(), TensorDesc::new(shape(dims)?, dtype)))
}

/// The shape in a pickled tuple of sizes.
pub(super) fn shape(dims: &[Value<'_>]) -> Option<Shape> {
    let size = |dim: &Value<'_>| match dim {
        Value::Int(size) => usize::try_from(*size).ok(),
        _ => None,
    };
    let dims: Vec<usize> = dims.iter().map(size).collect::<Option<_>>()?;
    Some(Shape::from(dims.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote() {
        let tensors = crate::export::tests::awkward_tensors();
        let mut file = Vec::new();
        write(&tensors, &mut file).unwrap();
        assert_eq!(read(&file).unwrap(), tensors);
        assert_eq!(strides(&[2, 3, 5]), [15, 5, 1]);
        assert!(strides(&[]).is_empty());
    }

    #[test]
    fn another_storage_or_stride_is_noticed() {
        let tensors = crate::export::tests::awkward_tensors();
        let mut file = Vec::new();
        write(&tensors, &mut file).unwrap();
        let shorter: NamedTensors = tensors.into_iter().take(1).collect();
        let mut other = Vec::new();
        write(&shorter, &mut other).unwrap();
        assert_eq!(read(&other).unwrap(), shorter);
        assert!(read(&file[..file.len() - 1]).unwrap_err().contains("cut"));
    }
}
