//! Shapes, element types and host tensors. Activations are NHWC; convolution weights are `[c_out][kh][kw][c_in]` (cuDNN's KRSC).

pub mod safetensors;

use std::fmt;

use crate::error::{Error, Result};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 64-bit float: the reference for gradient checks.
    F64,
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
    /// 64-bit signed integer (counters).
    I64,
    /// Byte.
    U8,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }

    /// Little-endian elements of this type nearest to `values`.
    pub fn encode(self, values: &[f64]) -> Vec<u8> {
        match self {
            DType::F64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|v| half::bf16::from_f64(*v).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| half::f16::from_f64(*v).to_le_bytes()).collect(),
            DType::I64 => values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
            DType::U8 => values.iter().map(|v| *v as u8).collect(),
        }
    }

    /// The same of float32 values.
    pub fn encode_f32(self, values: &[f32]) -> Vec<u8> {
        match self {
            DType::F32 => bytemuck::cast_slice(values).to_vec(),
            DType::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            other => other.encode(&values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I64 => "i64",
            DType::U8 => "u8",
        })
    }
}

/// Dimensions of a dense row-major tensor, outermost first. A scalar has no dimensions.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements (1 for a scalar).
    pub fn len(&self) -> usize {
        self.0.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The innermost dimension (channels), 1 for a scalar.
    pub fn channels(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Number of rows when seen as a matrix with the innermost dimension as columns.
    pub fn rows(&self) -> usize {
        self.len() / self.channels().max(1)
    }

    /// The dimensions as an array of known rank; `op` and `what` name the tensor in the error.
    pub fn expect<const R: usize>(&self, op: &str, what: &str) -> Result<[usize; R]> {
        self.0.as_slice().try_into().map_err(|_| Error::shape(op, what, format!("{R} dimensions"), self))
    }
}

impl<const R: usize> From<[usize; R]> for Shape {
    fn from(dims: [usize; R]) -> Shape {
        Shape(dims.to_vec())
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Shape {
        Shape(dims.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Shape and element type of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    /// Dimensions.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
}

impl TensorDesc {
    /// A description from dimensions and element type.
    pub fn new(shape: impl Into<Shape>, dtype: DType) -> TensorDesc {
        TensorDesc { shape: shape.into(), dtype }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.len() * self.dtype.size()
    }
}

impl fmt::Display for TensorDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

/// A dense tensor in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    desc: TensorDesc,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// A tensor over `bytes` (little-endian, row-major).
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of bytes does not fit the description.
    pub fn from_bytes(desc: TensorDesc, bytes: Vec<u8>) -> Result<HostTensor> {
        if bytes.len() != desc.bytes() {
            return Err(Error::shape("tensor", "bytes", format!("{} for {desc}", desc.bytes()), bytes.len()));
        }
        Ok(HostTensor { desc, bytes })
    }

    /// An f32 tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of values does not fit the shape.
    pub fn from_f32(shape: impl Into<Shape>, values: &[f32]) -> Result<HostTensor> {
        HostTensor::from_bytes(TensorDesc::new(shape, DType::F32), bytemuck::cast_slice(values).to_vec())
    }

    /// Shape and element type.
    pub fn desc(&self) -> &TensorDesc {
        &self.desc
    }

    /// The raw little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The elements of any float or integer type, widened to f64.
    pub fn to_f64(&self) -> Vec<f64> {
        fn widen<T: bytemuck::AnyBitPattern>(bytes: &[u8], f: impl Fn(T) -> f64) -> Vec<f64> {
            bytes.chunks_exact(size_of::<T>()).map(|chunk| f(bytemuck::pod_read_unaligned(chunk))).collect()
        }
        match self.desc.dtype {
            DType::F64 => widen::<f64>(&self.bytes, |x| x),
            DType::F32 => widen::<f32>(&self.bytes, f64::from),
            DType::Bf16 => widen::<u16>(&self.bytes, |x| half::bf16::from_bits(x).to_f64()),
            DType::F16 => widen::<u16>(&self.bytes, |x| half::f16::from_bits(x).to_f64()),
            DType::I64 => widen::<i64>(&self.bytes, |x| x as f64),
            DType::U8 => self.bytes.iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// The elements of an f32 tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] when the element type is another.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.desc.dtype {
            DType::F32 => Ok(bytemuck::pod_collect_to_vec(&self.bytes)),
            other => Err(Error::shape("tensor", "element type", DType::F32, other)),
        }
    }
}
