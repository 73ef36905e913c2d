//! The messages of an ONNX file (onnx.proto) with the fields that are used here; others are passed over when read.

use prost::Message;

/// float32 in [`Tensor::data_type`] and [`TensorType::elem_type`].
pub const FLOAT: i32 = 1;

/// A file.
#[derive(Clone, PartialEq, Message)]
pub struct Model {
    /// Version of these messages.
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    /// Program that made it.
    #[prost(string, tag = "2")]
    pub producer_name: String,
    /// What it computes.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<Graph>,
    /// Versions of the operators.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSet>,
    /// Facts about the model.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<Entry>,
}

/// A version of a set of operators.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSet {
    /// Its name; empty for the standard ones.
    #[prost(string, tag = "1")]
    pub domain: String,
    /// Its version.
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// A key and its value.
#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    /// The key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Nodes in an order in which they can run.
#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    /// The nodes.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<Node>,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Weights.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<Tensor>,
    /// What it is given.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfo>,
    /// What it gives.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfo>,
}

/// An operator, applied.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// Names of the values read.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the values made.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// The node's name.
    #[prost(string, tag = "3")]
    pub name: String,
    /// The operator.
    #[prost(string, tag = "4")]
    pub op_type: String,
    /// Its settings.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<Attribute>,
}

/// A setting of an operator: a number, or several whole ones.
#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// When it is a real number.
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// When it is a whole number.
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// When it is several.
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    /// Which of them it is.
    #[prost(int32, tag = "20")]
    pub kind: i32,
}

impl Attribute {
    /// A real number.
    pub fn float(name: &str, value: f64) -> Attribute {
        Attribute { name: name.into(), f: Some(value as f32), kind: 1, ..Attribute::default() }
    }

    /// A whole number.
    pub fn int(name: &str, value: i64) -> Attribute {
        Attribute { name: name.into(), i: Some(value), kind: 2, ..Attribute::default() }
    }

    /// Several whole numbers.
    pub fn ints(name: &str, values: &[usize]) -> Attribute {
        let ints = values.iter().map(|&value| value as i64).collect();
        Attribute { name: name.into(), ints, kind: 7, ..Attribute::default() }
    }
}

/// A constant tensor, row-major.
#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    /// Its shape.
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    /// Its element type.
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    /// Its name.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Its elements, little-endian.
    #[prost(bytes = "vec", tag = "9")]
    pub raw_data: Vec<u8>,
}

/// A value with its type.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfo {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub kind: Option<Type>,
}

/// The type of a value: a tensor's, here.
#[derive(Clone, PartialEq, Message)]
pub struct Type {
    /// Element type and shape.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorType>,
}

/// Element type and shape.
#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    /// The element type.
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    /// The shape.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShape>,
}

/// A shape with free dimensions.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShape {
    /// The dimensions.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<Dimension>,
}

/// A dimension: a size, or the name of one that is free.
#[derive(Clone, PartialEq, Message)]
pub struct Dimension {
    /// The size.
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    /// The name.
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}
