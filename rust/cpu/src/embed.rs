//! Rows of the embedding: only those that are asked for are ever dequantised.

use half::{bf16, f16};
use kbit_tensor::{DType, Weight};

/// `out = scale * table[id]`, plus a learned position.
#[derive(Debug)]
pub(crate) struct Embed {
    /// (vocab, hidden).
    pub(crate) table: Weight,
    pub(crate) scale: f32,
    /// (positions, hidden) and what is added to a position.
    pub(crate) positions: Option<(Weight, usize)>,
}

impl Embed {
    /// The row of token `id` at `position`.
    pub(crate) fn row(&self, id: u32, position: usize, out: &mut [f32], scratch: &mut Vec<f32>) {
        row(&self.table, id as usize, out);
        if self.scale != 1.0 {
            out.iter_mut().for_each(|v| *v *= self.scale);
        }
        if let Some((table, offset)) = &self.positions {
            scratch.resize(out.len(), 0.0);
            row(table, position + offset, scratch);
            out.iter_mut()
                .zip(scratch.iter())
                .for_each(|(v, p)| *v += p);
        }
    }
}

/// Row `index` of a matrix as f32. `Program::check` has seen the shape and the dtype.
fn row(table: &Weight, index: usize, out: &mut [f32]) {
    match table {
        Weight::Quantised(k) => k.dequantize_row(index, out),
        Weight::Dense(t) => {
            let size = t.dtype().size();
            let bytes = &t.bytes()[index * out.len() * size..(index + 1) * out.len() * size];
            match t.dtype() {
                DType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
                DType::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
                _ => each(bytes, out, f32::from_le_bytes),
            }
        }
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (b, out) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *out = value(*b);
    }
}
