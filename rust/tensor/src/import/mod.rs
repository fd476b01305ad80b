//! Other people's k-bit weights as [`KTensor`](crate::KTensor)s, without changing a single value.

mod blocks;
pub(crate) mod ggml;
mod grouped;
mod packed;

pub use packed::{DIALECTS, PackedOptions, Parts, load_packed};
