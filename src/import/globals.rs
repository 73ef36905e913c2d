//! All that a pickle may name, and what naming it gives: plain data. Nothing else is let through, and none of this is executed.

use super::pickle::{Element, Id, Machine, Storage, TensorRef, Value};
use crate::error::Result;

/// Dimensions that a tensor may have.
const MAX_RANK: usize = 8;
/// Longest name of a storage, each tensor of which repeats it.
const MAX_KEY: usize = 64;
/// Bytes that count as one value when they are copied.
const BYTES_PER_VALUE: usize = 16;

/// A function or class that a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`: a dict.
    OrderedDict,
    /// `set`: a list.
    Set,
    /// `torch.Size`: its tuple.
    Size,
    /// `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`: a tensor.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`: the tensor in it.
    RebuildParameter,
    /// `torch.FloatStorage` and its like.
    StorageType(Element),
    /// `torch.float32`, `torch.device` and the like: of no use here.
    Opaque,
    /// `numpy.dtype`, before and (with its letter and size) after it is called.
    NumpyDtype(Option<[u8; 2]>),
    /// `numpy.core.multiarray.scalar`: a number.
    NumpyScalar,
    /// `_codecs.encode`: how protocol 2 writes bytes.
    Encode,
    /// `argparse.Namespace`: an object with attributes.
    Namespace,
}

impl Global {
    /// What a pickle may name, by module and name.
    pub fn find(module: &str, name: &str) -> Option<Global> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("builtins" | "__builtin__", "set") => Global::Set,
            ("torch", "Size") => Global::Size,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "float32" | "float64" | "float16" | "bfloat16" | "int64" | "device") => Global::Opaque,
            ("torch", _) => Global::StorageType(storage_element(name)?),
            ("numpy", "dtype") => Global::NumpyDtype(None),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Global::NumpyScalar,
            ("_codecs", "encode") => Global::Encode,
            ("argparse", "Namespace") => Global::Namespace,
            _ => return None,
        })
    }
}

fn storage_element(name: &str) -> Option<Element> {
    Some(match name.strip_suffix("Storage")? {
        "Double" => Element::F64,
        "Float" => Element::F32,
        "Half" => Element::F16,
        "BFloat16" => Element::Bf16,
        "Long" => Element::I64,
        "Int" => Element::I32,
        "Short" => Element::I16,
        "Char" => Element::I8,
        "Byte" => Element::U8,
        "Bool" => Element::Bool,
        _ => return None,
    })
}

impl Machine<'_> {
    /// What calling `callee` with the tuple `arguments` gives; `new` for the opcode that makes objects.
    pub(super) fn call(&mut self, callee: Id, arguments: Id, new: bool) -> Result<Id> {
        let (Value::Global(global), Value::Tuple(arguments)) = (self.values.get(callee), self.values.get(arguments))
        else {
            let (callee, arguments) = (self.values.get(callee).kind(), self.values.get(arguments).kind());
            return Err(self.fault(format!("the pickle calls {callee} with {arguments}")));
        };
        if arguments.len() > MAX_RANK {
            return Err(self.fault(format!("a call with {} arguments", arguments.len())));
        }
        let (global, arguments) = (*global, arguments.clone());
        match (global, &arguments[..]) {
            (Global::OrderedDict, []) => self.add(Value::Dict(Vec::new())),
            (Global::OrderedDict, [pairs]) => self.dict_of_pairs(*pairs),
            (Global::Set | Global::Size, [items]) if self.values.items(*items).is_some() => Ok(*items),
            (Global::RebuildTensor, [storage, offset, shape, stride, ..]) => {
                let tensor = self.tensor([*storage, *offset, *shape, *stride])?;
                self.add(tensor)
            }
            (Global::RebuildParameter, [tensor, ..]) if matches!(self.values.get(*tensor), Value::Tensor(_)) => {
                Ok(*tensor)
            }
            (Global::Opaque, _) => self.add(Value::Opaque),
            (Global::NumpyDtype(None), [code, ..]) => self.numpy_dtype(*code),
            (Global::NumpyScalar, [dtype, bytes]) => self.numpy_scalar(*dtype, *bytes),
            (Global::Encode, [text, ..]) => self.encode(*text),
            (Global::Namespace, []) if new => self.add(Value::Object(None)),
            _ => {
                let kinds: Vec<_> = arguments.iter().map(|id| self.values.get(*id).kind()).collect();
                Err(self.fault(format!("the pickle calls {global:?} with ({})", kinds.join(", "))))
            }
        }
    }

    fn dict_of_pairs(&mut self, pairs: Id) -> Result<Id> {
        let length = self.values.items(pairs).map_or(0, <[Id]>::len);
        self.charge(length)?;
        let pair = |id: &Id| match self.values.items(*id) {
            Some([key, value]) => Some((*key, *value)),
            _ => None,
        };
        let entries: Option<Vec<(Id, Id)>> =
            self.values.items(pairs).and_then(|items| items.iter().map(pair).collect());
        match entries {
            Some(entries) => self.add(Value::Dict(entries)),
            None => Err(self.fault("an OrderedDict of something else than pairs".into())),
        }
    }

    /// The storage that a persistent id describes.
    pub(super) fn storage(&self, id: Id) -> Result<Value> {
        let fault = |what: &str| Err(self.fault(format!("a reference to a storage {what}")));
        let Some([tag, class, key, _location, len, rest @ ..]) = self.values.items(id) else {
            return fault("that is no tuple of five");
        };
        if self.values.text(*tag) != Some("storage") {
            return fault("that does not say so");
        }
        let Value::Global(Global::StorageType(element)) = self.values.get(*class) else {
            return fault("of unknown type");
        };
        if rest.iter().any(|id| !matches!(self.values.get(*id), Value::None)) {
            return fault("that is a view of another one, which is not supported");
        }
        let len = self.values.int(*len).and_then(|len| usize::try_from(len).ok());
        let (Some(key), Some(len)) = (self.values.text(*key).filter(|key| key.len() <= MAX_KEY), len) else {
            return fault("without a sensible name or length");
        };
        Ok(Value::Storage(Box::new(Storage { element: *element, key: key.to_string(), len })))
    }

    /// A tensor, whose elements must lie in its storage and be no more than that has.
    fn tensor(&self, [storage, offset, shape, stride]: [Id; 4]) -> Result<Value> {
        let Value::Storage(storage) = self.values.get(storage) else {
            return Err(self.fault("a tensor without storage".into()));
        };
        let offset = self.values.int(offset).and_then(|offset| usize::try_from(offset).ok());
        let (Some(offset), Some(shape), Some(stride)) = (offset, self.sizes(shape), self.sizes(stride)) else {
            return Err(self.fault(format!("a tensor whose offset, shape or stride is no number below 2^63, or with more than {MAX_RANK} dimensions")));
        };
        if shape.len() != stride.len() {
            return Err(self.fault(format!("a tensor with {} dimensions and {} strides", shape.len(), stride.len())));
        }
        if !fits(storage.len, offset, &shape, &stride) {
            let what = format!(
                "a tensor {shape:?} with stride {stride:?} from element {offset} is not in its storage of {}",
                storage.len
            );
            return Err(self.fault(what));
        }
        Ok(Value::Tensor(Box::new(TensorRef { storage: (**storage).clone(), offset, shape, stride })))
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let items = self.values.items(id).filter(|items| items.len() <= MAX_RANK)?;
        items.iter().map(|id| usize::try_from(self.values.int(*id)?).ok()).collect()
    }

    /// `f8`, `i4` and so on.
    fn numpy_dtype(&mut self, code: Id) -> Result<Id> {
        let code = self.values.text(code).and_then(|code| <[u8; 2]>::try_from(code.as_bytes()).ok());
        match code {
            Some(code) => self.add(Value::Global(Global::NumpyDtype(Some(code)))),
            None => Err(self.fault("a numpy type that is no number".into())),
        }
    }

    /// The state of a numpy dtype is (version, byte order, ...).
    pub(super) fn check_numpy_byte_order(&self, state: Id) -> Result<()> {
        let order = self.values.items(state).and_then(|items| self.values.text(*items.get(1)?));
        match order {
            Some("<" | "=" | "|") => Ok(()),
            _ => Err(self.fault("a numpy type that is not little-endian".into())),
        }
    }

    fn numpy_scalar(&mut self, dtype: Id, bytes: Id) -> Result<Id> {
        let (Value::Global(Global::NumpyDtype(Some(code))), Value::Bytes(bytes)) =
            (self.values.get(dtype), self.values.get(bytes))
        else {
            return Err(self.fault("a numpy number without type or bytes".into()));
        };
        let value = match (code, &bytes[..]) {
            (b"f8", &[a, b, c, d, e, f, g, h]) => Value::Float(f64::from_le_bytes([a, b, c, d, e, f, g, h])),
            (b"f4", &[a, b, c, d]) => Value::Float(f64::from(f32::from_le_bytes([a, b, c, d]))),
            (b"i8", &[a, b, c, d, e, f, g, h]) => Value::Int(i64::from_le_bytes([a, b, c, d, e, f, g, h])),
            (b"i4", &[a, b, c, d]) => Value::Int(i64::from(i32::from_le_bytes([a, b, c, d]))),
            _ => Value::Opaque,
        };
        self.add(value)
    }

    /// Text in which each character stands for a byte.
    fn encode(&mut self, text: Id) -> Result<Id> {
        let length = self.values.text(text).map_or(0, str::len);
        self.charge(length / BYTES_PER_VALUE)?;
        let bytes: Option<Vec<u8>> =
            self.values.text(text).and_then(|text| text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect());
        match bytes {
            Some(bytes) => self.add(Value::Bytes(bytes)),
            None => Err(self.fault("bytes that are not written as latin1".into())),
        }
    }
}

/// Whether a tensor has at most the elements of its storage, all inside of it.
fn fits(len: usize, offset: usize, shape: &[usize], stride: &[usize]) -> bool {
    // Nothing that follows may overflow, the product of an empty tensor's other dimensions included.
    let count = shape.iter().try_fold(1_usize, |count, dim| count.checked_mul((*dim).max(1)));
    if shape.contains(&0) {
        return offset <= len && count.is_some();
    }
    let reach = |last: usize, (dim, stride): (&usize, &usize)| last.checked_add((dim - 1).checked_mul(*stride)?);
    let last = shape.iter().zip(stride).try_fold(offset, reach);
    count.is_some_and(|count| count <= len) && last.is_some_and(|last| last < len)
}
