//! Weights as GGUF, without changing a value: k-bit matrices that came from a GGUF type go back to it; native ones
//! become `Q8_0`, whose int8 codes hold their int8 weights and whose f16 scales hold most bf16 scales exactly; what fits
//! neither is written as F32, which holds all of them.

use std::path::Path;

use half::f16;

use crate::atomic::Out;
use crate::gguf::{self, GgmlType, Value};
use crate::import::ggml;
use crate::{DType, Error, KTensor, Result, ScaleType, Scales, Weight, parallel};

/// One tensor of a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufTensor<'a> {
    /// Its name there.
    pub name: String,
    /// One weight, or several of one shape, the rows of each after those of the one before.
    pub parts: Vec<&'a Weight>,
    /// Whether parts are stacked along a new outermost dimension (experts), even a single one.
    pub stacked: bool,
    /// (heads, rotated rows of a head) of a rotary projection whose halves become pairs side by side: the inverse of
    /// [`Transform::PermuteRope`](crate::Transform::PermuteRope).
    pub rope: Option<(usize, usize)>,
}

/// What a tensor became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its name in the file.
    pub name: String,
    /// Its type there.
    pub kind: GgmlType,
    /// Bytes there.
    pub nbytes: u64,
}

/// Writes a GGUF file whose dequantised values are those of the weights. Whole or not at all.
///
/// # Errors
/// [`Error::Argument`] for parts that differ, shapes that GGUF cannot hold or a rotation that does not fit;
/// [`Error::Unsupported`] for dense types other than f32, f16 and bf16; [`Error::Io`].
pub fn save_gguf(
    path: impl AsRef<Path>,
    metadata: &[(String, Value)],
    tensors: &[GgufTensor<'_>],
) -> Result<Vec<Written>> {
    let mut planned = Vec::new();
    let mut written = Vec::new();
    for tensor in tensors {
        let wrong = |what: String| Error::Argument(format!("tensor {:?}: {what}", tensor.name));
        let first = tensor
            .parts
            .first()
            .ok_or_else(|| wrong("no weight".into()))?;
        let shape = first.shape();
        if tensor.parts.iter().any(|part| part.shape() != shape)
            || tensor.parts.len() != 1 && shape.is_empty()
        {
            let shapes: Vec<_> = tensor.parts.iter().map(|part| part.shape()).collect();
            return Err(wrong(format!("weights of {shapes:?} cannot be joined")));
        }
        let rows = Rows::new(&shape, tensor.rope).map_err(wrong)?;
        let kind = kind_of(&tensor.parts)?;
        let mut outer = shape.clone();
        if tensor.stacked {
            outer.insert(0, tensor.parts.len());
        } else if let Some(rows) = outer.first_mut() {
            *rows *= tensor.parts.len();
        }
        let elements: usize = outer.iter().product();
        written.push(Written {
            name: tensor.name.clone(),
            kind,
            nbytes: (elements / kind.block() * kind.block_bytes()) as u64,
        });
        planned.push(gguf::Planned {
            name: tensor.name.clone(),
            shape: outer,
            kind,
            content: Box::new(move |out| {
                tensor
                    .parts
                    .iter()
                    .try_for_each(|part| put(out, part, kind, &rows))
            }),
        });
    }
    gguf::write(path.as_ref(), metadata, &planned)?;
    Ok(written)
}

/// Which row of the weight each row of the file is.
struct Rows {
    count: usize,
    columns: usize,
    head: usize,
    rotated: usize,
}

impl Rows {
    fn new(shape: &[usize], rope: Option<(usize, usize)>) -> Result<Self, String> {
        let (rows, columns) = match *shape {
            [] => (1, 1),
            [n] => (n, 1),
            [ref outer @ .., n] => (outer.iter().product(), n),
        };
        let (heads, rotated) = rope.unwrap_or((1, 0));
        let head = rows.checked_div(heads).unwrap_or(0);
        if rope.is_some()
            && (heads * head != rows || rotated > head || rotated % 2 != 0 || shape.len() > 2)
        {
            return Err(format!(
                "{heads} heads with {rotated} rotated rows do not fit {shape:?}"
            ));
        }
        Ok(Self {
            count: rows,
            columns,
            head,
            rotated,
        })
    }

    fn source(&self, row: usize) -> usize {
        if self.rotated == 0 {
            return row;
        }
        let j = row % self.head;
        if j < self.rotated {
            row - j + j / 2 + j % 2 * (self.rotated / 2)
        } else {
            row
        }
    }
}

/// The smallest type that holds all parts exactly.
fn kind_of(parts: &[&Weight]) -> Result<GgmlType> {
    let mut kinds = Vec::new();
    for part in parts {
        kinds.push(match part {
            Weight::Quantised(k) => ggml::exact_kind(k)
                .or_else(|| is_q8_0(k).then_some(GgmlType::Q8_0))
                .unwrap_or(GgmlType::F32),
            // ggml adds and multiplies vectors in f32 only.
            Weight::Dense(t) => match t.dtype() {
                DType::F16 | DType::BF16 if t.shape().len() < 2 => GgmlType::F32,
                DType::F32 => GgmlType::F32,
                DType::F16 => GgmlType::F16,
                DType::BF16 => GgmlType::BF16,
                other => {
                    return Err(Error::Unsupported(format!(
                        "a dense weight of {}; GGUF is written from F32, F16 and BF16",
                        other.name()
                    )));
                }
            },
        });
    }
    let first = kinds.first().copied().unwrap_or(GgmlType::F32);
    if kinds.iter().all(|kind| *kind == first) {
        return Ok(first);
    }
    // Parts of several types meet in one that holds each.
    let all_q8 = parts
        .iter()
        .all(|part| matches!(part, Weight::Quantised(k) if is_q8_0(k)));
    Ok(if all_q8 {
        GgmlType::Q8_0
    } else {
        GgmlType::F32
    })
}

/// Whether every block of 32 is an f16 times integers of -127..=127.
fn is_q8_0(k: &KTensor) -> bool {
    if !k.inputs().is_multiple_of(32) || k.permutation().is_some() {
        return false;
    }
    let is_f16 = |scale: f32| f16::from_f32(scale).to_f32().to_bits() == scale.to_bits();
    if matches!(k.scales(), Scales::Ladder { .. } | Scales::Row) {
        // Their integers are int8 by definition.
        let layout = k.layout();
        return (0..k.rows()).all(|row| {
            (0..layout.supers).all(|sup| {
                is_f16(ScaleType::BF16.read(&k.bytes()[layout.wide_offset(row, sup, 0)..]))
            })
        });
    }
    let mut blocks = vec![([0i32; 32], 0.0); k.inputs() / 32];
    (0..k.rows()).all(|row| {
        ggml::integers(k, row, &mut blocks)
            && blocks.iter().all(|(values, scale)| {
                is_f16(*scale) && values.iter().all(|v| (-127..=127).contains(v))
            })
    })
}

/// Writes one weight in rows of `kind`, by 16 rows a task.
fn put(out: &mut Out, weight: &Weight, kind: GgmlType, rows: &Rows) -> Result<()> {
    let row_bytes = rows.columns / kind.block() * kind.block_bytes();
    let own = matches!(weight, Weight::Quantised(k) if ggml::exact_kind(k) == Some(kind));
    // About 16 MiB at a time, made in parallel.
    let step = (16usize << 20)
        .checked_div(row_bytes)
        .unwrap_or(0)
        .clamp(1, rows.count.max(1));
    let mut buffer = Vec::new();
    for first in (0..rows.count).step_by(step) {
        buffer.resize(step.min(rows.count - first) * row_bytes, 0);
        parallel::for_each_piece(0, &mut buffer, 16 * row_bytes, |i, piece| {
            for (r, out) in piece.chunks_exact_mut(row_bytes).enumerate() {
                put_row(weight, kind, own, rows.source(first + i * 16 + r), out)?;
            }
            Ok(())
        })?;
        out.put(&buffer)?;
    }
    Ok(())
}

fn put_row(weight: &Weight, kind: GgmlType, own: bool, row: usize, out: &mut [u8]) -> Result<()> {
    match (weight, kind) {
        (Weight::Dense(t), _) if kind.plain() == Some(t.dtype()) => {
            out.copy_from_slice(&t.bytes()[row * out.len()..][..out.len()]);
        }
        (Weight::Quantised(k), _) if own => ggml::export_row(k, kind, row, out)?,
        (Weight::Quantised(k), GgmlType::Q8_0) => {
            let mut blocks = vec![([0i32; 32], 0.0); k.inputs() / 32];
            ggml::integers(k, row, &mut blocks);
            for (out, (values, scale)) in out.chunks_exact_mut(34).zip(blocks) {
                out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                out[2..]
                    .iter_mut()
                    .zip(values)
                    .for_each(|(o, v)| *o = v as i8 as u8);
            }
        }
        (Weight::Quantised(k), _) => {
            let mut values = vec![0.0; k.inputs()];
            k.dequantize_row(row, &mut values);
            DType::F32.encode(&values, out)?;
        }
        (Weight::Dense(t), _) => {
            let columns = out.len() / 4;
            let mut values = vec![0.0; columns];
            let size = t.dtype().size();
            t.dtype().decode(
                &t.bytes()[row * columns * size..][..columns * size],
                &mut values,
            );
            DType::F32.encode(&values, out)?;
        }
    }
    Ok(())
}
