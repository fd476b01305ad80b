//! From bit planes to int8 weights: one code vector (16 rows x 4 inputs) at a time.

use std::ops::Range;

use kbit_simd::{Book, Simd};
use kbit_tensor::{Codebook, KLayout, KTensor, Scales};

/// Panels of a k-bit matrix by raw address.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub layout: &'a KLayout,
    bytes: &'a [u8],
}

impl<'a> Panels<'a> {
    pub(super) fn new(weight: &'a KTensor) -> Self {
        Self {
            layout: weight.layout(),
            bytes: weight.bytes(),
        }
    }

    /// Start of a panel. [`KTensor::new`] made sure that all `layout.panels` are there.
    #[inline(always)]
    pub(super) fn at(&self, panel: usize) -> *const u8 {
        self.bytes[panel * self.layout.panel_bytes..].as_ptr()
    }

    /// The same for requests, which may be for panels that there are not.
    #[inline(always)]
    pub(super) fn ahead(&self, panel: usize) -> *const u8 {
        self.bytes
            .as_ptr()
            .wrapping_add(panel * self.layout.panel_bytes)
    }

    /// Where in a panel chunks are stored, codes of `bits` bits and, with the first, the scales of all.
    pub(super) fn stored(&self, chunks: Range<usize>, bits: usize) -> Range<usize> {
        let chunk = |n: usize| self.layout.codes_at + self.layout.chunks.min(n) * bits * 128;
        let start = if chunks.start == 0 {
            0
        } else {
            chunk(chunks.start)
        };
        start..chunk(chunks.end)
    }
}

/// How codes become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Codebook times ladder; inputs of a block.
    Ladder(usize),
    /// Codebook.
    Table,
    /// `max(code + add, floor)`: what integer codebooks of 5 bits and more are, without tables of 32 to 256 entries.
    Linear {
        /// The entry of code 0 before the floor.
        add: i8,
        /// Least weight.
        floor: i8,
    },
}

/// Prepared tables of a matrix.
#[derive(Debug)]
pub(super) struct Decoder {
    pub bits: usize,
    pub method: Method,
    pub book: Book,
}

impl Decoder {
    pub(super) fn new(book: Book, weight: &KTensor) -> Self {
        let bits = weight.bits();
        let method = match (weight.scales(), weight.codebook()) {
            (Scales::Ladder { block, .. }, _) => Method::Ladder(*block),
            (_, Codebook::I8(entries)) if bits >= 5 => linear(entries).unwrap_or(Method::Table),
            _ => Method::Table,
        };
        Self { bits, method, book }
    }
}

/// The linear form of a codebook, if it has one.
fn linear(entries: &[i8]) -> Option<Method> {
    let last = i32::from(*entries.last()?);
    let add = last - (entries.len() as i32 - 1);
    let floor = i32::from(entries[0]);
    let fits = (-128..=127).contains(&add)
        && entries
            .iter()
            .enumerate()
            .all(|(code, &e)| i32::from(e) == (code as i32 + add).max(floor));
    fits.then_some(Method::Linear {
        add: add as i8,
        floor: floor as i8,
    })
}

/// A method on an instruction set at one width. `BLOCK` is the number of inputs that share what [`Decode::block`] gives.
pub(super) trait Decode<S: Simd>: Copy {
    /// Inputs of a block, 64 where nothing changes.
    const BLOCK: usize;
    /// Bits of a code.
    const BITS: usize;
    /// Whether weights have integer scales already.
    const FOLDED: bool = false;
    /// What a block needs.
    type Block: Copy;
    /// Loads the tables of a matrix into registers.
    fn new(s: S, decoder: &Decoder) -> Self;
    /// Prepared for one block of a panel.
    ///
    /// # Safety
    /// `panel` is the start of a panel of `layout`, `chunk` one of its chunks.
    unsafe fn block(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        chunk: usize,
        quarter: usize,
    ) -> Self::Block;
    /// Weights of code vector `G` of a chunk.
    ///
    /// # Safety
    /// `chunk` holds `BITS * 128` bytes.
    unsafe fn vector<const G: usize>(
        &self,
        s: S,
        block: &Self::Block,
        chunk: *const u8,
    ) -> S::Weights;
}

/// 64 bytes at an address.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::Bytes {
    // SAFETY: as the caller says.
    s.load_bytes(unsafe { &*at.cast() })
}

/// Shifts left by `left - right`; bits cross bytes within a pair.
#[inline(always)]
fn shift<S: Simd>(s: S, v: S::Bytes, left: usize, right: usize) -> S::Bytes {
    match (left as i32) - (right as i32) {
        0 => v,
        n if n > 0 => s.shl(v, n as u32),
        n => s.shr(v, (-n) as u32),
    }
}

/// Bits of plane `width` that belong to code vector `G`, moved to bit `at` of each byte; garbage around them.
///
/// # Safety
/// The plane starts at `plane` and has 8 `width` * 16 bytes.
#[inline(always)]
unsafe fn plane<S: Simd, const G: usize>(
    s: S,
    plane: *const u8,
    width: usize,
    at: usize,
) -> S::Bytes {
    let per = 8 / width;
    // SAFETY: vector G / per is in the plane.
    let v = unsafe { load(s, plane.add(G / per * 64)) };
    shift(s, v, at, width * (G % per))
}

/// Codes of code vector `G`; garbage above `BITS`.
///
/// # Safety
/// `chunk` holds `BITS * 128` bytes.
#[inline(always)]
unsafe fn codes<S: Simd, const BITS: usize, const G: usize>(s: S, chunk: *const u8) -> S::Bytes {
    // SAFETY: planes lie where `KLayout::planes` says, inside the chunk.
    unsafe {
        match BITS {
            2 => plane::<S, G>(s, chunk, 2, 0),
            3 => s.merge(
                3,
                plane::<S, G>(s, chunk, 2, 0),
                plane::<S, G>(s, chunk.add(256), 1, 2),
            ),
            4 => plane::<S, G>(s, chunk, 4, 0),
            5 => s.merge(
                15,
                plane::<S, G>(s, chunk, 4, 0),
                plane::<S, G>(s, chunk.add(512), 1, 4),
            ),
            6 => s.merge(
                15,
                plane::<S, G>(s, chunk, 4, 0),
                plane::<S, G>(s, chunk.add(512), 2, 4),
            ),
            7 => {
                let low = s.merge(
                    15,
                    plane::<S, G>(s, chunk, 4, 0),
                    plane::<S, G>(s, chunk.add(512), 2, 4),
                );
                s.merge(63, low, plane::<S, G>(s, chunk.add(768), 1, 6))
            }
            _ => load(s, chunk.add(G * 64)),
        }
    }
}

/// [`Method::Ladder`]; `SINGLE` is that of [`Simd::fold`].
#[derive(Clone, Copy)]
pub(super) struct LadderDecode<
    S: Simd,
    const BITS: usize,
    const BLOCK: usize,
    const SINGLE: bool = false,
>(S::Ladder);

impl<S: Simd, const BITS: usize, const BLOCK: usize, const SINGLE: bool> Decode<S>
    for LadderDecode<S, BITS, BLOCK, SINGLE>
{
    const BLOCK: usize = BLOCK;
    const BITS: usize = BITS;
    const FOLDED: bool = true;
    type Block = S::Rungs;
    #[inline(always)]
    fn new(s: S, decoder: &Decoder) -> Self {
        Self(s.ladder::<BITS>(&decoder.book))
    }
    #[inline(always)]
    unsafe fn block(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        chunk: usize,
        quarter: usize,
    ) -> S::Rungs {
        // Two neighbouring blocks share 16 bytes, the first in the low nibbles.
        let (pair, high) = match BLOCK {
            16 => (chunk * 2 + quarter / 2, quarter % 2 == 1),
            32 => (chunk, quarter >= 2),
            _ => (chunk / 2, chunk % 2 == 1),
        };
        // SAFETY: the fine section has 16 bytes for every pair of blocks.
        let s16 = unsafe { &*panel.add(layout.fine_at + pair * 16).cast::<[u8; 16]>() };
        s.rungs::<BITS, SINGLE>(&self.0, s16, high)
    }
    #[inline(always)]
    unsafe fn vector<const G: usize>(
        &self,
        s: S,
        rungs: &S::Rungs,
        chunk: *const u8,
    ) -> S::Weights {
        // SAFETY: as the caller says.
        s.fold::<BITS, SINGLE>(&self.0, rungs, unsafe { codes::<S, BITS, G>(s, chunk) })
    }
}

/// [`Method::Table`].
#[derive(Clone, Copy)]
pub(super) struct TableDecode<S: Simd, const BITS: usize>(S::Table);

impl<S: Simd, const BITS: usize> Decode<S> for TableDecode<S, BITS> {
    const BLOCK: usize = 64;
    const BITS: usize = BITS;
    type Block = ();
    #[inline(always)]
    fn new(s: S, decoder: &Decoder) -> Self {
        Self(s.table(&decoder.book))
    }
    #[inline(always)]
    unsafe fn block(&self, _: S, _: &KLayout, _: *const u8, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn vector<const G: usize>(&self, s: S, (): &(), chunk: *const u8) -> S::Weights {
        // SAFETY: as the caller says.
        s.weights(s.lookup::<BITS>(&self.0, unsafe { codes::<S, BITS, G>(s, chunk) }))
    }
}

/// [`Method::Linear`].
#[derive(Clone, Copy)]
pub(super) struct LinearDecode<S: Simd, const BITS: usize> {
    add: S::Bytes,
    floor: S::Bytes,
}

impl<S: Simd, const BITS: usize> Decode<S> for LinearDecode<S, BITS> {
    const BLOCK: usize = 64;
    const BITS: usize = BITS;
    type Block = ();
    #[inline(always)]
    fn new(s: S, decoder: &Decoder) -> Self {
        let (add, floor) = match decoder.method {
            Method::Linear { add, floor } => (add, floor),
            Method::Table | Method::Ladder(_) => unreachable!("chosen by with_decode"),
        };
        Self {
            add: s.splat_bytes(add as u8 ^ S::BIAS),
            floor: s.splat_bytes(floor as u8 ^ S::BIAS),
        }
    }
    #[inline(always)]
    unsafe fn block(&self, _: S, _: &KLayout, _: *const u8, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn vector<const G: usize>(&self, s: S, (): &(), chunk: *const u8) -> S::Weights {
        // SAFETY: as the caller says.
        let mut code = unsafe { codes::<S, BITS, G>(s, chunk) };
        if BITS < 8 {
            code = s.merge(((1u16 << BITS) - 1) as u8, code, s.splat_bytes(0));
        }
        s.weights(s.linear(code, self.add, self.floor))
    }
}

/// Runs `$do!(D)` with the [`Decode`] type of a [`Decoder`] at `$bits` bits.
macro_rules! with_decode {
    ($S:ident, $decoder:expr, $bits:tt, $do:ident) => {{
        use crate::linear::codes::{LadderDecode, LinearDecode, Method, TableDecode};
        match $decoder.method {
            Method::Ladder(16) => $do!(LadderDecode::<$S, $bits, 16>),
            Method::Ladder(32) => $do!(LadderDecode::<$S, $bits, 32>),
            Method::Ladder(_) => $do!(LadderDecode::<$S, $bits, 64>),
            Method::Table => $do!(TableDecode::<$S, $bits>),
            Method::Linear { .. } if const { $bits >= 5 } => $do!(LinearDecode::<$S, $bits>),
            Method::Linear { .. } => unreachable!("linear codebooks start at 5 bits"),
        }
    }};
}
pub(super) use with_decode;
