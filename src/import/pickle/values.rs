//! The values that a pickle makes: one table, in which they refer to each other by number.

use super::super::globals::Global;
use crate::tensor::DType;

/// Number of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(pub(super) u32);

/// A value of a pickle.
#[derive(Debug, Clone)]
pub enum Value {
    /// None.
    None,
    /// True or False.
    Bool(bool),
    /// An int of 64 bits.
    Int(i64),
    /// A longer int, as little-endian two's complement.
    Long(Vec<u8>),
    /// A float.
    Float(f64),
    /// A str.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list or a set.
    List(Vec<Id>),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A dict, in the order of insertion.
    Dict(Vec<(Id, Id)>),
    /// An object of which nothing is kept but its attributes, a dict.
    Object(Option<Id>),
    /// A function or class.
    Global(Global),
    /// Memory of tensors.
    Storage(Box<Storage>),
    /// A tensor.
    Tensor(Box<TensorRef>),
    /// A numpy array; nothing of it when it is not row-major or its elements are not [`Element`]s.
    Array(Option<Box<Array>>),
    /// Something that is of no use here.
    Opaque,
}

/// Element types of storages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // named as PyTorch's
pub enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Element::F64 | Element::I64 => 8,
            Element::F32 | Element::I32 => 4,
            Element::F16 | Element::Bf16 | Element::I16 => 2,
            Element::I8 | Element::U8 | Element::Bool => 1,
        }
    }

    /// What holds such elements here: integers narrower than 64 bits are widened.
    pub fn dtype(self) -> DType {
        match self {
            Element::F64 => DType::F64,
            Element::F32 => DType::F32,
            Element::F16 => DType::F16,
            Element::Bf16 => DType::Bf16,
            Element::I64 | Element::I32 | Element::I16 | Element::I8 => DType::I64,
            Element::U8 | Element::Bool => DType::U8,
        }
    }
}

/// The memory that tensors are views of; its bytes lie outside of the pickle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Type of its elements.
    pub element: Element,
    /// What the file calls it.
    pub key: String,
    /// Number of elements.
    pub len: usize,
}

/// A view of a storage, inside of its bounds.
#[derive(Debug, Clone)]
pub struct TensorRef {
    /// Whose elements these are.
    pub storage: Storage,
    /// Its first element.
    pub offset: usize,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements between neighbours, in each dimension.
    pub stride: Vec<usize>,
}

/// A numpy array, row-major, of as many bytes as its shape says.
#[derive(Debug, Clone)]
pub struct Array {
    /// Type of its elements.
    pub element: Element,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The value with its bytes.
    pub bytes: Id,
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub struct Values(pub(super) Vec<Value>);

impl Values {
    /// A value.
    pub fn get(&self, id: Id) -> &Value {
        &self.0[id.0 as usize]
    }

    /// Every value.
    pub fn iter(&self) -> impl Iterator<Item = &Value> {
        self.0.iter()
    }

    /// The entries of a dict, or the attributes of an object.
    pub fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            Value::Object(Some(attributes)) => match self.get(*attributes) {
                Value::Dict(entries) => Some(entries),
                _ => None,
            },
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::List(items) | Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// What a dict has under a string.
    pub fn lookup(&self, dict: Id, key: &str) -> Option<Id> {
        let entries = self.entries(dict)?;
        entries.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }

    /// A string.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// An int.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// Bytes.
    pub fn bytes(&self, id: Id) -> Option<&[u8]> {
        match self.get(id) {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// A number.
    pub fn number(&self, id: Id) -> Option<f64> {
        match self.get(id) {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            _ => None,
        }
    }
}

impl Value {
    /// What Python 2 wrote as str is text wherever it can be.
    pub(super) fn into_text(self, is_str: bool) -> Value {
        match self {
            Value::Bytes(bytes) if is_str => {
                String::from_utf8(bytes).map_or_else(|e| Value::Bytes(e.into_bytes()), Value::Text)
            }
            other => other,
        }
    }

    /// What it is, in an error.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a bool",
            Value::Int(_) | Value::Long(_) => "an int",
            Value::Float(_) => "a float",
            Value::Text(_) => "a str",
            Value::Bytes(_) => "bytes",
            Value::List(_) => "a list",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dict",
            Value::Object(_) => "an object",
            Value::Global(_) => "a function or class",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
            Value::Array(_) => "a numpy array",
            Value::Opaque => "an opaque value",
        }
    }
}
