//! The contract between a model and a device: a program, not a call per operation.
//!
//! `model` compiles a spec once into [`Op`]s on named buffers. A device prepares the program with its weights into a
//! [`Runner`]; the runner keeps the KV cache and executes steps. Buffers hold one row per token of the step, f32, and an
//! operation sees all tokens of all sequences of the batch at once. What an operation computes is written in
//! `docs/numerics.md`; how (quantising between operations, fusing, splitting over threads) is the device's own.
//!
//! Every row of a result depends only on its own sequence: never on the batch, the threads or how a prompt was chunked.

use std::sync::atomic::AtomicBool;

use crate::{Result, Weight};

/// Index into [`Program::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub u32);

/// Index into [`Program::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferId(pub u32);

/// A per-token f32 buffer: (tokens, width).
#[derive(Clone, Debug)]
pub struct Buffer {
    /// For traces and error messages.
    pub name: String,
    /// Elements a token.
    pub width: usize,
}

/// One matrix with its optional bias: `y = W x + b`, W (out_features, in_features).
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// The matrix.
    pub weight: WeightId,
    /// (out_features,) f32.
    pub bias: Option<WeightId>,
}

/// Element-wise activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x.
    Identity,
    /// x * sigmoid(x).
    Silu,
    /// Exact GELU by erf.
    Gelu,
    /// GELU by tanh.
    GeluTanh,
    /// x * sigmoid(1.702 x).
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)^2.
    Relu2,
}

/// What happens to the rows a [`Op::Linear`] produces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    /// `out = y` (parts side by side).
    Store,
    /// `out = act(y)`.
    Act(Activation),
    /// Two parts, gate and up: `out = act(gate) * up`.
    Gated(Activation),
    /// Two parts: `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`, `out = g * sigmoid(alpha * g) * (u + 1)`.
    GatedClamped {
        /// Sigmoid slope.
        alpha: f32,
        /// Clamp.
        limit: f32,
    },
    /// `out += scale * y`.
    AddTo {
        /// Factor of y.
        scale: f32,
    },
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps)`.
    Rms,
    /// `(x - mean) / sqrt(var + eps)`.
    Layer,
}

/// A norm with its learned parts, over rows of a buffer or over heads.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Which.
    pub kind: NormKind,
    /// Inside the root.
    pub eps: f32,
    /// Multiplied after normalising.
    pub weight: Option<WeightId>,
    /// Added last.
    pub bias: Option<WeightId>,
}

/// How experts are chosen and weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Softmax over all experts, take the top k.
    SoftmaxTopK {
        /// Divide the chosen weights by their sum.
        renormalise: bool,
    },
    /// Take the top k logits, softmax over them.
    TopKSoftmax,
}

/// One expert of a mixture.
#[derive(Clone, Copy, Debug)]
pub struct Expert {
    /// Absent in plain MLPs.
    pub gate: Option<Linear>,
    /// Up projection.
    pub up: Linear,
    /// Down projection.
    pub down: Linear,
}

/// One fused operation.
#[derive(Clone, Debug)]
pub enum Op {
    /// `out = scale * table[id]` (+ `positions[pos + offset]`).
    Embed {
        /// (vocab, hidden).
        table: WeightId,
        /// Factor of the token embedding.
        scale: f32,
        /// Learned positions (n, hidden) and what is added to the position.
        positions: Option<(WeightId, usize)>,
        /// (hidden).
        out: BufferId,
    },
    /// `out = norm(x)`; `x` and `out` may be the same buffer.
    Norm {
        /// Input.
        x: BufferId,
        /// Parameters.
        norm: Norm,
        /// Output.
        out: BufferId,
    },
    /// Matrices that share their input. `out` is as wide as all parts together (as one part, when gated).
    Linear {
        /// Input.
        x: BufferId,
        /// Matrices, outputs side by side.
        parts: Vec<Linear>,
        /// What happens to the outputs.
        epilogue: Epilogue,
        /// Output.
        out: BufferId,
    },
    /// On `qkv` = q heads, k heads, v heads side by side: norm q and k per head (or per whole width, told by the weight's
    /// length), rotate them, append k and v to the cache of `layer`; q stays in place.
    RopeAppend {
        /// (q_heads + 2 kv_heads) * head_dim wide.
        qkv: BufferId,
        /// Cache layer.
        layer: usize,
        /// Index into [`Program::ropes`]; None leaves q and k as they are.
        rope: Option<usize>,
        /// Norm of q.
        q_norm: Option<Norm>,
        /// Norm of k.
        k_norm: Option<Norm>,
        /// q, k and v are clamped to `-clip..=clip` first.
        clip: Option<f32>,
    },
    /// Softmax attention of the q heads in `qkv` over the cache of `layer`.
    Attention {
        /// As left by [`Op::RopeAppend`].
        qkv: BufferId,
        /// Cache layer.
        layer: usize,
        /// Factor of q . k.
        scale: f32,
        /// Keys at `pos - window + 1 ..= pos` only.
        window: Option<usize>,
        /// `s = cap * tanh(s / cap)`.
        softcap: Option<f32>,
        /// ALiBi: `s += slope[head] * (key position - query position)`.
        alibi: Option<Vec<f32>>,
        /// One learned logit per head that takes probability and gives no value.
        sinks: Option<WeightId>,
        /// q_heads * head_dim wide.
        out: BufferId,
    },
    /// `into += scale * x`.
    Add {
        /// What is added.
        x: BufferId,
        /// Its factor.
        scale: f32,
        /// Where to.
        into: BufferId,
    },
    /// `into += scale * sum over the chosen experts`; only the chosen ones are computed.
    Experts {
        /// Input.
        x: BufferId,
        /// (experts, hidden).
        router: Linear,
        /// All experts.
        experts: Vec<Expert>,
        /// Experts per token.
        top_k: usize,
        /// How they are chosen.
        routing: Routing,
        /// [`Epilogue::Act`], [`Epilogue::Gated`] or [`Epilogue::GatedClamped`] of gate and up.
        epilogue: Epilogue,
        /// Factor of the sum.
        scale: f32,
        /// Residual stream.
        into: BufferId,
    },
    /// Records `x` as the next hidden state when the step asks for them.
    Hidden {
        /// What is recorded.
        x: BufferId,
    },
    /// Logits of the rows that a step asks for: `cap(scale * (W x + b))`.
    Head {
        /// Final hidden state.
        x: BufferId,
        /// (vocab, hidden).
        linear: Linear,
        /// Factor.
        scale: f32,
        /// `cap * tanh(logit / cap)`.
        softcap: Option<f32>,
    },
}

/// Rotary embedding of one kind of layer, ready to use: the angle of pair j at position p is
/// `f32(p) * inv_freq[j]` rounded to f32; its sine and cosine, taken in f64 and rounded, are multiplied by `scale`.
/// Pairs are (j, j + n) with n = `inv_freq.len()` in the first 2 n dimensions of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// One per pair.
    pub inv_freq: Vec<f32>,
    /// Attention factor (YaRN, LongRoPE), 1 otherwise.
    pub scale: f32,
    /// Second set for sequences whose planned length exceeds `original` (LongRoPE, dynamic NTK).
    pub long: Option<LongRope>,
}

/// Frequencies of a sequence that is planned to pass the original context.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Planned length above which these are used.
    pub original: usize,
    /// One per pair.
    pub inv_freq: Vec<f32>,
    /// Attention factor.
    pub scale: f32,
}

/// KV cache of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayer {
    /// Key-value heads.
    pub kv_heads: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Window, if the layer never looks further back.
    pub window: Option<usize>,
}

/// A model, compiled.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Canonical tensor names.
    pub weights: Vec<String>,
    /// Per-token buffers.
    pub buffers: Vec<Buffer>,
    /// In order.
    pub ops: Vec<Op>,
    /// One per attention layer.
    pub cache: Vec<CacheLayer>,
    /// Rotary tables.
    pub ropes: Vec<Rope>,
    /// Rows of the head.
    pub vocab_size: usize,
    /// Positions a sequence may have.
    pub context: usize,
}

/// Numeric choices of a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Activations {
    /// int8 per token and 256 inputs into k-bit weights (the contract of `docs/numerics.md`).
    #[default]
    Int8,
    /// f32 into dequantised weights, for measuring.
    F32,
}

/// Type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CacheType {
    /// Half precision, round to nearest even.
    #[default]
    F16,
    /// bfloat16, round to nearest even.
    BF16,
    /// As computed.
    F32,
    /// int8 with one f32 scale per token and head: absmax / 127.
    I8,
}

/// How to prepare a program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Activation type of quantised matrices.
    pub activations: Activations,
    /// KV cache type.
    pub cache: CacheType,
    /// Threads; 0 = `KBIT_NUM_THREADS`, then the cores this process may use.
    pub threads: usize,
    /// Bytes the KV cache may grow to; 0 = half of what is free at the first step.
    pub cache_bytes: usize,
}

/// Identifies a sequence in a runner's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Which rows of a sequence's step want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// None (a prompt chunk that is not the last).
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// New tokens of one sequence, continuing where its cache ends.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Whose.
    pub sequence: SequenceId,
    /// At least one.
    pub ids: &'a [u32],
    /// Which rows want logits.
    pub rows: Rows,
}

/// What a step gives beside the new cache entries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want {
    /// Hand out full logits (else only the arg-max of each row).
    pub logits: bool,
    /// Hand out every [`Op::Hidden`].
    pub hidden: bool,
    /// Hand out the attention weights of every layer.
    pub attentions: bool,
}

/// Result of a step. Rows are in the order of the parts, then of their tokens.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// (rows, vocab) f32; empty unless asked for.
    pub logits: Vec<f32>,
    /// Lowest id among the largest logits of each row; `u32::MAX` when a logit of the row is not a number.
    pub argmax: Vec<u32>,
    /// Per [`Op::Hidden`]: (tokens, hidden) f32.
    pub hidden: Vec<Vec<f32>>,
    /// Per attention layer and part: (q_heads, new tokens, positions so far) f32.
    pub attentions: Vec<Vec<Vec<f32>>>,
}

/// A prepared program with its KV cache.
pub trait Runner: Send {
    /// A new, empty sequence that may grow to `planned` tokens (decides [`LongRope`]; not a reservation).
    ///
    /// # Errors
    /// [`Error::ContextOverflow`](crate::Error::ContextOverflow) when `planned` exceeds the context.
    fn open(&mut self, planned: usize) -> Result<SequenceId>;
    /// Frees the cache of a sequence; unknown ids are ignored.
    fn close(&mut self, sequence: SequenceId);
    /// Tokens in the cache of a sequence.
    fn len(&self, sequence: SequenceId) -> usize;
    /// Forgets everything from position `len` on.
    fn truncate(&mut self, sequence: SequenceId, len: usize);
    /// A new sequence with the same cached tokens.
    ///
    /// # Errors
    /// As [`Runner::open`]; [`Error::Memory`](crate::Error::Memory) without room.
    fn fork(&mut self, sequence: SequenceId, planned: usize) -> Result<SequenceId>;
    /// One step over all tokens of all parts. On an error (or when `cancel` turns true, looked at between operations)
    /// every sequence of the batch is as long as before.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled), [`Error::Memory`](crate::Error::Memory) when the cache is full,
    /// [`Error::ContextOverflow`](crate::Error::ContextOverflow), [`Error::Argument`](crate::Error::Argument) for token
    /// ids outside the vocabulary.
    fn run(&mut self, batch: &[Part<'_>], want: Want, cancel: &AtomicBool) -> Result<Output>;
    /// Bytes held by the KV cache.
    fn cache_bytes(&self) -> usize;
    /// Threads (1 for devices without).
    fn threads(&self) -> usize;
}

/// Something that runs programs.
pub trait Device: Send + Sync {
    /// For messages: "cpu", "gpu:0 (name)".
    fn name(&self) -> String;
    /// Binds weights (in the order of [`Program::weights`]) to a program.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) when a weight's shape does not fit its use (names the tensor and both
    /// shapes), [`Error::Unsupported`](crate::Error::Unsupported) for kinds the device cannot run.
    fn prepare(
        &self,
        program: std::sync::Arc<Program>,
        weights: Vec<Weight>,
        options: Options,
    ) -> Result<Box<dyn Runner>>;
}
