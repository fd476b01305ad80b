//! [`ModelSpec`] and the names of the tensors that exist, to a [`Program`].
//!
//! ```text
//! sequential                                parallel
//! h ─ in_norm ─ attention ─ out_norm ─ + h  h ─┬─ attn.in_norm ─ attention ─ out_norm ─┐
//! h ─ in_norm ─ mlp ─────── out_norm ─ + h     └─ mlp.in_norm or the same ─ mlp ───────┴─ + h
//! ```
//! Every norm is optional. Hidden states are those of `transformers`: the embedding, then what each layer leaves, the
//! last one after the final norm.

use std::collections::{BTreeSet, HashMap};

use kbit_tensor::program::{
    Activation, Buffer, BufferId, CacheLayer, Epilogue, Expert, Linear, Norm, NormKind, Op,
    Program, Routing, WeightId,
};
use kbit_tensor::{Error, Result};

use crate::rope::rope;
use crate::spec::{LayerSpec, ModelSpec};

/// Names listed on each side of an error, at most.
const LISTED: usize = 64;

/// Compiles a model.
///
/// `names` are the canonical names (`docs/adding.md`) of all tensors that exist; `context` bounds the positions of a
/// sequence, at most and by default the spec's.
///
/// # Errors
/// [`Error::Format`] when the spec contradicts itself, or naming every tensor that is missing and every one left over;
/// [`Error::Unsupported`] for words the spec uses that kbit does not know; [`Error::ContextOverflow`] for a context past
/// the model's.
pub fn compile<'a>(
    spec: &ModelSpec,
    names: impl IntoIterator<Item = &'a str>,
    context: Option<usize>,
) -> Result<Program> {
    let present: BTreeSet<&str> = names.into_iter().collect();
    validate(spec, present.len())?;
    let context = match context {
        None => spec.max_position_embeddings,
        Some(0) => return Err(Error::Argument("context must be at least 1, is 0".into())),
        Some(c) if c > spec.max_position_embeddings => {
            let max = spec.max_position_embeddings;
            return Err(Error::ContextOverflow(format!(
                "context {c} asked of a model with {max} positions"
            )));
        }
        Some(c) => c,
    };
    let mut ropes = Vec::new();
    for r in &spec.ropes {
        ropes.push(rope(r, spec.max_position_embeddings, context)?);
    }
    let program = Program {
        ropes,
        vocab_size: spec.vocab_size,
        context,
        ..Program::default()
    };
    let mut c = Compiler {
        spec,
        present,
        program,
        ids: HashMap::new(),
        missing: BTreeSet::new(),
        act: activation(spec)?,
    };
    c.model()?;
    c.finish()
}

/// Everything that later arithmetic relies on.
fn validate(spec: &ModelSpec, tensors: usize) -> Result<()> {
    let wrong = |what: String| Err(Error::Format(format!("spec: {what}")));
    let sizes = [
        ("vocab_size", spec.vocab_size),
        ("hidden_size", spec.hidden_size),
        ("intermediate_size", spec.intermediate_size),
        ("num_attention_heads", spec.num_attention_heads),
        ("num_key_value_heads", spec.num_key_value_heads),
        ("head_dim", spec.head_dim),
        ("max_position_embeddings", spec.max_position_embeddings),
    ];
    for (name, size) in sizes {
        if !(1..=1 << 24).contains(&size) {
            return wrong(format!("{name} must be 1..=2^24, is {size}"));
        }
    }
    let (heads, kv_heads) = (spec.num_attention_heads, spec.num_key_value_heads);
    if heads % kv_heads != 0 {
        return wrong(format!(
            "num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        ));
    }
    if spec.layers.is_empty() || spec.layers.len() > tensors {
        return wrong(format!(
            "{} layers for {tensors} tensors",
            spec.layers.len()
        ));
    }
    if spec.position_offset > 1 << 24 {
        return wrong(format!(
            "position_offset must be at most 2^24, is {}",
            spec.position_offset
        ));
    }
    let floats = [
        ("norm_eps", Some(spec.norm_eps)),
        ("embed_scale", Some(spec.embed_scale)),
        ("attention_scale", Some(spec.attention_scale)),
        ("residual_scale", Some(spec.residual_scale)),
        ("logit_scale", Some(spec.logit_scale)),
        ("attn_logit_softcapping", spec.attn_logit_softcapping),
        ("final_logit_softcapping", spec.final_logit_softcapping),
        ("clip_qkv", spec.clip_qkv),
        ("mlp_alpha", spec.mlp_alpha),
        ("mlp_limit", spec.mlp_limit),
    ];
    for (name, value) in floats {
        if let Some(v) = value
            && !(v as f32).is_finite()
        {
            return wrong(format!("{name} must be a finite f32, is {v}"));
        }
    }
    for r in &spec.ropes {
        if r.rotary_dim == 0 || r.rotary_dim % 2 != 0 || r.rotary_dim > spec.head_dim {
            return wrong(format!(
                "rotary_dim must be even and 2..=head_dim {}, is {}",
                spec.head_dim, r.rotary_dim
            ));
        }
    }
    for (i, layer) in spec.layers.iter().enumerate() {
        if let Some(r) = layer.rope
            && r >= spec.ropes.len()
        {
            return wrong(format!(
                "layer {i} names rope {r}, there are {}",
                spec.ropes.len()
            ));
        }
        if layer.sliding_window == Some(0) {
            return wrong(format!(
                "layer {i}: sliding_window must be at least 1, is 0"
            ));
        }
        if layer.experts && spec.moe.is_none() {
            return wrong(format!("layer {i} has experts, but 'moe' is missing"));
        }
    }
    if let Some(moe) = &spec.moe {
        let (n, k) = (moe.num_experts, moe.num_experts_per_tok);
        if n > tensors || k == 0 || k > n {
            return wrong(format!(
                "num_experts_per_tok {k} of num_experts {n} with {tensors} tensors"
            ));
        }
    }
    Ok(())
}

fn activation(spec: &ModelSpec) -> Result<Activation> {
    Ok(match spec.hidden_act.as_str() {
        "identity" => Activation::Identity,
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        other => {
            let known = "identity, silu, gelu, gelu_tanh, quick_gelu, relu and relu2";
            return Err(Error::Unsupported(format!(
                "hidden_act '{other}': kbit knows {known}"
            )));
        }
    })
}

/// ALiBi slopes: `2^(-8 i / n)`, i = 1..=n, for the largest power of two n within `heads`; the rest are the odd ones of
/// the next power.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let n = if heads.is_power_of_two() {
        heads
    } else {
        heads.next_power_of_two() / 2
    };
    let slope = |i: usize, of: usize| libm::exp2(-8.0 * i as f64 / of as f64) as f32;
    (1..=n)
        .map(|i| slope(i, n))
        .chain((0..heads - n).map(|i| slope(2 * i + 1, 2 * n)))
        .collect()
}

struct Compiler<'a> {
    spec: &'a ModelSpec,
    /// Names that exist; those in `ids` are used.
    present: BTreeSet<&'a str>,
    program: Program,
    ids: HashMap<String, WeightId>,
    missing: BTreeSet<String>,
    act: Activation,
}

/// The per-token buffers.
struct Buffers {
    /// Residual stream (hidden).
    h: BufferId,
    /// Normed input of a block (hidden); `x2`: of the MLP of a parallel block.
    x: BufferId,
    x2: BufferId,
    qkv: BufferId,
    /// What attention found (q_heads * head_dim).
    heads: BufferId,
    /// Inner activations of the MLP.
    inner: BufferId,
    /// A block's addend before its out_norm (hidden).
    y: BufferId,
}

impl Compiler<'_> {
    fn model(&mut self) -> Result<()> {
        let spec = self.spec;
        let (q, kv) = (
            spec.num_attention_heads * spec.head_dim,
            spec.num_key_value_heads * spec.head_dim,
        );
        let b = Buffers {
            h: self.buffer("residual", spec.hidden_size),
            x: self.buffer("normed", spec.hidden_size),
            x2: self.buffer("normed for the MLP", spec.hidden_size),
            qkv: self.buffer("qkv", q + 2 * kv),
            heads: self.buffer("heads", q),
            inner: self.buffer("inner", spec.intermediate_size),
            y: self.buffer("addend", spec.hidden_size),
        };
        let table = self.required("embed.weight");
        let positions = self
            .optional("embed.positions.weight")
            .map(|w| (w, spec.position_offset));
        self.push(Op::Embed {
            table,
            scale: spec.embed_scale as f32,
            positions,
            out: b.h,
        });
        if let Some(norm) = self.norm("embed.norm", false)? {
            self.push(Op::Norm {
                x: b.h,
                norm,
                out: b.h,
            });
        }
        for (i, layer) in spec.layers.iter().enumerate() {
            self.push(Op::Hidden { x: b.h });
            self.layer(i, layer, &b)?;
        }
        let x = self.normed("final_norm", b.h, b.x, true)?;
        self.push(Op::Hidden { x });
        let weight = self.optional("head.weight").unwrap_or(table);
        let bias = self.optional("head.bias");
        let softcap = spec.final_logit_softcapping.map(|c| c as f32);
        self.push(Op::Head {
            x,
            linear: Linear { weight, bias },
            scale: spec.logit_scale as f32,
            softcap,
        });
        Ok(())
    }

    fn layer(&mut self, i: usize, layer: &LayerSpec, b: &Buffers) -> Result<()> {
        let spec = self.spec;
        let (attn, mlp) = (format!("layers.{i}.attn"), format!("layers.{i}.mlp"));
        let x = self.normed(&format!("{attn}.in_norm"), b.h, b.x, true)?;
        // A parallel MLP reads the stream as attention found it, so its norm comes first.
        let parallel = if spec.parallel_residual {
            Some(match self.norm(&format!("{mlp}.in_norm"), false)? {
                Some(norm) => {
                    self.push(Op::Norm {
                        x: b.h,
                        norm,
                        out: b.x2,
                    });
                    b.x2
                }
                None if x == b.h => {
                    return Err(Error::Unsupported(format!(
                        "layer {i}: a parallel block without a norm before the MLP"
                    )));
                }
                None => x,
            })
        } else {
            None
        };

        let parts = ["q", "k", "v"]
            .map(|p| self.linear(&format!("{attn}.{p}")))
            .to_vec();
        self.push(Op::Linear {
            x,
            parts,
            epilogue: Epilogue::Store,
            out: b.qkv,
        });
        let q_norm = self.norm(&format!("{attn}.q_norm"), false)?;
        let k_norm = self.norm(&format!("{attn}.k_norm"), false)?;
        let clip = spec.clip_qkv.map(|c| c as f32);
        self.push(Op::RopeAppend {
            qkv: b.qkv,
            layer: i,
            rope: layer.rope,
            q_norm,
            k_norm,
            clip,
        });
        let sinks = self.optional(&format!("{attn}.sinks"));
        self.push(Op::Attention {
            qkv: b.qkv,
            layer: i,
            scale: spec.attention_scale as f32,
            window: layer.sliding_window,
            softcap: spec.attn_logit_softcapping.map(|c| c as f32),
            alibi: spec.alibi.then(|| alibi_slopes(spec.num_attention_heads)),
            sinks,
            out: b.heads,
        });
        self.program.cache.push(CacheLayer {
            kv_heads: spec.num_key_value_heads,
            q_heads: spec.num_attention_heads,
            head_dim: spec.head_dim,
            window: layer.sliding_window,
        });
        let o = self.linear(&format!("{attn}.o"));
        self.add_to_stream(&format!("{attn}.out_norm"), b.heads, o, b)?;

        let x = match parallel {
            Some(x) => x,
            None => self.normed(&format!("{mlp}.in_norm"), b.h, b.x, true)?,
        };
        if layer.experts {
            self.experts(i, &mlp, x, b)
        } else {
            self.mlp(&mlp, x, b)
        }
    }

    fn mlp(&mut self, mlp: &str, x: BufferId, b: &Buffers) -> Result<()> {
        let epilogue = self.inner_epilogue()?;
        let mut parts = Vec::new();
        if gated(epilogue) {
            parts.push(self.linear(&format!("{mlp}.gate")));
        }
        parts.push(self.linear(&format!("{mlp}.up")));
        self.push(Op::Linear {
            x,
            parts,
            epilogue,
            out: b.inner,
        });
        let down = self.linear(&format!("{mlp}.down"));
        self.add_to_stream(&format!("{mlp}.out_norm"), b.inner, down, b)
    }

    fn experts(&mut self, i: usize, mlp: &str, x: BufferId, b: &Buffers) -> Result<()> {
        let Some(moe) = &self.spec.moe else {
            return Ok(());
        };
        let routing = match moe.routing.as_str() {
            "softmax_topk" => Routing::SoftmaxTopK { renormalise: false },
            "softmax_topk_renormalise" => Routing::SoftmaxTopK { renormalise: true },
            "topk_softmax" => Routing::TopKSoftmax,
            other => {
                let known = "softmax_topk, softmax_topk_renormalise and topk_softmax";
                return Err(Error::Unsupported(format!(
                    "routing '{other}': kbit knows {known}"
                )));
            }
        };
        if self.norm(&format!("{mlp}.out_norm"), false)?.is_some() {
            return Err(Error::Unsupported(format!(
                "layer {i}: a norm of what experts add"
            )));
        }
        let epilogue = self.inner_epilogue()?;
        let router = self.linear(&format!("{mlp}.router"));
        let expert = |e| {
            let mut part = |p| self.linear(&format!("{mlp}.experts.{e}.{p}"));
            Expert {
                gate: gated(epilogue).then(|| part("gate")),
                up: part("up"),
                down: part("down"),
            }
        };
        let experts = (0..moe.num_experts).map(expert).collect();
        let scale = self.spec.residual_scale as f32;
        self.push(Op::Experts {
            x,
            router,
            experts,
            top_k: moe.num_experts_per_tok,
            routing,
            epilogue,
            scale,
            into: b.h,
        });
        Ok(())
    }

    /// `h += scale * norm(W x + b)`, fused where there is no norm.
    fn add_to_stream(
        &mut self,
        norm: &str,
        x: BufferId,
        linear: Linear,
        b: &Buffers,
    ) -> Result<()> {
        let scale = self.spec.residual_scale as f32;
        match self.norm(norm, false)? {
            None => self.push(Op::Linear {
                x,
                parts: vec![linear],
                epilogue: Epilogue::AddTo { scale },
                out: b.h,
            }),
            Some(norm) => {
                self.push(Op::Linear {
                    x,
                    parts: vec![linear],
                    epilogue: Epilogue::Store,
                    out: b.y,
                });
                self.push(Op::Norm {
                    x: b.y,
                    norm,
                    out: b.y,
                });
                self.push(Op::Add {
                    x: b.y,
                    scale,
                    into: b.h,
                });
            }
        }
        Ok(())
    }

    fn inner_epilogue(&self) -> Result<Epilogue> {
        Ok(match self.spec.mlp.as_str() {
            "plain" => Epilogue::Act(self.act),
            "gated" => Epilogue::Gated(self.act),
            "gated_clamped" => match (self.spec.mlp_alpha, self.spec.mlp_limit) {
                (Some(alpha), Some(limit)) if limit >= 0.0 => Epilogue::GatedClamped {
                    alpha: alpha as f32,
                    limit: limit as f32,
                },
                _ => {
                    return Err(Error::Format(
                        "spec: a gated_clamped MLP wants mlp_alpha and mlp_limit >= 0".into(),
                    ));
                }
            },
            other => {
                return Err(Error::Unsupported(format!(
                    "mlp '{other}': kbit knows plain, gated and gated_clamped"
                )));
            }
        })
    }

    /// The buffer with the normed `from`: `into`, or `from` itself where there is no norm.
    fn normed(
        &mut self,
        name: &str,
        from: BufferId,
        into: BufferId,
        place: bool,
    ) -> Result<BufferId> {
        Ok(match self.norm(name, place)? {
            None => from,
            Some(norm) => {
                self.push(Op::Norm {
                    x: from,
                    norm,
                    out: into,
                });
                into
            }
        })
    }

    /// The norm of that name. Where the block has a `place` for one, a layer norm is there even without parameters.
    fn norm(&mut self, name: &str, place: bool) -> Result<Option<Norm>> {
        let kind = match self.spec.norm.as_str() {
            "rms" => NormKind::Rms,
            "layer" => NormKind::Layer,
            other => {
                return Err(Error::Unsupported(format!(
                    "norm '{other}': kbit knows rms and layer"
                )));
            }
        };
        let (weight, bias) = (
            self.optional(&format!("{name}.weight")),
            self.optional(&format!("{name}.bias")),
        );
        let there = weight.is_some() || bias.is_some() || (place && kind == NormKind::Layer);
        Ok(there.then_some(Norm {
            kind,
            eps: self.spec.norm_eps as f32,
            weight,
            bias,
        }))
    }

    fn linear(&mut self, name: &str) -> Linear {
        Linear {
            weight: self.required(&format!("{name}.weight")),
            bias: self.optional(&format!("{name}.bias")),
        }
    }

    fn optional(&mut self, name: &str) -> Option<WeightId> {
        self.present.contains(name).then(|| self.required(name))
    }

    fn required(&mut self, name: &str) -> WeightId {
        if !self.present.contains(name) {
            self.missing.insert(name.into());
        }
        let next = WeightId(self.program.weights.len() as u32);
        let id = *self.ids.entry(name.into()).or_insert(next);
        if id == next {
            self.program.weights.push(name.into());
        }
        id
    }

    fn buffer(&mut self, name: &str, width: usize) -> BufferId {
        self.program.buffers.push(Buffer {
            name: name.into(),
            width,
        });
        BufferId(self.program.buffers.len() as u32 - 1)
    }

    fn push(&mut self, op: Op) {
        self.program.ops.push(op);
    }

    fn finish(self) -> Result<Program> {
        let left: Vec<&str> = self
            .present
            .iter()
            .copied()
            .filter(|n| !self.ids.contains_key(*n))
            .collect();
        let missing: Vec<&str> = self.missing.iter().map(String::as_str).collect();
        if left.is_empty() && missing.is_empty() {
            return Ok(self.program);
        }
        Err(Error::Format(format!(
            "checkpoint: missing tensors: {}; left over: {}",
            list(&missing),
            list(&left)
        )))
    }
}

fn gated(epilogue: Epilogue) -> bool {
    matches!(epilogue, Epilogue::Gated(_) | Epilogue::GatedClamped { .. })
}

fn list(names: &[&str]) -> String {
    match names.len() {
        0 => "none".into(),
        n if n > LISTED => format!("{} and {} more", names[..LISTED].join(", "), n - LISTED),
        _ => names.join(", "),
    }
}
