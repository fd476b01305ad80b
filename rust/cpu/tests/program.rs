//! Whole programs on the CPU against the reference device, `==`, and against themselves under everything that must not
//! matter: instruction set, threads, batch, chunking of the prompt, forks and truncation.

#[path = "../../simd/tests/emulator/mod.rs"]
mod emulator;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use emulator::instruction_sets;
use kbit_cpu::Cpu;
use kbit_model::spec::ModelSpec;
use kbit_model::{Reference, compile};
use kbit_simd::Isa;
use kbit_tensor::program::{
    Activations, CacheType, Device, Options, Output, Part, Program, Rows, Runner, SequenceId, Want,
};
use kbit_tensor::{Error, Tensor, Weight};
use serde_json::{Value, json};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn vector(&mut self, n: usize, scale: f32, mean: f32) -> Vec<f32> {
        (0..n)
            .map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale + mean)
            .collect()
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A model: its program and weights.
struct Model {
    name: &'static str,
    program: Arc<Program>,
    weights: Vec<Weight>,
}

const VOCAB: usize = 83;
const HIDDEN: usize = 96;

fn base() -> Value {
    json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 700,
        "layers": [{"rope": 0}, {"rope": 0, "sliding_window": 9}],
        "ropes": [{"rope_type": "default", "rope_theta": 10000.0, "rotary_dim": 24}],
        "norm": "rms", "norm_eps": 1e-5, "hidden_act": "silu", "mlp": "gated", "parallel_residual": false,
        "embed_scale": 1.0, "position_offset": 0, "attention_scale": 0.2, "alibi": false, "residual_scale": 1.0,
        "logit_scale": 1.0,
    })
}

#[allow(clippy::needless_pass_by_value, reason = "callers write it in place")]
fn with(changes: Value) -> Value {
    let mut spec = base();
    for (key, value) in changes.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    spec
}

/// Random weights for the names that a spec needs and `extra` ones; `bits` of every k-bit matrix, None for dense.
fn model(
    name: &'static str,
    spec: Value,
    extra: &[&str],
    bits: impl Fn(&str) -> Option<usize>,
) -> Model {
    let mut r = Random(name.len() as u64 * 77 + name.as_bytes()[0] as u64);
    let spec: ModelSpec = serde_json::from_value(spec).expect("a spec");
    let mut names: Vec<String> = vec!["embed.weight".into(), "final_norm.weight".into()];
    names.extend(
        extra
            .iter()
            .filter(|n| !n.starts_with("layer."))
            .map(ToString::to_string),
    );
    for (i, layer) in spec.layers.iter().enumerate() {
        let mut per_layer: Vec<String> = ["attn.in_norm", "attn.q", "attn.k", "attn.v", "attn.o"]
            .map(|n| format!("{n}.weight"))
            .to_vec();
        if !spec.parallel_residual {
            per_layer.push("mlp.in_norm.weight".into());
        }
        let parts: &[&str] = if spec.mlp == "plain" {
            &["up", "down"]
        } else {
            &["gate", "up", "down"]
        };
        if layer.experts {
            per_layer.push("mlp.router.weight".into());
            for e in 0..spec.moe.as_ref().expect("moe").num_experts {
                per_layer.extend(parts.iter().map(|p| format!("mlp.experts.{e}.{p}.weight")));
            }
        } else {
            per_layer.extend(parts.iter().map(|p| format!("mlp.{p}.weight")));
        }
        per_layer.extend(
            extra
                .iter()
                .filter_map(|n| n.strip_prefix("layer."))
                .map(ToString::to_string),
        );
        names.extend(per_layer.into_iter().map(|n| format!("layers.{i}.{n}")));
    }
    let program = compile(&spec, names.iter().map(String::as_str), None).expect("compiles");
    let (h, q, kv) = (
        HIDDEN,
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    );
    let inner = spec.intermediate_size;
    let weights = program.weights.iter().map(|full| {
        let parts: Vec<&str> = full.split('.').collect();
        let (last, part) = (parts[parts.len() - 1], parts[parts.len() - 2]);
        let shape: Vec<usize> = match (part, last) {
            ("embed" | "head", "weight") => vec![VOCAB, h],
            ("positions", _) => vec![spec.max_position_embeddings + spec.position_offset, h],
            ("q", "weight") => vec![q, h],
            ("k" | "v", "weight") => vec![kv, h],
            ("o", "weight") => vec![h, q],
            ("gate" | "up", "weight") => vec![inner, h],
            ("down", "weight") => vec![h, inner],
            ("router", "weight") => vec![spec.moe.as_ref().expect("moe").num_experts, h],
            ("q", _) => vec![q],
            ("k" | "v", _) => vec![kv],
            ("gate" | "up", _) => vec![inner],
            ("router", _) => vec![spec.moe.as_ref().expect("moe").num_experts],
            (_, "sinks") => vec![spec.num_attention_heads],
            ("q_norm", _) if name.contains("wide") => vec![q],
            ("k_norm", _) if name.contains("wide") => vec![kv],
            ("q_norm" | "k_norm", _) => vec![spec.head_dim],
            ("head", _) => vec![VOCAB],
            _ => vec![h],
        };
        let n = shape.iter().product();
        let norm = part.contains("norm") && last == "weight";
        let values = r.vector(
            n,
            if shape.len() == 2 { 0.25 } else { 0.4 },
            if norm { 1.0 } else { 0.0 },
        );
        match bits(full).filter(|_| shape.len() == 2 && part != "positions") {
            Some(bits) => {
                let options = kbit_tensor::QuantizeOptions::new(bits);
                Weight::Quantised(
                    kbit_tensor::quantize(&values, shape[0], shape[1], &options)
                        .expect("quantises"),
                )
            }
            None => Weight::Dense(Tensor::from_f32(&shape, &values).expect("room")),
        }
    });
    let weights = weights.collect();
    Model {
        name,
        program: Arc::new(program),
        weights,
    }
}

fn models() -> Vec<Model> {
    let moe = |routing: &str| {
        with(json!({
            "layers": [{"rope": 0, "experts": true}, {"rope": 0}],
            "moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 160, "routing": routing},
        }))
    };
    let norms = ["layer.attn.out_norm.weight", "layer.mlp.out_norm.weight"];
    vec![
        model("llama k4", base(), &[], |_| Some(4)),
        model(
            "llama dense",
            with(json!({"hidden_act": "gelu"})),
            &["head.weight"],
            |_| None,
        ),
        model(
            "biases and q/k norms, mixed widths",
            with(
                json!({"hidden_act": "gelu_tanh", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "embed_scale": 3.0}),
            ),
            &[
                "layer.attn.q.bias",
                "layer.attn.k.bias",
                "layer.attn.v.bias",
                "layer.mlp.gate.bias",
                "layer.mlp.up.bias",
                "layer.attn.q_norm.weight",
                "layer.attn.k_norm.weight",
                norms[0],
                norms[1],
            ],
            |n| {
                if n.contains("attn.q") {
                    Some(3)
                } else if n.contains("attn.v") {
                    None
                } else {
                    Some(5)
                }
            },
        ),
        model(
            "wide q/k norms",
            with(json!({"residual_scale": 0.5, "logit_scale": 0.25, "clip_qkv": 0.7})),
            &[
                "layer.attn.q_norm.weight",
                "layer.attn.k_norm.weight",
                "head.weight",
                "head.bias",
            ],
            |_| Some(6),
        ),
        model(
            "parallel layer norms, positions, plain",
            with(
                json!({"norm": "layer", "parallel_residual": true, "mlp": "plain", "hidden_act": "gelu", "position_offset": 2}),
            ),
            &[
                "embed.positions.weight",
                "final_norm.bias",
                "layer.attn.in_norm.bias",
                "layer.mlp.in_norm.weight",
                "embed.norm.weight",
            ],
            |_| Some(4),
        ),
        model(
            "alibi",
            with(
                json!({"alibi": true, "layers": [{}, {"sliding_window": 5}], "hidden_act": "relu2", "mlp": "plain"}),
            ),
            &[],
            |_| Some(2),
        ),
        model("experts", moe("topk_softmax"), &["layer.attn.sinks"], |n| {
            if n.contains("router") { None } else { Some(4) }
        }),
        model("experts too", moe("softmax_topk_renormalise"), &[], |_| {
            Some(8)
        }),
    ]
}

static NEVER: AtomicBool = AtomicBool::new(false);

const ALL: Want = Want {
    logits: true,
    hidden: false,
    attentions: false,
};

fn on(model: &Model, isa: Isa, options: Options) -> Box<dyn Runner> {
    Cpu::with_isa(isa)
        .expect("available")
        .prepare(model.program.clone(), model.weights.clone(), options)
        .expect("prepares")
}

fn part(sequence: SequenceId, ids: &[u32]) -> Part<'_> {
    Part {
        sequence,
        ids,
        rows: Rows::All,
    }
}

/// Logits and arg-max of `ids` in steps of `chunk`.
fn logits(runner: &mut dyn Runner, ids: &[u32], chunk: usize) -> (Vec<f32>, Vec<u32>) {
    let sequence = runner.open(ids.len()).expect("opens");
    let mut all = (Vec::new(), Vec::new());
    for ids in ids.chunks(chunk) {
        let out = runner
            .run(&[part(sequence, ids)], ALL, &NEVER)
            .expect("runs");
        all.0.extend(out.logits);
        all.1.extend(out.argmax);
    }
    runner.close(sequence);
    all
}

fn ids(n: usize, seed: u64) -> Vec<u32> {
    let mut r = Random(seed);
    (0..n).map(|_| r.below(VOCAB) as u32).collect()
}

#[test]
fn equals_the_reference_on_every_instruction_set() {
    for model in models() {
        for (kind, activations) in [
            (CacheType::F16, Activations::Int8),
            (CacheType::I8, Activations::Int8),
            (CacheType::BF16, Activations::F32),
            (CacheType::F32, Activations::Int8),
        ] {
            let options = Options {
                activations,
                cache: kind,
                threads: 2,
                cache_bytes: 1 << 30,
            };
            let ids = ids(41, 5);
            let mut reference = Reference
                .prepare(model.program.clone(), model.weights.clone(), options)
                .expect("prepares");
            let want = Want {
                logits: true,
                hidden: true,
                attentions: true,
            };
            let run = |runner: &mut dyn Runner| -> Output {
                let sequence = runner.open(ids.len()).expect("opens");
                runner
                    .run(&[part(sequence, &ids)], want, &NEVER)
                    .expect("runs")
            };
            let expected = run(&mut *reference);
            for isa in instruction_sets() {
                let got = run(&mut *on(&model, isa, options));
                assert_eq!(
                    got.hidden, expected.hidden,
                    "{}: hidden, {isa}, {kind:?}, {activations:?}",
                    model.name
                );
                assert_eq!(
                    got.attentions, expected.attentions,
                    "{}: attentions, {isa}, {kind:?}",
                    model.name
                );
                assert_eq!(
                    got.logits, expected.logits,
                    "{}: logits, {isa}, {kind:?}",
                    model.name
                );
                assert_eq!(
                    got.argmax, expected.argmax,
                    "{}: argmax, {isa}, {kind:?}",
                    model.name
                );
            }
        }
    }
}

/// Threads, chunking of the prompt, decoding against prefill.
#[test]
fn threads_and_chunks_do_not_matter() {
    for model in models() {
        let ids = ids(70, 9);
        let options = |threads| Options {
            threads,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let expected = logits(&mut *on(&model, Isa::Scalar, options(1)), &ids, ids.len());
        assert_eq!(expected.0.len(), ids.len() * VOCAB);
        for threads in [1, 2, 3, 4] {
            let all = instruction_sets();
            for isa in [Isa::Scalar, all[all.len() - 1]] {
                let mut runner = on(&model, isa, options(threads));
                for chunk in [1, 2, 7, 64, ids.len()] {
                    let got = logits(&mut *runner, &ids, chunk);
                    assert!(
                        got == expected,
                        "{}: {threads} threads, {isa}, chunks of {chunk}",
                        model.name
                    );
                }
                assert_eq!(runner.cache_bytes(), 0, "closed sequences keep memory");
            }
        }
    }
}

/// Long prompts pass by in several passes and pages.
#[test]
fn long_prompts() {
    for model in &models()[..2] {
        let ids = ids(690, 3);
        let options = Options {
            threads: 3,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let isa = Isa::chosen().expect("there is one");
        let mut reference = Reference
            .prepare(model.program.clone(), model.weights.clone(), options)
            .expect("prepares");
        let expected = logits(&mut *reference, &ids, ids.len());
        let mut runner = on(model, isa, options);
        for chunk in [690, 300, 256, 33] {
            assert!(
                logits(&mut *runner, &ids, chunk) == expected,
                "{}: chunks of {chunk}",
                model.name
            );
        }
    }
}

/// Where inner rows are wide and tokens many, their activations are made without them, also of a last part of 256.
#[test]
fn wide_inner_rows() {
    let plain = json!({"mlp": "plain", "hidden_act": "gelu", "intermediate_size": 1100});
    let extra = ["layer.mlp.gate.bias", "layer.mlp.up.bias"];
    for model in [
        model(
            "wide, gated",
            with(json!({"intermediate_size": 1100})),
            &extra,
            |_| Some(4),
        ),
        model("wide, plain", with(plain), &extra[1..], |_| Some(7)),
    ] {
        let ids = ids(401, 8);
        let options = |threads| Options {
            threads,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let mut reference = Reference
            .prepare(model.program.clone(), model.weights.clone(), options(1))
            .expect("prepares");
        let expected = logits(&mut *reference, &ids, ids.len());
        for isa in instruction_sets() {
            for threads in [1, 3, 4] {
                let mut runner = on(&model, isa, options(threads));
                for chunk in [ids.len(), 193] {
                    assert!(
                        logits(&mut *runner, &ids, chunk) == expected,
                        "{}: {threads} threads, {isa}, chunks of {chunk}",
                        model.name
                    );
                }
            }
        }
    }
}

/// After many steps of one token the rows of prompts are given back; nothing is different then or later.
#[test]
fn rows_given_back_do_not_matter() {
    for model in &models() {
        let ids = ids(500, 5);
        let options = Options {
            threads: 2,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let isa = Isa::chosen().expect("there is one");
        let expected = logits(&mut *on(model, isa, options), &ids, ids.len());
        let mut runner = on(model, isa, options);
        let sequence = runner.open(ids.len()).expect("opens");
        let mut all = (Vec::new(), Vec::new());
        let mut from = 0;
        for step in [100]
            .into_iter()
            .chain([1; 40])
            .chain([3, 300, 2])
            .chain([1; 55])
        {
            let part = part(sequence, &ids[from..from + step]);
            let out = runner.run(&[part], ALL, &NEVER).expect("runs");
            all.0.extend(out.logits);
            all.1.extend(out.argmax);
            from += step;
        }
        assert!(all == expected, "{}", model.name);
    }
}

/// A sequence gives the same whatever else is in the batch.
#[test]
fn batches_do_not_matter() {
    for model in models() {
        let options = Options {
            threads: 3,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let isa = Isa::chosen().expect("there is one");
        let mut runner = on(&model, isa, options);
        let prompts: Vec<Vec<u32>> = [3, 17, 1, 40, 9]
            .iter()
            .enumerate()
            .map(|(i, &n)| ids(n, i as u64))
            .collect();
        let alone: Vec<_> = prompts
            .iter()
            .map(|p| logits(&mut *runner, p, p.len()))
            .collect();
        let sequences: Vec<_> = prompts
            .iter()
            .map(|p| runner.open(p.len()).expect("opens"))
            .collect();
        let mut together = vec![(Vec::new(), Vec::new()); prompts.len()];
        let mut r = Random(1);
        let mut at = vec![0; prompts.len()];
        while at.iter().zip(&prompts).any(|(a, p)| *a < p.len()) {
            let mut taken = Vec::new();
            for i in 0..prompts.len() {
                let n = r.below(4).min(prompts[i].len() - at[i]);
                if n > 0 {
                    taken.push((i, n));
                }
            }
            let batch: Vec<_> = taken
                .iter()
                .map(|&(i, n)| part(sequences[i], &prompts[i][at[i]..at[i] + n]))
                .collect();
            let out = runner.run(&batch, ALL, &NEVER).expect("runs");
            let mut row = 0;
            for (i, n) in taken {
                together[i]
                    .0
                    .extend_from_slice(&out.logits[row * VOCAB..(row + n) * VOCAB]);
                together[i].1.extend_from_slice(&out.argmax[row..row + n]);
                (row, at[i]) = (row + n, at[i] + n);
            }
        }
        assert!(together == alone, "{}", model.name);
    }
}

#[test]
fn forks_and_truncation() {
    for model in &models()[..2] {
        let options = Options {
            threads: 2,
            cache_bytes: 1 << 30,
            ..Options::default()
        };
        let mut runner = on(model, Isa::chosen().expect("there is one"), options);
        let (a, b) = (ids(300, 1), ids(60, 2));
        let mut other = a[..270].to_vec();
        other.extend(&b);
        let (expected_a, expected_b) = (
            logits(&mut *runner, &a, 300),
            logits(&mut *runner, &other, 330),
        );

        let first = runner.open(300).expect("opens");
        runner
            .run(&[part(first, &a[..270])], Want::default(), &NEVER)
            .expect("runs");
        let fork = runner.fork(first, 330).expect("forks");
        let out = runner
            .run(&[part(first, &a[270..]), part(fork, &b)], ALL, &NEVER)
            .expect("runs");
        assert_eq!(out.logits[..30 * VOCAB], expected_a.0[270 * VOCAB..]);
        assert_eq!(out.logits[30 * VOCAB..], expected_b.0[270 * VOCAB..]);

        // Back to the common part, then the other way.
        runner.truncate(first, 270);
        assert_eq!(runner.len(first), 270);
        runner.close(fork);
        let out = runner.run(&[part(first, &b)], ALL, &NEVER).expect("runs");
        assert_eq!(out.logits, expected_b.0[270 * VOCAB..]);
        runner.truncate(first, 3);
        let out = runner
            .run(&[part(first, &a[3..])], ALL, &NEVER)
            .expect("runs");
        assert_eq!(out.logits, expected_a.0[3 * VOCAB..]);
        runner.close(first);
        assert_eq!(runner.cache_bytes(), 0);
    }
}

#[test]
fn errors_change_nothing() {
    let model = &models()[0];
    let isa = Isa::chosen().expect("there is one");
    let page = 2 * 2 * 256 * (24 + 32) * 2;
    let mut runner = on(
        model,
        isa,
        Options {
            threads: 2,
            cache_bytes: page * 2,
            ..Options::default()
        },
    );
    let (a, b) = (
        runner.open(700).expect("opens"),
        runner.open(700).expect("opens"),
    );
    let want = Want {
        logits: true,
        ..Want::default()
    };
    let before = runner
        .run(&[part(a, &[1, 2, 3])], want, &NEVER)
        .expect("runs");
    let cases: Vec<(&str, Vec<Part<'_>>)> = vec![
        ("outside the vocabulary", vec![part(a, &[1, VOCAB as u32])]),
        ("twice", vec![part(a, &[1]), part(a, &[2])]),
        ("no new tokens", vec![part(a, &[])]),
        ("not open", vec![part(a, &[1]), part(SequenceId(99), &[1])]),
    ];
    for (what, batch) in cases {
        match runner.run(&batch, want, &NEVER) {
            Err(Error::Argument(text)) => assert!(text.contains(what), "{text}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    let long = ids(698, 1);
    assert!(matches!(
        runner.run(&[part(a, &long)], want, &NEVER),
        Err(Error::ContextOverflow(_))
    ));
    assert!(matches!(runner.open(701), Err(Error::ContextOverflow(_))));
    // The budget holds two pages of both layers: a third is refused, and what was reserved for b is given back.
    assert!(matches!(
        runner.run(&[part(b, &[4]), part(a, &long[..600])], want, &NEVER),
        Err(Error::Memory(_))
    ));
    assert!(matches!(
        runner.run(&[part(a, &[5])], want, &AtomicBool::new(true)),
        Err(Error::Cancelled)
    ));
    assert_eq!((runner.len(a), runner.len(b)), (3, 0));
    assert!(
        runner.cache_bytes() <= page,
        "{} bytes",
        runner.cache_bytes()
    );
    runner.truncate(a, 0);
    let after = runner
        .run(&[part(a, &[1, 2, 3])], want, &NEVER)
        .expect("runs");
    assert_eq!(before.logits, after.logits);
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let model = &models()[0];
    let mut weights = model.weights.clone();
    let at = model
        .program
        .weights
        .iter()
        .position(|n| n == "layers.1.mlp.down.weight")
        .expect("there");
    weights[at] = Weight::Dense(Tensor::from_f32(&[7, 3], &[0.0; 21]).expect("room"));
    let device = Cpu::new().expect("available");
    match device
        .prepare(model.program.clone(), weights, Options::default())
        .map(|_| ())
    {
        Err(Error::Format(text)) => {
            assert!(
                text.contains("layers.1.mlp.down.weight")
                    && text.contains("[7, 3]")
                    && text.contains("160"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// What is not a number is said.
#[test]
fn nan_is_reported() {
    let mut model = models().remove(1);
    let at = model
        .program
        .weights
        .iter()
        .position(|n| n == "final_norm.weight")
        .expect("there");
    model.weights[at] =
        Weight::Dense(Tensor::from_f32(&[HIDDEN], &[f32::NAN; HIDDEN]).expect("room"));
    for isa in instruction_sets() {
        let mut runner = on(
            &model,
            isa,
            Options {
                threads: 2,
                cache_bytes: 1 << 30,
                ..Options::default()
            },
        );
        let sequence = runner.open(5).expect("opens");
        let out = runner
            .run(&[part(sequence, &[1, 2])], Want::default(), &NEVER)
            .expect("runs");
        assert_eq!(out.argmax, [u32::MAX, u32::MAX]);
    }
}
