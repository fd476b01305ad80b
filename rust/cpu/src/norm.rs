//! RMS and layer norms of rows: `docs/numerics.md`, section 5.

use kbit_simd::{Isa, LANES, Simd, SimdOp, dispatch};
use kbit_tensor::program::NormKind;

/// A norm with its learned parts in f32.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    pub(crate) eps: f32,
    pub(crate) weight: Option<Vec<f32>>,
    pub(crate) bias: Option<Vec<f32>>,
}

/// `out = norm(x)`; both as long as the learned parts.
pub(crate) fn norm(isa: Isa, norm: &Norm, x: &[f32], out: &mut [f32]) {
    dispatch(
        isa,
        Rows {
            norm,
            x,
            out,
            each: x.len(),
        },
    );
}

/// As [`norm`] for every `each` elements of `x`, in place.
pub(crate) fn norm_in_place(isa: Isa, norm: &Norm, x: &mut [f32], each: usize) {
    dispatch(isa, InPlace { norm, x, each });
}

struct Rows<'a> {
    norm: &'a Norm,
    x: &'a [f32],
    out: &'a mut [f32],
    each: usize,
}

impl SimdOp for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (x, out) in self
            .x
            .chunks_exact(self.each)
            .zip(self.out.chunks_exact_mut(self.each))
        {
            let stats = Stats::of(s, self.norm, x);
            let (groups, rest) = x.as_chunks::<LANES>();
            let (out_groups, out_rest) = out.as_chunks_mut::<LANES>();
            for (i, (x, out)) in groups.iter().zip(out_groups).enumerate() {
                s.store(stats.apply(s, self.norm, s.load(x), i * LANES, LANES), out);
            }
            if !rest.is_empty() {
                s.store_part(
                    stats.apply(
                        s,
                        self.norm,
                        s.load_part(rest),
                        x.len() - rest.len(),
                        rest.len(),
                    ),
                    out_rest,
                );
            }
        }
    }
}

struct InPlace<'a> {
    norm: &'a Norm,
    x: &'a mut [f32],
    each: usize,
}

impl SimdOp for InPlace<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.each) {
            let stats = Stats::of(s, self.norm, x);
            let n = x.len();
            let (groups, rest) = x.as_chunks_mut::<LANES>();
            for (i, x) in groups.iter_mut().enumerate() {
                s.store(stats.apply(s, self.norm, s.load(x), i * LANES, LANES), x);
            }
            if !rest.is_empty() {
                let at = n - rest.len();
                s.store_part(
                    stats.apply(s, self.norm, s.load_part(rest), at, rest.len()),
                    rest,
                );
            }
        }
    }
}

/// What a row is centred by and multiplied with.
struct Stats {
    mean: f32,
    factor: f32,
}

impl Stats {
    #[inline(always)]
    fn of<S: Simd>(s: S, norm: &Norm, x: &[f32]) -> Self {
        let n = x.len() as f32;
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => lane_sum(s, x) / n,
        };
        let mut sum = s.splat(0.0);
        let (groups, rest) = x.as_chunks::<LANES>();
        for x in groups {
            let x = s.sub(s.load(x), s.splat(mean));
            sum = s.fma(x, x, sum);
        }
        if !rest.is_empty() {
            let x = s.sub(s.load_part(rest), s.splat(mean));
            sum = s.select(s.first(rest.len()), s.fma(x, x, sum), sum);
        }
        Self {
            mean,
            factor: 1.0 / (s.reduce_add(sum) / n + norm.eps).sqrt(),
        }
    }

    /// 16 (or the first `n`) elements from index `at` on.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, norm: &Norm, x: S::F32, at: usize, n: usize) -> S::F32 {
        let mut y = s.mul(s.sub(x, s.splat(self.mean)), s.splat(self.factor));
        if let Some(w) = &norm.weight {
            y = s.mul(y, load(s, &w[at..at + n]));
        }
        if let Some(b) = &norm.bias {
            y = s.add(y, load(s, &b[at..at + n]));
        }
        y
    }
}

/// Up to 16 elements, the others 0.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, x: &[f32]) -> S::F32 {
    match x.first_chunk::<LANES>() {
        Some(x) => s.load(x),
        None => s.load_part(x),
    }
}

/// Stores up to 16 elements.
#[inline(always)]
pub(crate) fn store<S: Simd>(s: S, v: S::F32, to: &mut [f32]) {
    if let Some(to) = to.first_chunk_mut::<LANES>() {
        s.store(v, to);
    } else {
        s.store_part(v, to);
    }
}

/// The lane sum of section 1.
#[inline(always)]
pub(crate) fn lane_sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    let (groups, rest) = x.as_chunks::<LANES>();
    for x in groups {
        sum = s.add(sum, s.load(x));
    }
    if !rest.is_empty() {
        sum = s.select(s.first(rest.len()), s.add(sum, s.load_part(rest)), sum);
    }
    s.reduce_add(sum)
}
