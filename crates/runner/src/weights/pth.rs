//! Reads what `torch.save` writes for a dictionary of tensors, and nothing else.
//!
//! Such a file is a ZIP archive of stored members: `NAME/data.pkl`, a pickle of the dictionary in which a tensor is a
//! call with a reference to its storage, and `NAME/data/KEY`, the bytes of each storage (torch/serialization.py). A
//! pickle is a program. This reader knows the instructions that such a dictionary needs and four names that it may call;
//! it builds values and runs nothing, whatever the file says.

use std::collections::{BTreeMap, HashMap};

use super::{Format, floats};
use engine::{State, Tensor};

/// What is wrong with a file.
type Result<T> = std::result::Result<T, String>;

/// No member of an archive is compressed, and none lies outside of it.
fn members(file: &[u8]) -> Result<HashMap<String, &[u8]>> {
    let cut = || "the archive is cut short".to_owned();
    let u16_at = |at: usize| {
        let bytes = file.get(at..at + 2).ok_or_else(cut)?;
        Ok::<_, String>(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    };
    let u32_at = |at: usize| Ok::<_, String>(u16_at(at)? | u16_at(at + 2)? << 16);
    // The end of the directory: a fixed part of 22 bytes and a comment, which torch leaves empty.
    let least = file.len().saturating_sub(22 + 0xffff);
    let mut ends = (least..file.len().saturating_sub(21)).rev();
    let end = ends.find(|&at| file[at..].starts_with(b"PK\x05\x06"));
    let end = end.ok_or(
        "it has no directory of a ZIP archive; files from before torch 1.6 have to be saved again",
    )?;
    let (count, mut at) = (u16_at(end + 10)?, u32_at(end + 16)?);
    if count == 0xffff || at == 0xffff_ffff {
        return Err("archives of 4 GiB and more are not read; save it as safetensors".into());
    }
    let mut members = HashMap::new();
    for _ in 0..count {
        if file.get(at..at + 4) != Some(b"PK\x01\x02") {
            return Err("the archive's directory is damaged".into());
        }
        let (method, size) = (u16_at(at + 10)?, u32_at(at + 24)?);
        let (name, extra, comment) = (u16_at(at + 28)?, u16_at(at + 30)?, u16_at(at + 32)?);
        let local = u32_at(at + 42)?;
        let text = file.get(at + 46..at + 46 + name).ok_or_else(cut)?;
        let text = String::from_utf8_lossy(text).into_owned();
        if method != 0 || u32_at(at + 20)? != size {
            return Err(format!(
                "member {text} is compressed, which torch.save never does"
            ));
        }
        let start = local + 30 + u16_at(local + 26)? + u16_at(local + 28)?;
        let bytes = file.get(start..start + size).ok_or_else(cut)?;
        members.insert(text, bytes);
        at += 46 + name + extra + comment;
    }
    Ok(members)
}

/// A value of a pickle.
#[derive(Clone, Debug)]
enum Value {
    None,
    Int(i64),
    Text(String),
    /// True, false, a number with a point: nothing depends on them.
    Other,
    Mark,
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// A name that may be called.
    Global(Global),
    Storage {
        format: Format,
        key: String,
    },
    Tensor {
        format: Format,
        key: String,
        offset: usize,
        shape: Vec<usize>,
        strides: Vec<usize>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Format),
}

impl Global {
    fn new(module: &str, name: &str) -> Result<Self> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::Storage(Format::F32),
            ("torch", "DoubleStorage") => Self::Storage(Format::F64),
            ("torch", "HalfStorage") => Self::Storage(Format::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Format::Bf16),
            ("torch", "LongStorage") => Self::Storage(Format::I64),
            _ => {
                return Err(format!(
                    "it asks for {module}.{name}, which no state dict needs; save model.state_dict() alone"
                ));
            }
        })
    }
}

/// The instructions of a pickle, from its bytes.
struct Pickle<'a> {
    bytes: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
}

/// Far more than a state dict has; a pickle that copies its memo grows exponentially.
const MOST_VALUES: usize = 1 << 20;

impl<'a> Pickle<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(count)
            .ok_or("its pickle is cut short")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<u32> {
        let taken = self.take(bytes)?;
        let number = taken.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        u32::try_from(number).map_err(|_| "a number in its pickle is too large".into())
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.bytes.iter().position(|&b| b == b'\n');
        let line = self.take(end.ok_or("its pickle is cut short")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name in its pickle is no text".into())
    }

    fn text(&mut self, length: usize) -> Result<Value> {
        let text = std::str::from_utf8(self.take(length)?);
        let text = text.map_err(|_| "a text in its pickle is not UTF-8")?;
        Ok(Value::Text(text.into()))
    }

    fn pop(&mut self) -> Result<Value> {
        self.stack
            .pop()
            .ok_or_else(|| "its pickle is damaged".into())
    }

    /// What lies above the last mark.
    fn marked(&mut self) -> Result<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark));
        let mark = mark.ok_or("its pickle is damaged")?;
        let above = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(above)
    }

    fn top(&mut self) -> Result<&mut Value> {
        self.stack
            .last_mut()
            .ok_or_else(|| "its pickle is damaged".into())
    }

    fn keep(&mut self, at: u32) -> Result<()> {
        let value = self.top()?.clone();
        // Dictionaries are built after they are kept, and none is asked for twice.
        self.memo.insert(at, value);
        Ok(())
    }

    fn set(&mut self, items: Vec<Value>) -> Result<()> {
        let Value::Dict(dict) = self.top()? else {
            return Err("its pickle is damaged".into());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            dict.push((key, value));
        }
        Ok(())
    }

    fn run(mut self) -> Result<Value> {
        loop {
            if self.stack.len() > MOST_VALUES {
                return Err("its pickle holds too many values".into());
            }
            let value = match self.take(1)?[0] {
                0x80 => {
                    self.take(1)?; // version
                    continue;
                }
                0x95 => {
                    self.take(8)?; // length of a frame
                    continue;
                }
                b'.' => return self.pop(),
                b'(' => Value::Mark,
                b'}' => Value::Dict(vec![]),
                b']' => Value::List(vec![]),
                b')' => Value::Tuple(vec![]),
                b't' => Value::Tuple(self.marked()?),
                code @ 0x85..=0x87 => {
                    let count = usize::from(code - 0x84);
                    let from = self.stack.len().checked_sub(count);
                    Value::Tuple(self.stack.split_off(from.ok_or("its pickle is damaged")?))
                }
                b'N' => Value::None,
                0x88 | 0x89 => Value::Other,
                b'G' => {
                    self.take(8)?;
                    Value::Other
                }
                b'K' => Value::Int(self.number(1)?.into()),
                b'M' => Value::Int(self.number(2)?.into()),
                b'J' => Value::Int((self.number(4)? as i32).into()),
                0x8a => {
                    let length = self.number(1)? as usize;
                    let bytes = self.take(length)?;
                    let bytes = (length < 8)
                        .then_some(bytes)
                        .ok_or("a number in its pickle is too large")?;
                    let low = bytes.iter().rev().fold(0i64, |n, &b| n << 8 | i64::from(b));
                    let is_negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                    Value::Int(if is_negative {
                        low - (1 << (8 * length))
                    } else {
                        low
                    })
                }
                b'X' => {
                    let length = self.number(4)? as usize;
                    self.text(length)?
                }
                0x8c => {
                    let length = self.number(1)? as usize;
                    self.text(length)?
                }
                b'q' => {
                    let at = self.number(1)?;
                    self.keep(at)?;
                    continue;
                }
                b'r' => {
                    let at = self.number(4)?;
                    self.keep(at)?;
                    continue;
                }
                0x94 => {
                    let at = self.memo.len() as u32;
                    self.keep(at)?;
                    continue;
                }
                code @ (b'h' | b'j') => {
                    let at = self.number(if code == b'h' { 1 } else { 4 })?;
                    match self.memo.get(&at) {
                        Some(Value::Dict(_) | Value::List(_)) | None => {
                            return Err("its pickle refers to a value that it has not made".into());
                        }
                        Some(value) => value.clone(),
                    }
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    Value::Global(Global::new(module, name)?)
                }
                0x93 => match (self.pop()?, self.pop()?) {
                    (Value::Text(name), Value::Text(module)) => {
                        Value::Global(Global::new(&module, &name)?)
                    }
                    _ => return Err("its pickle is damaged".into()),
                },
                b'Q' => storage(self.pop()?)?,
                b'R' => {
                    let (arguments, callee) = (self.pop()?, self.pop()?);
                    call(callee, arguments)?
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![key, value])?;
                    continue;
                }
                b'u' => {
                    let items = self.marked()?;
                    self.set(items)?;
                    continue;
                }
                b'a' => {
                    let value = self.pop()?;
                    if let Value::List(list) = self.top()? {
                        list.push(value);
                    }
                    continue;
                }
                b'e' => {
                    let values = self.marked()?;
                    if let Value::List(list) = self.top()? {
                        list.extend(values);
                    }
                    continue;
                }
                // Attributes of a dictionary (`_metadata`, versions of modules) change no value.
                b'b' => {
                    self.pop()?;
                    continue;
                }
                other => {
                    return Err(format!(
                        "its pickle has the instruction {other:#04x}, which no state dict needs"
                    ));
                }
            };
            self.stack.push(value);
        }
    }
}

/// `("storage", type, key, device, elements)`.
fn storage(id: Value) -> Result<Value> {
    let parts = match id {
        Value::Tuple(parts) => parts,
        _ => vec![],
    };
    match &parts[..] {
        [
            Value::Text(kind),
            Value::Global(Global::Storage(format)),
            Value::Text(key),
            ..,
        ] if kind == "storage" => Ok(Value::Storage {
            format: *format,
            key: key.clone(),
        }),
        _ => Err("its pickle refers to something that is no storage of a tensor".into()),
    }
}

fn call(callee: Value, arguments: Value) -> Result<Value> {
    let (Value::Global(callee), Value::Tuple(arguments)) = (callee, arguments) else {
        return Err("its pickle is damaged".into());
    };
    match (callee, &arguments[..]) {
        (Global::OrderedDict, []) => Ok(Value::Dict(vec![])),
        (Global::RebuildParameter, [tensor @ Value::Tensor { .. }, ..]) => Ok(tensor.clone()),
        (
            Global::RebuildTensor,
            [
                Value::Storage { format, key },
                Value::Int(offset),
                Value::Tuple(shape),
                Value::Tuple(strides),
                ..,
            ],
        ) => {
            let sizes = |values: &[Value]| {
                let size = |v: &Value| match v {
                    Value::Int(n) => usize::try_from(*n).ok(),
                    _ => None,
                };
                let sizes: Option<Vec<usize>> = values.iter().map(size).collect();
                sizes.ok_or("a tensor's shape is no list of whole numbers")
            };
            Ok(Value::Tensor {
                format: *format,
                key: key.clone(),
                offset: usize::try_from(*offset)
                    .map_err(|_| "a tensor begins before its storage")?,
                shape: sizes(shape)?,
                strides: sizes(strides)?,
            })
        }
        _ => Err("its pickle calls something in a way that no state dict does".into()),
    }
}

/// The tensors of a file, by name; those that are not of floating point (counters of batches) are left out.
pub(super) fn read(file: &[u8]) -> Result<State> {
    let members = members(file)?;
    let pickle = members.iter().find(|(name, _)| name.ends_with("/data.pkl"));
    let (name, bytes) = pickle.ok_or("the archive has no data.pkl")?;
    let folder = name.trim_end_matches("data.pkl");
    let big_endian = members.get(&format!("{folder}byteorder"));
    if big_endian.is_some_and(|order| *order != b"little") {
        return Err("its numbers are big-endian".into());
    }
    let pickle = Pickle {
        bytes,
        stack: vec![],
        memo: HashMap::new(),
    };
    let mut root = pickle.run()?;
    // A training script's checkpoint has the model under one of these names.
    for name in ["state_dict", "model_state_dict", "model"] {
        let Value::Dict(items) = &root else { break };
        let is_it = |(key, value): &&(Value, Value)| {
            matches!(key, Value::Text(key) if key == name) && matches!(value, Value::Dict(_))
        };
        if let Some((_, inner)) = items.iter().find(is_it) {
            root = inner.clone();
        }
    }
    let Value::Dict(items) = root else {
        return Err("it holds no dictionary; save model.state_dict()".into());
    };
    let mut state = BTreeMap::new();
    for (key, value) in items {
        let (
            Value::Text(name),
            Value::Tensor {
                format,
                key,
                offset,
                shape,
                strides,
            },
        ) = (key, value)
        else {
            return Err(
                "its dictionary holds something else than named tensors; save model.state_dict()"
                    .into(),
            );
        };
        if format == Format::I64 {
            continue;
        }
        let bytes = members.get(&format!("{folder}data/{key}"));
        let bytes = bytes.ok_or_else(|| format!("the values of tensor {name} are missing"))?;
        let all = floats(format, bytes);
        let values = strided(&all, offset, &shape, &strides);
        let values = values.ok_or_else(|| format!("tensor {name} reaches beyond its values"))?;
        state.insert(name, Tensor { shape, values });
    }
    Ok(state)
}

/// The elements of a view in row-major order; none if it leaves its storage.
fn strided(all: &[f32], offset: usize, shape: &[usize], strides: &[usize]) -> Option<Vec<f32>> {
    let count = shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s))?;
    if shape.len() != strides.len() || count > all.len() {
        return None;
    }
    let mut values = Vec::with_capacity(count);
    let mut index = vec![0; shape.len()];
    for _ in 0..count {
        let mut terms = index.iter().zip(strides);
        let at = terms.try_fold(offset, |at: usize, (i, s): (&usize, &usize)| {
            at.checked_add(i.checked_mul(*s)?)
        });
        values.push(*all.get(at?)?);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Some(values)
}
