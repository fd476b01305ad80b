//! Rotation, cache rounding and attention of one token: `docs/numerics.md`, sections 5 and 6.

use std::ops::Range;

use kbit_tensor::program::{CacheLayer, CacheType, Rope};

use super::math::{Function, apply, exp, lane_dot, lane_sum};

/// Keys of a chunk; chunks start at multiples of it.
const CHUNK: usize = 256;

/// Rotates every head of `x` for `position`; `planned` tells which frequencies the sequence uses.
pub(super) fn rotate(rope: &Rope, planned: usize, position: usize, x: &mut [f32], head_dim: usize) {
    let (inv_freq, scale) = match &rope.long {
        Some(long) if planned > long.original => (&long.inv_freq, long.scale),
        _ => (&rope.inv_freq, rope.scale),
    };
    let n = inv_freq.len();
    for head in x.chunks_exact_mut(head_dim) {
        for j in 0..n {
            let angle = f64::from(position as f32 * inv_freq[j]);
            let cos = (libm::cos(angle) * f64::from(scale)) as f32;
            let sin = (libm::sin(angle) * f64::from(scale)) as f32;
            let (a, b) = (head[j], head[j + n]);
            head[j] = a * cos - b * sin;
            head[j + n] = b * cos + a * sin;
        }
    }
}

/// Appends `x` (heads * head_dim) to `cache`, rounded per head.
pub(super) fn store(kind: CacheType, x: &[f32], head_dim: usize, cache: &mut Vec<f32>) {
    for head in x.chunks_exact(head_dim) {
        let mut head = head.to_vec();
        super::round_to(kind, &mut head);
        cache.extend(head);
    }
}

/// The attention of one layer over one sequence.
pub(super) struct Attention<'a> {
    pub(super) layer: &'a CacheLayer,
    /// (positions, kv_heads * head_dim).
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
    pub(super) softcap: Option<f32>,
    pub(super) alibi: Option<&'a [f32]>,
    pub(super) sinks: Option<&'a [f32]>,
}

impl Attention<'_> {
    /// `qkv` of the token at `position` -> `out` (q_heads * head_dim).
    pub(super) fn token(&self, qkv: &[f32], position: usize, out: &mut [f32]) {
        for (head, out) in out.chunks_exact_mut(self.layer.head_dim).enumerate() {
            let (_, l) = self.head(qkv, head, position, out);
            out.iter_mut().for_each(|o| *o /= l);
        }
    }

    /// The probabilities behind [`Attention::token`], into `out` (q_heads, tokens, position + 1 + later ones).
    pub(super) fn weights(
        &self,
        qkv: &[f32],
        position: usize,
        out: &mut [f32],
        token: usize,
        tokens: usize,
    ) {
        let positions = out.len() / (self.layer.q_heads * tokens);
        let mut o = vec![0.0; self.layer.head_dim];
        for head in 0..self.layer.q_heads {
            let (m, l) = self.head(qkv, head, position, &mut o);
            let row = &mut out[(head * tokens + token) * positions..];
            let keys = self.first(position)..position + 1;
            let mut p = self.logits(qkv, head, position, keys.clone());
            p.iter_mut().for_each(|p| *p -= m);
            apply(Function::Exp, &mut p);
            row[keys].iter_mut().zip(p).for_each(|(w, p)| *w = p / l);
        }
    }

    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    fn at(&self, head: usize, p: usize) -> Range<usize> {
        let (l, d) = (self.layer, self.layer.head_dim);
        let start = (p * l.kv_heads + head / (l.q_heads / l.kv_heads)) * d;
        start..start + d
    }

    /// Logits of the keys `keys`.
    fn logits(&self, qkv: &[f32], head: usize, position: usize, keys: Range<usize>) -> Vec<f32> {
        let d = self.layer.head_dim;
        let q = &qkv[head * d..][..d];
        let dot = |p| lane_dot(q, &self.keys[self.at(head, p)]) * self.scale;
        let mut s: Vec<f32> = keys.clone().map(dot).collect();
        if let Some(cap) = self.softcap {
            s.iter_mut().for_each(|s| *s /= cap);
            apply(Function::Tanh, &mut s);
            s.iter_mut().for_each(|s| *s *= cap);
        }
        if let Some(slopes) = self.alibi {
            for (s, p) in s.iter_mut().zip(keys) {
                *s += slopes[head] * (p as f32 - position as f32);
            }
        }
        s
    }

    /// The unnormalised output in `out`; returns the maximum M and the sum L.
    fn head(&self, qkv: &[f32], head: usize, position: usize, out: &mut [f32]) -> (f32, f32) {
        let (mut big_m, mut big_l) = (f32::NEG_INFINITY, 0.0);
        out.fill(0.0);
        let first = self.first(position);
        for chunk in first / CHUNK..=position / CHUNK {
            let keys = first.max(chunk * CHUNK)..(position + 1).min((chunk + 1) * CHUNK);
            let s = self.logits(qkv, head, position, keys.clone());
            let m = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // Lanes are told by the position, so keys before the window's start leave a gap of zeros.
            let mut p = vec![0.0; keys.start - chunk * CHUNK];
            p.extend(s.iter().map(|s| s - m));
            apply(Function::Exp, &mut p[keys.start - chunk * CHUNK..]);
            let l = lane_sum(p.iter().copied());
            let mut o = vec![0f32; out.len()];
            for key in keys {
                let weight = p[key - chunk * CHUNK];
                for (o, v) in o.iter_mut().zip(&self.values[self.at(head, key)]) {
                    *o = weight.mul_add(*v, *o);
                }
            }
            let new = big_m.max(m);
            let (a, b) = (exp(big_m - new), exp(m - new));
            big_l = big_l * a + l * b;
            out.iter_mut()
                .zip(o)
                .for_each(|(out, o)| *out = *out * a + o * b);
            big_m = new;
        }
        if let Some(sinks) = self.sinks {
            let new = big_m.max(sinks[head]);
            let a = exp(big_m - new);
            big_l = big_l * a + exp(sinks[head] - new);
            out.iter_mut().for_each(|o| *o *= a);
            big_m = new;
        }
        (big_m, big_l)
    }
}
