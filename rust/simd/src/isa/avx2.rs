//! AVX2 with FMA and F16C, without and with 256-bit VNNI. A logical vector is two registers.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument holds for all: a token exists only after `new` detected its features"
)]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::dispatch::detected;
use crate::vector::multiply;
use crate::{Book, Isa, LANES, Simd, SimdOp};

/// AVX2, FMA and F16C; with `VNNI` also `vpdpbusd` on 256 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<const VNNI: bool>(());

/// Weights and activations in 16-bit lanes for `vpmaddwd`, which cannot saturate.
pub(crate) type Avx2 = Token<false>;
/// Weights plus 128 as unsigned bytes for `vpdpbusd`.
pub(crate) type AvxVnni = Token<true>;

type V = [__m256i; 2];

/// Codebook and ladder, 16 entries a register.
#[derive(Clone, Copy)]
pub(crate) struct Ladder {
    table: [__m256i; 16],
    ladder: __m256i,
}

/// `f` of both halves.
macro_rules! both {
    ($h:ident => $e:expr) => {{
        [
            {
                let $h = 0;
                $e
            },
            {
                let $h = 1;
                $e
            },
        ]
    }};
}

impl<const VNNI: bool> Simd for Token<VNNI> {
    type F32 = [__m256; 2];
    type I32 = V;
    type Mask = [__m256; 2];
    type Bytes = V;
    type Table = [__m256i; 16];
    type Ladder = Ladder;
    type Rungs = V;
    /// With VNNI the first two hold bytes; else even and odd inputs of rows 0..8, then of rows 8..16.
    type Weights = [__m256i; 4];
    type Acts = [__m256i; 2];

    const ISA: Isa = if VNNI { Isa::AvxVnni } else { Isa::Avx2 };
    const BIAS: u8 = if VNNI { 0x80 } else { 0 };
    const WEIGHT_BYTES: usize = if VNNI { 64 } else { 128 };
    const PAIRS: bool = !VNNI;
    const TILE: usize = if VNNI { 6 } else { 8 };
    const FLOATS: usize = 6;
    const PANELS: usize = 1;
    const DIRECT: usize = 2;

    fn new() -> Option<Self> {
        let detect = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && (!VNNI || is_x86_feature_detected!("avxvnni"))
        };
        detected(Self::ISA, detect).then_some(Self(()))
    }

    fn run<O: SimdOp>(self, op: O) -> O::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn base<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn vnni<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        // SAFETY: the token proves the features.
        unsafe { if VNNI { vnni(self, op) } else { base(self, op) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        unsafe { both!(h => _mm256_loadu_ps(x.as_ptr().add(8 * h))) }
    }
    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        unsafe { both!(h => _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(8 * h).cast()))) }
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [u16; LANES]) {
        for h in 0..2 {
            unsafe {
                _mm_storeu_si128(
                    to.as_mut_ptr().add(8 * h).cast(),
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[h]),
                );
            }
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        unsafe {
            both!(h => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8 * h).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        }
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F32, to: &mut [u16; LANES]) {
        unsafe {
            let r = both!(h => {
                let bits = _mm256_castps_si256(v[h]);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v[h], v[h]));
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
                _mm256_srli_epi32::<16>(_mm256_blendv_epi8(near, quiet, nan))
            });
            let packed = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(r[0], r[1]));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), packed);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_add_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_sub_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_mul_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_div_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_fmadd_ps(a[h], b[h], c[h])) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_sqrt_ps(a[h])) }
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_max_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_min_ps(a[h], b[h])) }
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_andnot_ps(_mm256_set1_ps(-0.0), a[h])) }
    }
    #[inline(always)]
    fn neg(self, a: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_xor_ps(_mm256_set1_ps(-0.0), a[h])) }
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        unsafe {
            both!(h => _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[h]))
        }
    }
    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        unsafe { both!(h => _mm256_cmp_ps::<_CMP_LT_OQ>(a[h], b[h])) }
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::Mask {
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            both!(h => _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32 - 8 * h), lane)))
        }
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { both!(h => _mm256_blendv_ps(b[h], a[h], mask[h])) }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        unsafe {
            let e = _mm256_add_ps(a[0], a[1]);
            let q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps::<1>(e));
            let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        unsafe {
            let e = _mm256_max_ps(a[0], a[1]);
            let q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps::<1>(e));
            let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I32 {
        unsafe { both!(h => _mm256_loadu_si256(x.as_ptr().add(8 * h).cast())) }
    }
    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        for h in 0..2 {
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().add(8 * h).cast(), v[h]) }
        }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I32 {
        unsafe { both!(h => _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.as_ptr().add(8 * h).cast()))) }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::I32 {
        unsafe { both!(h => _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().add(8 * h).cast()))) }
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        unsafe {
            let low = both!(h => _mm256_and_si256(v[h], _mm256_set1_epi32(255)));
            let words = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(low[0], low[1]));
            let bytes = _mm_packus_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { both!(h => _mm256_add_epi32(a[h], b[h])) }
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { both!(h => _mm256_sub_epi32(a[h], b[h])) }
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { both!(h => _mm256_mullo_epi32(a[h], b[h])) }
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        unsafe { both!(h => _mm256_and_si256(a[h], b[h])) }
    }
    #[inline(always)]
    fn shl_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        unsafe { both!(h => _mm256_sll_epi32(a[h], _mm_cvtsi32_si128(n as i32))) }
    }
    #[inline(always)]
    fn shr_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        unsafe { both!(h => _mm256_srl_epi32(a[h], _mm_cvtsi32_si128(n as i32))) }
    }
    #[inline(always)]
    fn reduce_add_i32(self, a: Self::I32) -> i32 {
        unsafe {
            let e = _mm256_add_epi32(a[0], a[1]);
            let q = _mm_add_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256::<1>(e));
            let d = _mm_add_epi32(q, _mm_shuffle_epi32::<0x4e>(q));
            _mm_cvtsi128_si32(_mm_add_epi32(d, _mm_shuffle_epi32::<0xb1>(d)))
        }
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        unsafe { both!(h => _mm256_cvtps_epi32(a[h])) }
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        unsafe { both!(h => _mm256_cvtepi32_ps(a[h])) }
    }
    #[inline(always)]
    fn bits(self, a: Self::F32) -> Self::I32 {
        unsafe { both!(h => _mm256_castps_si256(a[h])) }
    }
    #[inline(always)]
    fn of_bits(self, a: Self::I32) -> Self::F32 {
        unsafe { both!(h => _mm256_castsi256_ps(a[h])) }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::Bytes {
        unsafe { both!(h => _mm256_loadu_si256(x.as_ptr().add(32 * h).cast())) }
    }
    #[inline(always)]
    fn splat_bytes(self, x: u8) -> Self::Bytes {
        unsafe { [_mm256_set1_epi8(x as i8); 2] }
    }
    #[inline(always)]
    fn shr(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        unsafe { both!(h => _mm256_srl_epi16(v[h], _mm_cvtsi32_si128(n as i32))) }
    }
    #[inline(always)]
    fn shl(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        unsafe { both!(h => _mm256_sll_epi16(v[h], _mm_cvtsi32_si128(n as i32))) }
    }
    #[inline(always)]
    fn merge(self, mask: u8, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        unsafe {
            let (ones, zeros) = (_mm256_set1_epi8(mask as i8), _mm256_set1_epi8(!mask as i8));
            both!(h => _mm256_or_si256(_mm256_and_si256(ones, a[h]), _mm256_and_si256(zeros, b[h])))
        }
    }
    #[inline(always)]
    fn linear(self, code: Self::Bytes, add: Self::Bytes, floor: Self::Bytes) -> Self::Bytes {
        unsafe {
            both!(h => {
                let w = _mm256_add_epi8(code[h], add[h]);
                if VNNI { _mm256_max_epu8(w, floor[h]) } else { _mm256_max_epi8(w, floor[h]) }
            })
        }
    }
    #[inline(always)]
    fn table(self, book: &Book) -> Self::Table {
        table(&book.values, Self::BIAS)
    }
    #[inline(always)]
    fn lookup<const BITS: usize>(self, t: &Self::Table, code: Self::Bytes) -> Self::Bytes {
        unsafe {
            both!(h => {
                let low = _mm256_and_si256(code[h], _mm256_set1_epi8(15));
                // Pairs of tables are chosen by bit 4, pairs of pairs by bit 5, and so on; vpblendvb looks at bit 7.
                let mut v = [_mm256_setzero_si256(); 16];
                let n = 1 << BITS.saturating_sub(4);
                for j in 0..n {
                    v[j] = _mm256_shuffle_epi8(t[j], low);
                }
                for level in 0..BITS.saturating_sub(4) {
                    let bit = _mm256_sll_epi16(code[h], _mm_cvtsi32_si128(3 - level as i32));
                    for j in 0..n >> (level + 1) {
                        v[j] = _mm256_blendv_epi8(v[2 * j], v[2 * j + 1], bit);
                    }
                }
                v[0]
            })
        }
    }
    #[inline(always)]
    fn weights(self, v: Self::Bytes) -> Self::Weights {
        unsafe {
            if VNNI {
                return [v[0], v[1], v[0], v[1]];
            }
            let [low, high] = both!(h => {
                [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v[h])), _mm256_srai_epi16::<8>(v[h])]
            });
            [low[0], low[1], high[0], high[1]]
        }
    }
    #[inline(always)]
    fn ladder<const BITS: usize>(self, book: &Book) -> Self::Ladder {
        let ladder =
            unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(book.ladder.as_ptr().cast())) };
        Ladder {
            table: table(&book.values, 0),
            ladder,
        }
    }
    #[inline(always)]
    fn rungs<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        s: &[u8; 16],
        high: bool,
    ) -> Self::Rungs {
        unsafe {
            let rows = _mm256_broadcastsi128_si256(_mm_loadu_si128(s.as_ptr().cast()));
            let nibble = _mm256_and_si256(
                if high {
                    _mm256_srli_epi16::<4>(rows)
                } else {
                    rows
                },
                _mm256_set1_epi8(15),
            );
            let gain = _mm256_shuffle_epi8(ladder.ladder, nibble);
            // Row r of the half in the low byte of both its 16-bit lanes, zero above.
            let spread = _mm256_setr_epi32(
                0x80008000u32 as i32,
                0x80018001u32 as i32,
                0x80028002u32 as i32,
                0x80038003u32 as i32,
                0x80048004u32 as i32,
                0x80058005u32 as i32,
                0x80068006u32 as i32,
                0x80078007u32 as i32,
            );
            both!(h => _mm256_shuffle_epi8(gain, _mm256_add_epi8(spread, _mm256_set1_epi16(8 * h))))
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
            // vpmulhrsw of (value << 8) and the ladder value is the definition, for even and odd bytes apart.
            let value = self.lookup::<BITS>(&ladder.table, code);
            let [a, b] = both!(h => {
                let even = _mm256_mulhrs_epi16(_mm256_slli_epi16::<8>(value[h]), rungs[h]);
                let odd = _mm256_mulhrs_epi16(_mm256_and_si256(value[h], _mm256_set1_epi16(-256)), rungs[h]);
                [even, odd]
            });
            if VNNI {
                let join = |[even, odd]: [__m256i; 2]| {
                    let w8 = _mm256_or_si256(
                        _mm256_and_si256(even, _mm256_set1_epi16(255)),
                        _mm256_slli_epi16::<8>(odd),
                    );
                    _mm256_xor_si256(w8, _mm256_set1_epi8(-128))
                };
                let (a, b) = (join(a), join(b));
                return [a, b, a, b];
            }
            [a[0], a[1], b[0], b[1]]
        }
    }
    #[inline(always)]
    unsafe fn store_weights(self, w: Self::Weights, to: *mut u8) {
        for i in 0..Self::WEIGHT_BYTES / 32 {
            unsafe { _mm256_store_si256(to.add(32 * i).cast(), w[i]) }
        }
    }
    #[inline(always)]
    unsafe fn load_weights(self, from: *const u8) -> Self::Weights {
        unsafe {
            let mut w = [_mm256_setzero_si256(); 4];
            for i in 0..Self::WEIGHT_BYTES / 32 {
                w[i] = _mm256_load_si256(from.add(32 * i).cast());
            }
            w
        }
    }
    #[inline(always)]
    unsafe fn acts(self, a: *const u8) -> Self::Acts {
        unsafe {
            let first = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            if VNNI {
                [first, first]
            } else {
                [
                    first,
                    _mm256_set1_epi32(a.add(4).cast::<i32>().read_unaligned()),
                ]
            }
        }
    }
    #[inline(always)]
    fn dot(self, acc: Self::I32, w: Self::Weights, a: Self::Acts) -> Self::I32 {
        unsafe {
            if VNNI {
                return both!(h => _mm256_dpbusd_avx_epi32(acc[h], w[h], a[0]));
            }
            both!(h => {
                let even = _mm256_add_epi32(acc[h], _mm256_madd_epi16(w[2 * h], a[0]));
                _mm256_add_epi32(even, _mm256_madd_epi16(w[2 * h + 1], a[1]))
            })
        }
    }
    #[inline(always)]
    unsafe fn product<const P: usize, const M: usize>(
        self,
        weights: [*const u8; P],
        acts: *const u8,
        groups: Range<usize>,
        start: [V; M],
        sums: &mut MaybeUninit<[[V; M]; P]>,
    ) {
        let sums = sums.write([start; P]);
        unsafe {
            if VNNI || P != 1 {
                return multiply(self, weights, acts, groups, sums);
            }
            let tokens = sums[0].as_mut_slice();
            if let Ok(tokens) = <&mut [V; 8]>::try_from(&mut *tokens) {
                eight(weights[0], acts, groups, tokens);
            } else if let Ok(tokens) = <&mut [V; 4]>::try_from(tokens) {
                four(weights[0], acts, groups, tokens);
            } else {
                multiply(self, weights, acts, groups, sums);
            }
        }
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

/// The sums of four tokens out of each three rows of differences, A = 256 a - b, B = 256 b - c and C = 256 c - d. As 2^16 A + 2^8 B + C is 2^24 a - d, its low 24
/// bits are those of -d, and 256 inputs make at most 2^22 of it: d is known, then c, b and a are by exact divisions. Nothing overflows below 2^23.
#[inline]
#[target_feature(enable = "avx2")]
fn apart<const R: usize, const M: usize>(rows: &[V; R], tokens: &mut [V; M]) {
    for ([x, y, z], [a, b, c, d]) in rows.as_chunks().0.iter().zip(tokens.as_chunks_mut().0) {
        for h in 0..2 {
            let low =
                _mm256_add_epi32(_mm256_slli_epi32::<24>(x[h]), _mm256_slli_epi32::<16>(y[h]));
            let low = _mm256_add_epi32(low, _mm256_slli_epi32::<8>(z[h]));
            d[h] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_srai_epi32::<8>(low));
            c[h] = _mm256_srai_epi32::<8>(_mm256_add_epi32(z[h], d[h]));
            b[h] = _mm256_srai_epi32::<8>(_mm256_add_epi32(y[h], c[h]));
            a[h] = _mm256_srai_epi32::<8>(_mm256_add_epi32(x[h], b[h]));
        }
    }
}

/// [`Simd::product`] of one panel and `$tokens` tokens, which lie as `$m` rows: the weights of even inputs by all rows, then those of odd ones, so that six rows
/// have room for their sums, and each product added at once. In assembly, as compilers hold all weights and add pairs of products first.
macro_rules! tile {
    ($name:ident, $tokens:literal, $m:literal, $($n:literal $s0:ident $s1:ident),*) => {
        /// # Safety
        /// As [`Simd::product`].
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn $name(
            weights: *const u8,
            acts: *const u8,
            groups: Range<usize>,
            tokens: &mut [V; $tokens],
        ) {
            let mut rows = [[_mm256_setzero_si256(); 2]; $m];
            let [$([$s0, $s1]),*] = &mut rows;
            let acts = acts.wrapping_add(groups.start * 8 * $m);
            for pair in 0..groups.len() / 2 {
                unsafe {
                    std::arch::asm!(
                        tile!($m, 0, even, $($n $s0 $s1),*),
                        tile!($m, 0, odd, $($n $s0 $s1),*),
                        tile!($m, 1, even, $($n $s0 $s1),*),
                        tile!($m, 1, odd, $($n $s0 $s1),*),
                        acts = in(reg) acts.add(pair * 16 * $m),
                        weights = in(reg) weights.add(pair * 2 * Avx2::WEIGHT_BYTES),
                        even = const 0,
                        odd = const 1,
                        $($s0 = inout(ymm_reg) *$s0, $s1 = inout(ymm_reg) *$s1,)*
                        w0 = out(ymm_reg) _,
                        w1 = out(ymm_reg) _,
                        a = out(ymm_reg) _,
                        x = out(ymm_reg) _,
                        options(pure, readonly, nostack, preserves_flags),
                    );
                }
            }
            apart(&rows, tokens);
        }
    };
    ($m:literal, $group:literal, $inputs:ident, $($n:literal $s0:ident $s1:ident),*) => {
        concat!(
            "vmovdqa {w0}, [{weights}+128*", $group, "+32*{", stringify!($inputs), "}]\n",
            "vmovdqa {w1}, [{weights}+128*", $group, "+32*{", stringify!($inputs), "}+64]\n",
            $(
                "vpbroadcastd {a}, [{acts}+8*", $m, "*", $group, "+8*", $n, "+4*{", stringify!($inputs), "}]\n",
                "vpmaddwd {x}, {a}, {w0}\n",
                "vpaddd {", stringify!($s0), "}, {", stringify!($s0), "}, {x}\n",
                "vpmaddwd {a}, {a}, {w1}\n",
                "vpaddd {", stringify!($s1), "}, {", stringify!($s1), "}, {a}\n",
            )*
        )
    };
}
tile!(four, 4, 3, 0 a0 b0, 1 a1 b1, 2 a2 b2);
tile!(eight, 8, 6, 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5);

/// 16 registers of 16 repeated entries.
#[inline(always)]
fn table(entries: &[i8; 256], xor: u8) -> [__m256i; 16] {
    unsafe {
        let mut table = [_mm256_setzero_si256(); 16];
        for i in 0..16 {
            let v =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(entries.as_ptr().add(16 * i).cast()));
            table[i] = _mm256_xor_si256(v, _mm256_set1_epi8(xor as i8));
        }
        table
    }
}
