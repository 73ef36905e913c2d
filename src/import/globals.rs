//! All that a pickle may name, and what naming it gives: plain data. Nothing else is let through, and none of this is executed.

use super::pickle::{Array, Element, Id, Machine, Storage, TensorRef, Value};
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
    /// `bytes`: how protocol 2 writes those that are empty.
    Bytes,
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
    /// `numpy.ndarray`.
    NumpyArray,
    /// `numpy.core.multiarray._reconstruct`: an array that is yet to be given its state.
    NumpyReconstruct,
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
            ("builtins" | "__builtin__", "bytes") => Global::Bytes,
            ("torch", "Size") => Global::Size,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "float32" | "float64" | "float16" | "bfloat16" | "int64" | "device") => Global::Opaque,
            ("torch", _) => Global::StorageType(storage_element(name)?),
            ("numpy", "dtype") => Global::NumpyDtype(None),
            ("numpy", "ndarray") => Global::NumpyArray,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Global::NumpyScalar,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Global::NumpyReconstruct,
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

fn numpy_element(code: [u8; 2]) -> Option<Element> {
    Some(match &code {
        b"f8" => Element::F64,
        b"f4" => Element::F32,
        b"f2" => Element::F16,
        b"i8" => Element::I64,
        b"i4" => Element::I32,
        b"i2" => Element::I16,
        b"i1" => Element::I8,
        b"u1" => Element::U8,
        b"b1" => Element::Bool,
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
            (Global::Bytes, []) => self.add(Value::Bytes(Vec::new())),
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
            (Global::NumpyReconstruct, [class, ..])
                if matches!(self.values.get(*class), Value::Global(Global::NumpyArray)) =>
            {
                self.add(Value::Array(None))
            }
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

    /// `f8`, `<i4` and so on.
    fn numpy_dtype(&mut self, code: Id) -> Result<Id> {
        let code = self.values.text(code).map(|code| code.strip_prefix(['<', '=', '|']).unwrap_or(code));
        match code.and_then(|code| <[u8; 2]>::try_from(code.as_bytes()).ok()) {
            Some(code) => self.add(Value::Global(Global::NumpyDtype(Some(code)))),
            None => Err(self.fault("a numpy type that is no little-endian number".into())),
        }
    }

    /// The array whose state is (version, shape, dtype, column-major?, bytes), if it is of use here.
    pub(super) fn numpy_array(&self, state: Id) -> Result<Option<Box<Array>>> {
        let Some([_version, shape, dtype, column_major, bytes]) = self.values.items(state) else {
            return Err(self.fault("a numpy array whose state is no tuple of five".into()));
        };
        let (Some(shape), Value::Global(Global::NumpyDtype(Some(code)))) =
            (self.sizes(*shape), self.values.get(*dtype))
        else {
            return Err(self.fault(format!("a numpy array without a type or a shape of up to {MAX_RANK} dimensions")));
        };
        let (Some(element), Value::Bool(false)) = (numpy_element(*code), self.values.get(*column_major)) else {
            return Ok(None);
        };
        let expected = shape.iter().try_fold(element.size(), |bytes, dim| bytes.checked_mul(*dim));
        let got = self.values.bytes(*bytes).map(<[u8]>::len);
        if got.is_none() || got != expected {
            let got = got.map_or(self.values.get(*bytes).kind().into(), |got| format!("{got} bytes"));
            return Err(self.fault(format!("a numpy array {shape:?} of {element:?} with {got}")));
        }
        Ok(Some(Box::new(Array { element, shape, bytes: *bytes })))
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::pickle::{Array, Element, Id, Value, Values, read};

    /// Python 3.11, numpy 2.4: `pickle.dumps(a, 2)` and `pickle.dumps(a, 4)` of
    /// `a = np.array([[1.5, -2, 0], [3, 0.25, -0.0]], "<f4")`.
    const MATRIX: [&[u8]; 2] = [
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02c_\
          codecs\nencode\nq\x03X\x01\x00\x00\x00bq\x04X\x06\x00\x00\x00latin1q\x05\x86q\x06Rq\x07\
          \x87q\x08Rq\x09(K\x01K\x02K\x03\x86q\ncnumpy\ndtype\nq\x0bX\x02\x00\x00\x00f4q\x0c\x89\
          \x88\x87q\x0dRq\x0e(K\x03X\x01\x00\x00\x00<q\x0fNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\
          \x00tq\x10b\x89h\x03X\x1c\x00\x00\x00\x00\x00\xc3\x80?\x00\x00\x00\xc3\x80\x00\x00\x00\
          \x00\x00\x00@@\x00\x00\xc2\x80>\x00\x00\x00\xc2\x80q\x11h\x05\x86q\x12Rq\x13tq\x14b.",
        b"\x80\x04\x95\xa3\x00\x00\x00\x00\x00\x00\x00\x8c\x16numpy._core.multiarray\x94\x8c\x0c_rec\
          onstruct\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94C\x01b\x94\
          \x87\x94R\x94(K\x01K\x02K\x03\x86\x94h\x03\x8c\x05dtype\x94\x93\x94\x8c\x02f4\x94\x89\x88\
          \x87\x94R\x94(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b\x89C\x18\
          \x00\x00\xc0?\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00@@\x00\x00\x80>\x00\x00\x00\x80\x94t\
          \x94b.",
    ];
    /// `pickle.dumps({"x": np.array([7, -1], "<i2"), "key": np.array([1, 2], "<u4"), "t": np.asfortranarray(a),
    /// "e": np.zeros((0, 3)), "s": np.array(True)}, 2)`.
    const SEVERAL: &[u8] = b"\x80\x02}q\x00(X\x01\x00\x00\x00xq\x01cnumpy._core.multiarray\n_reconstruct\nq\x02cnumpy\
          \nndarray\nq\x03K\x00\x85q\x04c_codecs\nencode\nq\x05X\x01\x00\x00\x00bq\x06X\x06\x00\x00\
          \x00latin1q\x07\x86q\x08Rq\x09\x87q\nRq\x0b(K\x01K\x02\x85q\x0ccnumpy\ndtype\nq\x0dX\x02\
          \x00\x00\x00i2q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\x00\x00\x00<q\x11NNNJ\xff\xff\xff\
          \xffJ\xff\xff\xff\xffK\x00tq\x12b\x89h\x05X\x06\x00\x00\x00\x07\x00\xc3\xbf\xc3\xbfq\x13h\
          \x07\x86q\x14Rq\x15tq\x16bX\x03\x00\x00\x00keyq\x17h\x02h\x03K\x00\x85q\x18h\x09\x87q\x19R\
          q\x1a(K\x01K\x02\x85q\x1bh\x0dX\x02\x00\x00\x00u4q\x1c\x89\x88\x87q\x1dRq\x1e(K\x03h\x11NN\
          NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x1fb\x89h\x05X\x08\x00\x00\x00\x01\x00\x00\x00\
          \x02\x00\x00\x00q h\x07\x86q!Rq\"tq#bX\x01\x00\x00\x00tq$h\x02h\x03K\x00\x85q%h\x09\x87q&R\
          q'(K\x01K\x02K\x03\x86q(h\x0dX\x02\x00\x00\x00f4q)\x89\x88\x87q*Rq+(K\x03h\x11NNNJ\xff\
          \xff\xff\xffJ\xff\xff\xff\xffK\x00tq,b\x88h\x05X\x1c\x00\x00\x00\x00\x00\xc3\x80?\x00\x00@\
          @\x00\x00\x00\xc3\x80\x00\x00\xc2\x80>\x00\x00\x00\x00\x00\x00\x00\xc2\x80q-h\x07\x86q.Rq/\
          tq0bX\x01\x00\x00\x00eq1h\x02h\x03K\x00\x85q2h\x09\x87q3Rq4(K\x01K\x00K\x03\x86q5h\x0dX\
          \x02\x00\x00\x00f8q6\x89\x88\x87q7Rq8(K\x03h\x11NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\
          \x00tq9b\x89c__builtin__\nbytes\nq:)Rq;tq<bX\x01\x00\x00\x00sq=h\x02h\x03K\x00\x85q>h\x09\
          \x87q?Rq@(K\x01)h\x0dX\x02\x00\x00\x00b1qA\x89\x88\x87qBRqC(K\x03X\x01\x00\x00\x00|qDNNNJ\
          \xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tqEb\x89h\x05X\x01\x00\x00\x00\x01qFh\x07\x86qGRqHtq\
          Ibu.";

    fn array<'a>(values: &'a Values, id: Id) -> Option<(&'a Array, &'a [u8])> {
        let Value::Array(array) = values.get(id) else { panic!("{:?}", values.get(id)) };
        array.as_ref().map(|array| (&**array, values.bytes(array.bytes).unwrap()))
    }

    #[test]
    fn numpys_arrays_are_what_python_wrote() {
        let expected: Vec<u8> = [1.5f32, -2.0, 0.0, 3.0, 0.25, -0.0].into_iter().flat_map(f32::to_le_bytes).collect();
        for file in MATRIX {
            let pickle = read(Path::new("x"), file, 0..file.len()).unwrap();
            let (array, bytes) = array(&pickle.values, pickle.root).unwrap();
            assert_eq!((array.element, &array.shape[..], bytes), (Element::F32, &[2, 3][..], &expected[..]));
        }
        let pickle = read(Path::new("x"), SEVERAL, 0..SEVERAL.len()).unwrap();
        let found = |key: &str| array(&pickle.values, pickle.values.lookup(pickle.root, key).unwrap());
        for (key, element, shape, bytes) in [
            ("x", Element::I16, &[2][..], &[7, 0, 255, 255][..]),
            ("e", Element::F64, &[0, 3], &[]),
            ("s", Element::Bool, &[], &[1]),
        ] {
            let (array, got) = found(key).unwrap();
            assert_eq!((array.element, &array.shape[..], got), (element, shape, bytes), "{key}");
        }
        assert!(found("key").is_none() && found("t").is_none(), "unsigned, column-major");
    }
}
