//! GGUF, versions 2 and 3, little-endian: typed key-values, then tensors in ggml's types.

mod read;
mod types;
mod value;
mod write;

pub(crate) use read::read;
pub use types::GgmlType;
pub use value::{Array, Strings, Value};
pub(crate) use write::{Planned, write};

use crate::file::TensorInfo;

/// The first four bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors start, unless `general.alignment` says otherwise.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Bytes a string may have.
pub const MAX_STRING: u64 = 64 << 20;
/// Elements an array may have.
pub const MAX_ARRAY: u64 = 16 << 20;
/// Key-values a file may have; also the arrays that an array of arrays may have.
pub const MAX_KEYS: u64 = 65_536;
/// Tensors a file may have.
pub const MAX_TENSORS: u64 = 1_000_000;
/// How deep arrays may nest.
pub const MAX_NESTING: usize = 4;
/// Dimensions a tensor may have.
pub const MAX_RANK: u32 = 4;

/// What a header says: tensors and key-values in file order.
pub(crate) struct Header {
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) metadata: Vec<(String, Value)>,
}
