//! KQ: k-bit matrices in kernel order. One layout on disk and in memory, drawn in `docs/formats.md`.
//!
//! A *panel* is 16 output rows; a *chunk* is 16 rows x 64 inputs; a *code vector* is 16 rows x 4 inputs = 64 bytes once
//! decoded; a *super-block* is 256 inputs. Everything of a panel is contiguous:
//!
//! ```text
//! | wide: one or two 16-bit floats per row and super-block | fine: sub-scales per row and block | offset: minima or zeros | codes |
//! ```
//!
//! each section padded to 64 bytes. Codes are split into bit planes of width 4, 2, 1 (8 alone), lowest bits in the first
//! plane; in each plane the bits of code vector g lie in 64-byte vector `g / (8/width)` at shift `width * (g % (8/width))`.

use std::sync::Arc;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::{Bytes, Error, Result};

/// Output rows of a panel.
pub const ROWS: usize = 16;
/// Inputs of a chunk.
pub const CHUNK: usize = 64;
/// Inputs of a super-block: one activation scale, and one wide scale where the kind has them.
pub const SUPER: usize = 256;

/// What a code stands for: `2^bits` entries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codebook {
    /// Integer path: int8 entries; every dot product is exact.
    I8(Vec<i8>),
    /// Float path: what int8 cannot hold (NF4, FP4): decoded to an f32 tile.
    F32(Vec<f32>),
}

/// Type of the scale of a [`Scales::Block`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are the definitions")]
pub enum ScaleType {
    F16,
    BF16,
    F32,
    /// 2^(byte - 127); byte 0 is 2^-127, 255 is NaN.
    E8M0,
}

impl ScaleType {
    /// Bytes of one scale.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::E8M0 => 1,
        }
    }

    /// The scale stored at the start of `b`.
    pub fn read(self, b: &[u8]) -> f32 {
        match self {
            Self::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::E8M0 => match b[0] {
                0 => f32::from_bits(0x0040_0000),
                255 => f32::NAN,
                e => f32::from_bits(u32::from(e) << 23),
            },
        }
    }
}

/// What is added to `scale * codebook[code]` per block of a [`Scales::Block`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offset {
    /// Nothing.
    None,
    /// A float of the scale's type: `w = scale * cb + min`.
    Min,
    /// An integer zero point, u8 in units of a code: `w = scale * (cb - zero)`; at 8 bits both sides are shifted by 128.
    Zero,
}

/// How a [`Scales::Super`] stores its sub-scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SubScale {
    /// One unsigned byte (and one for the minimum in the offset section).
    U8,
    /// One signed byte.
    I8,
    /// Sub-scale in the low nibble, sub-minimum in the high one.
    U4,
}

/// The scale kinds. `docs/numerics.md` gives the exact arithmetic of each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Scales {
    /// Native: `w8 = (cb[code] * ladder[s] + 64) >> 7`, a 4-bit `s` per block, one bf16 per row and super-block.
    Ladder {
        /// Inputs of a block: 16, 32 or 64.
        block: usize,
        /// Non-decreasing, 0..=128.
        ladder: [u8; 16],
    },
    /// Native, for widths where int8 itself is the limit: `w8 = cb[code]`, one bf16 per row and super-block.
    Row,
    /// Imported: one float per block.
    Block {
        /// Inputs of a block: 16, 32, 64, 128 or 256.
        block: usize,
        /// Its type.
        scale: ScaleType,
        /// What is added.
        offset: Offset,
    },
    /// Imported: integer sub-scales (and minima) per block under one f16 (or two) per super-block:
    /// `w = (d * sub) * cb[code] - dmin * min`.
    Super {
        /// Inputs of a block: 16, 32 or 64.
        block: usize,
        /// Type of the sub-scale.
        sub: SubScale,
        /// Whether there are minima.
        min: bool,
    },
}

impl Scales {
    /// Inputs under one sub-scale (256 for [`Scales::Row`]).
    pub fn block(&self) -> usize {
        match *self {
            Self::Ladder { block, .. } | Self::Block { block, .. } | Self::Super { block, .. } => {
                block
            }
            Self::Row => SUPER,
        }
    }
}

/// Where everything lies. Derived from the header alone; all products are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "one line each in the layout drawing of docs/formats.md"
)]
pub struct KLayout {
    pub bits: usize,
    pub rows: usize,
    pub inputs: usize,
    /// Panels of 16 rows.
    pub panels: usize,
    /// Chunks of 64 inputs.
    pub chunks: usize,
    /// Super-blocks of 256 inputs; the last may hold 64, 128 or 192.
    pub supers: usize,
    /// Blocks of the scale kind over the padded inputs.
    pub blocks: usize,
    /// Bytes of the wide section of one super-block (0, 32 or 64).
    pub wide_bytes: usize,
    pub fine_at: usize,
    pub offset_at: usize,
    pub codes_at: usize,
    pub panel_bytes: usize,
}

impl KLayout {
    /// The layout of a matrix of `rows` x `inputs` at `bits`.
    ///
    /// # Errors
    /// [`Error::Format`] for widths outside 2..=8, empty matrices, unknown blocks, or sizes past 2^63.
    pub fn new(bits: usize, rows: usize, inputs: usize, scales: &Scales) -> Result<Self> {
        let wrong = |what: String| {
            Error::Format(format!(
                "k-bit matrix of {rows} x {inputs} at {bits} bits: {what}"
            ))
        };
        if !(2..=8).contains(&bits) {
            return Err(wrong("bits must be 2..=8".into()));
        }
        if rows == 0 || inputs == 0 || rows > 1 << 31 || inputs > 1 << 31 {
            return Err(wrong("rows and inputs must be 1..=2^31".into()));
        }
        let block = scales.block();
        let known: &[usize] = match scales {
            Scales::Ladder { .. } | Scales::Super { .. } => &[16, 32, 64],
            Scales::Row => &[256],
            Scales::Block { .. } => &[16, 32, 64, 128, 256],
        };
        if !known.contains(&block) {
            return Err(wrong(format!("block must be one of {known:?}, is {block}")));
        }
        let (panels, chunks, supers) = (
            rows.div_ceil(ROWS),
            inputs.div_ceil(CHUNK),
            inputs.div_ceil(SUPER),
        );
        let blocks = (chunks * CHUNK).div_ceil(block);
        let (wide_bytes, fine, offset) = match *scales {
            Scales::Ladder { block: 16, .. } => (32, chunks * 32, 0),
            Scales::Ladder { block: 32, .. } => (32, chunks * 16, 0),
            Scales::Ladder { .. } => (32, chunks.div_ceil(2) * 16, 0),
            Scales::Row => (32, 0, 0),
            Scales::Block { scale, offset, .. } => (
                0,
                blocks * ROWS * scale.size(),
                match offset {
                    Offset::None => 0,
                    Offset::Min => blocks * ROWS * scale.size(),
                    Offset::Zero => blocks * ROWS,
                },
            ),
            Scales::Super { sub, min, .. } => (
                if min { 64 } else { 32 },
                blocks * ROWS,
                if min && sub != SubScale::U4 {
                    blocks * ROWS
                } else {
                    0
                },
            ),
        };
        let fine_at = (supers * wide_bytes).next_multiple_of(64);
        let offset_at = fine_at + fine.next_multiple_of(64);
        let codes_at = offset_at + offset.next_multiple_of(64);
        let panel_bytes = codes_at + chunks * bits * 128;
        if panels
            .checked_mul(panel_bytes)
            .is_none_or(|n| n > usize::MAX / 2)
        {
            return Err(wrong("too large".into()));
        }
        Ok(Self {
            bits,
            rows,
            inputs,
            panels,
            chunks,
            supers,
            blocks,
            wide_bytes,
            fine_at,
            offset_at,
            codes_at,
            panel_bytes,
        })
    }

    /// Bytes of the whole matrix.
    pub fn nbytes(&self) -> usize {
        self.panels * self.panel_bytes
    }

    /// Bit planes as (width, byte offset in the chunk, shift of its bits in the code).
    pub fn planes(bits: usize) -> &'static [(usize, usize, usize)] {
        match bits {
            2 => &[(2, 0, 0)],
            3 => &[(2, 0, 0), (1, 256, 2)],
            4 => &[(4, 0, 0)],
            5 => &[(4, 0, 0), (1, 512, 4)],
            6 => &[(4, 0, 0), (2, 512, 4)],
            7 => &[(4, 0, 0), (2, 512, 4), (1, 768, 6)],
            _ => &[(8, 0, 0)],
        }
    }

    fn chunk_at(&self, row: usize, input: usize) -> usize {
        row / ROWS * self.panel_bytes + self.codes_at + input / CHUNK * self.bits * 128
    }

    /// The code of one weight, out of the matrix's bytes.
    pub fn code(&self, bytes: &[u8], row: usize, input: usize) -> u8 {
        let at = self.chunk_at(row, input);
        let (g, byte) = (input % CHUNK / 4, row % ROWS * 4 + input % 4);
        let mut code = 0;
        for &(width, plane, shift) in Self::planes(self.bits) {
            let per = 8 / width;
            let bits = bytes[at + plane + g / per * 64 + byte] >> (width * (g % per));
            code |= (bits & ((1u16 << width) - 1) as u8) << shift;
        }
        code
    }

    /// Writes the code of one weight.
    pub fn set_code(&self, bytes: &mut [u8], row: usize, input: usize, code: u8) {
        let at = self.chunk_at(row, input);
        let (g, byte) = (input % CHUNK / 4, row % ROWS * 4 + input % 4);
        for &(width, plane, shift) in Self::planes(self.bits) {
            let per = 8 / width;
            let (mask, place) = (((1u16 << width) - 1) as u8, width * (g % per));
            let b = &mut bytes[at + plane + g / per * 64 + byte];
            *b = *b & !(mask << place) | (code >> shift & mask) << place;
        }
    }

    /// Packs the codes of a chunk, 16 code vectors of 64 bytes one after the other, into its `bits * 128` bytes.
    pub fn pack_chunk(&self, codes: &[u8], out: &mut [u8]) {
        for &(width, plane, shift) in Self::planes(self.bits) {
            let (per, mask) = (8 / width, ((1u16 << width) - 1) as u8);
            let vectors = codes.chunks_exact(64 * per);
            for (packed, group) in out[plane..].chunks_exact_mut(64).zip(vectors) {
                packed.fill(0);
                for (place, vector) in group.chunks_exact(64).enumerate() {
                    for (p, &code) in packed.iter_mut().zip(vector) {
                        *p |= (code >> shift & mask) << (width * place);
                    }
                }
            }
        }
    }

    /// The inverse of [`Self::pack_chunk`].
    pub fn unpack_chunk(&self, packed: &[u8], codes: &mut [u8]) {
        codes.fill(0);
        for &(width, plane, shift) in Self::planes(self.bits) {
            let (per, mask) = (8 / width, ((1u16 << width) - 1) as u8);
            let vectors = codes.chunks_exact_mut(64 * per);
            for (packed, group) in packed[plane..].chunks_exact(64).zip(vectors) {
                for (place, vector) in group.chunks_exact_mut(64).enumerate() {
                    for (&p, code) in packed.iter().zip(vector) {
                        *code |= (p >> (width * place) & mask) << shift;
                    }
                }
            }
        }
    }

    /// Offset of the wide 16-bit float `which` (0: scale, 1: minimum) of a row and super-block.
    pub fn wide_offset(&self, row: usize, sup: usize, which: usize) -> usize {
        row / ROWS * self.panel_bytes + sup * self.wide_bytes + which * 32 + row % ROWS * 2
    }

    /// Offset of a value of `size` bytes per row and block in the fine section.
    pub fn fine_offset(&self, row: usize, block: usize, size: usize) -> usize {
        row / ROWS * self.panel_bytes + self.fine_at + (block * ROWS + row % ROWS) * size
    }

    /// Offset of a value of `size` bytes per row and block in the offset section.
    pub fn offset_offset(&self, row: usize, block: usize, size: usize) -> usize {
        row / ROWS * self.panel_bytes + self.offset_at + (block * ROWS + row % ROWS) * size
    }

    /// Offset of the byte that holds the ladder index of a row and block, and whether it is the high nibble. Two
    /// neighbouring blocks (2j, 2j+1) share byte `16 j + row`.
    pub fn rung_offset(&self, row: usize, block: usize) -> (usize, bool) {
        (
            row / ROWS * self.panel_bytes + self.fine_at + block / 2 * ROWS + row % ROWS,
            block % 2 == 1,
        )
    }
}

/// A k-bit matrix (`out_features`, `in_features`). Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct KTensor {
    layout: KLayout,
    codebook: Codebook,
    scales: Scales,
    /// Input permutation (GPTQ act-order): column j of the stored matrix multiplies input `permutation[j]`.
    permutation: Option<Arc<[u32]>>,
    bytes: Arc<Bytes>,
    offset: usize,
}

impl KTensor {
    /// A matrix over `nbytes` bytes of `bytes` from `offset` on, which must be a multiple of 64.
    ///
    /// # Errors
    /// [`Error::Format`] when codebook, ladder, permutation or bytes do not fit the header.
    pub fn new(
        bits: usize,
        rows: usize,
        inputs: usize,
        codebook: Codebook,
        scales: Scales,
        permutation: Option<Arc<[u32]>>,
        bytes: Arc<Bytes>,
        offset: usize,
    ) -> Result<Self> {
        let layout = KLayout::new(bits, rows, inputs, &scales)?;
        let wrong = |what: String| {
            Err(Error::Format(format!(
                "k-bit matrix of {rows} x {inputs} at {bits} bits: {what}"
            )))
        };
        let entries = match &codebook {
            Codebook::I8(c) => c.len(),
            Codebook::F32(c) => c.len(),
        };
        if entries != 1 << bits {
            return wrong(format!(
                "codebook wants {} entries, has {entries}",
                1 << bits
            ));
        }
        if let Scales::Ladder { ladder, .. } = &scales
            && ladder.iter().any(|&l| l > 128)
        {
            return wrong("ladder entries must be 0..=128".into());
        }
        if matches!(scales, Scales::Ladder { .. } | Scales::Row)
            && !matches!(&codebook, Codebook::I8(c) if c.iter().all(|&v| v > -128))
        {
            return wrong("a native scale kind wants int8 codebook entries of -127..=127".into());
        }
        if let Some(p) = &permutation {
            let mut seen = vec![false; inputs];
            if p.len() != inputs
                || p.iter().any(|&i| {
                    seen.get_mut(i as usize)
                        .is_none_or(|s| std::mem::replace(s, true))
                })
            {
                return wrong(format!(
                    "input permutation must name each of {inputs} inputs once"
                ));
            }
        }
        if !offset.is_multiple_of(64)
            || bytes
                .len()
                .checked_sub(offset)
                .is_none_or(|n| n < layout.nbytes())
        {
            return wrong(format!(
                "wants {} bytes at a multiple of 64, has {} from {offset} on",
                layout.nbytes(),
                bytes.len()
            ));
        }
        Ok(Self {
            layout,
            codebook,
            scales,
            permutation,
            bytes,
            offset,
        })
    }

    /// Where everything lies.
    pub fn layout(&self) -> &KLayout {
        &self.layout
    }
    /// Width of a code, 2..=8.
    pub fn bits(&self) -> usize {
        self.layout.bits
    }
    /// Output features.
    pub fn rows(&self) -> usize {
        self.layout.rows
    }
    /// Input features.
    pub fn inputs(&self) -> usize {
        self.layout.inputs
    }
    /// What a code stands for.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }
    /// The scale kind.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }
    /// Input permutation, if any.
    pub fn permutation(&self) -> Option<&Arc<[u32]>> {
        self.permutation.as_ref()
    }
    /// The panels, 64-byte aligned.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.offset..self.offset + self.layout.nbytes()]
    }
    /// What the panels lie in, maybe among others.
    pub fn storage(&self) -> &Bytes {
        &self.bytes
    }
    /// The same matrix, whose panels have been copied to `bytes` from `offset` on.
    ///
    /// # Errors
    /// As [`KTensor::new`].
    pub fn moved(&self, bytes: Arc<Bytes>, offset: usize) -> Result<Self> {
        let (codebook, scales) = (self.codebook.clone(), self.scales.clone());
        let (bits, permutation) = (self.bits(), self.permutation.clone());
        Self::new(
            bits,
            self.rows(),
            self.inputs(),
            codebook,
            scales,
            permutation,
            bytes,
            offset,
        )
    }
    /// Bytes, all constants counted (codebook and ladder included).
    pub fn nbytes(&self) -> usize {
        let tables = match &self.codebook {
            Codebook::I8(c) => c.len(),
            Codebook::F32(c) => 4 * c.len(),
        };
        let ladder = if matches!(self.scales, Scales::Ladder { .. }) {
            16
        } else {
            0
        };
        self.layout.nbytes()
            + tables
            + ladder
            + self.permutation.as_ref().map_or(0, |p| 4 * p.len())
    }
    /// Bits per weight, every constant and all padding counted.
    pub fn bits_per_weight(&self) -> f64 {
        self.nbytes() as f64 * 8.0 / (self.rows() as f64 * self.inputs() as f64)
    }

    /// The f32 values of one row, exactly as `docs/numerics.md` defines them; `out` has `inputs` elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let (l, b, block) = (&self.layout, self.bytes(), self.scales.block());
        let half_at = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        let bf16_at = |at: usize| bf16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        for j in 0..l.inputs {
            let code = l.code(b, row, j) as usize;
            let value = match &self.codebook {
                Codebook::I8(c) => f32::from(c[code]),
                Codebook::F32(c) => c[code],
            };
            let (k, sup) = (j / block, j / SUPER);
            let w = match self.scales {
                Scales::Ladder { ref ladder, .. } => {
                    let (at, high) = l.rung_offset(row, k);
                    let s = if high { b[at] >> 4 } else { b[at] & 15 };
                    let w8 = (value as i32 * i32::from(ladder[s as usize]) + 64) >> 7;
                    w8 as f32 * bf16_at(l.wide_offset(row, sup, 0))
                }
                Scales::Row => value * bf16_at(l.wide_offset(row, sup, 0)),
                Scales::Block { scale, offset, .. } => {
                    let s = scale.read(&b[l.fine_offset(row, k, scale.size())..]);
                    match offset {
                        Offset::None => s * value,
                        Offset::Min => {
                            s * value + scale.read(&b[l.offset_offset(row, k, scale.size())..])
                        }
                        Offset::Zero => s * (value - self.zero(b[l.offset_offset(row, k, 1)])),
                    }
                }
                Scales::Super { sub, min, .. } => {
                    let byte = b[l.fine_offset(row, k, 1)];
                    let (s, m) = match sub {
                        SubScale::U8 => (
                            f32::from(byte),
                            if min {
                                f32::from(b[l.offset_offset(row, k, 1)])
                            } else {
                                0.0
                            },
                        ),
                        SubScale::I8 => (
                            f32::from(byte as i8),
                            if min {
                                f32::from(b[l.offset_offset(row, k, 1)])
                            } else {
                                0.0
                            },
                        ),
                        SubScale::U4 => (f32::from(byte & 15), f32::from(byte >> 4)),
                    };
                    let w = half_at(l.wide_offset(row, sup, 0)) * s * value;
                    if min {
                        w - half_at(l.wide_offset(row, sup, 1)) * m
                    } else {
                        w
                    }
                }
            };
            out[self.permutation.as_ref().map_or(j, |p| p[j] as usize)] = w;
        }
    }

    /// A stored zero point as a number in units of the codebook.
    fn zero(&self, stored: u8) -> f32 {
        f32::from(stored) - if self.bits() == 8 { 128.0 } else { 0.0 }
    }

    /// The whole matrix in f32, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows() * self.inputs()];
        for (row, part) in out.chunks_exact_mut(self.inputs()).enumerate() {
            self.dequantize_row(row, part);
        }
        out
    }
}
