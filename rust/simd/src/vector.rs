//! The vector trait: what an instruction set must be able to do.
//!
//! Vectors are 64 bytes on every instruction set: one AVX-512 register, two of AVX2, four of NEON, an array in the scalar
//! definition. A generic algorithm is therefore written once, and "lane" means the same everywhere.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::{Isa, SimdOp};

/// Lanes of an f32 or i32 vector.
pub const LANES: usize = 16;

/// The images that [`Simd::table`] and [`Simd::ladder`] load: made once a matrix.
#[derive(Clone, Debug)]
pub struct Book {
    /// `codebook[code mod 2^bits]`.
    pub values: [i8; 256],
    /// `(codebook[code] * ladder[s] + 64) >> 7` at `code | s << bits`, for up to 4 bits.
    pub folded: [i8; 256],
    /// Ladder values.
    pub ladder: [u8; 16],
}

impl Book {
    /// The images of a codebook of `2^bits` entries and a ladder.
    ///
    /// # Panics
    /// When the codebook has another length or `bits` is over 8.
    pub fn new(bits: usize, codebook: &[i8], ladder: [u8; 16]) -> Self {
        assert!(
            bits <= 8 && codebook.len() == 1 << bits,
            "codebook of {} for {bits} bits",
            codebook.len()
        );
        let values = std::array::from_fn(|i| codebook[i % codebook.len()]);
        let rung = |i: usize| i32::from(ladder[i >> bits & 15]);
        let folded = std::array::from_fn(|i| ((i32::from(values[i]) * rung(i) + 64) >> 7) as i8);
        Self {
            values,
            folded,
            ladder,
        }
    }
}

/// An instruction set. A value of the type exists only where the processor has the instructions, so holding one is the
/// proof that every method may run; methods are meant to be inlined into a [`Simd::run`] shell.
///
/// Float operations round as IEEE binary32 does; `max(a, b)` is `if a > b { a } else { b }` and `min` likewise, so that
/// even NaN gives the same bits on every path.
pub trait Simd: Copy + Send + Sync + 'static {
    /// 16 f32.
    type F32: Copy;
    /// 16 i32 (wrapping).
    type I32: Copy;
    /// 16 truth values.
    type Mask: Copy;
    /// 64 bytes: a code vector, 16 rows of 4 inputs.
    type Bytes: Copy;
    /// Up to 256 bytes to look up in.
    type Table: Copy;
    /// Codebook and ladder, ready for [`Simd::fold`].
    type Ladder: Copy;
    /// Ladder values of the 16 rows in one block.
    type Rungs: Copy;
    /// A decoded code vector as [`Simd::dot`] wants it.
    type Weights: Copy;
    /// Four activations as [`Simd::dot`] wants them.
    type Acts: Copy;

    /// Which instruction set this is.
    const ISA: Isa;
    /// What is xored into weights and table entries: 0x80 where the dot product takes an unsigned side (the accumulator then starts
    /// at -128 times the sum of the activations), else 0.
    const BIAS: u8;
    /// Bytes of a [`Simd::Weights`] in memory.
    const WEIGHT_BYTES: usize;
    /// True when activations are stored as i16 in the order 0, 2, 1, 3 of each four, false for i8 in order. Where a tile has a multiple of four tokens,
    /// i16 have room for differences: each four, a, b, c and d, then lie as three rows, 256 a - b, 256 b - c and 256 c - d ([`Simd::rows`]).
    const PAIRS: bool;
    /// Inputs of one token that lie together in a tile of activations: 4, or what one step of [`Simd::product`] takes.
    const RUN: usize = 4;
    /// Tokens of the smallest matrix-matrix tile behind others.
    const LEAST: usize = 1;
    /// Tokens of the smallest one where there are no others.
    const ALONE: usize = Self::LEAST;
    /// Tokens of a matrix-matrix tile.
    const TILE: usize;
    /// The same where activations are f32.
    const FLOATS: usize = Self::TILE;
    /// Panels of 16 rows of a matrix-matrix tile: 1 or 2.
    const PANELS: usize;
    /// Whether a product leaves its sums in memory, as matrix tiles do. They are then best taken into results while the next product runs, and
    /// weights best scaled as integers ([`Simd::scale`]) before they are multiplied.
    const STORED: bool = false;
    /// Tokens up to which weights are best multiplied as they are decoded: 0, 2, 4, 8 or 16. So many tokens are one tile.
    const DIRECT: usize;

    /// The token, if this processor has the instructions.
    fn new() -> Option<Self>;

    /// Rows of activations that so many tokens, the whole of a tile, lie as: see [`Simd::PAIRS`].
    #[inline(always)]
    fn rows(tokens: usize) -> usize {
        if Self::PAIRS && tokens.is_multiple_of(4) {
            tokens / 4 * 3
        } else {
            tokens
        }
    }

    /// Runs `op` in a function compiled for this instruction set.
    fn run<O: SimdOp>(self, op: O) -> O::Output;

    // ---- f32: moves

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32;
    /// Lanes from memory.
    fn load(self, x: &[f32; LANES]) -> Self::F32;
    /// The first `x.len()` (at most 16) lanes from memory, the others +0.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F32 {
        if let Ok(all) = x.try_into() {
            return self.load(all);
        }
        let mut all = [0.0; LANES];
        all[..x.len()].copy_from_slice(x);
        self.load(&all)
    }
    /// Lanes to memory.
    fn store(self, v: Self::F32, to: &mut [f32; LANES]);
    /// The first `to.len()` (at most 16) lanes to memory.
    #[inline(always)]
    fn store_part(self, v: Self::F32, to: &mut [f32]) {
        if let Ok(all) = <&mut [f32; LANES]>::try_from(&mut *to) {
            return self.store(v, all);
        }
        let mut all = [0.0; LANES];
        self.store(v, &mut all);
        to.copy_from_slice(&all[..to.len()]);
    }
    /// From half precision (bits), exactly.
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32;
    /// To half precision, ties to even.
    fn store_f16(self, v: Self::F32, to: &mut [u16; LANES]);
    /// From bfloat16 (bits), exactly.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32;
    /// To bfloat16, ties to even; NaN stays NaN.
    fn store_bf16(self, v: Self::F32, to: &mut [u16; LANES]);

    // ---- f32: arithmetic

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// Square root.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// `if a > b { a } else { b }`.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if a < b { a } else { b }`.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Absolute value.
    fn abs(self, a: Self::F32) -> Self::F32;
    /// `-a`.
    fn neg(self, a: Self::F32) -> Self::F32;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// `a < b`.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// The first `n` lanes.
    fn first(self, n: usize) -> Self::Mask;
    /// `if mask { a } else { b }`.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Sum by halves: lane i + lane i+8, then +4, +2, +1.
    fn reduce_add(self, a: Self::F32) -> f32;
    /// Largest lane (of numbers).
    fn reduce_max(self, a: Self::F32) -> f32;

    // ---- i32

    /// All lanes `x`.
    fn splat_i32(self, x: i32) -> Self::I32;
    /// Lanes from memory.
    fn load_i32(self, x: &[i32; LANES]) -> Self::I32;
    /// Lanes to memory.
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]);
    /// From unsigned bytes.
    fn load_u8(self, x: &[u8; LANES]) -> Self::I32;
    /// From signed bytes.
    fn load_i8(self, x: &[i8; LANES]) -> Self::I32;
    /// The low byte of each lane.
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]);
    /// `a + b`.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a - b`.
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a * b`.
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a & b`.
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a << n`.
    fn shl_i32(self, a: Self::I32, n: u32) -> Self::I32;
    /// `a >> n`, filled with zeros.
    fn shr_i32(self, a: Self::I32, n: u32) -> Self::I32;
    /// Sum of the lanes.
    fn reduce_add_i32(self, a: Self::I32) -> i32;
    /// Nearest integer, ties to even, of values within i32.
    fn to_i32(self, a: Self::F32) -> Self::I32;
    /// Nearest f32, ties to even.
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// The bits of floats.
    fn bits(self, a: Self::F32) -> Self::I32;
    /// Floats of bits.
    fn of_bits(self, a: Self::I32) -> Self::F32;

    // ---- codes

    /// 64 bytes from memory.
    fn load_bytes(self, x: &[u8; 64]) -> Self::Bytes;
    /// All bytes `x`.
    fn splat_bytes(self, x: u8) -> Self::Bytes;
    /// Every 16-bit pair of bytes shifted right (the low byte gets bits of the high one: mask or ignore them).
    fn shr(self, v: Self::Bytes, n: u32) -> Self::Bytes;
    /// Every 16-bit pair of bytes shifted left.
    fn shl(self, v: Self::Bytes, n: u32) -> Self::Bytes;
    /// Bits of `a` where `mask` has ones, of `b` elsewhere.
    fn merge(self, mask: u8, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// `max(code + add, floor)` in wrapping bytes, where all three are xored with [`Simd::BIAS`] and compare as that says.
    fn linear(self, code: Self::Bytes, add: Self::Bytes, floor: Self::Bytes) -> Self::Bytes;
    /// The codebook, its entries xored with [`Simd::BIAS`].
    fn table(self, book: &Book) -> Self::Table;
    /// `table[code mod 2^BITS]` of each byte; higher bits of the code are ignored.
    fn lookup<const BITS: usize>(self, table: &Self::Table, code: Self::Bytes) -> Self::Bytes;
    /// Bytes that are weights xored with [`Simd::BIAS`], as the dot product wants them.
    fn weights(self, v: Self::Bytes) -> Self::Weights;
    /// Codebook and ladder.
    fn ladder<const BITS: usize>(self, book: &Book) -> Self::Ladder;
    /// Ladder indices of 16 rows: the low or the high nibbles. `SINGLE` as [`Simd::fold`] will have it.
    fn rungs<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        s: &[u8; 16],
        high: bool,
    ) -> Self::Rungs;
    /// `(codebook[code] * ladder[s] + 64) >> 7` of each byte; bits of the code above BITS are ignored.
    /// `SINGLE`: by looking bytes up in one register at a time, where there is another way ([`Simd::single`] says when that is faster).
    fn fold<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        rungs: &Self::Rungs,
        code: Self::Bytes,
    ) -> Self::Weights;
    /// Whether this processor is faster with `SINGLE` in [`Simd::fold`].
    #[inline(always)]
    fn single<const BITS: usize>(self) -> bool {
        false
    }
    /// Weights to memory.
    ///
    /// # Safety
    /// `to` is good for [`Simd::WEIGHT_BYTES`] bytes and 64-byte aligned.
    unsafe fn store_weights(self, w: Self::Weights, to: *mut u8);
    /// Weights from memory.
    ///
    /// # Safety
    /// `from` is good for [`Simd::WEIGHT_BYTES`] bytes and 64-byte aligned.
    unsafe fn load_weights(self, from: *const u8) -> Self::Weights;
    /// Four activations for all rows.
    ///
    /// # Safety
    /// `a` is good for 4 bytes, or 8 with [`Simd::PAIRS`].
    unsafe fn acts(self, a: *const u8) -> Self::Acts;
    /// Adds, per row, the exact dot product of its four weights and the four activations. Weights count as unsigned under
    /// [`Simd::BIAS`].
    fn dot(self, acc: Self::I32, w: Self::Weights, a: Self::Acts) -> Self::I32;
    /// Two neighbouring code vectors to memory, in the order [`Simd::product`] reads them.
    ///
    /// # Safety
    /// As [`Simd::store_weights`], for twice the bytes.
    #[inline(always)]
    unsafe fn store_pair(self, w: [Self::Weights; 2], to: *mut u8) {
        // SAFETY: as the caller says.
        unsafe {
            self.store_weights(w[0], to);
            self.store_weights(w[1], to.add(Self::WEIGHT_BYTES));
        }
    }
    /// Weights times the integers of their 16 rows, -128..=255, as `256 * a + b`: gives `a` and `b`.
    ///
    /// # Panics
    /// Without [`Simd::STORED`], where nothing wants it.
    #[inline(always)]
    fn scale(self, _: Self::Weights, _: Self::I32) -> [Self::Weights; 2] {
        unreachable!("weights are scaled for matrix tiles")
    }
    /// Before the products of a piece of work on this thread: whatever [`Simd::product`] needs set up. Each will be over so many inputs, less than
    /// [`Simd::RUN`] or any number of runs, by tiles of so many tokens, or of [`Simd::LEAST`] and more.
    #[inline(always)]
    fn begin_products(self, _inputs: usize, _tokens: usize) {}
    /// After them.
    #[inline(always)]
    fn end_products(self) {}
    /// The heart of a matrix-matrix tile: sets `sums[p][n]`, per row of panel p, to `start[n]` and the exact dot product of its weights with
    /// token n over the inputs `4 * groups.start .. 4 * groups.end`.
    ///
    /// `weights` are those of the first of these inputs, as [`Simd::store_pair`] wrote them; `acts` those of input 0, as
    /// `[inputs / RUN][rows(M)][RUN]` (see [`Simd::PAIRS`]). `start` is zero without [`Simd::BIAS`].
    ///
    /// # Safety
    /// Both are readable for `groups`, at most 256 inputs, which starts and ends at multiples of 8 inputs and of what [`Simd::begin_products`] was told, or of
    /// [`Simd::RUN`]; weights are 64-byte aligned. It runs before [`Simd::end_products`].
    #[inline(always)]
    unsafe fn product<const P: usize, const M: usize>(
        self,
        weights: [*const u8; P],
        acts: *const u8,
        groups: Range<usize>,
        start: [Self::I32; M],
        sums: &mut MaybeUninit<[[Self::I32; M]; P]>,
    ) {
        let sums = sums.write([start; P]);
        // SAFETY: as the caller says.
        unsafe { multiply(self, weights, acts, groups, sums) }
    }
    /// [`Simd::product`] in parts, with [`Simd::STORED`] only: the sums of a tile of `M` tokens become zero,
    ///
    /// # Safety
    /// It runs between [`Simd::begin_products`] and [`Simd::end_products`].
    #[inline(always)]
    unsafe fn begin_sums<const M: usize>(self) {
        unreachable!("sums are vectors");
    }
    /// products are added to them, any number of times,
    ///
    /// # Safety
    /// As [`Simd::product`], after [`Simd::begin_sums`].
    #[inline(always)]
    unsafe fn add_products<const P: usize, const M: usize>(
        self,
        _weights: [*const u8; P],
        _acts: *const u8,
        _groups: Range<usize>,
    ) {
        unreachable!("sums are vectors");
    }
    /// and they are taken to memory.
    ///
    /// # Safety
    /// After [`Simd::begin_sums`].
    #[inline(always)]
    unsafe fn end_sums<const P: usize, const M: usize>(
        self,
        _sums: &mut MaybeUninit<[[Self::I32; M]; P]>,
    ) {
        unreachable!("sums are vectors");
    }
    /// Asks for a cache line, into the first cache.
    fn prefetch(self, at: *const u8);
    /// The same into the second.
    fn prefetch_far(self, at: *const u8);
}

/// [`Simd::product`] by [`Simd::dot`], where activations lie by four.
///
/// # Safety
/// As [`Simd::product`].
#[inline(always)]
pub(crate) unsafe fn multiply<S: Simd, const P: usize, const M: usize>(
    s: S,
    mut weights: [*const u8; P],
    acts: *const u8,
    groups: Range<usize>,
    dots: &mut [[S::I32; M]; P],
) {
    assert!(
        S::RUN == 4 && S::rows(M) == M,
        "products of other layouts are overridden"
    );
    let four = if S::PAIRS { 8 } else { 4 };
    let mut acts = acts.wrapping_add(groups.start * four * M);
    for _ in groups {
        // SAFETY: as the caller says.
        let mut w = [unsafe { s.load_weights(weights[0]) }; P];
        for p in 0..P {
            // SAFETY: as the caller says.
            w[p] = unsafe { s.load_weights(weights[p]) };
            weights[p] = weights[p].wrapping_add(S::WEIGHT_BYTES);
        }
        // Activations one after the other: all of them at once would not fit the registers.
        for n in 0..M {
            // SAFETY: as the caller says.
            let a = unsafe { s.acts(acts.add(n * four)) };
            for p in 0..P {
                dots[p][n] = s.dot(dots[p][n], w[p], a);
            }
        }
        acts = acts.wrapping_add(four * M);
    }
}
