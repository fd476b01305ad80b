//! The end of a head: scale, cap, and the running arg-max of every row.

use kbit_simd::{LANES, Simd, SimdOp, math};

use crate::norm::{load, store};
use crate::project::Projection;

/// The head: `cap(scale * (W x + b))`.
#[derive(Debug)]
pub(crate) struct Head {
    /// One part; its bias is applied by the projection.
    pub(crate) projection: Projection,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
}

/// The largest logit of a row so far and its id; lowest id among equals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Best {
    value: f32,
    /// `u32::MAX` before anything was seen and once a logit was not a number.
    id: u32,
    nan: bool,
}

impl Best {
    /// Nothing seen yet.
    pub(crate) const NONE: Self = Self {
        value: f32::NEG_INFINITY,
        id: u32::MAX,
        nan: false,
    };

    /// The better of two disjoint sets of ids.
    pub(crate) fn merge(self, other: Self) -> Self {
        let nan = self.nan || other.nan;
        let wins = other.value > self.value || other.value == self.value && other.id < self.id;
        Self {
            nan,
            ..if wins { other } else { self }
        }
    }

    /// The largest so far.
    pub(crate) fn value(self) -> f32 {
        self.value
    }

    /// What a step reports.
    pub(crate) fn id(self) -> u32 {
        if self.nan { u32::MAX } else { self.id }
    }
}

/// Scales and caps logits in place; the best of them.
pub(crate) struct Logits<'a> {
    pub(crate) head: &'a Head,
    pub(crate) values: &'a mut [f32],
    /// Id of the first.
    pub(crate) first: u32,
    /// What the best of them must reach to matter.
    pub(crate) least: f32,
}

impl SimdOp for Logits<'_> {
    type Output = Best;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Best {
        // At least the largest (zeros fill up the last 16), and NaN once a value is not finite.
        let (mut peak, mut odd) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
        for x in self.values.chunks_mut(LANES) {
            let mut v = s.mul(load(s, x), s.splat(self.head.scale));
            if let Some(cap) = self.head.softcap {
                v = s.mul(s.splat(cap), math::tanh(s, s.div(v, s.splat(cap))));
            }
            store(s, v, x);
            odd = s.add(odd, s.sub(v, v));
            peak = s.max(v, peak);
        }
        if !s.reduce_add(odd).is_nan() && s.reduce_max(peak) < self.least {
            return Best::NONE;
        }
        let mut best = Best::NONE;
        for (id, &value) in (self.first..).zip(self.values.iter()) {
            best.nan |= value.is_nan();
            if value > best.value || best.id == u32::MAX && value == best.value {
                (best.value, best.id) = (value, id);
            }
        }
        best
    }
}
