//! Writing GGUF, version 3.

use std::path::Path;

use super::value::id;
use super::{Array, DEFAULT_ALIGNMENT, GgmlType, MAGIC, Value};
use crate::atomic::{self, Out};
use crate::{Error, Result};

/// Writes the bytes of a tensor.
type Content<'a> = Box<dyn Fn(&mut Out) -> Result<()> + 'a>;

/// A tensor to be written; its bytes are made when their turn comes.
pub(crate) struct Planned<'a> {
    pub(crate) name: String,
    /// Outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: GgmlType,
    /// Puts exactly the bytes that shape and kind want.
    pub(crate) content: Content<'a>,
}

/// Writes a file, whole or not at all.
pub(crate) fn write(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[Planned<'_>],
) -> Result<()> {
    let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
        None => u64::from(DEFAULT_ALIGNMENT),
        Some((_, Value::U32(n))) if n.is_power_of_two() => u64::from(*n),
        Some((_, found)) => {
            return Err(Error::Argument(format!(
                "general.alignment must be a power of two as u32, is {found:?}"
            )));
        }
    };
    let sizes: Vec<u64> = tensors.iter().map(size).collect::<Result<_>>()?;
    atomic::write(path, |out| {
        out.put(&MAGIC)?;
        out.put(&3u32.to_le_bytes())?;
        out.put(&(tensors.len() as u64).to_le_bytes())?;
        out.put(&(metadata.len() as u64).to_le_bytes())?;
        for (key, value) in metadata {
            string(out, key)?;
            put_value(out, value)?;
        }
        let mut at = 0u64;
        for (tensor, size) in tensors.iter().zip(&sizes) {
            string(out, &tensor.name)?;
            out.put(&(tensor.shape.len() as u32).to_le_bytes())?;
            for &d in tensor.shape.iter().rev() {
                out.put(&(d as u64).to_le_bytes())?;
            }
            out.put(&tensor.kind.id().to_le_bytes())?;
            out.put(&at.to_le_bytes())?;
            at = at.saturating_add(*size).next_multiple_of(alignment);
        }
        for (tensor, size) in tensors.iter().zip(&sizes) {
            out.pad(alignment)?;
            let before = out.at();
            (tensor.content)(out)?;
            if out.at() - before != *size {
                return Err(Error::Argument(format!(
                    "tensor {:?} of {} {:?} wants {size} bytes, {} were written",
                    tensor.name,
                    tensor.kind.name(),
                    tensor.shape,
                    out.at() - before
                )));
            }
        }
        out.pad(alignment)
    })
}

fn size(tensor: &Planned<'_>) -> Result<u64> {
    let (block, bytes) = (tensor.kind.block(), tensor.kind.block_bytes());
    let whole = tensor.shape.last().copied().unwrap_or(1).checked_rem(block) == Some(0);
    let elements = tensor
        .shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d));
    let size = elements
        .filter(|_| whole && tensor.shape.len() <= 4)
        .and_then(|n| (n / block).checked_mul(bytes));
    size.map(|n| n as u64).ok_or_else(|| {
        Error::Argument(format!(
            "tensor {:?}: GGUF cannot hold {} {:?}",
            tensor.name,
            tensor.kind.name(),
            tensor.shape
        ))
    })
}

fn string(out: &mut Out, s: &str) -> Result<()> {
    out.put(&(s.len() as u64).to_le_bytes())?;
    out.put(s.as_bytes())
}

fn put_value(out: &mut Out, value: &Value) -> Result<()> {
    macro_rules! number {
        ($id:ident, $v:expr) => {{
            out.put(&id::$id.to_le_bytes())?;
            out.put(&$v.to_le_bytes())
        }};
    }
    match value {
        Value::U8(v) => number!(U8, v),
        Value::I8(v) => number!(I8, v),
        Value::U16(v) => number!(U16, v),
        Value::I16(v) => number!(I16, v),
        Value::U32(v) => number!(U32, v),
        Value::I32(v) => number!(I32, v),
        Value::F32(v) => number!(F32, v),
        Value::U64(v) => number!(U64, v),
        Value::I64(v) => number!(I64, v),
        Value::F64(v) => number!(F64, v),
        Value::Bool(v) => number!(BOOL, u8::from(*v)),
        Value::String(s) => {
            out.put(&id::STRING.to_le_bytes())?;
            string(out, s)
        }
        Value::Array(array) => {
            out.put(&id::ARRAY.to_le_bytes())?;
            put_array(out, array)
        }
    }
}

fn put_array(out: &mut Out, array: &Array) -> Result<()> {
    let mut head = |kind: u32, len: usize| {
        out.put(&kind.to_le_bytes())?;
        out.put(&(len as u64).to_le_bytes())
    };
    macro_rules! numbers {
        ($id:ident, $v:expr) => {{
            head(id::$id, $v.len())?;
            $v.iter().try_for_each(|v| out.put(&v.to_le_bytes()))
        }};
    }
    match array {
        Array::U8(v) => numbers!(U8, v),
        Array::I8(v) => numbers!(I8, v),
        Array::U16(v) => numbers!(U16, v),
        Array::I16(v) => numbers!(I16, v),
        Array::U32(v) => numbers!(U32, v),
        Array::I32(v) => numbers!(I32, v),
        Array::F32(v) => numbers!(F32, v),
        Array::U64(v) => numbers!(U64, v),
        Array::I64(v) => numbers!(I64, v),
        Array::F64(v) => numbers!(F64, v),
        Array::Bool(v) => {
            head(id::BOOL, v.len())?;
            v.iter().try_for_each(|&v| out.put(&[u8::from(v)]))
        }
        Array::Strings(v) => {
            head(id::STRING, v.len())?;
            v.iter().try_for_each(|s| string(out, s))
        }
        Array::Arrays(v) => {
            head(id::ARRAY, v.len())?;
            v.iter().try_for_each(|a| put_array(out, a))
        }
    }
}
