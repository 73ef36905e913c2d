//! Named tensors in one safetensors file. The header is written here rather than by the `safetensors` crate, whose
//! metadata comes out in random order: equal content must give equal bytes. Reading relies on the crate's checks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{DType, HostTensor, TensorDesc};
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// Tensors by name, in name order.
pub type NamedTensors = BTreeMap<String, HostTensor>;

const LENGTH_BYTES: u64 = 8;
/// The format's own limit, against absurd allocations.
const MAX_HEADER: u64 = 100_000_000;

/// Writes `tensors` and string `metadata` to `path`, atomically and without a copy of the data. The bytes are a function
/// of the content: widest element type first (so that all data is aligned), then by name.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written.
pub fn write(path: &Path, tensors: &NamedTensors, metadata: &BTreeMap<String, String>) -> Result<()> {
    write_atomic(path, |out| write_to(out, tensors, metadata))
}

/// The bytes of such a file, to wherever `out` leads.
///
/// # Errors
/// What `out` reports.
pub fn write_to(out: &mut dyn Write, tensors: &NamedTensors, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    let mut ordered: Vec<(&String, &HostTensor)> = tensors.iter().collect();
    ordered.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.desc().dtype.size())); // stable: names stay in order
    let described: Vec<(&str, &TensorDesc)> = ordered.iter().map(|(name, t)| (name.as_str(), t.desc())).collect();
    out.write_all(&header(&described, metadata)?)?;
    ordered.iter().try_for_each(|(_, tensor)| out.write_all(tensor.bytes()))
}

/// What a file begins with whose data are these tensors, in this order: for writers that have the data later. Tensors of
/// wider element types come first, so that all are aligned.
///
/// # Errors
/// None in practice: any name can be written as JSON.
pub fn header(ordered: &[(&str, &TensorDesc)], metadata: &BTreeMap<String, String>) -> serde_json::Result<Vec<u8>> {
    let mut map = serde_json::Map::new();
    map.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    let mut offset = 0;
    for (name, desc) in ordered {
        let end = offset + desc.bytes();
        let info = TensorInfo {
            dtype: stored_dtype(desc.dtype),
            shape: desc.shape.dims().to_vec(),
            data_offsets: (offset, end),
        };
        map.insert(name.to_string(), serde_json::to_value(info)?);
        offset = end;
    }
    let mut text = serde_json::to_vec(&map)?;
    text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok([&(text.len() as u64).to_le_bytes(), &text[..]].concat())
}

/// Reads every tensor and the string metadata of `path`.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is cut, too long, not a safetensors file or has an
/// element type the engine does not know.
pub fn read(path: &Path) -> Result<(NamedTensors, BTreeMap<String, String>)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let length = file.metadata().map_err(Error::io("inspect", path))?.len();
    read_from(path, BufReader::new(file), length)
}

/// As [`read`], from a file held in memory; `path` names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(path: &Path, bytes: &[u8]) -> Result<(NamedTensors, BTreeMap<String, String>)> {
    read_from(path, bytes, bytes.len() as u64)
}

fn read_from(path: &Path, mut file: impl Read, length: u64) -> Result<(NamedTensors, BTreeMap<String, String>)> {
    let header = read_header(path, &mut file, length)?;
    let mut tensors = NamedTensors::new();
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else { continue };
        let dtype = known_dtype(info.dtype).ok_or_else(|| {
            Error::format(path, None, format!("tensor {name} has element type {}, which is not supported", info.dtype))
        })?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        file.read_exact(&mut bytes).map_err(Error::io("read", path))?;
        tensors.insert(name, HostTensor::from_bytes(TensorDesc::new(info.shape.as_slice(), dtype), bytes)?);
    }
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok((tensors, metadata))
}

fn read_header(path: &Path, file: &mut impl Read, length: u64) -> Result<Metadata> {
    if length < LENGTH_BYTES {
        return Err(Error::format(path, Some(0), format!("not a safetensors file: only {length} bytes long")));
    }
    let mut size = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut size).map_err(Error::io("read", path))?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        let what = format!("not a safetensors file: header length {size} is over the limit of {MAX_HEADER}");
        return Err(Error::format(path, Some(0), what));
    }
    if size > length - LENGTH_BYTES {
        let what = format!("the file is cut: a header of {size} bytes is promised, {} follow", length - LENGTH_BYTES);
        return Err(Error::format(path, Some(0), what));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(Error::io("read", path))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| Error::format(path, Some(LENGTH_BYTES), format!("not a safetensors file: header: {e}")))?;
    let expected = (metadata.data_len() as u64).checked_add(LENGTH_BYTES + size);
    match expected {
        Some(expected) if expected == length => Ok(metadata),
        Some(expected) if expected < length => {
            let what = format!("{} bytes after the last tensor", length - expected);
            Err(Error::format(path, Some(expected), what))
        }
        _ => {
            let promised = expected.map_or("more than 2^64".into(), |n| n.to_string());
            Err(Error::format(path, Some(length), format!("the file is cut: {promised} bytes expected, got {length}")))
        }
    }
}

fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I64 => Dtype::I64,
        DType::U8 => Dtype::U8,
    }
}

fn known_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::Bf16,
        Dtype::F16 => DType::F16,
        Dtype::I64 => DType::I64,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (NamedTensors, BTreeMap<String, String>) {
        let scalar = HostTensor::from_bytes(TensorDesc::new([], DType::I64), (-3_i64).to_le_bytes().to_vec()).unwrap();
        let bytes = HostTensor::from_bytes(TensorDesc::new([3], DType::U8), vec![9, 8, 7]).unwrap();
        let half = HostTensor::from_bytes(TensorDesc::new([1, 2], DType::Bf16), vec![1, 2, 3, 4]).unwrap();
        let empty = HostTensor::from_f32([0, 5], &[]).unwrap();
        let floats = HostTensor::from_f32([2, 1, 3], &[1.5, -0.0, f32::NAN, 4.0, 5.0, 6.0]).unwrap();
        let named = [("b.bytes", bytes), ("a.half", half), ("z.counter", scalar), ("a.empty", empty), ("m", floats)];
        let metadata = [("format", "pt"), ("note", "quotes \" and\nnewlines")];
        (
            named.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect(),
            metadata.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        )
    }

    fn same(a: &NamedTensors, b: &NamedTensors) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(x, y)| x.0 == y.0 && x.1.desc() == y.1.desc() && x.1.bytes() == y.1.bytes())
    }

    #[test]
    fn round_trip_and_the_crate_agrees() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let (tensors, metadata) = sample();
        write(&path, &tensors, &metadata).unwrap();
        let (back, meta) = read(&path).unwrap();
        assert!(same(&tensors, &back) && meta == metadata);
        let bytes = std::fs::read(&path).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("z.counter").unwrap().data(), (-3_i64).to_le_bytes());
        assert_eq!(parsed.tensor("m").unwrap().shape(), [2, 1, 3]);
        write(&path, &tensors, &metadata).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "equal content, equal bytes");
    }

    #[test]
    fn every_cut_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let (tensors, metadata) = sample();
        write(&path, &tensors, &metadata).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = read(&path).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "cut at {cut}: {error}");
        }
    }

    #[test]
    fn malformations_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let with_header = |header: &str, data: &[u8]| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(data);
            bytes
        };
        let cases = [
            (b"\x89PNG\r\n\x1a\n plus data".to_vec(), "not a safetensors file: header length"),
            (with_header("hello!!!", &[]), "not a safetensors file: header"),
            (with_header("{\"\u{7f}", &[]), "not a safetensors file: header"),
            (with_header("{}", &[1, 2]), "2 bytes after the last tensor"),
            (
                with_header(r#"{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
                "tensor a has element type I32",
            ),
            (with_header(r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}"#, &[0, 0]), "invalid shape"),
            (with_header(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#, &[0, 0, 0]), "invalid offset"),
            (
                with_header(r#"{"a":{"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,2]}}"#, &[0, 0]),
                "overflow",
            ),
            (
                with_header(
                    r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
                    &[0],
                ),
                "",
            ),
        ];
        for (bytes, expected) in cases {
            std::fs::write(&path, &bytes).unwrap();
            let message = read(&path).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("x.safetensors"), "{message}");
        }
    }

    #[test]
    fn absent_file_is_named() {
        let message = read(Path::new("/nonexistent/x.safetensors")).unwrap_err().to_string();
        assert!(message.starts_with("cannot open /nonexistent/x.safetensors"), "{message}");
    }
}
