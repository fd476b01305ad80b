//! Element functions of `docs/numerics.md` section 5: one polynomial each, the same operations on every instruction set.

use crate::Simd;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has few enough bits that `n * LN2_HI` is exact.
#[allow(clippy::excessive_precision, reason = "exact in f32")]
const LN2_HI: f32 = 0.693_359_375;
const LN2_LO: f32 = -2.121_944_4e-4;
const EXP_LOW: f32 = -87.336_54;
const EXP_HIGH: f32 = 88.376_26;

/// Horner form by fma, highest power first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F32, c: [f32; N]) -> S::F32 {
    let mut p = s.splat(c[0]);
    for i in 1..N {
        p = s.fma(p, x, s.splat(c[i]));
    }
    p
}

/// e^x; 0 below -87.33654, as at 88.37626 above that. NaN stays NaN.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (low, high) = (s.splat(EXP_LOW), s.splat(EXP_HIGH));
    // The order of operands keeps NaN: max and min give their second one.
    let c = s.min(high, s.max(low, x));
    let n = s.round(s.mul(c, s.splat(LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HI), c);
    let r = s.fma(n, s.splat(-LN2_LO), r);
    let p = polynomial(
        s,
        r,
        [
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ],
    );
    // n is -126..=128; 2^n in two factors, so that both exponents are normal.
    let n = s.to_i32(n);
    let half = s.sub_i32(
        s.shr_i32(s.add_i32(n, s.splat_i32(256)), 1),
        s.splat_i32(128),
    );
    let power = |n: S::I32| s.of_bits(s.shl_i32(s.add_i32(n, s.splat_i32(127)), 23));
    let y = s.mul(s.mul(p, power(half)), power(s.sub_i32(n, half)));
    s.select(s.lt(x, low), s.splat(0.0), y)
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.neg(x))))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    s.mul(x, sigmoid(s, x))
}

/// `x * sigmoid(1.702 x)`.
#[inline(always)]
pub fn quick_gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    s.mul(x, sigmoid(s, s.mul(s.splat(1.702), x)))
}

/// `sign(x) (1 - 2 / (exp(2|x|) + 1))` for |x| >= 0.625, an odd polynomial below.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let a = s.abs(x);
    let e = exp(s, s.add(a, a));
    let large = s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(e, s.splat(1.0))));
    let large = s.select(s.lt(x, s.splat(0.0)), s.neg(large), large);
    let z = s.mul(x, x);
    let p = polynomial(
        s,
        z,
        [
            -5.704_988_7e-3,
            2.063_909e-2,
            -5.373_972e-2,
            1.333_144_2e-1,
            -3.333_328e-1,
        ],
    );
    let small = s.fma(s.mul(p, z), x, x);
    s.select(s.lt(a, s.splat(0.625)), small, large)
}

/// `0.5 x (1 + tanh(0.7978845608 (x + 0.044715 x^3)))`.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let cube = s.mul(s.mul(x, x), x);
    let inner = s.mul(s.splat(0.797_884_6), s.fma(s.splat(0.044_715), cube, x));
    s.mul(s.mul(s.splat(0.5), x), s.add(s.splat(1.0), tanh(s, inner)))
}

/// The error function, absolute error below 3e-7: Abramowitz and Stegun 7.1.26, the Taylor series for |x| < 0.75.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let a = s.abs(x);
    let t = s.div(s.splat(1.0), s.fma(s.splat(0.327_591_1), a, s.splat(1.0)));
    let p = polynomial(
        s,
        t,
        [
            1.061_405_4,
            -1.453_152,
            1.421_413_8,
            -0.284_496_72,
            0.254_829_6,
        ],
    );
    let y = s.sub(s.splat(1.0), s.mul(s.mul(p, t), exp(s, s.neg(s.mul(a, a)))));
    let large = s.select(s.lt(x, s.splat(0.0)), s.neg(y), y);
    let series = [
        -1.0 / 75600.0,
        1.0 / 9360.0,
        -1.0 / 1320.0,
        1.0 / 216.0,
        -1.0 / 42.0,
        0.1,
        -1.0 / 3.0,
        1.0,
    ];
    let p = polynomial(s, s.mul(x, x), series);
    let small = s.mul(s.mul(s.splat(std::f32::consts::FRAC_2_SQRT_PI), x), p);
    s.select(s.lt(a, s.splat(0.75)), small, large)
}

/// `0.5 x (1 + erf(x / sqrt 2))`.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let e = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.mul(s.mul(s.splat(0.5), x), s.add(s.splat(1.0), e))
}
