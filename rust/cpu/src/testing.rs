//! Plain scalar loops of `docs/numerics.md` that tests compare with, and random numbers.

use kbit_simd::{Isa, Simd, SimdOp, dispatch, math};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Somewhat normal, variance 1.
    pub(crate) fn value(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4)
            .map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5)
            .sum();
        sum * 1.732
    }

    pub(crate) fn vector(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

pub(crate) fn reduce(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

pub(crate) fn lane_sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    x.iter().enumerate().for_each(|(i, v)| lanes[i % 16] += v);
    reduce(lanes)
}

pub(crate) fn lane_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    a.iter()
        .zip(b)
        .enumerate()
        .for_each(|(i, (a, b))| lanes[i % 16] = a.mul_add(*b, lanes[i % 16]));
    reduce(lanes)
}

/// An element function of `kbit_simd::math`, by its scalar definition.
pub(crate) struct Exp(f32);
impl SimdOp for Exp {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut lanes = [0.0; 16];
        s.store(math::exp(s, s.splat(self.0)), &mut lanes);
        lanes[0]
    }
}

pub(crate) fn exp(x: f32) -> f32 {
    dispatch(Isa::Scalar, Exp(x))
}
