//! Tiny random models for the tests of this crate.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use kbit_model::spec::{LayerSpec, ModelSpec, RopeSpec};
use kbit_model::{Engine, Reference, compile, philox};
use kbit_tensor::program::{CacheType, Device, Options, Program, Runner};
use kbit_tensor::{Tensor, Weight};

pub(crate) fn rope_spec() -> RopeSpec {
    serde_json::from_str(r#"{"rope_type": "default", "rope_theta": 10000.0, "rotary_dim": 8}"#)
        .unwrap()
}

/// A Llama of two layers: vocab 50, hidden 32, 4 heads of 8 over 2 key-value heads, 64 positions.
pub(crate) fn spec() -> ModelSpec {
    let layer = LayerSpec {
        rope: Some(0),
        ..LayerSpec::default()
    };
    ModelSpec {
        vocab_size: 50,
        hidden_size: 32,
        intermediate_size: 48,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        layers: vec![layer.clone(), layer],
        ropes: vec![rope_spec()],
        norm: "rms".into(),
        norm_eps: 1e-5,
        hidden_act: "silu".into(),
        mlp: "gated".into(),
        mlp_alpha: None,
        mlp_limit: None,
        parallel_residual: false,
        embed_scale: 1.0,
        position_offset: 0,
        attention_scale: 8f64.powf(-0.5),
        attn_logit_softcapping: None,
        clip_qkv: None,
        alibi: false,
        residual_scale: 1.0,
        logit_scale: 1.0,
        final_logit_softcapping: None,
        moe: None,
    }
}

/// Names and shapes of the tensors of [`spec`].
pub(crate) fn shapes(spec: &ModelSpec) -> BTreeMap<String, Vec<usize>> {
    let (h, q) = (spec.hidden_size, spec.num_attention_heads * spec.head_dim);
    let (kv, inner) = (
        spec.num_key_value_heads * spec.head_dim,
        spec.intermediate_size,
    );
    let mut all = BTreeMap::from([
        ("embed.weight".to_string(), vec![spec.vocab_size, h]),
        ("final_norm.weight".into(), vec![h]),
    ]);
    for i in 0..spec.layers.len() {
        let parts: [(&str, &[usize]); 9] = [
            ("attn.in_norm", &[h]),
            ("attn.q", &[q, h]),
            ("attn.k", &[kv, h]),
            ("attn.v", &[kv, h]),
            ("attn.o", &[h, q]),
            ("mlp.in_norm", &[h]),
            ("mlp.gate", &[inner, h]),
            ("mlp.up", &[inner, h]),
            ("mlp.down", &[h, inner]),
        ];
        for (name, shape) in parts {
            all.insert(format!("layers.{i}.{name}.weight"), shape.to_vec());
        }
    }
    all
}

/// Numbers in -0.5..0.5 that depend on the name alone.
pub(crate) fn values(name: &str, n: usize) -> Vec<f32> {
    let key = name
        .bytes()
        .fold(7u32, |k, b| k.wrapping_mul(31).wrapping_add(u32::from(b)));
    (0..n as u32)
        .map(|i| (philox([i, 0, 0, 0], [key, 1])[0] >> 8) as f32 / (1 << 24) as f32 - 0.5)
        .collect()
}

pub(crate) fn weights(program: &Program, shapes: &BTreeMap<String, Vec<usize>>) -> Vec<Weight> {
    let weight = |name: &String| {
        let shape = &shapes[name];
        Weight::Dense(Tensor::from_f32(shape, &values(name, shape.iter().product())).unwrap())
    };
    program.weights.iter().map(weight).collect()
}

pub(crate) fn program(spec: &ModelSpec, shapes: &BTreeMap<String, Vec<usize>>) -> Arc<Program> {
    Arc::new(compile(spec, shapes.keys().map(String::as_str), None).unwrap())
}

pub(crate) fn runner(
    spec: &ModelSpec,
    shapes: &BTreeMap<String, Vec<usize>>,
    cache_bytes: usize,
) -> (Arc<Program>, Box<dyn Runner>) {
    let program = program(spec, shapes);
    let options = Options {
        cache: CacheType::F32,
        cache_bytes,
        ..Options::default()
    };
    let runner = Reference
        .prepare(program.clone(), weights(&program, shapes), options)
        .unwrap();
    (program, runner)
}

pub(crate) fn engine(max_batch: usize, cache_bytes: usize) -> Engine {
    let spec = spec();
    let (program, runner) = runner(&spec, &shapes(&spec), cache_bytes);
    Engine::new(&program, runner, max_batch, 64).unwrap()
}
