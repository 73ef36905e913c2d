//! Files of `torch.save`: the zip format (since PyTorch 1.6) and the legacy one, as a pickle and the bytes of its storages.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::Format;
use super::pickle::{self, Element, Id, Pickle, TensorRef, Value, Values, shown};
use super::zip;
use crate::error::{Error, Result};
use crate::tensor::{HostTensor, TensorDesc};

/// What pickles of protocol 2 and above begin with.
const PICKLE: u8 = 0x80;
/// The number that a legacy file begins with.
const LEGACY_MAGIC: &[u8] = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
const LEGACY_VERSION: i64 = 1001;

/// A file of `torch.save` in memory.
#[derive(Debug)]
pub struct TorchFile {
    /// Which of the formats.
    pub format: Format,
    /// All values.
    pub values: Values,
    /// What was saved.
    pub root: Id,
    bytes: Vec<u8>,
    /// Where the bytes of the storages lie, by key.
    storages: HashMap<String, Range<usize>>,
}

/// Whether a file begins as `torch.save` begins them.
pub fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(zip::MAGIC) || bytes.first() == Some(&PICKLE)
}

/// Reads a file; `path` names it in errors.
///
/// # Errors
/// [`Error::Format`] for what is cut, damaged, or names what a file of tensors has no need of.
pub fn read(path: &Path, bytes: Vec<u8>) -> Result<TorchFile> {
    let file = if bytes.starts_with(zip::MAGIC) { read_zip(path, &bytes) } else { read_legacy(path, &bytes) };
    let (format, Pickle { values, root, .. }, storages) = file?;
    let file = TorchFile { format, values, root, bytes, storages };
    file.check_storages(path)?;
    Ok(file)
}

type Parts = (Format, Pickle, HashMap<String, Range<usize>>);

fn read_zip(path: &Path, bytes: &[u8]) -> Result<Parts> {
    let entries = zip::entries(path, bytes)?;
    let mut pickles = entries.iter().filter(|(name, _)| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let (Some((name, range)), None) = (pickles.next(), pickles.next()) else {
        let what = "a zip file without (or with several) data.pkl: not written by torch.save";
        return Err(Error::format(path, None, what).with_hint("TorchScript and ONNX files cannot be imported"));
    };
    let folder = name.strip_suffix("data.pkl").unwrap_or_default();
    if entries.contains_key(&format!("{folder}constants.pkl")) {
        let what = "a TorchScript program, not a checkpoint";
        return Err(Error::format(path, None, what).with_hint("save the model's state_dict with torch.save"));
    }
    let order = entries.get(&format!("{folder}byteorder")).map(|range| &bytes[range.clone()]);
    if order.is_some_and(|order| order != b"little") {
        return Err(Error::format(path, None, "written on a big-endian machine, which is not supported"));
    }
    let pickle = pickle::read(path, bytes, range.clone())?;
    let prefix = format!("{folder}data/");
    let storages = entries.iter().filter_map(|(name, range)| Some((name.strip_prefix(&prefix)?.into(), range.clone())));
    Ok((Format::Torch, pickle, storages.collect()))
}

/// Five pickles one behind the other (a number, a version, facts of the machine, the content, the keys of the storages), then of
/// each storage the number of elements and their bytes.
fn read_legacy(path: &Path, bytes: &[u8]) -> Result<Parts> {
    let next = |at: usize| pickle::read(path, bytes, at..bytes.len());
    let magic = next(0)?;
    if !matches!(magic.values.get(magic.root), Value::Long(number) if number == LEGACY_MAGIC) {
        let what = "a pickle, but not written by torch.save";
        return Err(Error::format(path, Some(0), what).with_hint("save the model's state_dict with torch.save"));
    }
    let version = next(magic.end)?;
    if version.values.int(version.root) != Some(LEGACY_VERSION) {
        let what = format!("legacy PyTorch format: expected version {LEGACY_VERSION}");
        return Err(Error::format(path, Some(magic.end as u64), what));
    }
    let machine = next(version.end)?;
    let little = machine.values.lookup(machine.root, "little_endian").map(|id| machine.values.get(id));
    if matches!(little, Some(Value::Bool(false))) {
        return Err(Error::format(path, None, "written on a big-endian machine, which is not supported"));
    }
    let content = next(machine.end)?;
    let keys = next(content.end)?;
    let storages = legacy_storages(path, bytes, &content.values, &keys)?;
    Ok((Format::TorchLegacy, content, storages))
}

fn legacy_storages(path: &Path, bytes: &[u8], values: &Values, keys: &Pickle) -> Result<HashMap<String, Range<usize>>> {
    let sizes: HashMap<&str, usize> = values
        .iter()
        .filter_map(|value| match value {
            Value::Storage(storage) => Some((storage.key.as_str(), storage.element.size())),
            _ => None,
        })
        .collect();
    let mut at = keys.end;
    let mut storages = HashMap::new();
    for id in keys.values.items(keys.root).unwrap_or_default() {
        let fault = |what: &str| Error::format(path, Some(at as u64), format!("a storage {what}"));
        let key = keys.values.text(*id).ok_or_else(|| fault("without name"))?;
        let size = sizes.get(key).ok_or_else(|| fault("that no tensor has"))?;
        let header =
            bytes[at.min(bytes.len())..].first_chunk::<8>().ok_or_else(|| fault("is expected, the file ends"))?;
        let len = usize::try_from(u64::from_le_bytes(*header)).ok().and_then(|len| len.checked_mul(*size));
        let end = len.and_then(|len| (at + 8).checked_add(len)).filter(|end| *end <= bytes.len());
        let end = end.ok_or_else(|| fault("is longer than the file"))?;
        storages.insert(key.to_string(), at + 8..end);
        at = end;
    }
    match at == bytes.len() {
        true => Ok(storages),
        false => {
            Err(Error::format(path, Some(at as u64), format!("{} bytes after the last storage", bytes.len() - at)))
        }
    }
}

impl TorchFile {
    /// Every storage that is named must be there, as long as it is said to be.
    fn check_storages(&self, path: &Path) -> Result<()> {
        for value in self.values.iter() {
            let Value::Storage(storage) = value else { continue };
            let expected = storage.len.checked_mul(storage.element.size());
            let got = self.storages.get(&storage.key).map(Range::len);
            if got.is_none() || got != expected {
                let got = got.map_or("none".into(), |got| format!("{got} bytes"));
                let (key, len, element) = (shown(&storage.key), storage.len, storage.element);
                let what = format!("storage {key}: expected {len} elements of {element:?}, got {got}");
                return Err(Error::format(path, None, what).with_hint("the file is cut or damaged; get it again"));
            }
        }
        Ok(())
    }

    /// The tensor that a value is.
    pub fn tensor(&self, id: Id) -> Option<&TensorRef> {
        match self.values.get(id) {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The elements of a tensor, row-major. Integers narrower than 64 bits are widened.
    ///
    /// # Errors
    /// None for tensors of this file.
    pub fn elements(&self, tensor: &TensorRef) -> Result<HostTensor> {
        let storage = self.storages.get(&tensor.storage.key).cloned().unwrap_or_default();
        let storage = &self.bytes[storage];
        let (element, size) = (tensor.storage.element, tensor.storage.element.size());
        let mut bytes = Vec::new();
        for at in positions(tensor) {
            let element_bytes = &storage[at * size..(at + 1) * size];
            match element {
                Element::I32 => bytes.extend(widened(element_bytes, i32::from_le_bytes)),
                Element::I16 => bytes.extend(widened(element_bytes, i16::from_le_bytes)),
                Element::I8 => bytes.extend(widened(element_bytes, i8::from_le_bytes)),
                _ => bytes.extend_from_slice(element_bytes),
            }
        }
        HostTensor::from_bytes(TensorDesc::new(&tensor.shape[..], element.dtype()), bytes)
    }
}

fn widened<const N: usize, T: Into<i64>>(bytes: &[u8], read: fn([u8; N]) -> T) -> [u8; 8] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    read(array).into().to_le_bytes()
}

/// Where the elements of a tensor lie in its storage, in row-major order.
fn positions(tensor: &TensorRef) -> impl Iterator<Item = usize> + '_ {
    let count = tensor.shape.iter().product();
    let mut index = vec![0; tensor.shape.len()];
    let mut at = tensor.offset;
    (0..count).map(move |_| {
        let here = at;
        for d in (0..index.len()).rev() {
            index[d] += 1;
            if index[d] < tensor.shape[d] {
                at += tensor.stride[d];
                break;
            }
            at -= (index[d] - 1) * tensor.stride[d];
            index[d] = 0;
        }
        here
    })
}
