//! Weights as detectron2's checkpointer takes them: a pickled dict with numpy arrays under `model`.

use std::io::{self, Write};
use std::path::Path;

use super::pickle::Value;
use crate::error::{Error, Result};
use crate::import::pickle::{self, Id, Pickle, Value as Read};
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

/// The tensors in a file that [`write`] wrote, by the reader of files that come from elsewhere.
///
/// # Errors
/// [`Error::Format`] for what is cut, damaged, or not what detectron2 takes.
pub fn read(path: &Path, file: &[u8]) -> Result<NamedTensors> {
    let Pickle { values, root, .. } = pickle::read(path, file, 0..file.len())?;
    let fault = |what: &str| Error::format(path, None, what);
    let find = |key: &str| values.lookup(root, key);
    let author = find("__author__").and_then(|id| values.text(id));
    let heuristics = find("matching_heuristics").map(|id| values.get(id));
    if author != Some(AUTHOR) || !matches!(heuristics, Some(Read::Bool(true))) {
        return Err(fault("it lacks an author, or asks for exact names"));
    }
    let arrays =
        find("model").and_then(|id| values.entries(id)).ok_or_else(|| fault("there is no dict \"model\" in it"))?;
    let tensor = |(name, value): &(Id, Id)| {
        let (Some(name), Read::Array(Some(array))) = (values.text(*name), values.get(*value)) else {
            return Err(fault("something else than arrays of numbers under their names"));
        };
        let bytes = values.bytes(array.bytes).unwrap_or_default().to_vec();
        let desc = TensorDesc::new(&array.shape[..], array.element.dtype());
        Ok((name.to_string(), HostTensor::from_bytes(desc, bytes)?))
    };
    arrays.iter().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote() {
        let tensors = crate::export::tests::awkward_tensors();
        let mut file = Vec::new();
        write(&tensors, &mut file).unwrap();
        let path = Path::new("x.pkl");
        assert_eq!(read(path, &file).unwrap(), tensors);
        for cut in 0..file.len() {
            assert!(read(path, &file[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn an_element_type_that_numpy_lacks_is_named() {
        let half = HostTensor::from_bytes(TensorDesc::new([1], DType::Bf16), vec![0; 2]).unwrap();
        let error = write(&[("a".to_string(), half)].into(), &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "numpy has no bf16");
    }
}
