//! What a model is, as data: the Rust face of `python/kbit/spec.py`. Field names are Hugging Face's where they exist.
//!
//! Presence is a switch: biases, q/k norms, norms around the blocks, learned positions, sinks and an untied head exist when
//! their canonical tensor exists. `docs/adding.md` lists the canonical names.

use serde::{Deserialize, Serialize};

/// Rotary embedding by the names of `config.json`; `model/src/rope.rs` turns it into frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeSpec {
    /// `default`, `linear`, `dynamic`, `yarn`, `llama3` or `longrope`.
    pub rope_type: String,
    /// Base of the geometric frequencies.
    pub rope_theta: f64,
    /// Rotated dimensions of a head (even, at most `head_dim`).
    pub rotary_dim: usize,
    /// Scaling factor of every type but `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Context before scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
    /// llama3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// llama3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// YaRN and LongRoPE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// YaRN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    /// YaRN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    /// YaRN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// YaRN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// YaRN: whether the ramp's ends are rounded outwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    /// LongRoPE, one per pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_factor: Option<Vec<f64>>,
    /// LongRoPE, one per pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub long_factor: Option<Vec<f64>>,
}

/// Mixture of experts of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsSpec {
    /// Experts.
    pub num_experts: usize,
    /// Chosen per token.
    pub num_experts_per_tok: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// `softmax_topk`, `softmax_topk_renormalise` or `topk_softmax`.
    pub routing: String,
}

/// What differs between layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// Index into [`ModelSpec::ropes`]; absent: no rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<usize>,
    /// Keys at `pos - sliding_window + 1 ..= pos` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// True: a mixture of experts instead of the plain MLP.
    #[serde(default)]
    pub experts: bool,
}

/// A decoder, described.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions the model accepts.
    pub max_position_embeddings: usize,
    /// One per layer.
    pub layers: Vec<LayerSpec>,
    /// Rotary tables.
    pub ropes: Vec<RopeSpec>,
    /// `rms` or `layer`.
    pub norm: String,
    /// Epsilon of all norms.
    pub norm_eps: f64,
    /// `silu`, `gelu`, `gelu_tanh`, `quick_gelu`, `relu`, `relu2` or `identity`.
    pub hidden_act: String,
    /// `plain` (down(act(up))), `gated` (down(act(gate) * up)) or `gated_clamped`.
    pub mlp: String,
    /// Slope of `gated_clamped`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mlp_alpha: Option<f64>,
    /// Limit of `gated_clamped`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mlp_limit: Option<f64>,
    /// Attention and MLP read the same residual stream (GPT-J, GPT-NeoX, Phi).
    pub parallel_residual: bool,
    /// Factor of token embeddings.
    pub embed_scale: f64,
    /// Added to a position before it indexes the learned positions (OPT: 2).
    pub position_offset: usize,
    /// Factor of q . k.
    pub attention_scale: f64,
    /// `cap * tanh(s / cap)` of attention logits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attn_logit_softcapping: Option<f64>,
    /// q, k, v clamped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_qkv: Option<f64>,
    /// ALiBi biases.
    pub alibi: bool,
    /// Factor of what a block adds to the stream.
    pub residual_scale: f64,
    /// Factor of logits.
    pub logit_scale: f64,
    /// `cap * tanh(logit / cap)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_logit_softcapping: Option<f64>,
    /// Mixture of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<ExpertsSpec>,
}
