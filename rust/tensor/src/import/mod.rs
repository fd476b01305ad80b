//! Other people's k-bit weights as [`KTensor`](crate::KTensor)s, without changing a single value.

mod blocks;
pub mod ggml;
