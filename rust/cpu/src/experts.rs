//! Mixtures of experts: only chosen experts are computed, each for all of its tokens at once.

use std::ops::Range;

use kbit_simd::{Isa, LANES, Simd, SimdOp, dispatch, math};
use kbit_tensor::program::Routing;

use crate::norm::{lane_sum, load, store};
use crate::project::Projection;

/// One expert: `down(epilogue(gate, up))`.
#[derive(Debug)]
pub(crate) struct Expert {
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

/// A mixture.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(crate) router: Projection,
    pub(crate) members: Vec<Expert>,
    pub(crate) top_k: usize,
    pub(crate) routing: Routing,
    pub(crate) scale: f32,
}

/// Which tokens go to which expert: a *slot* is one token at one expert, slots of an expert lie together.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    /// (tokens, `top_k`), best first: slot and weight.
    pub(crate) chosen: Vec<(usize, f32)>,
    /// Token of each slot.
    pub(crate) tokens: Vec<usize>,
    /// Experts with tokens, and their first slot; ends with (number of experts, number of slots).
    active: Vec<(usize, usize)>,
    /// Scratch.
    experts: Vec<usize>,
    order: Vec<usize>,
    weights: Vec<f32>,
}

impl Routes {
    /// Routes `tokens` rows of router logits.
    pub(crate) fn route<'a>(
        &mut self,
        isa: Isa,
        mixture: &Experts,
        tokens: usize,
        logits: impl Fn(usize) -> &'a [f32],
    ) {
        let (n, top_k) = (mixture.members.len(), mixture.top_k);
        self.chosen.clear();
        self.experts.clear();
        for token in 0..tokens {
            let logits = logits(token);
            self.order.clear();
            self.order.extend(0..n);
            self.order
                .sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            self.order.truncate(top_k);
            match mixture.routing {
                Routing::TopKSoftmax => {
                    self.weights.clear();
                    self.weights.extend(self.order.iter().map(|&e| logits[e]));
                    dispatch(isa, Softmax(&mut self.weights));
                }
                Routing::SoftmaxTopK { renormalise } => {
                    let mut all = logits.to_vec();
                    dispatch(isa, Softmax(&mut all));
                    self.weights.clear();
                    self.weights.extend(self.order.iter().map(|&e| all[e]));
                    if renormalise {
                        let sum = dispatch(isa, Sum(&self.weights));
                        self.weights.iter_mut().for_each(|w| *w /= sum);
                    }
                }
            }
            self.experts.extend(&self.order);
            self.chosen.extend(self.weights.iter().map(|&w| (0, w)));
        }
        self.tokens.clear();
        self.active.clear();
        for expert in 0..n {
            let first = self.tokens.len();
            for (i, _) in self
                .experts
                .iter()
                .enumerate()
                .filter(|&(_, &e)| e == expert)
            {
                self.chosen[i].0 = self.tokens.len();
                self.tokens.push(i / top_k);
            }
            if self.tokens.len() > first {
                self.active.push((expert, first));
            }
        }
        self.active.push((n, self.tokens.len()));
    }

    /// Experts with tokens: (expert, its slots).
    pub(crate) fn active(&self) -> impl ExactSizeIterator<Item = (usize, Range<usize>)> + '_ {
        self.active.windows(2).map(|w| (w[0].0, w[0].1..w[1].1))
    }

    /// The `i`-th of them.
    pub(crate) fn slots(&self, i: usize) -> (usize, Range<usize>) {
        let (expert, first) = self.active[i];
        (expert, first..self.active[i + 1].1)
    }
}

struct Softmax<'a>(&'a mut [f32]);

impl SimdOp for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let max = self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for x in self.0.chunks_mut(LANES) {
            store(s, math::exp(s, s.sub(load(s, x), s.splat(max))), x);
        }
        let sum = s.splat(lane_sum(s, self.0));
        for x in self.0.chunks_mut(LANES) {
            store(s, s.div(load(s, x), sum), x);
        }
    }
}

struct Sum<'a>(&'a [f32]);

impl SimdOp for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        lane_sum(s, self.0)
    }
}

/// `sum += weight * y`, product and sum rounded.
pub(crate) struct AddScaled<'a> {
    pub(crate) sum: &'a mut [f32],
    pub(crate) weight: f32,
    pub(crate) y: &'a [f32],
}

impl SimdOp for AddScaled<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (sum, y) in self.sum.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            store(
                s,
                s.add(load(s, sum), s.mul(s.splat(self.weight), load(s, y))),
                sum,
            );
        }
    }
}
