//! One matrix product on its own, outside a program: the same kernels, the same bits.

use std::sync::atomic::AtomicBool;

use kbit_tensor::program::Activations;
use kbit_tensor::{Error, Result, Weight};

use crate::acts::Acts;
use crate::linear::Matrix;
use crate::{Cpu, default_threads, pool};

/// Tokens that are multiplied at once; bounds the copy of the activations.
const TOKENS: usize = 512;
/// Most panels that a thread takes at a time: kernels for many tokens take some side by side.
const RUN: usize = 8;

/// The output, of which every panel belongs to one thread.
struct Output(*mut f32);

// SAFETY: threads write disjoint places of it, see `matmul`.
unsafe impl Sync for Output {}

/// `x Wᵀ`: x (tokens, inputs) row-major, gives (tokens, rows). `threads` 0: as many as [`default_threads`].
///
/// # Errors
/// [`Error::Argument`] for what is no matrix or has other inputs, [`Error::Cancelled`], [`Error::Memory`].
pub fn matmul(
    weight: &Weight,
    x: &[f32],
    inputs: usize,
    activations: Activations,
    threads: usize,
    cancel: &AtomicBool,
) -> Result<Vec<f32>> {
    let shape = weight.shape();
    let &[rows, wanted] = shape.as_slice() else {
        return Err(Error::Argument(format!(
            "matmul: wants a matrix, has shape {shape:?}"
        )));
    };
    if wanted != inputs || inputs == 0 {
        return Err(Error::Argument(format!(
            "matmul: weight wants in_features = {wanted}, x has {inputs}"
        )));
    }
    let isa = Cpu::new()?.isa();
    let threads = if threads == 0 {
        default_threads()?
    } else {
        threads
    };
    let matrix = Matrix::prepare(weight, activations)?;
    let tokens = x.len() / inputs;
    let mut out = Vec::new();
    let size = tokens
        .checked_mul(rows)
        .filter(|&n| out.try_reserve_exact(n).is_ok());
    let size = size
        .ok_or_else(|| Error::Memory(format!("matmul: no room for {tokens} x {rows} results")))?;
    out.resize(size, 0.0);
    let mut acts = Acts::new()?;
    for (x, y) in x.chunks(TOKENS * inputs).zip(out.chunks_mut(TOKENS * rows)) {
        acts.reserve(isa, matrix.input(), x.len() / inputs)?;
        acts.fill_all(x, inputs);
        let (acts, y) = (&acts, &Output(y.as_mut_ptr()));
        pool::run(threads, cancel, &|team| {
            team.for_runs(matrix.panels(), 1..=RUN, |panels| {
                // SAFETY: `y` has a place for every token and row, and every panel goes to one thread.
                unsafe { matrix.run(acts, 0..acts.tokens(), panels, y.0, rows) };
            });
            team.barrier()
        })?;
    }
    Ok(out)
}
