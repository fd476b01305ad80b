//! NEON with dot products (`sdot`), without and with int8 matrix products (`smmla`). A logical vector is four registers.
//!
//! The intrinsics of these two extensions, and prefetching, are not in stable Rust yet: they are instructions at the end of
//! this file. NEON itself is part of every 64-bit Arm target.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument holds for all: a token exists only after `new` detected its features"
)]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::dispatch::detected;
use crate::{Book, Isa, LANES, Simd, SimdOp};

/// NEON and `dotprod`; with `I8MM` also `i8mm`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<const I8MM: bool>(());

/// A sum of four inputs of one row and token in a 32-bit lane.
pub(crate) type Neon = Token<false>;
/// The same while decoding; tiles take eight inputs of two rows and two tokens a register.
pub(crate) type NeonI8mm = Token<true>;

/// Codebook and ladder, 16 entries a register, both negated: int8 holds a ladder value of 128 only as -128, and the signs
/// cancel in the product. Codebooks under a ladder have no -128.
#[derive(Clone, Copy)]
pub(crate) struct Ladder {
    table: [uint8x16_t; 16],
    ladder: uint8x16_t,
}

/// `$e` of each of the four registers.
macro_rules! four {
    ($h:ident => $e:expr) => {
        four!($h => $e, 0, 1, 2, 3)
    };
    ($h:ident => $e:expr, $($i:literal),*) => {
        [$({
            let $h = $i;
            unsafe { $e }
        }),*]
    };
}

impl<const I8MM: bool> Simd for Token<I8MM> {
    type F32 = [float32x4_t; 4];
    type I32 = [int32x4_t; 4];
    type Mask = [uint32x4_t; 4];
    type Bytes = [uint8x16_t; 4];
    type Table = [uint8x16_t; 16];
    type Ladder = Ladder;
    /// Negated ladder values, one a weight.
    type Rungs = [int8x16_t; 4];
    type Weights = [uint8x16_t; 4];
    /// Four activations in the first 32-bit lane: loading them into all lanes costs a vector slot on some cores.
    type Acts = uint8x16_t;

    const ISA: Isa = if I8MM { Isa::NeonI8mm } else { Isa::Neon };
    const BIAS: u8 = 0;
    const WEIGHT_BYTES: usize = 64;
    const PAIRS: bool = false;
    const RUN: usize = if I8MM { 8 } else { 4 };
    // Of 32 registers six tokens take 24 for sums, of 4 rows and a token or 2 rows and 2 tokens. What is left holds the
    // activations and weights in use; two panels of 3 tokens would load more for as many sums.
    const TILE: usize = 6;
    const PANELS: usize = 1;
    // While decoding, four tokens are 16 sums beside 4 ladder values, 4 codes, 2 products, the activations, masks and the
    // 1 or 2 registers of a codebook of up to 5 bits.
    const DIRECT: usize = 4;

    fn new() -> Option<Self> {
        let detect = || {
            is_aarch64_feature_detected!("neon")
                && is_aarch64_feature_detected!("dotprod")
                && (!I8MM || is_aarch64_feature_detected!("i8mm"))
        };
        detected(Self::ISA, detect).then_some(Self(()))
    }

    fn run<O: SimdOp>(self, op: O) -> O::Output {
        #[inline(never)]
        #[target_feature(enable = "neon,dotprod")]
        fn base<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        #[inline(never)]
        #[target_feature(enable = "neon,dotprod,i8mm")]
        fn i8mm<S: Simd, O: SimdOp>(s: S, op: O) -> O::Output {
            op.eval(s)
        }
        // SAFETY: the token proves the features.
        unsafe { if I8MM { i8mm(self, op) } else { base(self, op) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        four!(_h => vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        four!(h => vld1q_f32(x.as_ptr().add(4 * h)))
    }
    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        four!(h => vst1q_f32(to.as_mut_ptr().add(4 * h), v[h]));
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        four!(h => vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().add(4 * h)))))
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [u16; LANES]) {
        four!(h => {
            let half = vreinterpret_u16_f16(vcvt_f16_f32(v[h]));
            vst1_u16(to.as_mut_ptr().add(4 * h), half);
        });
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        four!(h => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(4 * h)))))
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F32, to: &mut [u16; LANES]) {
        four!(h => {
            let bits = vreinterpretq_u32_f32(v[h]);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
            let all = vbslq_u32(vceqq_f32(v[h], v[h]), near, quiet);
            vst1_u16(to.as_mut_ptr().add(4 * h), vshrn_n_u32::<16>(all));
        });
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vaddq_f32(a[h], b[h]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vsubq_f32(a[h], b[h]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vmulq_f32(a[h], b[h]))
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vdivq_f32(a[h], b[h]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        four!(h => vfmaq_f32(c[h], a[h], b[h]))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        four!(h => vsqrtq_f32(a[h]))
    }
    // `fmax` and `fmin` give NaN where either side is NaN and order the zeros: not what the trait says.
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vbslq_f32(vcgtq_f32(a[h], b[h]), a[h], b[h]))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vbslq_f32(vcltq_f32(a[h], b[h]), a[h], b[h]))
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        four!(h => vabsq_f32(a[h]))
    }
    #[inline(always)]
    fn neg(self, a: Self::F32) -> Self::F32 {
        four!(h => vnegq_f32(a[h]))
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        four!(h => vrndnq_f32(a[h]))
    }
    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        four!(h => vcltq_f32(a[h], b[h]))
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::Mask {
        let lanes = [0, 1, 2, 3];
        four!(h => vcltq_s32(vld1q_s32(lanes.as_ptr()), vdupq_n_s32(n as i32 - 4 * h)))
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        four!(h => vbslq_f32(mask[h], a[h], b[h]))
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        unsafe {
            let q = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vpadds_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))) }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        four!(_h => vdupq_n_s32(x))
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I32 {
        four!(h => vld1q_s32(x.as_ptr().add(4 * h)))
    }
    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        four!(h => vst1q_s32(to.as_mut_ptr().add(4 * h), v[h]));
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I32 {
        let words = unsafe {
            let v = vld1q_u8(x.as_ptr());
            let (a, b) = (vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v));
            [
                vget_low_u16(a),
                vget_high_u16(a),
                vget_low_u16(b),
                vget_high_u16(b),
            ]
        };
        four!(h => vreinterpretq_s32_u32(vmovl_u16(words[h])))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::I32 {
        let words = unsafe {
            let v = vld1q_s8(x.as_ptr());
            let (a, b) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            [
                vget_low_s16(a),
                vget_high_s16(a),
                vget_low_s16(b),
                vget_high_s16(b),
            ]
        };
        four!(h => vmovl_s16(words[h]))
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        let words: [int16x8_t; 4] = four!(h => vreinterpretq_s16_s32(v[h]));
        unsafe {
            let a = vreinterpretq_s8_s16(vuzp1q_s16(words[0], words[1]));
            let b = vreinterpretq_s8_s16(vuzp1q_s16(words[2], words[3]));
            vst1q_s8(to.as_mut_ptr(), vuzp1q_s8(a, b));
        }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        four!(h => vaddq_s32(a[h], b[h]))
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        four!(h => vsubq_s32(a[h], b[h]))
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        four!(h => vmulq_s32(a[h], b[h]))
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        four!(h => vandq_s32(a[h], b[h]))
    }
    #[inline(always)]
    fn shl_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        four!(h => vshlq_s32(a[h], vdupq_n_s32(n as i32)))
    }
    #[inline(always)]
    fn shr_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        four!(h => {
            let right = vdupq_n_s32(-(n as i32));
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[h]), right))
        })
    }
    #[inline(always)]
    fn reduce_add_i32(self, a: Self::I32) -> i32 {
        unsafe { vaddvq_s32(vaddq_s32(vaddq_s32(a[0], a[1]), vaddq_s32(a[2], a[3]))) }
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        four!(h => vcvtnq_s32_f32(a[h]))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        four!(h => vcvtq_f32_s32(a[h]))
    }
    #[inline(always)]
    fn bits(self, a: Self::F32) -> Self::I32 {
        four!(h => vreinterpretq_s32_f32(a[h]))
    }
    #[inline(always)]
    fn of_bits(self, a: Self::I32) -> Self::F32 {
        four!(h => vreinterpretq_f32_s32(a[h]))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::Bytes {
        four!(h => vld1q_u8(x.as_ptr().add(16 * h)))
    }
    #[inline(always)]
    fn splat_bytes(self, x: u8) -> Self::Bytes {
        four!(_h => vdupq_n_u8(x))
    }
    #[inline(always)]
    fn shr(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        four!(h => {
            let right = vdupq_n_s16(-(n as i16));
            vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(v[h]), right))
        })
    }
    #[inline(always)]
    fn shl(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        four!(h => {
            let left = vdupq_n_s16(n as i16);
            vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(v[h]), left))
        })
    }
    #[inline(always)]
    fn merge(self, mask: u8, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        four!(h => vbslq_u8(vdupq_n_u8(mask), a[h], b[h]))
    }
    #[inline(always)]
    fn linear(self, code: Self::Bytes, add: Self::Bytes, floor: Self::Bytes) -> Self::Bytes {
        four!(h => {
            let w = vreinterpretq_s8_u8(vaddq_u8(code[h], add[h]));
            vreinterpretq_u8_s8(vmaxq_s8(w, vreinterpretq_s8_u8(floor[h])))
        })
    }
    #[inline(always)]
    fn table(self, book: &Book) -> Self::Table {
        table(&book.values)
    }
    #[inline(always)]
    fn lookup<const BITS: usize>(self, t: &Self::Table, code: Self::Bytes) -> Self::Bytes {
        let quad = |j: usize| uint8x16x4_t(t[4 * j], t[4 * j + 1], t[4 * j + 2], t[4 * j + 3]);
        four!(h => {
            let low = vdupq_n_u8((15 | ((1u16 << BITS) - 1)) as u8);
            let i = vandq_u8(code[h], low);
            let mut v = match BITS {
                ..=4 => vqtbl1q_u8(t[0], i),
                5 => vqtbl2q_u8(uint8x16x2_t(t[0], t[1]), i),
                _ => vqtbl4q_u8(quad(0), i),
            };
            // Where an index is past the table, `tbx` leaves what was there.
            for j in 1..1 << BITS.saturating_sub(6) {
                v = vqtbx4q_u8(v, quad(j), vsubq_u8(i, vdupq_n_u8((64 * j) as u8)));
            }
            v
        })
    }
    #[inline(always)]
    fn weights(self, v: Self::Bytes) -> Self::Weights {
        v
    }
    #[inline(always)]
    fn ladder<const BITS: usize>(self, book: &Book) -> Self::Ladder {
        let ladder = book.ladder.map(u8::wrapping_neg);
        Ladder {
            table: table(&book.values.map(i8::wrapping_neg)),
            ladder: unsafe { vld1q_u8(ladder.as_ptr()) },
        }
    }
    #[inline(always)]
    fn rungs<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        s: &[u8; 16],
        high: bool,
    ) -> Self::Rungs {
        let rows = unsafe {
            let s = vld1q_u8(s.as_ptr());
            let low = vandq_u8(s, vdupq_n_u8(15));
            vqtbl1q_u8(ladder.ladder, if high { vshrq_n_u8::<4>(s) } else { low })
        };
        let four_each = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
        four!(h => {
            let row = vaddq_u8(vld1q_u8(four_each.as_ptr()), vdupq_n_u8(4 * h));
            vreinterpretq_s8_u8(vqtbl1q_u8(rows, row))
        })
    }
    // A table of codebook times ladder would take a `tbl` of 4 registers at 2 bits, no faster than multiplying, and 8 and 16
    // registers at 3 and 4.
    #[inline(always)]
    fn fold<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        rungs: &Self::Rungs,
        code: Self::Bytes,
    ) -> Self::Weights {
        let value = self.lookup::<BITS>(&ladder.table, code);
        four!(h => {
            // `rshrn` by 7 adds 64 before it shifts: the definition.
            let v = vreinterpretq_s8_u8(value[h]);
            let low = vrshrn_n_s16::<7>(vmull_s8(vget_low_s8(v), vget_low_s8(rungs[h])));
            vreinterpretq_u8_s8(vrshrn_high_n_s16::<7>(low, vmull_high_s8(v, rungs[h])))
        })
    }
    #[inline(always)]
    unsafe fn store_weights(self, w: Self::Weights, to: *mut u8) {
        four!(h => vst1q_u8(to.add(16 * h), w[h]));
    }
    #[inline(always)]
    unsafe fn load_weights(self, from: *const u8) -> Self::Weights {
        four!(h => vld1q_u8(from.add(16 * h)))
    }
    #[inline(always)]
    unsafe fn acts(self, a: *const u8) -> Self::Acts {
        unsafe {
            let four = a.cast::<u32>().read_unaligned();
            vreinterpretq_u8_u32(vsetq_lane_u32::<0>(four, vdupq_n_u32(0)))
        }
    }
    #[inline(always)]
    fn dot(self, acc: Self::I32, w: Self::Weights, a: Self::Acts) -> Self::I32 {
        four!(h => sdot::<0>(acc[h], w[h], a))
    }
    /// With i8mm, register i of eight holds rows 2i and 2i + 1 of 8 inputs each.
    #[inline(always)]
    unsafe fn store_pair(self, w: [Self::Weights; 2], to: *mut u8) {
        let [a, b] = w;
        for h in 0..4 {
            unsafe {
                if I8MM {
                    let (a, b) = (vreinterpretq_u32_u8(a[h]), vreinterpretq_u32_u8(b[h]));
                    vst1q_u32(to.add(32 * h).cast(), vzip1q_u32(a, b));
                    vst1q_u32(to.add(32 * h + 16).cast(), vzip2q_u32(a, b));
                } else {
                    vst1q_u8(to.add(16 * h), a[h]);
                    vst1q_u8(to.add(64 + 16 * h), b[h]);
                }
            }
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
        let dots = sums.write([start; P]);
        let acts = acts.wrapping_add(groups.start * 4 * M);
        for p in 0..P {
            unsafe {
                if I8MM {
                    by_smmla(weights[p], acts, groups.len() / 2, &mut dots[p]);
                } else {
                    by_sdot(weights[p], acts, groups.len() / 4, &mut dots[p]);
                }
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
        }
    }
}

/// 16 registers of 16 entries.
#[inline(always)]
fn table(entries: &[i8; 256]) -> [uint8x16_t; 16] {
    unsafe { entries.as_ptr().cast::<[uint8x16_t; 16]>().read_unaligned() }
}

/// One panel: `steps` times 16 inputs of M tokens.
///
/// # Safety
/// As [`Simd::product`].
#[inline(always)]
unsafe fn by_sdot<const M: usize>(
    mut weights: *const u8,
    mut acts: *const u8,
    steps: usize,
    dots: &mut [[int32x4_t; 4]; M],
) {
    // By macro: left to itself, the compiler keeps a loop over so many lanes, and the sums in memory.
    macro_rules! lanes {
        ($i:literal: $($lane:literal)*) => { $({
            let (group, n) = ((4 * $i + $lane) / M, (4 * $i + $lane) % M);
            let sums = &mut dots[n];
            *sums = four!(h => {
                let w = vld1q_u8(weights.add(64 * group + 16 * h));
                sdot::<$lane>(sums[h], w, vld1q_u8(acts.add(16 * $i)))
            });
        })* };
        ($($i:literal)*) => { $(
            if const { $i < M } {
                lanes!($i: 0 1 2 3);
            }
        )* };
    }
    for _ in 0..steps {
        lanes!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        weights = weights.wrapping_add(256);
        acts = acts.wrapping_add(16 * M);
    }
}

/// One panel: `steps` times 8 inputs of M tokens, one or an even number. Sums stay 2 rows by 2 tokens until the end; one token is
/// taken twice.
///
/// # Safety
/// As [`Simd::product`].
#[inline(always)]
unsafe fn by_smmla<const M: usize>(
    mut weights: *const u8,
    mut acts: *const u8,
    steps: usize,
    dots: &mut [[int32x4_t; 4]; M],
) {
    unsafe {
        // Of tokens 2t and 2t + 1: [t][rows 2i and 2i + 1]; the second half is not used.
        let mut sums = [[vdupq_n_s32(0); 8]; M];
        for _ in 0..steps {
            for i in 0..8 {
                let w = vld1q_u8(weights.add(16 * i));
                for t in 0..M.div_ceil(2) {
                    let a = if M == 1 {
                        vreinterpretq_u8_u64(vdupq_n_u64(acts.cast::<u64>().read_unaligned()))
                    } else {
                        vld1q_u8(acts.add(16 * t))
                    };
                    sums[t][i] = smmla(sums[t][i], w, a);
                }
            }
            weights = weights.wrapping_add(128);
            acts = acts.wrapping_add(8 * M);
        }
        for n in 0..M {
            for h in 0..4 {
                let (a, b) = (sums[n / 2][2 * h], sums[n / 2][2 * h + 1]);
                let rows = if n % 2 == 0 {
                    vuzp1q_s32(a, b)
                } else {
                    vuzp2q_s32(a, b)
                };
                dots[n][h] = vaddq_s32(dots[n][h], rows);
            }
        }
    }
}

/// Adds to each 32-bit lane the dot product of its four int8 of `w` and the four of `a` in lane `LANE`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: usize>(mut acc: int32x4_t, w: uint8x16_t, a: uint8x16_t) -> int32x4_t {
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inlateout(vreg) acc, in(vreg) w, in(vreg) a,
            const LANE, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Adds the 2 x 2 products of two rows of eight int8 in `w` and two in `a`: `[w0 a0, w0 a1, w1 a0, w1 a1]`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, w: uint8x16_t, a: uint8x16_t) -> int32x4_t {
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inlateout(vreg) acc, in(vreg) w, in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
