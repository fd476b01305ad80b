//! What codes stand for: the fixed codebooks and where the learned one starts.

use std::str::FromStr;

use crate::Error;

/// The kinds of codebook. All end as `2^bits` non-decreasing int8 entries in -127..=127.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodebookFormat {
    /// Equal steps from -128 (stored as -127) to 128 - step.
    Int,
    /// Sign, exponent and mantissa with subnormals: E1M0, E2M0, E2M1, E2M2, E3M2, E3M3, E4M3 at 2..=8 bits.
    Float,
    /// Levels that a normal distribution hits equally often.
    Quantile,
    /// Quantiles of a normal distribution with an exact zero and both ends at 127.
    Nf,
    /// Fitted to the tensor by minimising the squared error.
    Learned,
}

impl CodebookFormat {
    /// All, by name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("int", Self::Int),
        ("float", Self::Float),
        ("quantile", Self::Quantile),
        ("nf", Self::Nf),
        ("learned", Self::Learned),
    ];

    /// The codebook before [`rounded`]; for [`Self::Learned`], where learning starts.
    pub(super) fn values(self, bits: usize) -> Vec<f64> {
        let n = 1i32 << bits;
        let half = n / 2;
        match self {
            Self::Int => (-half..half)
                .map(|c| f64::from((c * (128 / half)).max(-127)))
                .collect(),
            Self::Float => float_values(bits),
            Self::Quantile => {
                let at = |i: i32| normal_quantile((f64::from(i) + 0.5) / f64::from(n));
                (0..n).map(at).collect()
            }
            Self::Nf => {
                // `half` steps down from zero, `half - 1` up, over probabilities that leave the ends finite.
                let end = 1.0 - 0.5 * (1.0 / f64::from(2 * n) + 1.0 / f64::from(2 * n - 2));
                let down =
                    |i: i32| -normal_quantile(0.5 + (end - 0.5) * f64::from(i) / f64::from(half));
                let up = |i: i32| {
                    normal_quantile(0.5 + (end - 0.5) * f64::from(i) / f64::from(half - 1))
                };
                let (low, high) = (-down(half), up(half - 1));
                let down = (1..=half).rev().map(|i| down(i) / low);
                down.chain((0..half).map(|i| up(i) / high)).collect()
            }
            Self::Learned if bits == 8 => Self::Int.values(bits),
            Self::Learned => curve(bits, 0.5),
        }
    }
}

impl FromStr for CodebookFormat {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|(n, _)| *n == name);
        found.map(|f| f.1).ok_or_else(|| {
            let names = Self::ALL.map(|(n, _)| n).join(", ");
            Error::Argument(format!(
                "quantize: format must be one of {names}, is '{name}'"
            ))
        })
    }
}

/// Levels that lie the denser around zero the smaller `slope` (at zero, of 1) is; 1 gives equal steps.
pub(super) fn curve(bits: usize, slope: f64) -> Vec<f64> {
    let n = 1u32 << bits;
    (0..n)
        .map(|i| (2.0 * f64::from(i) + 1.0) / f64::from(n) - 1.0)
        .map(|u| u * (slope + (1.0 - slope) * u * u))
        .collect()
}

/// Non-decreasing values as int8, the largest magnitude at 127.
pub(super) fn rounded(values: &[f64]) -> Vec<i8> {
    let peak = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    values
        .iter()
        .map(|v| libm::rint(v / peak * 127.0) as i8)
        .collect()
}

fn float_values(bits: usize) -> Vec<f64> {
    let exponent_bits = [1, 2, 2, 2, 3, 3, 4][bits - 2];
    let mantissa_bits = bits as i32 - 1 - exponent_bits;
    let one = 1 << mantissa_bits;
    let positive = (0..1 << (bits - 1)).map(|c| {
        let (e, m) = (c >> mantissa_bits, c % one);
        let value = if e == 0 { m } else { (one + m) << (e - 1) };
        f64::from(value)
    });
    let positive: Vec<f64> = positive.collect();
    let negative = positive.iter().rev().map(|v| -v);
    negative.chain(positive.iter().copied()).collect()
}

/// The value below which a standard normal variable falls with probability `p`, 0 < p < 1, by bisection.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-10f64, 10f64);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if 0.5 * libm::erfc(-middle / std::f64::consts::SQRT_2) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}
