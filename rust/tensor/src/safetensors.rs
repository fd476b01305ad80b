//! The header of a safetensors file.
//!
//! Accepts what the `safetensors` package accepts, with the same meaning, except that a tensor named twice, metadata
//! keys given twice, more than [`MAX_TENSORS`] tensors, more than [`MAX_RANK`] dimensions and JSON nested deeper than
//! [`MAX_DEPTH`] are refused. The `safetensors` crate wants the whole file in memory and keeps the last of two tensors
//! of one name, so the header is read here.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::file::{Source, Stored, TensorInfo};
use crate::{DType, Error, Result};

/// Bytes of JSON a header may have.
pub const MAX_HEADER: u64 = 100_000_000;
/// Tensors a file may have.
pub const MAX_TENSORS: usize = 1_000_000;
/// Dimensions a tensor may have.
pub const MAX_RANK: usize = 8;
/// Depth to which JSON may nest.
pub const MAX_DEPTH: usize = 64;

/// What a header says: tensors in file order, and the metadata.
pub(crate) struct Header {
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header; afterwards every tensor lies inside the file.
pub(crate) fn read(source: &Source) -> Result<Header> {
    let wrong = |what: String| Error::Format(format!("{}: safetensors: {what}", source.path()));
    let size = source.len();
    if size < 8 {
        return Err(wrong(format!(
            "a header length takes 8 bytes, the file has {size}"
        )));
    }
    let mut length = [0; 8];
    source.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    let rest = size.saturating_sub(8);
    let mut first = [0];
    if rest > 0 {
        source.read_at(8, &mut first)?;
        if length > rest && first != *b"{" {
            return Err(Error::Format(format!(
                "{}: neither GGUF nor safetensors: no header follows the first 8 bytes",
                source.path()
            )));
        }
    }
    if length > MAX_HEADER {
        return Err(wrong(format!(
            "header of {length} bytes; at most {MAX_HEADER} are read"
        )));
    }
    let Some(data) = rest.checked_sub(length) else {
        return Err(wrong(format!(
            "header of {length} bytes, but {rest} follow its length"
        )));
    };
    let start = size.saturating_sub(data);
    let json = source.read_vec(8, length)?;
    if let Some(at) = too_deep(&json) {
        return Err(wrong(format!(
            "header nests deeper than {MAX_DEPTH} at byte {at}"
        )));
    }
    let raw: RawHeader =
        serde_json::from_slice(&json).map_err(|e| wrong(format!("header is not valid: {e}")))?;
    drop(json);

    let mut entries = raw.tensors;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut tensors = Vec::with_capacity(entries.len());
    let mut end = 0;
    for (name, entry) in entries {
        let (from, to) = entry.data_offsets;
        let Some(nbytes) = to.checked_sub(from).filter(|_| from == end) else {
            return Err(wrong(format!(
                "tensor {name:?} lies at {from}..{to}, the one before it ends at {end}"
            )));
        };
        if to > data {
            return Err(wrong(format!(
                "tensor {name:?} ends at byte {to} of the data, the file holds {data}"
            )));
        }
        if entry.shape.len() > MAX_RANK {
            return Err(wrong(format!(
                "tensor {name:?} has {} dimensions; at most {MAX_RANK} are read",
                entry.shape.len()
            )));
        }
        let stored = entry.dtype.stored();
        let bits = entry
            .shape
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .and_then(|n| n.checked_mul(stored.bits()));
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != nbytes) {
            let wanted = bits.map_or("more than 2^64".into(), |bits| {
                format!("{}", bits as f64 / 8.0)
            });
            return Err(wrong(format!(
                "tensor {name:?} of {} {:?} wants {wanted} bytes, its offsets hold {}",
                stored.name(),
                entry.shape,
                nbytes
            )));
        }
        end = to;
        let shape = entry.shape.iter().map(|&d| usize::try_from(d)).collect();
        let shape: Vec<usize> = match shape {
            Ok(shape) => shape,
            Err(std::num::TryFromIntError { .. }) => {
                return Err(wrong(format!("tensor {name:?} is too large")));
            }
        };
        tensors.push(TensorInfo {
            name,
            stored,
            shape,
            at: start.saturating_add(from),
            nbytes,
        });
    }
    if end != data {
        return Err(wrong(format!(
            "tensors end at byte {end} of the data, the file holds {data}"
        )));
    }
    Ok(Header {
        tensors,
        metadata: raw.metadata,
    })
}

/// Where JSON first nests deeper than [`MAX_DEPTH`], if it does. Brackets inside strings do not count.
fn too_deep(json: &[u8]) -> Option<usize> {
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for (at, &byte) in json.iter().enumerate() {
        if quoted {
            quoted = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'{' | b'[' => {
                depth = depth.saturating_add(1);
                if depth > MAX_DEPTH {
                    return Some(at);
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[derive(Deserialize)]
struct Entry {
    dtype: Name,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Element types by the names of a header; those without a [`DType`] can be listed but not read.
#[derive(Deserialize)]
#[allow(
    non_camel_case_types,
    clippy::upper_case_acronyms,
    reason = "the names of the format"
)]
enum Name {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Name {
    fn stored(&self) -> Stored {
        let other = |name, bits| Stored::Other { name, bits };
        Stored::Plain(match self {
            Self::F4 => return other("F4", 4),
            Self::F6_E2M3 => return other("F6_E2M3", 6),
            Self::F6_E3M2 => return other("F6_E3M2", 6),
            Self::F8_E8M0 => return other("F8_E8M0", 8),
            Self::F8_E4M3FNUZ => return other("F8_E4M3FNUZ", 8),
            Self::F8_E5M2FNUZ => return other("F8_E5M2FNUZ", 8),
            Self::C64 => return other("C64", 64),
            Self::BOOL => DType::Bool,
            Self::U8 => DType::U8,
            Self::I8 => DType::I8,
            Self::F8_E5M2 => DType::F8E5M2,
            Self::F8_E4M3 => DType::F8E4M3,
            Self::I16 => DType::I16,
            Self::U16 => DType::U16,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::I32 => DType::I32,
            Self::U32 => DType::U32,
            Self::F32 => DType::F32,
            Self::F64 => DType::F64,
            Self::I64 => DType::I64,
            Self::U64 => DType::U64,
        })
    }
}

struct RawHeader {
    tensors: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut tensors: Vec<(String, Entry)> = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let found = map.next_value::<Option<Unique>>()?;
                if metadata.replace(found).is_some() {
                    return Err(A::Error::custom("__metadata__ is given twice"));
                }
            } else if tensors.len() == MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names
            .array_windows()
            .find_map(|[a, b]| (a == b).then_some(a))
        {
            return Err(A::Error::custom(format!("tensor {twice:?} is given twice")));
        }
        let metadata = metadata.flatten().map(|Unique(m)| m).unwrap_or_default();
        Ok(RawHeader { tensors, metadata })
    }
}

/// A map of strings in which no key comes twice.
struct Unique(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Unique;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(A::Error::custom(format!(
                            "metadata key {key:?} is given twice"
                        )));
                    }
                    out.insert(key, value);
                }
                Ok(Unique(out))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}
