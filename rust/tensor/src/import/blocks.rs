//! ggml's blocks, taken apart and put together, by one table.
//!
//! Codes lie in bit fields: bits `to..to + width` of element e are in byte `at + e / group * lanes + e % lanes` at shift
//! `e % group / lanes * width`, where `group = lanes * 8 / width`.

use self::Subs::{HighLow, Nibbles, Signed, Six, SixWithMin};
use crate::gguf::GgmlType;
use crate::{Codebook, Offset, SUPER, ScaleType, Scales, SubScale};

/// Where some bits of the codes lie.
struct Field {
    at: usize,
    width: usize,
    lanes: usize,
    /// The lowest bit of the code that is here.
    to: usize,
}

/// How sub-scales (and minima) of a super-block are stored.
#[derive(Clone, Copy)]
enum Subs {
    /// There are none.
    None,
    /// Sixteen bytes: sub-scale in the low nibble, minimum in the high one.
    Nibbles,
    /// Sixteen signed bytes.
    Signed,
    /// `Q3_K`: sixteen of 6 bits, less 32, in 12 bytes.
    Six,
    /// `Q4_K` and `Q5_K`: eight of 6 bits and eight minima of 6 bits in 12 bytes.
    SixWithMin,
    /// `IQ4_XS`: eight of 6 bits, less 32: two bytes of high bits, four of low ones.
    HighLow,
}

/// The layout of a block type, and what it becomes.
pub(super) struct Format {
    pub(super) bits: usize,
    /// Elements of a block.
    pub(super) elements: usize,
    pub(super) scales: Scales,
    fields: &'static [Field],
    /// Where the f16 scale lies (MXFP4: the E8M0 byte), and the f16 minimum.
    scale_at: usize,
    min_at: Option<usize>,
    subs: Subs,
    subs_at: usize,
}

/// A block, taken apart.
#[derive(Clone)]
pub(super) struct Block {
    /// Codes in the order of the elements.
    pub(super) codes: [u8; SUPER],
    pub(super) scale: [u8; 2],
    pub(super) min: [u8; 2],
    /// Sub-scales, as [`SubScale`] stores them.
    pub(super) subs: [u8; 16],
    /// Minima of sub-blocks.
    pub(super) mins: [u8; 16],
}

impl Block {
    pub(super) const EMPTY: Self = Self {
        codes: [0; SUPER],
        scale: [0; 2],
        min: [0; 2],
        subs: [0; 16],
        mins: [0; 16],
    };
}

const fn field(at: usize, width: usize, lanes: usize, to: usize) -> Field {
    Field {
        at,
        width,
        lanes,
        to,
    }
}

const fn block32(offset: Offset) -> Scales {
    Scales::Block {
        block: 32,
        scale: ScaleType::F16,
        offset,
    }
}

const fn supers(block: usize, sub: SubScale, min: bool) -> Scales {
    Scales::Super { block, sub, min }
}

impl Format {
    /// The layout of a type; `None` for types that are not imported.
    pub(super) fn of(kind: GgmlType) -> Option<Self> {
        const Q4_0: &[Field] = &[field(2, 4, 16, 0)];
        const Q4_1: &[Field] = &[field(4, 4, 16, 0)];
        const Q5_0: &[Field] = &[field(6, 4, 16, 0), field(2, 1, 1, 4)];
        const Q5_1: &[Field] = &[field(8, 4, 16, 0), field(4, 1, 1, 4)];
        const Q8_0: &[Field] = &[field(2, 8, 1, 0)];
        const Q2_K: &[Field] = &[field(16, 2, 32, 0)];
        const Q3_K: &[Field] = &[field(32, 2, 32, 0), field(0, 1, 32, 2)];
        const Q4_K: &[Field] = &[field(16, 4, 32, 0)];
        const Q5_K: &[Field] = &[field(48, 4, 32, 0), field(16, 1, 32, 4)];
        const Q6_K: &[Field] = &[field(0, 4, 64, 0), field(128, 2, 32, 4)];
        const IQ4_XS: &[Field] = &[field(8, 4, 16, 0)];
        const MXFP4: &[Field] = &[field(1, 4, 16, 0)];
        let none = block32(Offset::None);
        let min = block32(Offset::Min);
        let e8m0 = Scales::Block {
            block: 32,
            scale: ScaleType::E8M0,
            offset: Offset::None,
        };
        let (bits, fields, scale_at, min_at, subs, subs_at, scales) = match kind {
            GgmlType::Q4_0 | GgmlType::IQ4_NL => (4, Q4_0, 0, None, Subs::None, 0, none),
            GgmlType::Q4_1 => (4, Q4_1, 0, Some(2), Subs::None, 0, min),
            GgmlType::Q5_0 => (5, Q5_0, 0, None, Subs::None, 0, none),
            GgmlType::Q5_1 => (5, Q5_1, 0, Some(2), Subs::None, 0, min),
            GgmlType::Q8_0 => (8, Q8_0, 0, None, Subs::None, 0, none),
            GgmlType::MXFP4 => (4, MXFP4, 0, None, Subs::None, 0, e8m0),
            GgmlType::Q2_K => (
                2,
                Q2_K,
                80,
                Some(82),
                Nibbles,
                0,
                supers(16, SubScale::U4, true),
            ),
            GgmlType::Q3_K => (3, Q3_K, 108, None, Six, 96, supers(16, SubScale::I8, false)),
            GgmlType::Q4_K => (
                4,
                Q4_K,
                0,
                Some(2),
                SixWithMin,
                4,
                supers(32, SubScale::U8, true),
            ),
            GgmlType::Q5_K => (
                5,
                Q5_K,
                0,
                Some(2),
                SixWithMin,
                4,
                supers(32, SubScale::U8, true),
            ),
            GgmlType::Q6_K => (
                6,
                Q6_K,
                208,
                None,
                Signed,
                192,
                supers(16, SubScale::I8, false),
            ),
            GgmlType::IQ4_XS => (
                4,
                IQ4_XS,
                0,
                None,
                HighLow,
                2,
                supers(32, SubScale::I8, false),
            ),
            _ => return None,
        };
        Some(Self {
            bits,
            elements: kind.block(),
            scales,
            fields,
            scale_at,
            min_at,
            subs,
            subs_at,
        })
    }

    /// Takes a block apart.
    pub(super) fn unpack(&self, bytes: &[u8], block: &mut Block) {
        let codes = &mut block.codes[..self.elements];
        codes.fill(0);
        for f in self.fields {
            let (per, mask) = (8 / f.width, ((1u16 << f.width) - 1) as u8);
            let groups = codes.chunks_exact_mut(f.lanes * per);
            for (group, from) in groups.zip(bytes[f.at..].chunks_exact(f.lanes)) {
                for (k, lanes) in group.chunks_exact_mut(f.lanes).enumerate() {
                    for (code, byte) in lanes.iter_mut().zip(from) {
                        *code |= (byte >> (k * f.width) & mask) << f.to;
                    }
                }
            }
        }
        if self.bits == 8 {
            // Two's complement in the file; codes are in the order of their values.
            for code in codes.iter_mut() {
                *code ^= 0x80;
            }
        }
        for (at, two) in [
            (Some(self.scale_at), &mut block.scale),
            (self.min_at, &mut block.min),
        ] {
            if let Some(at) = at {
                two.copy_from_slice(&bytes[at..at + 2]);
            }
        }
        let (subs, mins) = (&mut block.subs, &mut block.mins);
        let packed = &bytes[self.subs_at..];
        match self.subs {
            Subs::None => {}
            Subs::Nibbles | Subs::Signed => subs.copy_from_slice(&packed[..16]),
            Subs::Six => {
                for (j, sub) in subs.iter_mut().enumerate() {
                    let low = packed[j % 8] >> (j / 8 * 4) & 15;
                    let high = packed[8 + j % 4] >> (j / 4 * 2) & 3;
                    *sub = (low | high << 4).wrapping_sub(32);
                }
            }
            Subs::SixWithMin => {
                for j in 0..4 {
                    let (d, m, both) = (packed[j], packed[4 + j], packed[8 + j]);
                    (subs[j], mins[j]) = (d & 63, m & 63);
                    subs[4 + j] = both & 15 | d >> 6 << 4;
                    mins[4 + j] = both >> 4 | m >> 6 << 4;
                }
            }
            Subs::HighLow => {
                let high = u16::from_le_bytes([packed[0], packed[1]]);
                for (j, sub) in subs.iter_mut().take(8).enumerate() {
                    let low = packed[2 + j / 2] >> (j % 2 * 4) & 15;
                    *sub = (low | ((high >> (2 * j) & 3) as u8) << 4).wrapping_sub(32);
                }
            }
        }
    }

    /// Puts a block together: the inverse of [`Format::unpack`]. `bytes` is one block.
    pub(super) fn pack(&self, block: &Block, bytes: &mut [u8]) {
        bytes.fill(0);
        let flip = if self.bits == 8 { 0x80 } else { 0 };
        for f in self.fields {
            let (per, mask) = (8 / f.width, ((1u16 << f.width) - 1) as u8);
            let groups = block.codes[..self.elements].chunks_exact(f.lanes * per);
            for (group, to) in groups.zip(bytes[f.at..].chunks_exact_mut(f.lanes)) {
                for (k, lanes) in group.chunks_exact(f.lanes).enumerate() {
                    for (code, byte) in lanes.iter().zip(&mut *to) {
                        *byte |= ((code ^ flip) >> f.to & mask) << (k * f.width);
                    }
                }
            }
        }
        let scale_bytes = if self.scale_type() == Some(ScaleType::E8M0) {
            1
        } else {
            2
        };
        bytes[self.scale_at..self.scale_at + scale_bytes]
            .copy_from_slice(&block.scale[..scale_bytes]);
        if let Some(at) = self.min_at {
            bytes[at..at + 2].copy_from_slice(&block.min);
        }
        let (subs, mins) = (&block.subs, &block.mins);
        let packed = &mut bytes[self.subs_at..];
        match self.subs {
            Subs::None => {}
            Subs::Nibbles | Subs::Signed => packed[..16].copy_from_slice(subs),
            Subs::Six => {
                for (j, sub) in subs.iter().enumerate() {
                    let six = sub.wrapping_add(32);
                    packed[j % 8] |= (six & 15) << (j / 8 * 4);
                    packed[8 + j % 4] |= (six >> 4 & 3) << (j / 4 * 2);
                }
            }
            Subs::SixWithMin => {
                for j in 0..4 {
                    packed[j] = subs[j] & 63 | subs[4 + j] >> 4 << 6;
                    packed[4 + j] = mins[j] & 63 | mins[4 + j] >> 4 << 6;
                    packed[8 + j] = subs[4 + j] & 15 | mins[4 + j] << 4;
                }
            }
            Subs::HighLow => {
                let mut high = 0u16;
                for (j, sub) in subs.iter().take(8).enumerate() {
                    let six = sub.wrapping_add(32);
                    packed[2 + j / 2] |= (six & 15) << (j % 2 * 4);
                    high |= u16::from(six >> 4 & 3) << (2 * j);
                }
                packed[..2].copy_from_slice(&high.to_le_bytes());
            }
        }
    }

    /// Whether the sub-scales of a block fit the bits that the type has for them.
    pub(super) fn holds(&self, block: &Block) -> bool {
        match self.subs {
            Subs::None | Subs::Nibbles | Subs::Signed => true,
            Subs::Six | Subs::HighLow => block.subs.iter().all(|s| (-32..32).contains(&(*s as i8))),
            Subs::SixWithMin => block.subs.iter().chain(&block.mins).all(|s| *s < 64),
        }
    }

    fn scale_type(&self) -> Option<ScaleType> {
        match self.scales {
            Scales::Block { scale, .. } => Some(scale),
            _ => None,
        }
    }
}

/// What the codes of a type stand for.
pub(super) fn codebook(kind: GgmlType) -> Codebook {
    const NL: [i8; 16] = [
        -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
    ];
    // Twice the values of FP4 E2M1, so that they are whole; the scale is halved instead.
    const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
    let from = |first: i16, bits: usize| (first..).take(1 << bits).map(|v| v as i8).collect();
    Codebook::I8(match kind {
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => NL.to_vec(),
        GgmlType::MXFP4 => FP4.to_vec(),
        GgmlType::Q4_0 => from(-8, 4),
        GgmlType::Q5_0 => from(-16, 5),
        GgmlType::Q2_K => from(0, 2),
        GgmlType::Q3_K => from(-4, 3),
        GgmlType::Q5_1 | GgmlType::Q5_K => from(0, 5),
        GgmlType::Q6_K => from(-32, 6),
        GgmlType::Q8_0 => from(-128, 8),
        _ => from(0, 4),
    })
}
