//! Plain loops over arrays: the definition, and what runs where nothing better is known. Byte operations stay calls:
//! inlined into unrolled kernels, 64-byte arrays take the compiler minutes and win nothing that matters here.

use crate::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::{Book, Isa, LANES, Simd, SimdOp};

/// Any processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar(());

/// Applies an expression to each lane.
macro_rules! each {
    ($n:expr, $i:ident => $e:expr) => {{
        let mut out = [Default::default(); $n];
        for $i in 0..$n {
            out[$i] = $e;
        }
        out
    }};
}

impl Simd for Scalar {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Mask = [bool; LANES];
    type Bytes = [u8; 64];
    type Table = [u8; 256];
    type Ladder = ([i8; 256], [u8; 16]);
    type Rungs = [u8; LANES];
    type Weights = [i8; 64];
    type Acts = [i8; 4];

    const ISA: Isa = Isa::Scalar;
    const BIAS: u8 = 0;
    const WEIGHT_BYTES: usize = 64;
    const PAIRS: bool = false;
    const TILE: usize = 4;
    const PANELS: usize = 1;
    const DIRECT: usize = 0;

    fn new() -> Option<Self> {
        Some(Self(()))
    }

    fn run<O: SimdOp>(self, op: O) -> O::Output {
        // Only so that `mul_add` is an instruction instead of a call: the bits are the same.
        #[cfg(target_arch = "x86_64")]
        {
            #[inline(never)]
            #[target_feature(enable = "avx,fma")]
            fn shell<O: SimdOp>(s: Scalar, op: O) -> O::Output {
                op.eval(s)
            }
            if is_x86_feature_detected!("avx") && is_x86_feature_detected!("fma") {
                // SAFETY: both features were just detected.
                return unsafe { shell(self, op) };
            }
        }
        op.eval(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        each!(LANES, i => f16_to_f32(x[i]))
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [u16; LANES]) {
        *to = each!(LANES, i => f32_to_f16(v[i]));
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        each!(LANES, i => bf16_to_f32(x[i]))
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F32, to: &mut [u16; LANES]) {
        *to = each!(LANES, i => f32_to_bf16(v[i]));
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i].sqrt())
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i].abs())
    }
    #[inline(always)]
    fn neg(self, a: Self::F32) -> Self::F32 {
        each!(LANES, i => -a[i])
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        each!(LANES, i => a[i].round_ties_even())
    }
    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        each!(LANES, i => a[i] < b[i])
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::Mask {
        each!(LANES, i => i < n)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(LANES, i => if mask[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        let e = each!(8, i => a[i] + a[i + 8]);
        let q = each!(4, i => e[i] + e[i + 4]);
        (q[0] + q[2]) + (q[1] + q[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        let mut m = a[0];
        for x in a {
            m = if x > m { x } else { m };
        }
        m
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        [x; LANES]
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I32 {
        *x
    }
    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I32 {
        each!(LANES, i => i32::from(x[i]))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::I32 {
        each!(LANES, i => i32::from(x[i]))
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        *to = each!(LANES, i => v[i] as i8);
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(LANES, i => a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(LANES, i => a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(LANES, i => a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(LANES, i => a[i] & b[i])
    }
    #[inline(always)]
    fn shl_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        each!(LANES, i => a[i] << n)
    }
    #[inline(always)]
    fn shr_i32(self, a: Self::I32, n: u32) -> Self::I32 {
        each!(LANES, i => (a[i] as u32 >> n) as i32)
    }
    #[inline(always)]
    fn reduce_add_i32(self, a: Self::I32) -> i32 {
        a.iter().fold(0, |sum, &x| sum.wrapping_add(x))
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        each!(LANES, i => a[i].round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        each!(LANES, i => a[i] as f32)
    }
    #[inline(always)]
    fn bits(self, a: Self::F32) -> Self::I32 {
        each!(LANES, i => a[i].to_bits() as i32)
    }
    #[inline(always)]
    fn of_bits(self, a: Self::I32) -> Self::F32 {
        each!(LANES, i => f32::from_bits(a[i] as u32))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::Bytes {
        *x
    }
    #[inline(never)]
    fn splat_bytes(self, x: u8) -> Self::Bytes {
        [x; 64]
    }
    #[inline(never)]
    fn shr(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        each!(64, i => (u16::from_le_bytes([v[i / 2 * 2], v[i / 2 * 2 + 1]]) >> n).to_le_bytes()[i % 2])
    }
    #[inline(never)]
    fn shl(self, v: Self::Bytes, n: u32) -> Self::Bytes {
        each!(64, i => (u16::from_le_bytes([v[i / 2 * 2], v[i / 2 * 2 + 1]]) << n).to_le_bytes()[i % 2])
    }
    #[inline(never)]
    fn merge(self, mask: u8, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        each!(64, i => mask & a[i] | !mask & b[i])
    }
    #[inline(never)]
    fn linear(self, code: Self::Bytes, add: Self::Bytes, floor: Self::Bytes) -> Self::Bytes {
        each!(64, i => (code[i].wrapping_add(add[i]) as i8).max(floor[i] as i8) as u8)
    }
    #[inline(never)]
    fn table(self, book: &Book) -> Self::Table {
        book.values.map(|v| v as u8)
    }
    #[inline(never)]
    fn lookup<const BITS: usize>(self, table: &Self::Table, code: Self::Bytes) -> Self::Bytes {
        each!(64, i => table[code[i] as usize % (1 << BITS)])
    }
    #[inline(never)]
    fn weights(self, v: Self::Bytes) -> Self::Weights {
        each!(64, i => v[i] as i8)
    }
    #[inline(never)]
    fn ladder<const BITS: usize>(self, book: &Book) -> Self::Ladder {
        (book.values, book.ladder)
    }
    #[inline(never)]
    fn rungs<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        s: &[u8; 16],
        high: bool,
    ) -> Self::Rungs {
        each!(LANES, i => ladder.1[(if high { s[i] >> 4 } else { s[i] & 15 }) as usize])
    }
    #[inline(never)]
    fn fold<const BITS: usize, const SINGLE: bool>(
        self,
        ladder: &Self::Ladder,
        rungs: &Self::Rungs,
        code: Self::Bytes,
    ) -> Self::Weights {
        each!(64, i => {
            let value = i32::from(ladder.0[code[i] as usize % (1 << BITS)]);
            ((value * i32::from(rungs[i / 4]) + 64) >> 7) as i8
        })
    }
    #[inline(never)]
    unsafe fn store_weights(self, w: Self::Weights, to: *mut u8) {
        // SAFETY: the caller gives 64 bytes.
        unsafe { to.cast::<[i8; 64]>().write_unaligned(w) }
    }
    #[inline(always)]
    unsafe fn load_weights(self, from: *const u8) -> Self::Weights {
        // SAFETY: the caller gives 64 bytes.
        unsafe { from.cast::<[i8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn acts(self, a: *const u8) -> Self::Acts {
        // SAFETY: the caller gives 4 bytes.
        unsafe { a.cast::<[i8; 4]>().read_unaligned() }
    }
    #[inline(never)]
    fn dot(self, acc: Self::I32, w: Self::Weights, a: Self::Acts) -> Self::I32 {
        each!(LANES, r => {
            let mut sum = acc[r];
            for i in 0..4 {
                sum = sum.wrapping_add(i32::from(w[4 * r + i]) * i32::from(a[i]));
            }
            sum
        })
    }
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _at: *const u8) {}
}
