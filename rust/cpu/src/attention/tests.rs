//! Attention against plain loops written from `docs/numerics.md`, on every instruction set, `==`.

use std::sync::atomic::AtomicU32;

use kbit_simd::{Isa, Simd, SimdOp, dispatch, math};
use kbit_tensor::program::{CacheLayer, CacheType, NormKind, Rope};

use super::chunk::Scoring;
use super::{Attention, Rotation, Scratch, Shared, View, WeightsOut};
use crate::buffers::Rows;
use crate::cache::Cache;
use crate::norm::Norm;
use crate::rope::Tables;
use crate::testing::{Random, exp, lane_dot, lane_sum};

/// A case: shape, masks, and what the cache holds before the new tokens.
#[derive(Clone)]
struct Case {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    old: usize,
    new: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    alibi: bool,
    sinks: bool,
    kind: CacheType,
    rotary: usize,
    norm: Option<(NormKind, bool)>,
    clip: Option<f32>,
}

struct Tanh(f32);
impl SimdOp for Tanh {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut lanes = [0.0; 16];
        s.store(math::tanh(s, s.splat(self.0)), &mut lanes);
        lanes[0]
    }
}

fn round(kind: CacheType, x: &mut [f32]) {
    match kind {
        CacheType::F32 => {}
        CacheType::F16 => x
            .iter_mut()
            .for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        CacheType::BF16 => x
            .iter_mut()
            .for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
        CacheType::I8 => {
            let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let (scale, inverse) = (amax / 127.0, 127.0 / amax);
            x.iter_mut()
                .for_each(|v| *v = (*v * inverse).round_ties_even() * scale);
        }
    }
}

fn plain_norm(norm: &Norm, x: &mut [f32]) {
    let n = x.len() as f32;
    let mean = if norm.kind == NormKind::Layer {
        lane_sum(x) / n
    } else {
        0.0
    };
    let centred: Vec<f32> = x.iter().map(|v| v - mean).collect();
    let factor = 1.0 / (lane_dot(&centred, &centred) / n + norm.eps).sqrt();
    for (i, v) in x.iter_mut().enumerate() {
        *v = (*v - mean) * factor;
        if let Some(w) = &norm.weight {
            *v *= w[i];
        }
        if let Some(b) = &norm.bias {
            *v += b[i];
        }
    }
}

/// Inputs of a case, and the plain result.
struct World {
    case: Case,
    rope: Rope,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    /// (old + new, width)
    qkv: Vec<Vec<f32>>,
}

impl World {
    fn new(case: Case, seed: u64) -> Self {
        let mut r = Random(seed);
        let width = (case.q_heads + 2 * case.kv_heads) * case.head_dim;
        let norm = |heads: usize, r: &mut Random| {
            case.norm.map(|(kind, whole)| {
                let n = if whole {
                    heads * case.head_dim
                } else {
                    case.head_dim
                };
                Norm {
                    kind,
                    eps: 1e-5,
                    weight: Some(r.vector(n)),
                    bias: (kind == NormKind::Layer).then(|| r.vector(n)),
                }
            })
        };
        Self {
            rope: Rope {
                inv_freq: (0..case.rotary / 2)
                    .map(|j| 10000f32.powf(-(j as f32) / 7.0))
                    .collect(),
                scale: 1.25,
                long: None,
            },
            q_norm: norm(case.q_heads, &mut r),
            k_norm: norm(case.kv_heads, &mut r),
            slopes: case.alibi.then(|| r.vector(case.q_heads)),
            sinks: case.sinks.then(|| r.vector(case.q_heads)),
            qkv: (0..case.old + case.new).map(|_| r.vector(width)).collect(),
            case,
        }
    }

    /// (rows of new tokens, weights (heads, new, positions)).
    fn plain(&self) -> (Vec<Vec<f32>>, Vec<f32>) {
        let (c, d) = (&self.case, self.case.head_dim);
        let total = c.old + c.new;
        let rows: Vec<Vec<f32>> = self
            .qkv
            .iter()
            .enumerate()
            .map(|(p, row)| self.prepared(row, p))
            .collect();
        let group = c.q_heads / c.kv_heads;
        let mut weights = vec![0.0; c.q_heads * c.new * total];
        let mut result = Vec::new();
        for p in c.old..total {
            let mut out = vec![0.0; c.q_heads * d];
            for h in 0..c.q_heads {
                let q = &rows[p][h * d..(h + 1) * d];
                let key = |j: usize| &rows[j][(c.q_heads + h / group) * d..][..d];
                let value = |j: usize| &rows[j][(c.q_heads + c.kv_heads + h / group) * d..][..d];
                let first = c.window.map_or(0, |w| (p + 1).saturating_sub(w));
                let score = |j: usize| {
                    let mut s = lane_dot(q, key(j)) * 0.3;
                    if let Some(cap) = c.softcap {
                        s = cap * dispatch(Isa::Scalar, Tanh(s / cap));
                    }
                    if let Some(slopes) = &self.slopes {
                        s += slopes[h] * (j as f32 - p as f32);
                    }
                    s
                };
                let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0f32, vec![0f32; d]);
                for chunk in first / 256..=p / 256 {
                    let keys = first.max(chunk * 256)..(p + 1).min(chunk * 256 + 256);
                    let scores: Vec<f32> = keys.clone().map(score).collect();
                    let cm = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let mut lanes = [0f32; 16];
                    let mut co = vec![0f32; d];
                    for (j, s) in keys.zip(&scores) {
                        let w = exp(s - cm);
                        lanes[j % 16] += w;
                        co.iter_mut()
                            .zip(value(j))
                            .for_each(|(o, v)| *o = w.mul_add(*v, *o));
                    }
                    let cl = crate::testing::reduce(lanes);
                    let new = m.max(cm);
                    let (a, b) = (exp(m - new), exp(cm - new));
                    l = l * a + cl * b;
                    o.iter_mut().zip(&co).for_each(|(o, c)| *o = *o * a + c * b);
                    m = new;
                }
                if let Some(sinks) = &self.sinks {
                    let new = m.max(sinks[h]);
                    let a = exp(m - new);
                    l = l * a + exp(sinks[h] - new);
                    o.iter_mut().for_each(|o| *o *= a);
                    m = new;
                }
                out[h * d..(h + 1) * d]
                    .iter_mut()
                    .zip(&o)
                    .for_each(|(out, o)| *out = o / l);
                for j in first..=p {
                    weights[(h * c.new + p - c.old) * total + j] = exp(score(j) - m) / l;
                }
            }
            result.push(out);
        }
        (result, weights)
    }

    /// Clamped, normed, rotated; keys and values rounded to the cache's type.
    fn prepared(&self, row: &[f32], position: usize) -> Vec<f32> {
        let (c, d) = (&self.case, self.case.head_dim);
        let mut row = row.to_vec();
        if let Some(clip) = c.clip {
            row.iter_mut().for_each(|v| *v = v.clamp(-clip, clip));
        }
        let (q, kv) = row.split_at_mut(c.q_heads * d);
        let (k, v) = kv.split_at_mut(c.kv_heads * d);
        for (x, norm) in [(&mut *q, &self.q_norm), (&mut *k, &self.k_norm)] {
            if let Some(norm) = norm {
                let n = norm.weight.as_ref().expect("tests give weights").len();
                x.chunks_exact_mut(n).for_each(|x| plain_norm(norm, x));
            }
            for head in x.chunks_exact_mut(d) {
                let n = self.rope.inv_freq.len();
                for j in 0..n {
                    let angle = f64::from(position as f32 * self.rope.inv_freq[j]);
                    let (cos, sin) = (
                        (libm::cos(angle) * 1.25) as f32,
                        (libm::sin(angle) * 1.25) as f32,
                    );
                    let (a, b) = (head[j], head[j + n]);
                    head[j] = a * cos - b * sin;
                    head[j + n] = b * cos + a * sin;
                }
            }
        }
        k.chunks_exact_mut(d).for_each(|k| round(c.kind, k));
        v.chunks_exact_mut(d).for_each(|v| round(c.kind, v));
        row
    }

    /// The same by the device, all steps of `steps` tokens; `fused` leaves rotation to the items.
    fn device(
        &self,
        isa: Isa,
        steps: &[usize],
        fused: bool,
        want_weights: bool,
    ) -> (Vec<Vec<f32>>, Vec<f32>) {
        let c = &self.case;
        let (d, total) = (c.head_dim, c.old + c.new);
        let layers = [CacheLayer {
            kv_heads: c.kv_heads,
            q_heads: c.q_heads,
            head_dim: d,
            window: c.window,
        }];
        let mut cache = Cache::new(&layers, c.kind, usize::MAX);
        let id = cache.open(total);
        let attention = Attention {
            layer: 0,
            q_heads: c.q_heads,
            kv_heads: c.kv_heads,
            head_dim: d,
            scoring: Scoring {
                scale: 0.3,
                softcap: c.softcap,
                alibi: c.alibi,
            },
            window: c.window,
            slopes: self.slopes.clone(),
            sinks: self.sinks.clone(),
        };
        let rotation = Rotation {
            rope: Some(0),
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            clip: c.clip,
        };
        let mut tables = [Tables::new(&self.rope)];
        tables[0].reach(total, total);
        let (head, heads_at) = cache.layers()[0];
        let mut weights = vec![
            0.0;
            if want_weights {
                c.q_heads * c.new * total
            } else {
                0
            }
        ];
        let mut result = Vec::new();
        let mut scratch = Scratch::default();
        let mut start = 0;
        for &n in steps {
            let whole = want_weights || !fused && n % 2 == 0;
            let fused = fused && super::is_split(n, want_weights);
            cache.reserve(id, n).expect("room");
            let (qkv, mut out) = (
                Rows::new(n, self.qkv[0].len()).expect("room"),
                Rows::new(n, c.q_heads * d).expect("room"),
            );
            out.poison();
            for t in 0..n {
                // SAFETY: one thread.
                unsafe { qkv.row_mut(t) }.copy_from_slice(&self.qkv[start + t]);
            }
            let to = WeightsOut {
                at: weights.as_mut_ptr(),
                tokens: c.new,
                skip: start.wrapping_sub(c.old),
                positions: total,
            };
            let weights = if want_weights && start >= c.old {
                vec![to]
            } else {
                Vec::new()
            };
            let view = View {
                row: 0,
                tokens: n,
                start,
                planned: total,
                pages: cache.pages(id),
                weights,
            };
            let views = [view];
            let work = attention.work(&views, whole);
            let mut partials = Rows::new(work.partials, head.value_stride + 2).expect("room");
            partials.poison();
            let finished: Vec<AtomicU32> = (0..work.groups).map(|_| AtomicU32::new(0)).collect();
            let shared = Shared {
                isa,
                kind: c.kind,
                head,
                heads_at,
                views: &views,
                tables: &tables,
                qkv: &qkv,
                out: &out,
                partials: &partials,
                finished: &finished,
            };
            if !fused {
                for t in 0..n {
                    // SAFETY: one thread.
                    unsafe { attention.rotate_and_append(&shared, &rotation, &views[0], t) };
                }
            }
            // Any order of items gives the same.
            for i in (0..work.items.len()).rev() {
                let items = &work.items[i..];
                // SAFETY: one thread.
                unsafe { attention.item(&shared, fused.then_some(&rotation), items, &mut scratch) }
                    .expect("room");
            }
            for t in 0..n {
                if start + t >= c.old {
                    // SAFETY: one thread.
                    result.push(unsafe { out.row(t) }.to_vec());
                }
            }
            cache.advance(id, n);
            start += n;
        }
        (result, weights)
    }
}

#[test]
fn attention_equals_plain_loops() {
    let base = Case {
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        old: 0,
        new: 5,
        window: None,
        softcap: None,
        alibi: false,
        sinks: false,
        kind: CacheType::F16,
        rotary: 64,
        norm: None,
        clip: None,
    };
    let cases = [
        base.clone(),
        Case {
            old: 250,
            new: 20,
            kind: CacheType::BF16,
            ..base.clone()
        },
        Case {
            old: 700,
            new: 3,
            q_heads: 7,
            kv_heads: 1,
            kind: CacheType::I8,
            rotary: 32,
            ..base.clone()
        },
        Case {
            old: 511,
            new: 70,
            q_heads: 6,
            kv_heads: 3,
            head_dim: 40,
            window: Some(100),
            kind: CacheType::F32,
            rotary: 20,
            ..base.clone()
        },
        Case {
            old: 600,
            new: 9,
            q_heads: 3,
            kv_heads: 3,
            head_dim: 80,
            softcap: Some(2.0),
            sinks: true,
            rotary: 80,
            ..base.clone()
        },
        Case {
            old: 513,
            new: 4,
            q_heads: 8,
            kv_heads: 1,
            head_dim: 128,
            alibi: true,
            window: Some(300),
            rotary: 0,
            ..base.clone()
        },
        Case {
            old: 30,
            new: 6,
            norm: Some((NormKind::Rms, false)),
            sinks: true,
            ..base.clone()
        },
        Case {
            old: 260,
            new: 6,
            norm: Some((NormKind::Layer, true)),
            clip: Some(0.5),
            kind: CacheType::I8,
            ..base.clone()
        },
        Case {
            old: 300,
            new: 33,
            q_heads: 5,
            kv_heads: 5,
            head_dim: 8,
            kind: CacheType::I8,
            rotary: 8,
            ..base
        },
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let world = World::new(case, number as u64);
        let (want, want_weights) = world.plain();
        let (old, new) = (world.case.old, world.case.new);
        for isa in Isa::available() {
            let mut splits: Vec<Vec<usize>> = vec![
                vec![old + new],
                [old, new].into_iter().filter(|&n| n > 0).collect(),
            ];
            let mut single = if old > 0 { vec![old] } else { Vec::new() };
            single.extend(std::iter::repeat_n(1, new));
            splits.push(single);
            splits.push(
                (0..old + new)
                    .step_by(7)
                    .map(|at| 7.min(old + new - at))
                    .collect(),
            );
            for steps in splits {
                for fused in [false, true] {
                    let (got, _) = world.device(isa, &steps, fused, false);
                    assert_eq!(
                        got, want,
                        "case {number}, {isa}, steps {steps:?}, fused {fused}"
                    );
                }
            }
            let mut steps = if old > 0 { vec![old] } else { Vec::new() };
            steps.extend([new / 2, new - new / 2]);
            let (got, weights) = world.device(isa, &steps, false, true);
            assert_eq!(
                (got, weights),
                (want.clone(), want_weights.clone()),
                "case {number}, {isa}, with weights"
            );
        }
    }
}
