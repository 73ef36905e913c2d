//! Weights as detectron2's checkpointer takes them: a pickled dict with numpy arrays under `model`.

use std::io::{self, Write};

use crate::export::pickle::Value;
use crate::export::torch::shape;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, TensorDesc};

/// Without `bytes` objects, which protocol 3 brought, arrays would have to go through a text encoding.
const PROTOCOL: u8 = 3;
/// Who made the file; anything but "Caffe2", whose names detectron2 would translate.
const AUTHOR: &str = "simsiam-engine";

/// Writes tensors that have detectron2's names.
///
/// # Errors
/// What `out` reports; arrays of 4 GiB and more, element types that numpy does not have.
pub fn write(tensors: &NamedTensors, out: &mut dyn Write) -> io::Result<()> {
    let arrays: io::Result<_> = tensors.iter().map(|(name, tensor)| Ok((Value::text(name), array(tensor)?))).collect();
    let file = [
        ("model", Value::Dict(arrays?)),
        ("__author__", Value::text(AUTHOR)),
        // The names match the ends of a detector's, whatever its modules are called.
        ("matching_heuristics", Value::Bool(true)),
    ];
    Value::Dict(file.map(|(key, value)| (Value::text(key), value)).into()).write(PROTOCOL, out)
}

/// A numpy array, made empty and then given its state: version, shape, element type, column-major?, data.
fn array(tensor: &HostTensor) -> io::Result<Value<'_>> {
    let desc = tensor.desc();
    let dtype = numpy_name(desc.dtype).ok_or_else(|| io::Error::other(format!("numpy has no {}", desc.dtype)))?;
    let empty = vec![Value::global("numpy", "ndarray"), Value::sizes(&[0]), Value::Bytes(b"b")];
    // Where it was until numpy 2, and still is for pickles.
    let object = Value::call(Value::global("numpy.core.multiarray", "_reconstruct"), empty);
    let dtype = Value::call(Value::global("numpy", "dtype"), vec![Value::text(dtype)]);
    let dims = Value::sizes(desc.shape.dims());
    let state = vec![Value::Int(1), dims, dtype, Value::Bool(false), Value::Bytes(tensor.bytes())];
    Ok(Value::Build(Box::new([object, Value::Tuple(state)])))
}

fn numpy_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F64 => Some("<f8"),
        DType::F32 => Some("<f4"),
        DType::Bf16 => None,
        DType::F16 => Some("<f2"),
        DType::I64 => Some("<i8"),
        DType::U8 => Some("|u1"),
    }
}

/// The tensors in a file that [`write`] wrote.
///
/// # Errors
/// What is wrong with it.
pub fn read(file: &[u8]) -> Result<NamedTensors, String> {
    let Value::Dict(items) = Value::read(file)? else { return Err("its pickle is no dict".into()) };
    let find = |wanted: &str| items.iter().find(|(key, _)| *key == Value::text(wanted)).map(|(_, value)| value);
    if find("__author__") != Some(&Value::text(AUTHOR)) || find("matching_heuristics") != Some(&Value::Bool(true)) {
        return Err("it lacks an author, or asks for exact names".into());
    }
    let Some(Value::Dict(arrays)) = find("model") else { return Err("there is no dict \"model\" in it".into()) };
    arrays.iter().map(|(name, value)| tensor(name, value)).collect()
}

fn tensor(name: &Value<'_>, value: &Value<'_>) -> Result<(String, HostTensor), String> {
    let Value::Str(name) = name else { return Err("an array without a name".into()) };
    let fault = || format!("{name} is no array of a known kind");
    let (desc, bytes) = described(value).ok_or_else(fault)?;
    let tensor = HostTensor::from_bytes(desc, bytes.to_vec()).map_err(|error| error.to_string())?;
    // Whatever else is in the value is to be as `array` writes it.
    if array(&tensor).is_ok_and(|expected| expected == *value) { Ok((name.clone(), tensor)) } else { Err(fault()) }
}

fn described<'a>(value: &Value<'a>) -> Option<(TensorDesc, &'a [u8])> {
    let Value::Build(parts) = value else { return None };
    let Value::Tuple(state) = &parts[1] else { return None };
    let [_, Value::Tuple(dims), Value::Call(dtype), _, Value::Bytes(bytes)] = state.as_slice() else { return None };
    let dtypes = [DType::F64, DType::F32, DType::F16, DType::I64, DType::U8];
    let is_it = |candidate: &DType| {
        numpy_name(*candidate).is_some_and(|name| dtype[1] == Value::Tuple(vec![Value::text(name)]))
    };
    Some((TensorDesc::new(shape(dims)?, dtypes.into_iter().find(is_it)?), bytes))
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
        for cut in 0..file.len() {
            assert!(read(&file[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn an_element_type_that_numpy_lacks_is_named() {
        let half = HostTensor::from_bytes(TensorDesc::new([1], DType::Bf16), vec![0; 2]).unwrap();
        let error = write(&[("a".to_string(), half)].into(), &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "numpy has no bf16");
    }
}
