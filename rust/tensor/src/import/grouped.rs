//! Weights of groups that share a scale, as [`Scales::Block`]: what all dialects but GGUF come down to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    Bytes, CHUNK, Codebook, Error, KLayout, KTensor, Offset, ROWS, Result, ScaleType, Scales,
    parallel,
};

/// A matrix to be, by its elements.
pub(super) struct Grouped<'a> {
    /// For messages.
    pub(super) dialect: &'a str,
    pub(super) bits: usize,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    /// Inputs (in stored order) under one scale.
    pub(super) group: usize,
    pub(super) codebook: Codebook,
    pub(super) scale_type: ScaleType,
    /// Stored column to input.
    pub(super) permutation: Option<Arc<[u32]>>,
    /// Code of a row and input.
    pub(super) code: &'a (dyn Fn(usize, usize) -> u8 + Sync),
    /// Bytes of the scale of a row and group; as many as the type has are used.
    pub(super) scale: &'a (dyn Fn(usize, usize) -> [u8; 4] + Sync),
    pub(super) zeros: Option<&'a Zeros>,
}

impl Grouped<'_> {
    /// Packs the matrix, panels in parallel.
    pub(super) fn build(self) -> Result<KTensor> {
        let one_group = self.group >= self.inputs;
        let blocks = [256, 128, 64, 32, 16];
        let block = blocks
            .into_iter()
            .find(|b| one_group || self.group.is_multiple_of(*b));
        let block = block.ok_or_else(|| {
            Error::Unsupported(format!(
                "{}: groups of {} inputs; a multiple of 16 is wanted",
                self.dialect, self.group
            ))
        })?;
        let zeros = self.zeros.and_then(Zeros::stored);
        let scales = Scales::Block {
            block,
            scale: self.scale_type,
            offset: if zeros.is_some() {
                Offset::Zero
            } else {
                Offset::None
            },
        };
        let layout = KLayout::new(self.bits, self.rows, self.inputs, &scales)?;
        let mut bytes = Bytes::zeroed(layout.nbytes())?;
        let size = self.scale_type.size();
        let lowest = AtomicBool::new(false);
        parallel::for_each_piece(0, &mut bytes, layout.panel_bytes, |panel, out| {
            let mut codes = vec![0; layout.chunks * ROWS * CHUNK];
            let first = panel * ROWS;
            let mut zero_code = false;
            for r in 0..ROWS.min(self.rows - first) {
                for k in 0..self.inputs.div_ceil(block) {
                    let group = if one_group { 0 } else { k * block / self.group };
                    let at = layout.fine_offset(r, k, size);
                    out[at..at + size].copy_from_slice(&(self.scale)(first + r, group)[..size]);
                    if let Some((zeros, groups)) = zeros {
                        out[layout.offset_offset(r, k, 1)] = zeros[(first + r) * groups + group];
                    }
                }
                for j in 0..self.inputs {
                    let input = self.permutation.as_ref().map_or(j, |p| p[j] as usize);
                    let code = (self.code)(first + r, input);
                    zero_code |= code == 0;
                    codes[j / 4 * 64 + r * 4 + j % 4] = code;
                }
            }
            if zero_code {
                lowest.store(true, Ordering::Relaxed);
            }
            let packed = out[layout.codes_at..].chunks_exact_mut(layout.bits * 128);
            for (codes, packed) in codes.chunks_exact(ROWS * CHUNK).zip(packed) {
                layout.pack_chunk(codes, packed);
            }
            Ok(())
        })?;
        let mut book = self.codebook;
        if let Codebook::I8(book) = &mut book
            && book[0] == -128
            && !lowest.into_inner()
        {
            // Nothing uses it, and without it every entry has a negative.
            book[0] = -127;
        }
        KTensor::new(
            self.bits,
            self.rows,
            self.inputs,
            book,
            scales,
            self.permutation,
            Arc::new(bytes),
            0,
        )
    }
}

/// The matrix whose rows are the given rows of another.
pub(crate) fn take_rows(k: &KTensor, rows: &[u32]) -> Result<KTensor> {
    let from = k.layout();
    if let Some(row) = rows.iter().find(|row| **row as usize >= k.rows()) {
        return Err(Error::Argument(format!(
            "row {row} asked of {} rows",
            k.rows()
        )));
    }
    let to = KLayout::new(k.bits(), rows.len(), k.inputs(), k.scales())?;
    let mut bytes = Bytes::zeroed(to.nbytes())?;
    let source = k.bytes();
    parallel::for_each_piece(0, &mut bytes, to.panel_bytes, |panel, out| {
        for (r, &row) in rows.iter().skip(panel * ROWS).take(ROWS).enumerate() {
            let row = row as usize;
            let base = row / ROWS * from.panel_bytes;
            let lane = row % ROWS;
            let mut copy = |at: usize, size: usize| {
                out[at + r * size..][..size]
                    .copy_from_slice(&source[base + at + lane * size..][..size]);
            };
            for sup in 0..to.supers {
                (0..to.wide_bytes / 32).for_each(|w| copy(sup * to.wide_bytes + w * 32, 2));
            }
            // Everything else is laid out in units of 16 rows: fine and offset values, and four bytes of each vector.
            match *k.scales() {
                Scales::Ladder { .. } => {
                    let pairs = (to.offset_at - to.fine_at) / ROWS;
                    (0..pairs).for_each(|p| copy(to.fine_at + p * ROWS, 1));
                }
                Scales::Row => {}
                Scales::Block { scale, offset, .. } => {
                    let size = scale.size();
                    (0..to.blocks).for_each(|b| copy(to.fine_at + b * ROWS * size, size));
                    let size = match offset {
                        Offset::None => 0,
                        Offset::Min => size,
                        Offset::Zero => 1,
                    };
                    let some = if size == 0 { 0 } else { to.blocks };
                    (0..some).for_each(|b| copy(to.offset_at + b * ROWS * size, size));
                }
                Scales::Super { .. } => {
                    (0..to.blocks).for_each(|b| copy(to.fine_at + b * ROWS, 1));
                    let some = (to.codes_at - to.offset_at) / ROWS;
                    (0..some.min(to.blocks)).for_each(|b| copy(to.offset_at + b * ROWS, 1));
                }
            }
            let vectors = to.chunks * to.bits * 2;
            (0..vectors).for_each(|v| copy(to.codes_at + v * 64, 4));
        }
        Ok(())
    })?;
    KTensor::new(
        k.bits(),
        rows.len(),
        k.inputs(),
        k.codebook().clone(),
        k.scales().clone(),
        k.permutation().cloned(),
        Arc::new(bytes),
        0,
    )
}

/// Integer codes with a zero point per row and group; one that is the same everywhere moves into the codebook.
pub(super) struct Zeros {
    /// Codebook of the codes.
    pub(super) book: Codebook,
    stored: Option<Vec<u8>>,
    groups: usize,
}

impl Zeros {
    /// `zero` of every row and group.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for zero points that differ and do not fit a byte.
    pub(super) fn new(
        dialect: &str,
        bits: usize,
        rows: usize,
        groups: usize,
        zero: impl Fn(usize, usize) -> i32,
    ) -> Result<Self> {
        let mut all = Vec::with_capacity(rows * groups);
        for row in 0..rows {
            for group in 0..groups {
                all.push(zero(row, group));
            }
        }
        let first = all.first().copied().unwrap_or(0);
        let book = |zero: i32| Codebook::I8((0..1 << bits).map(|c| (c - zero) as i8).collect());
        if all.iter().all(|z| *z == first)
            && (-127..=128).contains(&first)
            && (1 << bits) - 1 - first <= 127
        {
            return Ok(Self {
                book: book(first),
                stored: None,
                groups,
            });
        }
        if let Some(z) = all.iter().find(|z| !(0..256).contains(*z)) {
            return Err(Error::Unsupported(format!(
                "{dialect}: a zero point of {z}; 0 to 255 are read"
            )));
        }
        let stored = all.iter().map(|z| *z as u8).collect();
        // At 8 bits, code and zero point are both shifted by 128.
        Ok(Self {
            book: book(if bits == 8 { 128 } else { 0 }),
            stored: Some(stored),
            groups,
        })
    }

    /// (rows, groups) as [`Offset::Zero`] stores them, and the number of groups; None where the codebook has the zero point.
    fn stored(&self) -> Option<(&[u8], usize)> {
        self.stored.as_deref().map(|zeros| (zeros, self.groups))
    }
}
