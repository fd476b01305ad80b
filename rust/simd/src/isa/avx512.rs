//! AVX-512 with VNNI, without and with VBMI (byte permutations), and what AMX shares with it: all but the product.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument holds for all: a token exists only after `new` detected its features"
)]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx;
use crate::dispatch::detected;
use crate::vector::multiply;
use crate::{Book, Isa, LANES, Simd, SimdOp, Vendor};

/// AVX-512 F, BW, VL, DQ and VNNI; from [`VBMI`] on also byte permutations, with [`AMX`] also tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<const LEVEL: u8>(());

const VBMI: u8 = 1;
const AMX: u8 = 2;

/// Without VBMI: tables by `vpshufb`, ladders by multiplication.
pub(crate) type Avx512 = Token<0>;
/// With VBMI: tables of 64 and 128 entries in one instruction, ladders up to 4 bits by table.
pub(crate) type Avx512Vbmi = Token<VBMI>;
/// The same, but products are of AMX tiles.
pub(crate) type Amx = Token<AMX>;

impl Amx {
    /// The token, without looking for AMX.
    ///
    /// # Safety
    /// The process may use AMX int8 tiles.
    pub(super) unsafe fn over(_: Avx512Vbmi) -> Self {
        Self(())
    }
}

/// A codebook, or codebook and ladder in one table, and the ladder itself.
#[derive(Clone, Copy)]
pub(crate) struct Ladder {
    table: [__m512i; 16],
    ladder: __m512i,
}

/// One block of 16 rows.
#[derive(Clone, Copy)]
pub(crate) struct Rungs {
    /// Ladder index above where the code goes (table), or twice the ladder value in even bytes (multiplication).
    v: __m512i,
    /// The same in odd bytes.
    odd: __m512i,
    /// Which bytes look where in a table of more registers than one.
    parts: Parts,
}

/// Bytes of an index: those below 128 and the others, or, to look into one register at a time, those with bit 6, with bit 7 and with both.
#[derive(Clone, Copy)]
struct Parts(__mmask64, __mmask64, __mmask64);

/// Whether codebook and ladder fit one table.
const fn folds_by_table(level: u8, bits: usize) -> bool {
    level >= VBMI && bits <= 4
}

/// Whether a table of two or four registers is looked up one at a time: processors with AMX split `vpermi2b` into three instructions.
const fn one_at_a_time(level: u8, single: bool) -> bool {
    single || level == AMX
}

impl<const LEVEL: u8> Simd for Token<LEVEL> {
    type F32 = __m512;
    type I32 = __m512i;
    type Mask = __mmask16;
    type Bytes = __m512i;
    type Table = [__m512i; 16];
    type Ladder = Ladder;
    type Rungs = Rungs;
    type Weights = __m512i;
    type Acts = __m512i;

    const ISA: Isa = match LEVEL {
        AMX => Isa::Amx,
        VBMI => Isa::Avx512Vbmi,
        _ => Isa::Avx512,
    };
    /// Tiles multiply signed numbers with each other.
    const BIAS: u8 = if LEVEL == AMX { 0 } else { 0x80 };
    const WEIGHT_BYTES: usize = 64;
    const PAIRS: bool = false;
    const RUN: usize = if LEVEL == AMX { amx::STEP } else { 4 };
    const LEAST: usize = if LEVEL == AMX { amx::ROWS } else { 1 };
    const ALONE: usize = if LEVEL == AMX { amx::ALONE } else { 1 };
    const TILE: usize = if LEVEL == AMX { 2 * amx::ROWS } else { 12 };
    const PANELS: usize = 2;
    const STORED: bool = LEVEL == AMX;
    const DIRECT: usize = if LEVEL == AMX { 0 } else { 16 };

    fn new() -> Option<Self> {
        let detect = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && (LEVEL < VBMI || is_x86_feature_detected!("avx512vbmi"))
        };
        // That of AMX is remembered there, as tests change it.
        (detected(Self::ISA, detect) && (LEVEL < AMX || amx::usable())).then_some(Self(()))
    }

    fn run<O: SimdOp>(self, op: O) -> O::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
        fn base<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        #[inline(never)]
        #[target_feature(
            enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c"
        )]
        fn vbmi<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        // SAFETY: the token proves the features.
        unsafe {
            if LEVEL >= VBMI {
                vbmi(self, op)
            } else {
                base(self, op)
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F32 {
        unsafe { _mm512_maskz_loadu_ps(self.first(x.len()), x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn store_part(self, v: Self::F32, to: &mut [f32]) {
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), self.first(to.len()), v) }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [u16; LANES]) {
        unsafe {
            _mm256_storeu_si256(
                to.as_mut_ptr().cast(),
                _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v),
            );
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(x.as_ptr().cast()),
            )))
        }
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F32, to: &mut [u16; LANES]) {
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let all = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm256_storeu_si256(
                to.as_mut_ptr().cast(),
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(all)),
            );
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn neg(self, a: Self::F32) -> Self::F32 {
        unsafe { _mm512_xor_ps(a, _mm512_set1_ps(-0.0)) }
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::Mask {
        ((1u32 << n.min(LANES)) - 1) as u16
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_mask_blend_ps(mask, b, a) }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(a)));
            let e = _mm256_add_ps(_mm512_castps512_ps256(a), high);
            let q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps::<1>(e));
            let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I32 {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I32 {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::I32 {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)) }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { _mm512_mullo_epi32(a, b) }
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn shl_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shr_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn reduce_add_i32(self, a: Self::I32) -> i32 {
        unsafe { _mm512_reduce_add_epi32(a) }
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn bits(self, a: Self::F32) -> Self::I32 {
        unsafe { _mm512_castps_si512(a) }
    }
    #[inline(always)]
    fn of_bits(self, a: Self::I32) -> Self::F32 {
        unsafe { _mm512_castsi512_ps(a) }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::Bytes {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_bytes(self, x: u8) -> Self::Bytes {
        unsafe { _mm512_set1_epi8(x as i8) }
    }
    #[inline(always)]
    fn shr(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        unsafe { _mm512_srl_epi16(v, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shl(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        unsafe { _mm512_sll_epi16(v, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn merge(self, mask: u8, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(mask as i8), a, b) }
    }
    #[inline(always)]
    fn linear(self, code: Self::Bytes, add: Self::Bytes, floor: Self::Bytes) -> Self::Bytes {
        unsafe {
            let v = _mm512_add_epi8(code, add);
            if Self::BIAS == 0 {
                _mm512_max_epi8(v, floor)
            } else {
                _mm512_max_epu8(v, floor)
            }
        }
    }
    #[inline(always)]
    fn table(self, book: &Book) -> Self::Table {
        table(LEVEL >= VBMI, &book.values, Self::BIAS)
    }
    #[inline(always)]
    fn lookup<const BITS: usize>(self, t: &Self::Table, code: Self::Bytes) -> Self::Bytes {
        unsafe {
            if LEVEL >= VBMI {
                return match BITS {
                    ..=6 => _mm512_permutexvar_epi8(code, t[0]),
                    7 => _mm512_permutex2var_epi8(t[0], code, t[1]),
                    _ => lookup_256(t, code, Parts::halves(code)),
                };
            }
            let low = _mm512_and_si512(code, _mm512_set1_epi8(15));
            let mut v = _mm512_shuffle_epi8(t[0], low);
            if BITS > 4 {
                let high = _mm512_and_si512(code, _mm512_set1_epi8(((1u16 << BITS) - 16) as i8));
                for j in 1..1 << BITS.saturating_sub(4) {
                    let here = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((j << 4) as i8));
                    v = _mm512_mask_shuffle_epi8(v, here, t[j], low);
                }
            }
            v
        }
    }
    #[inline(always)]
    fn weights(self, v: Self::Bytes) -> Self::Weights {
        v
    }
    #[inline(always)]
    fn single<const BITS: usize>(self) -> bool {
        LEVEL == VBMI && matches!(BITS, 3 | 4) && Vendor::here() != Vendor::Amd
    }
    #[inline(always)]
    fn ladder<const BITS: usize>(self, book: &Book) -> Self::Ladder {
        let table = if folds_by_table(LEVEL, BITS) {
            table(LEVEL >= VBMI, &book.folded, Self::BIAS)
        } else {
            table(LEVEL >= VBMI, &book.values, 0)
        };
        // 255 is as good as 256: (255 v + 128) >> 8 is v for all entries, which are -127..=127.
        let ladder = unsafe {
            let once = _mm_loadu_si128(book.ladder.as_ptr().cast());
            _mm512_broadcast_i32x4(_mm_adds_epu8(once, once))
        };
        Ladder { table, ladder }
    }
    #[inline(always)]
    fn rungs<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        s: &[u8; 16],
        high: bool,
    ) -> Self::Rungs {
        unsafe {
            let rows = _mm512_broadcast_i32x4(_mm_loadu_si128(s.as_ptr().cast()));
            let four_each = _mm512_set_epi32(
                0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909,
                0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
                0x01010101, 0,
            );
            let s = _mm512_shuffle_epi8(rows, four_each);
            if folds_by_table(LEVEL, BITS) {
                let v = if high {
                    self.shr(s, 4 - BITS as u32)
                } else {
                    self.shl(s, BITS as u32)
                };
                let parts = match BITS {
                    3 | 4 if one_at_a_time(LEVEL, SINGLE) => Parts::quarters(v),
                    4 => Parts::halves(v),
                    _ => Parts::NONE,
                };
                return Rungs { v, odd: v, parts };
            }
            let nibble = _mm512_and_si512(
                if high { _mm512_srli_epi16::<4>(s) } else { s },
                _mm512_set1_epi8(15),
            );
            let twice = _mm512_shuffle_epi8(ladder.ladder, nibble);
            let v = _mm512_and_si512(twice, _mm512_set1_epi16(255));
            Rungs {
                v,
                odd: _mm512_xor_si512(twice, v),
                parts: Parts::NONE,
            }
        }
    }
    #[inline(always)]
    fn fold<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        rungs: &Self::Rungs,
        code: Self::Bytes,
    ) -> Self::Weights {
        unsafe {
            if folds_by_table(LEVEL, BITS) {
                let t = &ladder.table;
                let index = self.merge(((1u16 << BITS) - 1) as u8, code, rungs.v);
                return match BITS {
                    2 => _mm512_permutexvar_epi8(index, t[0]),
                    _ if one_at_a_time(LEVEL, SINGLE) => {
                        lookup_single::<BITS>(t, index, rungs.parts)
                    }
                    3 => _mm512_permutex2var_epi8(t[0], index, t[1]),
                    _ => lookup_256(t, index, rungs.parts),
                };
            }
            // Twice the product with its rounding has the weight in its upper byte; the lower one is dropped.
            let value = self.lookup::<BITS>(&ladder.table, code);
            let bias = _mm512_set1_epi16(i16::from_le_bytes([0x80, Self::BIAS]));
            let even = _mm512_add_epi16(_mm512_maddubs_epi16(rungs.v, value), bias);
            let odd = _mm512_add_epi16(_mm512_maddubs_epi16(rungs.odd, value), bias);
            upper_bytes(even, odd)
        }
    }
    #[inline(always)]
    unsafe fn store_weights(self, w: Self::Weights, to: *mut u8) {
        unsafe { _mm512_store_si512(to.cast(), w) }
    }
    #[inline(always)]
    unsafe fn load_weights(self, from: *const u8) -> Self::Weights {
        unsafe { _mm512_load_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn acts(self, a: *const u8) -> Self::Acts {
        unsafe { _mm512_set1_epi32(a.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn dot(self, acc: Self::I32, w: Self::Weights, a: Self::Acts) -> Self::I32 {
        unsafe {
            if Self::BIAS == 0 {
                // No kernel has this: tiles multiply what is signed, this instruction does not.
                let bias = _mm512_set1_epi8(-128);
                let sum = _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, bias), a);
                let more = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bias, a);
                return _mm512_sub_epi32(sum, more);
            }
            _mm512_dpbusd_epi32(acc, w, a)
        }
    }
    #[inline(always)]
    fn scale(self, w: Self::Weights, by: Self::I32) -> [Self::Weights; 2] {
        unsafe {
            // Both halves of a row's 32 bits.
            let by = _mm512_or_si512(
                _mm512_and_si512(by, _mm512_set1_epi32(0xffff)),
                _mm512_slli_epi32::<16>(by),
            );
            let even = _mm512_mullo_epi16(_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(w)), by);
            let odd = _mm512_mullo_epi16(_mm512_srai_epi16::<8>(w), by);
            // As signed bytes: the lower one may count down from the next 256.
            let half = _mm512_set1_epi16(128);
            let high = _mm512_mask_blend_epi8(
                ODD,
                _mm512_srli_epi16::<8>(_mm512_add_epi16(even, half)),
                _mm512_add_epi16(odd, half),
            );
            let low = _mm512_mask_blend_epi8(ODD, even, _mm512_slli_epi16::<8>(odd));
            [high, low]
        }
    }
    #[inline(always)]
    fn begin_products(self, inputs: usize, tokens: usize) {
        if const { LEVEL == AMX } {
            unsafe { amx::configure(inputs, tokens) }
        }
    }
    #[inline(always)]
    fn end_products(self) {
        if const { LEVEL == AMX } {
            unsafe { amx::release() }
        }
    }
    #[inline(always)]
    unsafe fn product<const P: usize, const M: usize>(
        self,
        weights: [*const u8; P],
        acts: *const u8,
        groups: Range<usize>,
        start: [Self::I32; M],
        sums: &mut MaybeUninit<[[Self::I32; M]; P]>,
    ) {
        unsafe {
            if const { LEVEL == AMX } {
                self.begin_sums::<M>();
                self.add_products::<P, M>(weights, acts, groups);
                self.end_sums(sums);
            } else {
                multiply(self, weights, acts, groups, sums.write([start; P]));
            }
        }
    }
    #[inline(always)]
    unsafe fn begin_sums<const M: usize>(self) {
        assert!(Self::STORED, "sums are vectors");
        unsafe { amx::zero::<M>() }
    }
    #[inline(always)]
    unsafe fn add_products<const P: usize, const M: usize>(
        self,
        weights: [*const u8; P],
        acts: *const u8,
        groups: Range<usize>,
    ) {
        assert!(Self::STORED, "sums are vectors");
        unsafe { amx::add::<P, M>(weights, acts, groups) }
    }
    #[inline(always)]
    unsafe fn end_sums<const P: usize, const M: usize>(
        self,
        sums: &mut MaybeUninit<[[Self::I32; M]; P]>,
    ) {
        assert!(Self::STORED, "sums are vectors");
        unsafe { amx::store(sums) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Every second byte.
const ODD: __mmask64 = 0xaaaa_aaaa_aaaa_aaaa;

impl Parts {
    const NONE: Self = Self(0, 0, 0);

    // In assembly, which stays where it is written: masks take long to make, and compilers put off what would be ready in time.

    /// The halves of an index.
    #[inline]
    #[target_feature(enable = "avx512bw")]
    fn halves(index: __m512i) -> Self {
        let (lower, upper);
        unsafe {
            std::arch::asm!(
                "vpmovb2m {upper}, {index}",
                "knotq {lower}, {upper}",
                index = in(zmm_reg) index,
                upper = out(kreg) upper,
                lower = lateout(kreg) lower,
                options(nomem, nostack, preserves_flags),
            );
        }
        Self(lower, upper, 0)
    }

    /// Bits 6 and 7 of an index.
    #[inline]
    #[target_feature(enable = "avx512bw")]
    fn quarters(index: __m512i) -> Self {
        let (bit6, bit7, both);
        unsafe {
            std::arch::asm!(
                "vpmovb2m {bit7}, {index}",
                "vpmovb2m {bit6}, {twice}",
                "kandq {both}, {bit6}, {bit7}",
                index = in(zmm_reg) index,
                twice = in(zmm_reg) _mm512_add_epi8(index, index),
                bit7 = out(kreg) bit7,
                bit6 = out(kreg) bit6,
                both = lateout(kreg) both,
                options(nomem, nostack, preserves_flags),
            );
        }
        Self(bit6, bit7, both)
    }
}

/// Two tables of 128. Each lookup writes its bytes over their indices, so that nothing is left to merge.
#[inline(always)]
fn lookup_256(t: &[__m512i; 16], index: __m512i, Parts(lower, upper, _): Parts) -> __m512i {
    // SAFETY: called with VBMI only.
    unsafe {
        let low = _mm512_mask2_permutex2var_epi8(t[0], index, lower, t[1]);
        _mm512_mask2_permutex2var_epi8(t[2], low, upper, t[3])
    }
}

/// Two tables of 64, or with 4 bits four: each lookup writes over those before where it knows better.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn lookup_single<const BITS: usize>(
    t: &[__m512i; 16],
    index: __m512i,
    Parts(bit6, bit7, both): Parts,
) -> __m512i {
    let v = _mm512_permutexvar_epi8(index, t[0]);
    let v = lookup_over(v, bit6, index, t[1]);
    if BITS == 3 {
        return v;
    }
    let v = lookup_over(v, bit7, index, t[2]);
    lookup_over(v, both, index, t[3])
}

/// `_mm512_mask_permutexvar_epi8` in assembly, which stays where it is written, so that weights are decoded beside the products of the vector before them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn lookup_over(mut v: __m512i, here: __mmask64, index: __m512i, table: __m512i) -> __m512i {
    // SAFETY: reads and writes these registers only; the instruction set is the function's.
    unsafe {
        std::arch::asm!(
            "vpermb {v}{{{here}}}, {index}, {table}",
            v = inout(zmm_reg) v,
            here = in(kreg) here,
            index = in(zmm_reg) index,
            table = in(zmm_reg) table,
            options(nomem, nostack, preserves_flags),
        );
    }
    v
}

/// The upper bytes of 16-bit lanes: of `even` in even bytes, of `odd` in odd ones. In assembly for the same reason, as products wait for weights that are
/// decoded just before them, and because compilers put a slower `vpermt2b` in its place.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_bytes(even: __m512i, mut odd: __m512i) -> __m512i {
    let swapped = _mm_set_epi8(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
    unsafe {
        std::arch::asm!(
            "vpshufb {odd}{{{evens}}}, {even}, {swapped}",
            odd = inout(zmm_reg) odd,
            even = in(zmm_reg) even,
            swapped = in(zmm_reg) _mm512_broadcast_i32x4(swapped),
            evens = in(kreg) 0x5555_5555_5555_5555u64,
            options(nomem, nostack, preserves_flags),
        );
    }
    odd
}

/// Four registers of 64 entries with VBMI, 16 of 16 repeated entries without.
#[inline(always)]
fn table(vbmi: bool, entries: &[i8; 256], xor: u8) -> [__m512i; 16] {
    unsafe {
        let mut table = [_mm512_setzero_si512(); 16];
        for i in 0..16 {
            let v = if vbmi {
                _mm512_loadu_si512(entries.as_ptr().add(i % 4 * 64).cast())
            } else {
                _mm512_broadcast_i32x4(_mm_loadu_si128(entries.as_ptr().add(i * 16).cast()))
            };
            table[i] = _mm512_xor_si512(v, _mm512_set1_epi8(xor as i8));
        }
        table
    }
}
