//! The part of Python's pickle format that weights need, as a tree of values: written, and read back to see that it was written
//! well. Nothing is executed: a function call is a value like any other. Pickles of others have opcodes that are not known here.

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

    /// The value in a pickle that [`Value::write`] wrote.
    ///
    /// # Errors
    /// What is wrong, and at which byte.
    pub fn read(bytes: &'a [u8]) -> Result<Value<'a>, String> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(1)? != [op::PROTO] || !matches!(reader.take(1)?, [2 | 3]) {
            return Err("not a pickle of protocol 2 or 3".into());
        }
        let mut stack = vec![Vec::new()];
        loop {
            let at = reader.at;
            let code = reader.take(1)?[0];
            let fault = || format!("the pickle breaks at byte {at}, opcode {code:#04x}");
            if code == op::STOP {
                let [top] = stack.as_mut_slice() else { return Err(fault()) };
                return (top.len() == 1).then(|| top.pop()).flatten().ok_or_else(fault);
            }
            reader.step(code, &mut stack)?.ok_or_else(fault)?;
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

/// A pickle being read.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// The values since each mark.
type Stack<'a> = Vec<Vec<Value<'a>>>;

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the pickle ends within {count} bytes at {}", self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "unreachable: as long as asked for".into())
    }

    fn sized(&mut self) -> Result<&'a [u8], String> {
        let length = u32::from_le_bytes(self.array()?);
        self.take(length as usize)
    }

    fn text(&mut self, bytes: &'a [u8]) -> Result<String, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| format!("text before byte {} is not UTF-8", self.at))?;
        Ok(text.into())
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let end = memchr::memchr(b'\n', rest).ok_or("the pickle ends within a name")?;
        let line = self.take(end + 1)?;
        self.text(&line[..end])
    }

    /// Carries out one opcode; nothing when it finds another stack than it needs, or is not known.
    fn step(&mut self, code: u8, stack: &mut Stack<'a>) -> Result<Option<()>, String> {
        let value = match code {
            op::MARK => {
                stack.push(Vec::new());
                return Ok(Some(()));
            }
            op::NONE => Value::None,
            op::NEWTRUE => Value::Bool(true),
            op::NEWFALSE => Value::Bool(false),
            op::EMPTY_DICT => Value::Dict(Vec::new()),
            op::BININT => Value::Int(i32::from_le_bytes(self.array()?).into()),
            op::LONG1 if self.take(1)? == [8] => Value::Int(i64::from_le_bytes(self.array()?)),
            op::BINBYTES => Value::Bytes(self.sized()?),
            op::BINUNICODE => {
                let bytes = self.sized()?;
                Value::Str(self.text(bytes)?)
            }
            op::GLOBAL => Value::Global(self.line()?, self.line()?),
            _ => return Ok(combine(code, stack)),
        };
        Ok(stack.last_mut().map(|top| top.push(value)))
    }
}

/// The opcodes that make one value of those on the stack.
fn combine(code: u8, stack: &mut Stack<'_>) -> Option<()> {
    if matches!(code, op::TUPLE | op::SETITEMS) {
        let items = stack.pop()?;
        let below = stack.last_mut()?;
        if code == op::TUPLE {
            below.push(Value::Tuple(items));
            return Some(());
        }
        let Value::Dict(dict) = below.last_mut()? else { return None };
        let mut items = items.into_iter();
        while let Some(key) = items.next() {
            dict.push((key, items.next()?));
        }
        return Some(());
    }
    let top = stack.last_mut()?;
    let last = top.pop()?;
    let value = match code {
        op::BINPERSID => Value::Persistent(Box::new(last)),
        op::REDUCE => Value::Call(Box::new([top.pop()?, last])),
        op::BUILD => Value::Build(Box::new([top.pop()?, last])),
        _ => return None,
    };
    top.push(value);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Value<'static> {
        let made = Value::call(Value::global("collections", "OrderedDict"), vec![]);
        let items = vec![
            (Value::text("sizes"), Value::sizes(&[3, 0, 1 << 40])),
            (Value::text("größe"), Value::Int(-7)),
            (Value::Int(i64::MIN), Value::Tuple(vec![Value::None, Value::Bool(true), Value::Bool(false)])),
            (Value::text("data"), Value::Bytes(b"\x00\xffnot text\n")),
            (Value::text("built"), Value::Build(Box::new([made, Value::Dict(vec![])]))),
            (Value::text("outside"), Value::Persistent(Box::new(Value::Tuple(vec![Value::text("0")])))),
        ];
        Value::Dict(items)
    }

    #[test]
    fn reads_what_it_wrote() {
        let mut bytes = Vec::new();
        sample().write(3, &mut bytes).unwrap();
        assert_eq!(Value::read(&bytes).unwrap(), sample());
        // Python 3.11: pickle.dumps((1, "a"), protocol=2) without its memo.
        let mut small = Vec::new();
        Value::Tuple(vec![Value::Int(1), Value::text("a")]).write(2, &mut small).unwrap();
        assert_eq!(small, b"\x80\x02(J\x01\x00\x00\x00X\x01\x00\x00\x00at.");
    }

    #[test]
    fn no_damage_panics_and_no_cut_is_taken_for_whole() {
        let mut bytes = Vec::new();
        sample().write(3, &mut bytes).unwrap();
        for at in 0..bytes.len() {
            assert!(Value::read(&bytes[..at]).is_err(), "cut at {at}");
            for flip in [1, 0x20, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                let _ = Value::read(&damaged); // an error or another value, never a panic
            }
        }
    }
}
