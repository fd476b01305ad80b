//! Reading the header. Every length is checked against what remains of the file before anything is allocated for it;
//! tensors must lie one after the other, each padded to the alignment, as ggml writes them and demands them.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use super::value::id;
use super::{
    Array, DEFAULT_ALIGNMENT, GgmlType, Header, MAGIC, MAX_ARRAY, MAX_KEYS, MAX_NESTING, MAX_RANK,
    MAX_STRING, MAX_TENSORS, Strings, Value,
};
use crate::file::{Source, Stored, TensorInfo, to_usize};
use crate::{Error, Result};

/// Reads and checks the header; afterwards every tensor lies inside the file.
pub(crate) fn read(source: &Source) -> Result<Header> {
    let mut cursor = Cursor::new(source);
    let magic: [u8; 4] = cursor.take()?;
    if magic != MAGIC {
        return Err(cursor.wrong(format!("starts with {magic:?}, not with \"GGUF\"")));
    }
    let version = cursor.u32()?;
    if version != 2 && version != 3 {
        let what = match version {
            1 => "version 1".into(),
            v if v.swap_bytes() <= 3 => format!("version {} in big-endian", v.swap_bytes()),
            v => format!("version {v}"),
        };
        return Err(Error::Unsupported(format!(
            "{}: GGUF {what}; versions 2 and 3 in little-endian are read",
            source.path()
        )));
    }
    let tensors = cursor.count("tensors", MAX_TENSORS, 24)?;
    let keys = cursor.count("key-values", MAX_KEYS, 13)?;

    let mut metadata = Vec::new();
    for _ in 0..keys {
        let key = cursor.string("a key")?;
        let kind = cursor.u32()?;
        let value = value(&mut cursor, &key, kind)?;
        metadata.push((key, value));
    }
    if let Some(key) = repeated(metadata.iter().map(|(key, _)| key.as_str())) {
        return Err(cursor.wrong(format!("key {key:?} is given twice")));
    }
    let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some((_, Value::U32(n))) if n.is_power_of_two() => *n,
        Some((_, found)) => {
            return Err(cursor.wrong(format!(
                "general.alignment must be a power of two as u32, is {found:?}"
            )));
        }
    };
    let tensors = tensor_infos(&mut cursor, tensors, u64::from(alignment))?;
    Ok(Header { tensors, metadata })
}

fn tensor_infos(cursor: &mut Cursor<'_>, count: u64, alignment: u64) -> Result<Vec<TensorInfo>> {
    let mut infos = Vec::new();
    // Where the next tensor must start, counted from the end of the header.
    let mut next = 0u64;
    for _ in 0..count {
        let name = cursor.string("a tensor's name")?;
        let rank = cursor.u32()?;
        if rank > MAX_RANK {
            return Err(cursor.wrong(format!(
                "tensor {name:?} has {rank} dimensions; at most {MAX_RANK} are read"
            )));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.push(cursor.u64()?);
        }
        let kind = cursor.u32()?;
        let at = cursor.u64()?;
        let Some(kind) = GgmlType::from_id(kind) else {
            let what = match GgmlType::retired(kind) {
                Some(retired) => format!("type {retired}, which ggml has retired"),
                None => format!("type number {kind}, which ggml does not have"),
            };
            return Err(Error::Unsupported(format!(
                "{}: tensor {name:?} has {what}; read are F32, F16, BF16, F64, I8, I16, I32, I64, {}",
                cursor.source.path(),
                GgmlType::imported_names()
            )));
        };
        let (block, block_bytes) = (kind.block() as u64, kind.block_bytes() as u64);
        let inputs = dims.first().copied().unwrap_or(1);
        if inputs.checked_rem(block) != Some(0) {
            return Err(cursor.wrong(format!(
                "tensor {name:?} of {} has rows of {inputs} elements, not a multiple of {block}",
                kind.name()
            )));
        }
        let nbytes = dims
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .and_then(|n| n.checked_div(block)?.checked_mul(block_bytes));
        let Some((nbytes, end)) = nbytes.and_then(|n| Some((n, next.checked_add(n)?))) else {
            return Err(cursor.wrong(format!(
                "tensor {name:?} of {} {dims:?} wants more than 2^64 bytes",
                kind.name()
            )));
        };
        if at != next {
            return Err(cursor.wrong(format!(
                "tensor {name:?} lies at {at} of the data, the ones before it end at {next}"
            )));
        }
        next = match end.checked_next_multiple_of(alignment) {
            Some(padded) => padded,
            None => return Err(cursor.wrong(format!("tensor {name:?} ends at {end}"))),
        };
        let shape = dims
            .iter()
            .rev()
            .map(|&d| to_usize(d))
            .collect::<Result<_>>()?;
        infos.push(TensorInfo {
            name,
            stored: kind.plain().map_or(Stored::Ggml(kind), Stored::Plain),
            shape,
            nbytes,
            at,
        });
    }
    if let Some(name) = repeated(infos.iter().map(|t| t.name.as_str())) {
        return Err(cursor.wrong(format!("tensor {name:?} is given twice")));
    }
    let (header, size) = (cursor.at, cursor.source.len());
    let data = header.checked_next_multiple_of(alignment);
    for info in &mut infos {
        let at = data.and_then(|data| data.checked_add(info.at));
        let end = at.and_then(|at| at.checked_add(info.nbytes));
        match (at, end) {
            (Some(at), Some(end)) if end <= size => info.at = at,
            // Nothing to read, wherever it claims to be.
            (Some(at), _) if info.nbytes == 0 => info.at = at,
            _ => {
                return Err(Error::Format(format!(
                    "{}: GGUF: tensor {:?} takes {} bytes at {} after the header of {header}, the file has {size}",
                    cursor.source.path(),
                    info.name,
                    info.nbytes,
                    info.at
                )));
            }
        }
    }
    Ok(infos)
}

/// A string that comes twice, if there is one.
fn repeated<'a>(strings: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut sorted: Vec<&str> = strings.collect();
    sorted.sort_unstable();
    sorted
        .array_windows()
        .find_map(|[a, b]| (a == b).then_some(*a))
}

fn value(cursor: &mut Cursor<'_>, key: &str, kind: u32) -> Result<Value> {
    Ok(match kind {
        id::U8 => Value::U8(u8::from_le_bytes(cursor.take()?)),
        id::I8 => Value::I8(i8::from_le_bytes(cursor.take()?)),
        id::U16 => Value::U16(u16::from_le_bytes(cursor.take()?)),
        id::I16 => Value::I16(i16::from_le_bytes(cursor.take()?)),
        id::U32 => Value::U32(cursor.u32()?),
        id::I32 => Value::I32(i32::from_le_bytes(cursor.take()?)),
        id::F32 => Value::F32(f32::from_le_bytes(cursor.take()?)),
        id::BOOL => Value::Bool(cursor.bool(key)?),
        id::STRING => Value::String(cursor.string(key)?),
        id::ARRAY => Value::Array(array(cursor, key, 1)?),
        id::U64 => Value::U64(cursor.u64()?),
        id::I64 => Value::I64(i64::from_le_bytes(cursor.take()?)),
        id::F64 => Value::F64(f64::from_le_bytes(cursor.take()?)),
        _ => return Err(cursor.wrong(format!("key {key:?} has value type {kind}; 0 to 12 exist"))),
    })
}

fn array(cursor: &mut Cursor<'_>, key: &str, depth: usize) -> Result<Array> {
    let kind = cursor.u32()?;
    let what = format!("elements of {key:?}");
    let mut scalars = |size: u64| -> Result<(u64, Vec<u8>)> {
        let count = cursor.count(&what, MAX_ARRAY, size)?;
        Ok((count, cursor.vec(count.saturating_mul(size))?))
    };
    macro_rules! numbers {
        ($variant:ident, $type:ty) => {{
            const SIZE: usize = size_of::<$type>();
            let (_, bytes) = scalars(SIZE as u64)?;
            let (chunks, _) = bytes.as_chunks::<SIZE>();
            Array::$variant(chunks.iter().map(|c| <$type>::from_le_bytes(*c)).collect())
        }};
    }
    Ok(match kind {
        id::U8 => Array::U8(scalars(1)?.1),
        id::I8 => numbers!(I8, i8),
        id::U16 => numbers!(U16, u16),
        id::I16 => numbers!(I16, i16),
        id::U32 => numbers!(U32, u32),
        id::I32 => numbers!(I32, i32),
        id::F32 => numbers!(F32, f32),
        id::U64 => numbers!(U64, u64),
        id::I64 => numbers!(I64, i64),
        id::F64 => numbers!(F64, f64),
        id::BOOL => {
            let bytes = scalars(1)?.1;
            if let Some(b) = bytes.iter().find(|b| **b > 1) {
                return Err(cursor.wrong(format!("key {key:?} has the boolean {b}; 0 and 1 exist")));
            }
            Array::Bool(bytes.into_iter().map(|b| b == 1).collect())
        }
        id::STRING => {
            let count = cursor.count(&what, MAX_ARRAY, 8)?;
            let mut strings = Strings::default();
            for _ in 0..count {
                strings.push(&cursor.string(key)?);
            }
            Array::Strings(strings)
        }
        id::ARRAY => {
            if depth == MAX_NESTING {
                return Err(cursor.wrong(format!(
                    "key {key:?} nests arrays deeper than {MAX_NESTING}"
                )));
            }
            let count = cursor.count(&what, MAX_KEYS, 12)?;
            let mut arrays = Vec::new();
            for _ in 0..count {
                arrays.push(array(cursor, key, depth.saturating_add(1))?);
            }
            Array::Arrays(arrays)
        }
        _ => {
            return Err(cursor.wrong(format!(
                "key {key:?} has element type {kind}; 0 to 12 exist"
            )));
        }
    })
}

/// A place in the file, with a window of it in memory.
struct Cursor<'a> {
    source: &'a Source,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> Cursor<'a> {
    const WINDOW: u64 = 1 << 16;

    fn new(source: &'a Source) -> Self {
        Self {
            source,
            at: 0,
            window: Vec::new(),
            window_at: 0,
        }
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Format(format!(
            "{}: GGUF: {what} (before byte {})",
            self.source.path(),
            self.at
        ))
    }

    fn remaining(&self) -> u64 {
        self.source.len().saturating_sub(self.at)
    }

    /// `len` bytes that are known to remain.
    fn vec(&mut self, len: u64) -> Result<Vec<u8>> {
        let from = self
            .at
            .checked_sub(self.window_at)
            .and_then(|n| usize::try_from(n).ok());
        let found = from
            .and_then(|from| self.window.get(from..))
            .and_then(|rest| rest.get(..usize::try_from(len).ok()?));
        let out = if let Some(found) = found {
            found.to_vec()
        } else if len >= Self::WINDOW {
            self.source.read_vec(self.at, len)?
        } else {
            self.fill()?;
            let found = usize::try_from(len)
                .ok()
                .and_then(|len| self.window.get(..len));
            found.map(<[u8]>::to_vec).ok_or_else(|| {
                self.wrong(format!("{len} bytes wanted, {} are left", self.remaining()))
            })?
        };
        self.at = self.at.saturating_add(len);
        Ok(out)
    }

    fn fill(&mut self) -> Result<()> {
        self.window = self
            .source
            .read_vec(self.at, self.remaining().min(Self::WINDOW))?;
        self.window_at = self.at;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let inside = |c: &Self| {
            let from = usize::try_from(c.at.checked_sub(c.window_at)?).ok()?;
            c.window.get(from..)?.first_chunk::<N>().copied()
        };
        let found = if let Some(found) = inside(self) {
            Some(found)
        } else {
            self.fill()?;
            inside(self)
        };
        let found = found.ok_or_else(|| {
            self.wrong(format!("{N} bytes wanted, {} are left", self.remaining()))
        })?;
        self.at = self.at.saturating_add(N as u64);
        Ok(found)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn bool(&mut self, key: &str) -> Result<bool> {
        match self.take()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(self.wrong(format!("key {key:?} has the boolean {b}; 0 and 1 exist"))),
        }
    }

    /// A count of things that take at least `least` bytes each: within the limit and within what remains.
    fn count(&mut self, what: &str, limit: u64, least: u64) -> Result<u64> {
        let count = self.u64()?;
        if count > limit {
            return Err(self.wrong(format!("{count} {what}; at most {limit} are read")));
        }
        if count
            .checked_mul(least)
            .is_none_or(|n| n > self.remaining())
        {
            return Err(self.wrong(format!(
                "{count} {what} of at least {least} bytes, but {} bytes are left",
                self.remaining()
            )));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64()?;
        if len > MAX_STRING || len > self.remaining() {
            return Err(self.wrong(format!(
                "{what} has a string of {len} bytes; {} are left and at most {MAX_STRING} are read",
                self.remaining()
            )));
        }
        let bytes = self.vec(len)?;
        String::from_utf8(bytes)
            .map_err(|e| self.wrong(format!("{what} has a string that is not UTF-8: {e}")))
    }
}
