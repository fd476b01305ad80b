//! Half precision and bfloat16 in plain code: the definition that conversion instructions are tested against.

/// The f32 of a half-precision number; NaN payloads are kept and made quiet.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, mantissa) = (u32::from(bits >> 10 & 31), u32::from(bits & 0x3ff));
    let magnitude = match (exponent, mantissa) {
        (0, m) => (m as f32 * f32::from_bits(0x3380_0000)).to_bits(), // m * 2^-24, exact
        (31, 0) => 0x7f80_0000,
        (31, m) => 0x7fc0_0000 | m << 13,
        (e, m) => (e + 112) << 23 | m << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// The nearest half-precision number, ties to even.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let (sign, magnitude) = ((bits >> 16 & 0x8000) as u16, bits & 0x7fff_ffff);
    let half = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13 & 0x3ff) as u16
    } else if magnitude >= 0x477f_f000 {
        0x7c00 // 65520 and above round to infinity
    } else if magnitude >= 0x3880_0000 {
        let odd = magnitude >> 13 & 1;
        ((magnitude - 0x3800_0000 + 0xfff + odd) >> 13) as u16
    } else {
        // Adding 0.5 leaves the multiple of 2^-24 in the low mantissa bits, rounded to even by the addition itself.
        (f32::from_bits(magnitude) + 0.5).to_bits() as u16
    };
    sign | half
}

/// The f32 of a bfloat16 number.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16 number, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
