//! One weight, from files to the engine: read, transformed, kept at its own bits or quantised.

use std::sync::Arc;

use crate::file::{Stored, TensorFile};
use crate::transform::{Transform, View};
use crate::{DType, Error, QuantizeOptions, Result, Tensor, Weight, import, quantize_rows};

/// What becomes of a weight.
#[derive(Clone, Copy, Debug)]
pub enum Keep<'a> {
    /// What is stored: k-bit types of GGUF at their own bits, f32, f16 and bf16 as they are, fp8 as bf16 and all other
    /// types as f32.
    AsStored,
    /// A dense array of f32, f16 or bf16.
    Dense(DType),
    /// Quantised by kbit, from the values after all steps; reads 16 rows a thread at a time.
    Quantised(&'a QuantizeOptions<'a>),
}

/// Reads, transforms and keeps one weight. `threads` 0: as many as the process may use.
///
/// # Errors
/// [`Error::Argument`] for unknown names, steps that do not fit, or what is no matrix but should be k-bit;
/// [`Error::Unsupported`] for types that are not read; [`Error::Io`], [`Error::Memory`].
pub fn load_weight(
    sources: &[(&TensorFile, &str)],
    transforms: &[Transform],
    keep: Keep<'_>,
    threads: usize,
) -> Result<Weight> {
    let mut view = View::new(sources)?;
    for step in transforms {
        view = view.apply(step)?;
    }
    let dtype = match (keep, view.stored()) {
        (Keep::AsStored, Stored::Ggml(kind)) if !view.is_computed() && view.shape().len() == 2 => {
            return import::ggml::import(&view, kind, threads).map(Weight::Quantised);
        }
        (Keep::AsStored, _) => view.dense_dtype(),
        (Keep::Dense(dtype @ (DType::F32 | DType::F16 | DType::BF16)), _) => dtype,
        (Keep::Quantised(options), _) => {
            let &[rows, inputs] = view.shape() else {
                return Err(Error::Argument(format!(
                    "only a matrix can be quantised, not {:?}",
                    view.shape()
                )));
            };
            let read = |first: usize, out: &mut [f32]| view.read_f32(first, out);
            return quantize_rows(rows, inputs, options, &read).map(Weight::Quantised);
        }
        (Keep::Dense(other), _) => {
            return Err(Error::Argument(format!(
                "dense weights are F32, F16 or BF16, not {}",
                other.name()
            )));
        }
    };
    let bytes = view.read_dense(dtype, threads)?;
    Tensor::new(dtype, view.shape(), Arc::new(bytes)).map(Weight::Dense)
}
