//! Reads pickles as plain data and executes nothing: the opcodes that `torch.save` writes (protocols 2 to 5), and of all that a
//! pickle may name only what [`super::globals`] knows. Values lie in one table and refer to each other by number, so that
//! cycles and deep nesting cost neither recursion nor leaks.

mod values;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::globals::Global;
use crate::error::{Error, Result};

pub use values::{Array, Element, Id, Storage, TensorRef, Value, Values};

/// Values that one pickle may make. A training checkpoint has some ten thousand.
const MAX_VALUES: usize = 1 << 20;
/// Newest protocol.
const MAX_PROTOCOL: u8 = 5;
/// Characters of a name shown in an error.
const SHOWN: usize = 60;

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle {
    /// Its values.
    pub values: Values,
    /// The value that it is.
    pub root: Id,
    /// Where it ends in the file.
    pub end: usize,
}

/// Reads the pickle that starts at `range.start` of a file and ends at `range.end` at the latest; `path` names the file.
///
/// # Errors
/// [`Error::Format`] with the byte in the file: for what is cut or inconsistent, and for everything that a file of tensors
/// has no need of.
pub fn read(path: &Path, file: &[u8], range: Range<usize>) -> Result<Pickle> {
    let file = file.get(..range.end).unwrap_or(file);
    let mut machine = Machine {
        path,
        file,
        at: range.start,
        opcode_at: range.start,
        values: Values::default(),
        budget: MAX_VALUES,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    Ok(Pickle { root, end: machine.at, values: machine.values })
}

/// A name of a file in an error: what is long or no text is not repeated.
pub fn shown(name: &str) -> String {
    let mut short: String = name.chars().take(SHOWN).flat_map(char::escape_default).collect();
    if name.chars().nth(SHOWN).is_some() {
        short.push_str("...");
    }
    short
}

/// The stack machine that a pickle is a program for.
pub(super) struct Machine<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
    opcode_at: usize,
    pub(super) values: Values,
    budget: usize,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id> {
        loop {
            self.opcode_at = self.at;
            let [opcode] = self.array()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => return self.protocol(),
            0x95 => return self.frame(),
            b'(' => self.marks.push(self.stack.len()),
            b'q' | b'r' | 0x94 => return self.memoise(opcode),
            b'h' | b'j' => return self.recall(opcode),
            b'a' => return self.append_one(),
            b'e' | 0x90 => return self.append_all(),
            b's' => return self.set_one(),
            b'u' => return self.set_all(),
            b'b' => {
                let state = self.pop()?;
                let target = self.top()?;
                return self.build(target, state);
            }
            b'R' | 0x81 => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                let result = self.call(callee, arguments, opcode == 0x81)?;
                self.stack.push(result);
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(&module, &name)?;
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.push_global(&module, &name)?;
            }
            b't' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(if opcode == b't' { Value::Tuple(items) } else { Value::List(items) })?;
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x85..=opcode {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Value::Tuple(items))?;
            }
            _ => {
                let value = self.constant(opcode)?;
                self.push(value)?;
            }
        }
        Ok(())
    }

    /// The opcodes that push what follows them.
    fn constant(&mut self, opcode: u8) -> Result<Value> {
        Ok(match opcode {
            b'}' => Value::Dict(Vec::new()),
            b']' | 0x8f => Value::List(Vec::new()),
            b')' => Value::Tuple(Vec::new()),
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(i64::from(u8::from_le_bytes(self.array()?))),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.array()?))),
            0x8a | 0x8b => {
                let bytes = self.counted(if opcode == 0x8a { 1 } else { 4 })?;
                integer(bytes)
            }
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'U' | b'C' => Value::Bytes(self.counted(1)?.to_vec()).into_text(opcode == b'U'),
            b'T' | b'B' => Value::Bytes(self.counted(4)?.to_vec()).into_text(opcode == b'T'),
            0x8e | 0x96 => Value::Bytes(self.counted(8)?.to_vec()),
            _ => {
                let what = format!("pickle opcode 0x{opcode:02x} is none that torch.save writes");
                return Err(self.fault(what));
            }
        })
    }

    fn protocol(&mut self) -> Result<()> {
        let [version] = self.array()?;
        if version > MAX_PROTOCOL {
            return Err(self.fault(format!("pickle protocol {version}: expected 2 to {MAX_PROTOCOL}")));
        }
        Ok(())
    }

    /// Frames are for readers of streams; here only the promise is checked.
    fn frame(&mut self) -> Result<()> {
        let length = u64::from_le_bytes(self.array()?);
        if length > (self.file.len() - self.at) as u64 {
            return Err(self.fault(format!("a pickle frame of {length} bytes, {} follow", self.file.len() - self.at)));
        }
        Ok(())
    }

    fn memoise(&mut self, opcode: u8) -> Result<()> {
        let key = match opcode {
            b'q' => u32::from(u8::from_le_bytes(self.array()?)),
            b'r' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        self.charge(1)?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<()> {
        let key = match opcode {
            b'h' => u32::from(u8::from_le_bytes(self.array()?)),
            _ => u32::from_le_bytes(self.array()?),
        };
        let Some(id) = self.memo.get(&key) else {
            return Err(self.fault(format!("the pickle recalls value {key}, which it has not stored")));
        };
        self.stack.push(*id);
        Ok(())
    }

    fn append_one(&mut self) -> Result<()> {
        let item = self.pop()?;
        self.append(vec![item])
    }

    fn append_all(&mut self) -> Result<()> {
        let items = self.pop_to_mark()?;
        self.append(items)
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        let target = self.top()?;
        match &mut self.values.0[target.0 as usize] {
            Value::List(list) => list.extend(items),
            other => {
                let what = format!("the pickle appends to {}", other.kind());
                return Err(self.fault(what));
            }
        }
        Ok(())
    }

    fn set_one(&mut self) -> Result<()> {
        let (value, key) = (self.pop()?, self.pop()?);
        self.set(&[key, value])
    }

    fn set_all(&mut self) -> Result<()> {
        let items = self.pop_to_mark()?;
        self.set(&items)
    }

    fn set(&mut self, items: &[Id]) -> Result<()> {
        let target = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        match &mut self.values.0[target.0 as usize] {
            Value::Dict(entries) if rest.is_empty() => entries.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            Value::Dict(_) => return Err(self.fault("a dict's key without its value".into())),
            other => {
                let what = format!("the pickle sets an item of {}", other.kind());
                return Err(self.fault(what));
            }
        }
        Ok(())
    }

    /// Takes note of an object's state.
    fn build(&mut self, target: Id, state: Id) -> Result<()> {
        if let Value::Array(None) = self.values.get(target) {
            let array = self.numpy_array(state)?;
            self.values.0[target.0 as usize] = Value::Array(array);
            return Ok(());
        }
        let state_is_dict = matches!(self.values.get(state), Value::Dict(_));
        match &mut self.values.0[target.0 as usize] {
            // Attributes of an OrderedDict: a state_dict has its _metadata there.
            Value::Dict(_) => Ok(()),
            Value::Object(attributes) if state_is_dict => {
                *attributes = Some(state);
                Ok(())
            }
            Value::Global(Global::NumpyDtype(_)) => self.check_numpy_byte_order(state),
            other => {
                let what = format!("the pickle sets the state of {}, which is not needed for tensors", other.kind());
                Err(self.fault(what))
            }
        }
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<()> {
        let Some(global) = Global::find(module, name) else {
            let what = format!("the pickle names {}.{}, which no file of tensors needs", shown(module), shown(name));
            let hint = "nothing of the file was executed; if you trust it, save its state_dict alone in PyTorch";
            return Err(self.fault(what).with_hint(hint));
        };
        self.push(Value::Global(global))
    }

    // What globals.rs is made of.

    /// An error about the opcode at hand.
    pub(super) fn fault(&self, what: String) -> Error {
        Error::format(self.path, Some(self.opcode_at as u64), what)
    }

    /// A new value in the table.
    pub(super) fn add(&mut self, value: Value) -> Result<Id> {
        self.charge(1)?;
        let id = Id(self.values.0.len() as u32);
        self.values.0.push(value);
        Ok(id)
    }

    /// Counts what takes memory that the file's length does not bound by itself.
    pub(super) fn charge(&mut self, units: usize) -> Result<()> {
        let left = self.budget.checked_sub(units);
        self.budget = left.ok_or_else(|| self.fault(format!("a pickle of more than {MAX_VALUES} values")))?;
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<()> {
        let id = self.add(value)?;
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => Err(self.fault("the pickle takes more values than there are".into())),
        }
    }

    fn top(&mut self) -> Result<Id> {
        let id = self.pop()?;
        self.stack.push(id);
        Ok(id)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let Some(mark) = self.marks.pop() else {
            return Err(self.fault("the pickle takes values up to a mark, and there is none".into()));
        };
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn pop_text(&mut self) -> Result<String> {
        let id = self.pop()?;
        match self.values.text(id) {
            Some(text) => Ok(text.to_string()),
            None => Err(self.fault(format!("a name is expected, got {}", self.values.get(id).kind()))),
        }
    }

    fn take(&mut self, length: u64) -> Result<&[u8]> {
        let left = (self.file.len() - self.at) as u64;
        if length > left {
            return Err(self.fault(format!("the pickle is cut: {length} bytes expected, {left} follow")));
        }
        let start = self.at;
        self.at += length as usize;
        Ok(&self.file[start..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    /// Bytes whose number comes before them, in `width` bytes.
    fn counted(&mut self, width: u64) -> Result<&[u8]> {
        let mut length = [0; 8];
        length[..width as usize].copy_from_slice(self.take(width)?);
        self.take(u64::from_le_bytes(length))
    }

    fn text(&mut self, width: u64) -> Result<Value> {
        let text = str::from_utf8(self.counted(width)?).map(String::from);
        text.map(Value::Text).map_err(|_| self.fault("a string that is not UTF-8".into()))
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.file[self.at..];
        let length = memchr::memchr(b'\n', rest).ok_or_else(|| self.fault("the pickle is cut within a name".into()))?;
        let line = str::from_utf8(&rest[..length]).map(String::from);
        self.at += length + 1;
        line.map_err(|_| self.fault("a name that is not UTF-8".into()))
    }
}

/// A two's complement number of any length.
fn integer(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Long(bytes.to_vec());
    }
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}
