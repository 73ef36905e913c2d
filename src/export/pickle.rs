//! The part of Python's pickle format that weights need, as a tree of values to be written. A function call is a value like any
//! other. Pickles are read by `import::pickle`.

use std::io::{self, Write};

/// A pickled value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// `None`.
    None,
    /// A `bool`.
    Bool(bool),
    /// An `int`.
    Int(i64),
    /// A `str`.
    Str(String),
    /// A `bytes` object. Needs protocol 3.
    Bytes(&'a [u8]),
    /// A `tuple`.
    Tuple(Vec<Value<'a>>),
    /// A `dict`, in its order.
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// A class or function: module and name.
    Global(String, String),
    /// What a function makes of a tuple of arguments.
    Call(Box<[Value<'a>; 2]>),
    /// An object, and the state that its `__setstate__` is given.
    Build(Box<[Value<'a>; 2]>),
    /// An object that lies outside, and how it is found there.
    Persistent(Box<Value<'a>>),
}

/// Opcodes, by the names of Python's `pickle` module.
mod op {
    pub const PROTO: u8 = 0x80;
    pub const STOP: u8 = b'.';
    pub const MARK: u8 = b'(';
    pub const NONE: u8 = b'N';
    pub const NEWTRUE: u8 = 0x88;
    pub const NEWFALSE: u8 = 0x89;
    pub const BININT: u8 = b'J';
    pub const LONG1: u8 = 0x8a;
    pub const BINUNICODE: u8 = b'X';
    pub const BINBYTES: u8 = b'B';
    pub const TUPLE: u8 = b't';
    pub const EMPTY_DICT: u8 = b'}';
    pub const SETITEMS: u8 = b'u';
    pub const GLOBAL: u8 = b'c';
    pub const REDUCE: u8 = b'R';
    pub const BUILD: u8 = b'b';
    pub const BINPERSID: u8 = b'Q';
}

impl<'a> Value<'a> {
    /// A `str`.
    pub fn text(text: &str) -> Value<'a> {
        Value::Str(text.into())
    }

    /// The class or function `name` of `module`.
    pub fn global(module: &str, name: &str) -> Value<'a> {
        Value::Global(module.into(), name.into())
    }

    /// What `function` makes of `arguments`.
    pub fn call(function: Value<'a>, arguments: Vec<Value<'a>>) -> Value<'a> {
        Value::Call(Box::new([function, Value::Tuple(arguments)]))
    }

    /// A tuple of sizes.
    pub fn sizes(sizes: &[usize]) -> Value<'a> {
        Value::Tuple(sizes.iter().map(|&size| Value::Int(size as i64)).collect())
    }

    /// The pickle of this value alone, in protocol 2 or 3.
    ///
    /// # Errors
    /// What `out` reports; strings and bytes of 4 GiB and more.
    pub fn write(&self, protocol: u8, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&[op::PROTO, protocol])?;
        self.put(out)?;
        out.write_all(&[op::STOP])
    }

    fn put(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Value::None => out.write_all(&[op::NONE]),
            Value::Bool(true) => out.write_all(&[op::NEWTRUE]),
            Value::Bool(false) => out.write_all(&[op::NEWFALSE]),
            Value::Int(value) => match i32::try_from(*value) {
                Ok(small) => tagged(op::BININT, &small.to_le_bytes(), out),
                Err(_) => tagged(op::LONG1, &[&[8], value.to_le_bytes().as_slice()].concat(), out),
            },
            Value::Str(text) => sized(op::BINUNICODE, text.as_bytes(), out),
            Value::Bytes(bytes) => sized(op::BINBYTES, bytes, out),
            Value::Tuple(items) => {
                out.write_all(&[op::MARK])?;
                items.iter().try_for_each(|item| item.put(out))?;
                out.write_all(&[op::TUPLE])
            }
            Value::Dict(items) => {
                out.write_all(&[op::EMPTY_DICT, op::MARK])?;
                items.iter().try_for_each(|(key, value)| key.put(out).and_then(|()| value.put(out)))?;
                out.write_all(&[op::SETITEMS])
            }
            Value::Global(module, name) => tagged(op::GLOBAL, format!("{module}\n{name}\n").as_bytes(), out),
            Value::Call(parts) => pair(parts, op::REDUCE, out),
            Value::Build(parts) => pair(parts, op::BUILD, out),
            Value::Persistent(id) => id.put(out).and_then(|()| out.write_all(&[op::BINPERSID])),
        }
    }
}

fn tagged(code: u8, bytes: &[u8], out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&[code])?;
    out.write_all(bytes)
}

fn sized(code: u8, bytes: &[u8], out: &mut dyn Write) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::Error::other("a pickled object ends at 4 GiB"))?;
    tagged(code, &length.to_le_bytes(), out)?;
    out.write_all(bytes)
}

fn pair(parts: &[Value<'_>; 2], code: u8, out: &mut dyn Write) -> io::Result<()> {
    parts.iter().try_for_each(|part| part.put(out))?;
    out.write_all(&[code])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::import::pickle::{self, Id, Values};

    /// What the importer's reader finds, in Python's notation.
    fn shown(values: &Values, id: Id) -> String {
        use pickle::Value;
        let all = |ids: &[Id]| ids.iter().map(|&id| shown(values, id)).collect::<Vec<_>>().join(", ");
        match values.get(id) {
            Value::Tuple(items) => format!("({})", all(items)),
            Value::Dict(entries) => {
                let pair = |(key, value): &(Id, Id)| format!("{}: {}", shown(values, *key), shown(values, *value));
                format!("{{{}}}", entries.iter().map(pair).collect::<Vec<_>>().join(", "))
            }
            Value::Int(value) => value.to_string(),
            Value::Text(text) => format!("{text:?}"),
            Value::Bytes(bytes) => format!("b{:?}", bytes.escape_ascii().to_string()),
            other => format!("<{}>", other.kind()),
        }
    }

    #[test]
    fn is_read_by_the_importer_as_it_was_meant() {
        let array = [Value::global("numpy", "ndarray"), Value::sizes(&[0]), Value::Bytes(b"b")];
        let array = Value::call(Value::global("numpy.core.multiarray", "_reconstruct"), array.into());
        let dtype = Value::call(Value::global("numpy", "dtype"), vec![Value::text("|u1")]);
        let state = vec![Value::Int(1), Value::sizes(&[2]), dtype, Value::Bool(false), Value::Bytes(b"ab")];
        let storage = vec![
            Value::text("storage"),
            Value::global("torch", "FloatStorage"),
            Value::text("7"),
            Value::text("cpu"),
            Value::Int(3),
        ];
        let items = vec![
            (Value::text("sizes"), Value::sizes(&[3, 0, 1 << 40])),
            (Value::text("größe"), Value::Int(-7)),
            (Value::Int(i64::MIN), Value::Tuple(vec![Value::None, Value::Bool(true), Value::Bool(false)])),
            (Value::text("data"), Value::Bytes(b"\x00\xffnot text\n")),
            (Value::text("called"), Value::call(Value::global("collections", "OrderedDict"), vec![])),
            (Value::text("built"), Value::Build(Box::new([array, Value::Tuple(state)]))),
            (Value::text("outside"), Value::Persistent(Box::new(Value::Tuple(storage)))),
        ];
        let mut bytes = Vec::new();
        Value::Dict(items).write(3, &mut bytes).unwrap();
        let read = |bytes: &[u8]| pickle::read(Path::new("x"), bytes, 0..bytes.len());
        let whole = read(&bytes).unwrap();
        let expected = concat!(
            "{\"sizes\": (3, 0, 1099511627776), \"größe\": -7, -9223372036854775808: (<None>, <a bool>, <a bool>), ",
            "\"data\": b\"\\\\x00\\\\xffnot text\\\\n\", \"called\": {}, ",
            "\"built\": <a numpy array>, \"outside\": <a storage>}",
        );
        assert_eq!((shown(&whole.values, whole.root).as_str(), whole.end), (expected, bytes.len()));
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn bytes_are_those_of_python() {
        // Python 3.11: pickle.dumps((1, "a"), protocol=2) without its memo.
        let mut small = Vec::new();
        Value::Tuple(vec![Value::Int(1), Value::text("a")]).write(2, &mut small).unwrap();
        assert_eq!(small, b"\x80\x02(J\x01\x00\x00\x00X\x01\x00\x00\x00at.");
    }
}
