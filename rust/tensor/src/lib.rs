//! What a number array is, how k bits store it, how files hold it, and what a device must be able to do.
//!
//! The crate depends on no device and no Python. Start with [`Tensor`] (plain arrays), [`KTensor`] (k-bit arrays in
//! kernel order, drawn in `docs/formats.md`) and [`program`] (the contract between a model and a device).

mod atomic;
mod bytes;
mod check;
mod checkpoint;
mod dtype;
mod error;
mod export;
mod file;
pub mod gguf;
pub mod import;
mod ktensor;
mod load;
mod parallel;
pub mod program;
mod quantize;
pub mod safetensors;
mod tensor;
mod transform;

pub use bytes::Bytes;
pub use checkpoint::{Checkpoint, open_checkpoint, read_checkpoint, save_checkpoint};
pub use dtype::DType;
pub use error::{Error, Result};
pub use export::{GgufTensor, Written, save_gguf};
pub use file::{Container, Stored, TensorFile, TensorInfo};
pub use ktensor::{
    CHUNK, Codebook, KLayout, KTensor, Offset, ROWS, SUPER, ScaleType, Scales, SubScale,
};
pub use load::{Keep, load_weight};
pub use quantize::{
    CodebookFormat, QuantizeOptions, ReadRows, default_block, quantize, quantize_rows,
};
pub use tensor::{Tensor, Weight};
pub use transform::{Transform, View};
