//! The reference device: plain f32 loops over a [`Program`], as `docs/numerics.md` writes them. Slow and obvious.
//!
//! Tests compare devices with it, `==`. A sequence is a list of f32 keys and values, already rounded as its cache type
//! would round them.

mod attention;
mod linear;
mod math;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kbit_tensor::program::{
    Activations, CacheType, Device, Epilogue, Expert, Norm, NormKind, Op, Options, Output, Part,
    Program, Routing, Rows, Runner, SequenceId, Want,
};
use kbit_tensor::{Error, Result, Weight};

use math::{Function, apply, exp, lane_sum};

/// The reference device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Device for Reference {
    fn name(&self) -> String {
        "reference".into()
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: Vec<Weight>,
        options: Options,
    ) -> Result<Box<dyn Runner>> {
        program.check(&weights)?;
        let dense = |w: &Weight| match w {
            Weight::Dense(t) => t.to_f32(),
            Weight::Quantised(_) => Vec::new(),
        };
        let dense = weights.iter().map(dense).collect();
        let weights = Weights {
            stored: weights,
            dense,
            activations: options.activations,
        };
        Ok(Box::new(Interpreter {
            program,
            weights,
            options,
            sequences: BTreeMap::new(),
            next: 0,
        }))
    }
}

/// Weights with the dense ones as f32.
struct Weights {
    stored: Vec<Weight>,
    dense: Vec<Vec<f32>>,
    activations: Activations,
}

#[derive(Clone, Default)]
struct Sequence {
    /// Per layer, (positions, kv_heads * head_dim).
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    len: usize,
    planned: usize,
}

struct Interpreter {
    program: Arc<Program>,
    weights: Weights,
    options: Options,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u64,
}

impl Interpreter {
    fn insert(&mut self, sequence: Sequence) -> Result<SequenceId> {
        let (planned, context) = (sequence.planned, self.program.context);
        if planned > context {
            return Err(Error::ContextOverflow(format!(
                "{planned} tokens planned, the context holds {context}"
            )));
        }
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    fn token_bytes(&self) -> usize {
        self.program
            .cache
            .iter()
            .map(|l| 8 * l.kv_heads * l.head_dim)
            .sum()
    }

    /// Everything that can be wrong with a batch, before anything is computed.
    fn validate(&self, batch: &[Part<'_>]) -> Result<()> {
        let mut new = 0;
        for (i, part) in batch.iter().enumerate() {
            let Some(sequence) = self.sequences.get(&part.sequence) else {
                return Err(Error::Argument(format!(
                    "sequence {} is not open",
                    part.sequence.0
                )));
            };
            if batch[..i].iter().any(|p| p.sequence == part.sequence) {
                return Err(Error::Argument(format!(
                    "sequence {} is twice in the batch",
                    part.sequence.0
                )));
            }
            if part.ids.is_empty() {
                return Err(Error::Argument(format!(
                    "sequence {} has no new tokens",
                    part.sequence.0
                )));
            }
            let vocab = self.program.vocab_size;
            if let Some(id) = part.ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::Argument(format!(
                    "token id {id} is outside the vocabulary of {vocab}"
                )));
            }
            let (len, context) = (sequence.len + part.ids.len(), self.program.context);
            if len > context {
                return Err(Error::ContextOverflow(format!(
                    "{len} tokens in a context of {context}"
                )));
            }
            new += part.ids.len();
        }
        let wanted = self.cache_bytes() + new * self.token_bytes();
        if self.options.cache_bytes > 0 && wanted > self.options.cache_bytes {
            return Err(Error::Memory(format!(
                "KV cache of {wanted} bytes, allowed are {}",
                self.options.cache_bytes
            )));
        }
        Ok(())
    }

    /// Runs the ops for one part; its new keys and values are appended, its length is not.
    fn part(
        &mut self,
        part: &Part<'_>,
        want: Want,
        cancel: &AtomicBool,
        out: &mut Step,
    ) -> Result<()> {
        let program = self.program.clone();
        let Some(sequence) = self.sequences.get_mut(&part.sequence) else {
            return Ok(());
        };
        let (w, n, start) = (&self.weights, part.ids.len(), sequence.len);
        let mut buffers: Vec<Vec<f32>> = program
            .buffers
            .iter()
            .map(|b| vec![0.0; n * b.width])
            .collect();
        let width = |b: kbit_tensor::program::BufferId| program.buffers[b.0 as usize].width;
        for op in &program.ops {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            match op {
                Op::Embed {
                    table,
                    scale,
                    positions,
                    out,
                } => {
                    for (t, (&id, to)) in part
                        .ids
                        .iter()
                        .zip(buffers[out.0 as usize].chunks_exact_mut(width(*out)))
                        .enumerate()
                    {
                        w.row(*table, id as usize, to);
                        to.iter_mut().for_each(|v| *v *= scale);
                        if let Some((table, offset)) = positions {
                            let mut position = vec![0.0; to.len()];
                            w.row(*table, start + t + offset, &mut position);
                            to.iter_mut().zip(position).for_each(|(v, p)| *v += p);
                        }
                    }
                }
                Op::Norm { x, norm, out } => {
                    let from = buffers[x.0 as usize].clone();
                    let rows = from
                        .chunks_exact(width(*x))
                        .zip(buffers[out.0 as usize].chunks_exact_mut(width(*out)));
                    rows.for_each(|(from, to)| w.norm(norm, from, to));
                }
                Op::Linear {
                    x,
                    parts,
                    epilogue,
                    out,
                } => {
                    let from = buffers[x.0 as usize].clone();
                    for (from, to) in from
                        .chunks_exact(width(*x))
                        .zip(buffers[out.0 as usize].chunks_exact_mut(width(*out)))
                    {
                        let y: Vec<Vec<f32>> = parts.iter().map(|p| w.linear(p, from)).collect();
                        epilogue_of(*epilogue, &y, to);
                    }
                }
                Op::RopeAppend {
                    qkv,
                    layer,
                    rope,
                    q_norm,
                    k_norm,
                    clip,
                } => {
                    let l = &program.cache[*layer];
                    let rope = rope.map(|r| &program.ropes[r]);
                    for (t, row) in buffers[qkv.0 as usize]
                        .chunks_exact_mut(width(*qkv))
                        .enumerate()
                    {
                        if let Some(clip) = clip {
                            row.iter_mut().for_each(|v| *v = v.clamp(-clip, *clip));
                        }
                        let (q, kv) = row.split_at_mut(l.q_heads * l.head_dim);
                        let (k, v) = kv.split_at_mut(l.kv_heads * l.head_dim);
                        for (part, norm) in [(&mut *q, q_norm), (&mut *k, k_norm)] {
                            if let Some(norm) = norm {
                                w.head_norm(norm, part, l.head_dim);
                            }
                            if let Some(rope) = rope {
                                attention::rotate(
                                    rope,
                                    sequence.planned,
                                    start + t,
                                    part,
                                    l.head_dim,
                                );
                            }
                        }
                        attention::store(
                            self.options.cache,
                            k,
                            l.head_dim,
                            &mut sequence.keys[*layer],
                        );
                        attention::store(
                            self.options.cache,
                            v,
                            l.head_dim,
                            &mut sequence.values[*layer],
                        );
                    }
                }
                Op::Attention {
                    qkv,
                    layer,
                    scale,
                    window,
                    softcap,
                    alibi,
                    sinks,
                    out: to,
                } => {
                    let sinks = sinks.map(|s| w.dense[s.0 as usize].as_slice());
                    let attention = attention::Attention {
                        layer: &program.cache[*layer],
                        keys: &sequence.keys[*layer],
                        values: &sequence.values[*layer],
                        scale: *scale,
                        window: *window,
                        softcap: *softcap,
                        alibi: alibi.as_deref(),
                        sinks,
                    };
                    let queries = buffers[qkv.0 as usize].clone();
                    let mut weights = vec![
                        0.0;
                        if want.attentions {
                            attention.layer.q_heads * n * (start + n)
                        } else {
                            0
                        }
                    ];
                    for (t, row) in queries.chunks_exact(width(*qkv)).enumerate() {
                        // The one operation whose cost grows with the context.
                        if cancel.load(Ordering::Relaxed) {
                            return Err(Error::Cancelled);
                        }
                        let to = &mut buffers[to.0 as usize][t * width(*to)..][..width(*to)];
                        attention.token(row, start + t, to);
                        if want.attentions {
                            attention.weights(row, start + t, &mut weights, t, n);
                        }
                    }
                    if want.attentions {
                        out.attentions[*layer].push(weights);
                    }
                }
                Op::Add { x, scale, into } => {
                    let from = buffers[x.0 as usize].clone();
                    buffers[into.0 as usize]
                        .iter_mut()
                        .zip(from)
                        .for_each(|(h, y)| *h += scale * y);
                }
                Op::Experts {
                    x,
                    router,
                    experts,
                    top_k,
                    routing,
                    epilogue,
                    scale,
                    into,
                } => {
                    let from = buffers[x.0 as usize].clone();
                    for (from, to) in from
                        .chunks_exact(width(*x))
                        .zip(buffers[into.0 as usize].chunks_exact_mut(width(*into)))
                    {
                        let chosen = route(&w.linear(router, from), *top_k, *routing);
                        let mut sum = vec![0.0; to.len()];
                        for (e, weight) in chosen {
                            let y = w.expert(&experts[e], from, *epilogue);
                            sum.iter_mut().zip(y).for_each(|(s, y)| *s += weight * y);
                        }
                        to.iter_mut().zip(sum).for_each(|(h, y)| *h += scale * y);
                    }
                }
                Op::Hidden { x } => {
                    if want.hidden {
                        out.hidden_op(&buffers[x.0 as usize]);
                    }
                }
                Op::Head {
                    x,
                    linear,
                    scale,
                    softcap,
                } => {
                    let first = match part.rows {
                        Rows::None => n,
                        Rows::Last => n - 1,
                        Rows::All => 0,
                    };
                    for from in buffers[x.0 as usize].chunks_exact(width(*x)).skip(first) {
                        let mut logits = w.linear(linear, from);
                        logits.iter_mut().for_each(|v| *v *= scale);
                        if let Some(cap) = softcap {
                            logits.iter_mut().for_each(|v| *v /= cap);
                            apply(Function::Tanh, &mut logits);
                            logits.iter_mut().for_each(|v| *v *= cap);
                        }
                        out.output.argmax.push(argmax(&logits));
                        if want.logits {
                            out.output.logits.extend(logits);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// A step's output under construction.
#[derive(Default)]
struct Step {
    output: Output,
    /// Per layer and part.
    attentions: Vec<Vec<Vec<f32>>>,
    /// The next [`Op::Hidden`].
    hidden: usize,
}

impl Step {
    fn hidden_op(&mut self, x: &[f32]) {
        if self.hidden == self.output.hidden.len() {
            self.output.hidden.push(Vec::new());
        }
        self.output.hidden[self.hidden].extend_from_slice(x);
        self.hidden += 1;
    }
}

/// Lowest id among the largest; `u32::MAX` when a logit is not a number.
fn argmax(logits: &[f32]) -> u32 {
    if logits.iter().any(|v| v.is_nan()) {
        return u32::MAX;
    }
    let mut best = 0;
    for (i, &v) in logits.iter().enumerate() {
        if v > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// `y`: one row per part; `to`: the row of the output buffer.
fn epilogue_of(epilogue: Epilogue, y: &[Vec<f32>], to: &mut [f32]) {
    let flat = y.iter().flatten();
    match epilogue {
        Epilogue::Store => to.iter_mut().zip(flat).for_each(|(o, y)| *o = *y),
        Epilogue::AddTo { scale } => to.iter_mut().zip(flat).for_each(|(o, y)| *o += scale * y),
        Epilogue::Act(act) => {
            to.iter_mut().zip(flat).for_each(|(o, y)| *o = *y);
            apply(Function::Act(act), to);
        }
        Epilogue::Gated(act) => {
            to.copy_from_slice(&y[0]);
            apply(Function::Act(act), to);
            to.iter_mut().zip(&y[1]).for_each(|(o, up)| *o *= up);
        }
        Epilogue::GatedClamped { alpha, limit } => {
            let gate: Vec<f32> = y[0]
                .iter()
                .map(|&g| if limit < g { limit } else { g })
                .collect();
            to.iter_mut().zip(&gate).for_each(|(o, g)| *o = alpha * g);
            apply(Function::Sigmoid, to);
            for ((o, g), up) in to.iter_mut().zip(gate).zip(&y[1]) {
                *o = g * *o * (up.clamp(-limit, limit) + 1.0);
            }
        }
    }
}

/// Chosen experts and their weights, best first, ties to the lower number.
fn route(logits: &[f32], top_k: usize, routing: Routing) -> Vec<(usize, f32)> {
    let softmax = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f32> = logits.iter().map(|l| exp(l - max)).collect();
        let sum = lane_sum(p.iter().copied());
        p.into_iter().map(|p| p / sum).collect::<Vec<f32>>()
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    let chosen: Vec<f32> = order.iter().map(|&e| logits[e]).collect();
    let weights: Vec<f32> = match routing {
        Routing::TopKSoftmax => softmax(&chosen),
        Routing::SoftmaxTopK { renormalise } => {
            let all = softmax(logits);
            let weights: Vec<f32> = order.iter().map(|&e| all[e]).collect();
            let sum = if renormalise {
                lane_sum(weights.iter().copied())
            } else {
                1.0
            };
            weights.into_iter().map(|w| w / sum).collect()
        }
    };
    order.into_iter().zip(weights).collect()
}

impl Weights {
    fn norm(&self, norm: &Norm, from: &[f32], to: &mut [f32]) {
        let n = from.len() as f32;
        let learned = |id: Option<kbit_tensor::program::WeightId>| {
            id.map(|id| self.dense[id.0 as usize].as_slice())
        };
        let (weight, bias) = (learned(norm.weight), learned(norm.bias));
        let (mean, r) = match norm.kind {
            NormKind::Rms => (
                0.0,
                1.0 / (math::lane_dot(from, from) / n + norm.eps).sqrt(),
            ),
            NormKind::Layer => {
                let mean = lane_sum(from.iter().copied()) / n;
                let centred: Vec<f32> = from.iter().map(|x| x - mean).collect();
                (
                    mean,
                    1.0 / (math::lane_dot(&centred, &centred) / n + norm.eps).sqrt(),
                )
            }
        };
        for (i, (x, o)) in from.iter().zip(to).enumerate() {
            *o = (x - mean) * r;
            if let Some(w) = weight {
                *o *= w[i];
            }
            if let Some(b) = bias {
                *o += b[i];
            }
        }
    }

    /// Per head, or over the whole width when the weight is that long.
    fn head_norm(&self, norm: &Norm, x: &mut [f32], head_dim: usize) {
        let learned = norm
            .weight
            .or(norm.bias)
            .map_or(head_dim, |id| self.dense[id.0 as usize].len());
        for part in x.chunks_exact_mut(learned) {
            let from = part.to_vec();
            self.norm(norm, &from, part);
        }
    }

    fn expert(&self, expert: &Expert, x: &[f32], epilogue: Epilogue) -> Vec<f32> {
        let y: Vec<Vec<f32>> = expert
            .gate
            .iter()
            .chain([&expert.up])
            .map(|p| self.linear(p, x))
            .collect();
        let mut inner = vec![0.0; y[0].len()];
        epilogue_of(epilogue, &y, &mut inner);
        self.linear(&expert.down, &inner)
    }
}

impl Runner for Interpreter {
    fn open(&mut self, planned: usize) -> Result<SequenceId> {
        let layers = vec![Vec::new(); self.program.cache.len()];
        self.insert(Sequence {
            keys: layers.clone(),
            values: layers,
            len: 0,
            planned,
        })
    }

    fn close(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, |s| s.len)
    }

    fn truncate(&mut self, sequence: SequenceId, len: usize) {
        let program = self.program.clone();
        if let Some(s) = self.sequences.get_mut(&sequence) {
            s.len = s.len.min(len);
            for (l, layer) in program.cache.iter().enumerate() {
                s.keys[l].truncate(s.len * layer.kv_heads * layer.head_dim);
                s.values[l].truncate(s.len * layer.kv_heads * layer.head_dim);
            }
        }
    }

    fn fork(&mut self, sequence: SequenceId, planned: usize) -> Result<SequenceId> {
        let Some(s) = self.sequences.get(&sequence) else {
            return Err(Error::Argument(format!(
                "sequence {} is not open",
                sequence.0
            )));
        };
        let fork = Sequence {
            planned,
            ..s.clone()
        };
        self.insert(fork)
    }

    fn run(&mut self, batch: &[Part<'_>], want: Want, cancel: &AtomicBool) -> Result<Output> {
        self.validate(batch)?;
        let mut step = Step {
            attentions: vec![Vec::new(); self.program.cache.len()],
            ..Step::default()
        };
        for part in batch {
            step.hidden = 0;
            if let Err(e) = self.part(part, want, cancel, &mut step) {
                batch
                    .iter()
                    .for_each(|p| self.truncate(p.sequence, self.len(p.sequence)));
                return Err(e);
            }
        }
        for part in batch {
            if let Some(s) = self.sequences.get_mut(&part.sequence) {
                s.len += part.ids.len();
            }
        }
        if want.attentions {
            step.output.attentions = step.attentions;
        }
        Ok(step.output)
    }

    fn cache_bytes(&self) -> usize {
        self.sequences.values().map(|s| s.len).sum::<usize>() * self.token_bytes()
    }

    fn threads(&self) -> usize {
        1
    }
}

/// Rounds as the cache type does; see [`attention::store`].
fn round_to(cache: CacheType, x: &mut [f32]) {
    match cache {
        CacheType::F32 => {}
        CacheType::F16 => x
            .iter_mut()
            .for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        CacheType::BF16 => x
            .iter_mut()
            .for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
        CacheType::I8 => {
            let (scale, codes) = linear::quantise_block(x);
            x.iter_mut()
                .zip(codes)
                .for_each(|(v, q)| *v = f32::from(q) * scale);
        }
    }
}
