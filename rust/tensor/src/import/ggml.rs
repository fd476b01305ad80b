//! GGUF's block types to KQ and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;

use super::blocks::{Block, Format, codebook};
use crate::file::{TensorFile, TensorInfo};
use crate::gguf::GgmlType;
use crate::transform::View;
use crate::{
    Bytes, CHUNK, Codebook, DType, Error, KLayout, KTensor, Offset, ROWS, Result, SUPER, ScaleType,
    Scales, SubScale, Tensor, parallel,
};

fn format(kind: GgmlType) -> Result<Format> {
    Format::of(kind).ok_or_else(|| {
        Error::Unsupported(format!(
            "GGUF type {}; read are F32, F16, BF16, {}",
            kind.name(),
            GgmlType::imported_names()
        ))
    })
}

/// A matrix of blocks as a [`KTensor`] with exactly the same values. Holds the result and 16 rows a thread.
///
/// # Errors
/// [`Error::Argument`] for what is no matrix, [`Error::Unsupported`] for a type that is not imported, and what reading
/// returns.
pub(crate) fn import(view: &View, kind: GgmlType, threads: usize) -> Result<KTensor> {
    let format = format(kind)?;
    if view.shape().len() != 2 {
        return Err(Error::Argument(format!(
            "a k-bit weight is a matrix, {} {:?} is not",
            kind.name(),
            view.shape()
        )));
    }
    let mut scales = format.scales.clone();
    let special = AtomicBool::new(false);
    let mut bytes = pack(view, &format, &scales, threads, &special)?;
    let mut book = codebook(kind);
    if kind == GgmlType::MXFP4 && special.load(Ordering::Relaxed) {
        // A halved scale of 2^-128 has no E8M0 byte, but a bf16.
        scales = Scales::Block {
            block: 32,
            scale: ScaleType::BF16,
            offset: Offset::None,
        };
        bytes = pack(view, &format, &scales, threads, &special)?;
    }
    if let (Codebook::I8(book), GgmlType::Q8_0, false) = (&mut book, kind, special.into_inner()) {
        // ggml's own quantiser never writes -128; without it, every entry has a negative.
        book[0] = -127;
    }
    KTensor::new(
        format.bits,
        view.rows(),
        view.columns(),
        book,
        scales,
        None,
        Arc::new(bytes),
        0,
    )
}

/// [`import`] of blocks in memory.
pub(crate) fn import_bytes(
    kind: GgmlType,
    rows: usize,
    inputs: usize,
    bytes: Bytes,
) -> Result<KTensor> {
    import(&View::of_blocks(kind, rows, inputs, bytes)?, kind, 0)
}

/// Panels of the view's rows. `special` is set when an MXFP4 scale of 2^-128 or a `Q8_0` code of -128 was met.
fn pack(
    view: &View,
    format: &Format,
    scales: &Scales,
    threads: usize,
    special: &AtomicBool,
) -> Result<Bytes> {
    let (rows, inputs) = (view.rows(), view.columns());
    let layout = KLayout::new(format.bits, rows, inputs, scales)?;
    let mut bytes = Bytes::zeroed(layout.nbytes())?;
    parallel::for_each_piece(threads, &mut bytes, layout.panel_bytes, |panel, out| {
        let first = panel * ROWS;
        let count = ROWS.min(rows - first);
        let mut raw = vec![0; count * view.row_bytes()];
        view.read_rows(first, &mut raw)?;
        // Chunks of code vectors: 4 inputs of each of 16 rows, side by side.
        let mut codes = vec![0; layout.chunks * ROWS * CHUNK];
        let mut block = Block::EMPTY;
        let block_bytes = view.row_bytes() / (inputs / format.elements);
        for (row, raw) in raw.chunks_exact(view.row_bytes()).enumerate() {
            for (b, raw) in raw.chunks_exact(block_bytes).enumerate() {
                format.unpack(raw, &mut block);
                put_scales(&layout, scales, row, b, &block, out);
                if special_case(format, &block) {
                    special.store(true, Ordering::Relaxed);
                }
                let first = b * format.elements / 4;
                let fours = block.codes[..format.elements].as_chunks::<4>().0;
                for (vector, four) in (first..).zip(fours) {
                    codes[vector * 64 + row * 4..][..4].copy_from_slice(four);
                }
            }
        }
        let packed = out[layout.codes_at..].chunks_exact_mut(layout.bits * 128);
        for (codes, packed) in codes.chunks_exact(ROWS * CHUNK).zip(packed) {
            layout.pack_chunk(codes, packed);
        }
        Ok(())
    })?;
    Ok(bytes)
}

fn special_case(format: &Format, block: &Block) -> bool {
    match format.scales {
        Scales::Block {
            scale: ScaleType::E8M0,
            ..
        } => block.scale[0] == 0,
        _ => format.bits == 8 && block.codes[..format.elements].contains(&0),
    }
}

/// Writes the scales of ggml block `b` of a row into its panel.
fn put_scales(
    layout: &KLayout,
    scales: &Scales,
    row: usize,
    b: usize,
    block: &Block,
    out: &mut [u8],
) {
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    match *scales {
        Scales::Block {
            scale: ScaleType::E8M0,
            ..
        } => {
            put(
                layout.fine_offset(row, b, 1),
                &[block.scale[0].saturating_sub(1)],
            );
        }
        Scales::Block {
            scale: ScaleType::BF16,
            ..
        } => {
            let half = bf16::from_f32(half_e8m0(block.scale[0]));
            put(layout.fine_offset(row, b, 2), &half.to_le_bytes());
        }
        Scales::Block { offset, .. } => {
            put(layout.fine_offset(row, b, 2), &block.scale);
            if offset == Offset::Min {
                put(layout.offset_offset(row, b, 2), &block.min);
            }
        }
        Scales::Super {
            block: size,
            sub,
            min,
        } => {
            put(layout.wide_offset(row, b, 0), &block.scale);
            if min {
                put(layout.wide_offset(row, b, 1), &block.min);
            }
            let per = SUPER / size;
            for k in 0..per {
                put(layout.fine_offset(row, b * per + k, 1), &block.subs[k..=k]);
                if min && sub != SubScale::U4 {
                    put(
                        layout.offset_offset(row, b * per + k, 1),
                        &block.mins[k..=k],
                    );
                }
            }
        }
        Scales::Ladder { .. } | Scales::Row => {}
    }
}

/// Half of 2^(e - 127): the scale of doubled FP4 values. Unlike E8M0 itself, it knows no NaN.
fn half_e8m0(e: u8) -> f32 {
    f32::from_bits(match e {
        0 | 1 => 0x0020_0000 << e,
        _ => (u32::from(e) - 1) << 23,
    })
}

/// The values of whole rows of blocks.
pub(crate) fn decode_rows(
    kind: GgmlType,
    columns: usize,
    raw: &[u8],
    out: &mut [f32],
) -> Result<()> {
    let format = format(kind)?;
    let Codebook::I8(book) = codebook(kind) else {
        return Err(Error::Unsupported(format!("GGUF type {}", kind.name())));
    };
    if !columns.is_multiple_of(format.elements) {
        return Err(Error::Argument(format!(
            "rows of {columns} elements of {}, which come in blocks of {}",
            kind.name(),
            format.elements
        )));
    }
    let mut block = Block::EMPTY;
    let outs = out.chunks_exact_mut(format.elements);
    for (raw, out) in raw.chunks_exact(kind.block_bytes()).zip(outs) {
        format.unpack(raw, &mut block);
        decode_block(&format, &book, &block, out);
    }
    Ok(())
}

fn decode_block(format: &Format, book: &[i8], block: &Block, out: &mut [f32]) {
    let size = format.scales.block();
    let f16 = |b: &[u8; 2]| ScaleType::F16.read(b);
    let parts = out
        .chunks_exact_mut(size)
        .zip(block.codes.chunks_exact(size));
    for (k, (out, codes)) in parts.enumerate() {
        let values = codes.iter().map(|&c| f32::from(book[usize::from(c)]));
        let (scale, add) = match format.scales {
            Scales::Block {
                scale: ScaleType::E8M0,
                ..
            } => (half_e8m0(block.scale[0]), None),
            Scales::Block {
                offset: Offset::Min,
                ..
            } => (f16(&block.scale), Some(f16(&block.min))),
            Scales::Super { sub, min, .. } => {
                let (s, m) = match sub {
                    SubScale::U8 => (f32::from(block.subs[k]), block.mins[k]),
                    SubScale::I8 => (f32::from(block.subs[k] as i8), block.mins[k]),
                    SubScale::U4 => (f32::from(block.subs[k] & 15), block.subs[k] >> 4),
                };
                let least = min.then(|| -(f16(&block.min) * f32::from(m)));
                (f16(&block.scale) * s, least)
            }
            _ => (f16(&block.scale), None),
        };
        match add {
            // a - b and a + (-b) are one operation.
            Some(add) => out
                .iter_mut()
                .zip(values)
                .for_each(|(o, v)| *o = scale * v + add),
            None => out.iter_mut().zip(values).for_each(|(o, v)| *o = scale * v),
        }
    }
}

/// A whole tensor of blocks in f32.
pub(crate) fn dequantize(file: &TensorFile, info: &TensorInfo) -> Result<Tensor> {
    let view = View::new(&[(file, &info.name)])?;
    let bytes = view.read_dense(DType::F32, 0)?;
    Tensor::new(DType::F32, &info.shape, Arc::new(bytes))
}

/// The GGUF type whose blocks hold a matrix as it is.
pub(crate) fn exact_kind(k: &KTensor) -> Option<GgmlType> {
    let Codebook::I8(book) = k.codebook() else {
        return None;
    };
    GgmlType::ALL
        .iter()
        .copied()
        .filter(|_| k.permutation().is_none())
        .find(|&kind| {
            let Some(format) = Format::of(kind) else {
                return false;
            };
            let Codebook::I8(mut own) = codebook(kind) else {
                return false;
            };
            if kind == GgmlType::Q8_0 && book.first() == Some(&-127) {
                own[0] = -127;
            }
            let scales = *k.scales() == format.scales
                || kind == GgmlType::MXFP4
                    && matches!(
                        *k.scales(),
                        Scales::Block {
                            block: 32,
                            scale: ScaleType::BF16,
                            offset: Offset::None
                        }
                    );
            k.bits() == format.bits
                && k.inputs().is_multiple_of(format.elements)
                && *book == own
                && scales
                && (0..k.rows()).all(|row| {
                    (0..k.inputs() / format.elements)
                        .all(|b| get_scales(k, &format, row, b).is_some())
                })
        })
}

/// The scales of ggml block `b` of a row, with empty codes; `None` where the type has no room for one.
fn get_scales(k: &KTensor, format: &Format, row: usize, b: usize) -> Option<Block> {
    let (layout, bytes) = (k.layout(), k.bytes());
    let mut block = Block::EMPTY;
    let two = |at: usize| [bytes[at], bytes[at + 1]];
    match *k.scales() {
        Scales::Block {
            scale: ScaleType::E8M0,
            ..
        } => {
            block.scale[0] = bytes[layout.fine_offset(row, b, 1)].checked_add(1)?;
        }
        Scales::Block {
            scale: ScaleType::BF16,
            ..
        } => {
            let scale = bf16::from_le_bytes(two(layout.fine_offset(row, b, 2))).to_f32();
            block.scale[0] = (0..=u8::MAX).find(|&e| half_e8m0(e) == scale)?;
        }
        Scales::Block { offset, .. } => {
            block.scale = two(layout.fine_offset(row, b, 2));
            if offset == Offset::Min {
                block.min = two(layout.offset_offset(row, b, 2));
            }
        }
        Scales::Super {
            block: size,
            sub,
            min,
        } => {
            block.scale = two(layout.wide_offset(row, b, 0));
            if min {
                block.min = two(layout.wide_offset(row, b, 1));
            }
            let per = SUPER / size;
            for j in 0..per {
                block.subs[j] = bytes[layout.fine_offset(row, b * per + j, 1)];
                if min && sub != SubScale::U4 {
                    block.mins[j] = bytes[layout.offset_offset(row, b * per + j, 1)];
                }
            }
            if !format.holds(&block) {
                return None;
            }
        }
        Scales::Ladder { .. } | Scales::Row => return None,
    }
    Some(block)
}

/// One row as blocks of the type that [`exact_kind`] found.
pub(crate) fn export_row(k: &KTensor, kind: GgmlType, row: usize, out: &mut [u8]) -> Result<()> {
    let format = format(kind)?;
    let layout = k.layout();
    for (b, out) in out.chunks_exact_mut(kind.block_bytes()).enumerate() {
        let mut block = get_scales(k, &format, row, b)
            .ok_or_else(|| Error::Argument(format!("row {row} does not fit {}", kind.name())))?;
        for (e, code) in block.codes[..format.elements].iter_mut().enumerate() {
            *code = layout.code(k.bytes(), row, b * format.elements + e);
        }
        format.pack(&block, out);
    }
    Ok(())
}

/// A row as integers under one scale per 32 inputs. False for matrices that have minima, float codebooks or
/// sub-scales, where there are none.
pub(crate) fn integers(k: &KTensor, row: usize, out: &mut [([i32; 32], f32)]) -> bool {
    let (layout, bytes) = (k.layout(), k.bytes());
    let Codebook::I8(book) = k.codebook() else {
        return false;
    };
    let shift = if k.bits() == 8 { 128 } else { 0 };
    for (j, (values, scale)) in out.iter_mut().enumerate() {
        let first = j * 32;
        let wide = layout.wide_offset(row, first / SUPER, 0);
        let bf16_at = |at: usize| bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        for (i, value) in values.iter_mut().enumerate() {
            let input = first + i;
            let entry = i32::from(book[usize::from(layout.code(bytes, row, input))]);
            (*value, *scale) = match *k.scales() {
                Scales::Ladder { block, ref ladder } => {
                    let (at, high) = layout.rung_offset(row, input / block);
                    let rung = if high { bytes[at] >> 4 } else { bytes[at] & 15 };
                    (
                        (entry * i32::from(ladder[usize::from(rung)]) + 64) >> 7,
                        bf16_at(wide),
                    )
                }
                Scales::Row => (entry, bf16_at(wide)),
                Scales::Block {
                    block,
                    scale,
                    offset,
                } if block >= 32 && offset != Offset::Min => {
                    let zero = match offset {
                        Offset::Zero => {
                            i32::from(bytes[layout.offset_offset(row, input / block, 1)]) - shift
                        }
                        _ => 0,
                    };
                    let at = layout.fine_offset(row, input / block, scale.size());
                    (entry - zero, scale.read(&bytes[at..]))
                }
                _ => return false,
            };
        }
    }
    true
}
