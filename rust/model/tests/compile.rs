//! Specs to programs: what is computed when, what is missing or left over, rotary tables.
#![allow(clippy::excessive_precision, reason = "all digits of NumPy's float32")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{shapes, spec};
use kbit_model::spec::{ExpertsSpec, ModelSpec, RopeSpec};
use kbit_model::{Reference, alibi_slopes, compile, rope};
use kbit_tensor::program::{CacheType, Device, Op, Options, Part, Program, Rows, Want};
use kbit_tensor::{Error, Tensor, Weight};

type Shapes = BTreeMap<String, Vec<usize>>;

fn compiled(spec: &ModelSpec, shapes: &Shapes) -> Result<Program, Error> {
    compile(spec, shapes.keys().map(String::as_str), None)
}

/// The words of a program: one per operation.
fn words(program: &Program) -> String {
    let word = |op: &Op| match op {
        Op::Embed {
            positions: Some(_), ..
        } => "embed+positions",
        Op::Embed { .. } => "embed",
        Op::Norm { .. } => "norm",
        Op::Linear { parts, .. } => ["", "linear", "linear2", "linear3"][parts.len()],
        Op::RopeAppend { .. } => "rope",
        Op::Attention { .. } => "attention",
        Op::Add { .. } => "add",
        Op::Experts { .. } => "experts",
        Op::Hidden { .. } => "hidden",
        Op::Head { .. } => "head",
    };
    program.ops.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// A model of one layer, so that the words stay readable.
fn one_layer() -> ModelSpec {
    let mut spec = spec();
    spec.layers.truncate(1);
    spec
}

const LLAMA: &str =
    "embed hidden norm linear3 rope attention linear norm linear2 linear norm hidden head";

#[test]
fn presence_is_a_switch() {
    let spec = one_layer();
    let plain = shapes(&spec);
    let with = |extra: &[(&str, &[usize])], without: &[&str]| {
        let mut all = plain.clone();
        all.extend(extra.iter().map(|(n, s)| ((*n).to_string(), s.to_vec())));
        without
            .iter()
            .for_each(|n| assert!(all.remove(*n).is_some()));
        words(&compiled(&spec, &all).unwrap())
    };
    assert_eq!(with(&[], &[]), LLAMA);
    // Biases, q and k norms, sinks and an untied head change no operation, only what is in it.
    let heads: &[(&str, &[usize])] = &[
        ("layers.0.attn.q.bias", &[32]),
        ("layers.0.attn.q_norm.weight", &[8]),
        ("layers.0.attn.k_norm.weight", &[8]),
        ("layers.0.attn.sinks", &[4]),
        ("head.weight", &[50, 32]),
        ("head.bias", &[50]),
    ];
    assert_eq!(with(heads, &[]), LLAMA);
    let sandwich: &[(&str, &[usize])] = &[
        ("layers.0.attn.out_norm.weight", &[32]),
        ("layers.0.mlp.out_norm.weight", &[32]),
    ];
    assert_eq!(
        with(sandwich, &[]),
        LLAMA
            .replace("attention linear norm", "attention linear norm add norm")
            .replace("linear2 linear", "linear2 linear norm add")
    );
    assert_eq!(
        with(
            sandwich,
            &[
                "layers.0.attn.in_norm.weight",
                "layers.0.mlp.in_norm.weight"
            ]
        ),
        "embed hidden linear3 rope attention linear norm add linear2 linear norm add norm hidden head"
    );
    let ends: &[(&str, &[usize])] = &[
        ("embed.positions.weight", &[64, 32]),
        ("embed.norm.weight", &[32]),
    ];
    assert_eq!(
        with(ends, &["final_norm.weight"]),
        LLAMA
            .replace("embed hidden", "embed+positions norm hidden")
            .replace("linear norm hidden head", "linear hidden head")
    );
}

#[test]
fn a_parallel_block_reads_the_stream_once() {
    let mut spec = one_layer();
    spec.parallel_residual = true;
    let mut all = shapes(&spec);
    let two =
        "embed hidden norm norm linear3 rope attention linear linear2 linear norm hidden head";
    assert_eq!(words(&compiled(&spec, &all).unwrap()), two);
    all.remove("layers.0.mlp.in_norm.weight");
    assert_eq!(
        words(&compiled(&spec, &all).unwrap()),
        two.replacen("norm norm", "norm", 1)
    );
    // A layer norm needs no parameters, but a shared one stays shared.
    all.remove("layers.0.attn.in_norm.weight");
    assert!(matches!(compiled(&spec, &all), Err(Error::Unsupported(m)) if m.contains("parallel")));
    spec.norm = "layer".into();
    assert_eq!(
        words(&compiled(&spec, &all).unwrap()),
        two.replacen("norm norm", "norm", 1)
    );
}

#[test]
fn errors_name_both_sides() {
    let spec = spec();
    let mut all = shapes(&spec);
    all.remove("layers.1.mlp.up.weight");
    all.remove("embed.weight");
    all.insert("layers.0.attn.qkv.weight".into(), vec![64, 32]);
    all.insert("layers.2.attn.q.weight".into(), vec![32, 32]);
    let error = compiled(&spec, &all).unwrap_err().to_string();
    assert_eq!(
        error,
        "checkpoint: missing tensors: embed.weight, layers.1.mlp.up.weight; \
        left over: layers.0.attn.qkv.weight, layers.2.attn.q.weight"
    );

    let all = shapes(&spec);
    let refused = |change: &dyn Fn(&mut ModelSpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        compiled(&spec, &all).unwrap_err().to_string()
    };
    for (change, word) in [
        (
            &(|s: &mut ModelSpec| s.vocab_size = 0) as &dyn Fn(&mut ModelSpec),
            "vocab_size must be 1..=2^24, is 0",
        ),
        (&|s| s.hidden_size = usize::MAX, "hidden_size"),
        (
            &|s| s.num_key_value_heads = 3,
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        (
            &|s| s.layers = vec![s.layers[0].clone(); 1000],
            "1000 layers for 20 tensors",
        ),
        (
            &|s| s.layers[1].rope = Some(1),
            "layer 1 names rope 1, there are 1",
        ),
        (
            &|s| s.layers[0].experts = true,
            "layer 0 has experts, but 'moe' is missing",
        ),
        (&|s| s.layers[0].sliding_window = Some(0), "sliding_window"),
        (
            &|s| s.ropes[0].rotary_dim = 9,
            "rotary_dim must be even and 2..=head_dim 8, is 9",
        ),
        (
            &|s| s.norm_eps = f64::NAN,
            "norm_eps must be a finite f32, is NaN",
        ),
        (&|s| s.embed_scale = 1e300, "embed_scale"),
        (
            &|s| s.norm = "batch".into(),
            "norm 'batch': kbit knows rms and layer",
        ),
        (
            &|s| s.hidden_act = "swish7".into(),
            "hidden_act 'swish7': kbit knows",
        ),
        (&|s| s.mlp = "wide".into(), "mlp 'wide': kbit knows"),
        (
            &|s| s.mlp = "gated_clamped".into(),
            "mlp_alpha and mlp_limit",
        ),
        (
            &|s| {
                s.moe = Some(ExpertsSpec {
                    num_experts: usize::MAX,
                    num_experts_per_tok: 1,
                    moe_intermediate_size: 1,
                    routing: String::new(),
                });
            },
            "num_experts",
        ),
        (&|s| s.position_offset = usize::MAX, "position_offset"),
    ] {
        let error = refused(change);
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    let context = |c| compile(&spec, all.keys().map(String::as_str), Some(c));
    assert!(
        matches!(context(65), Err(Error::ContextOverflow(m)) if m == "context 65 asked of a model with 64 positions")
    );
    assert!(matches!(context(0), Err(Error::Argument(_))));
    assert_eq!(context(10).unwrap().context, 10);
}

#[test]
fn weights_of_the_wrong_shape_are_refused() {
    let spec = spec();
    let all = shapes(&spec);
    let program = Arc::new(compiled(&spec, &all).unwrap());
    let good = common::weights(&program, &all);
    let prepare = |weights| {
        Reference
            .prepare(program.clone(), weights, Options::default())
            .map(|_| ())
    };
    prepare(good.clone()).unwrap();
    // Every weight, made too long by one in its last dimension, and made a cube.
    for (i, name) in program.weights.iter().enumerate() {
        let mut longer = all[name].clone();
        *longer.last_mut().unwrap() += 1;
        for shape in [longer, vec![1, 2, 3], vec![]] {
            let mut weights = good.clone();
            weights[i] = Weight::Dense(
                Tensor::from_f32(&shape, &vec![0.0; shape.iter().product()]).unwrap(),
            );
            let error = prepare(weights).unwrap_err();
            let (text, shape) = (error.to_string(), format!("{shape:?}"));
            assert!(
                matches!(error, Error::Format(_))
                    && text.starts_with(name.as_str())
                    && text.contains(&shape),
                "{text}"
            );
        }
    }
    let few = prepare(good[1..].to_vec()).unwrap_err().to_string();
    assert_eq!(few, "program: wants 20 weights, has 19");
}

/// Logits of `ids`, fed in the given chunks.
fn logits(
    program: &Arc<Program>,
    weights: &[Weight],
    ids: &[u32],
    chunk: usize,
    cache: CacheType,
) -> Vec<f32> {
    let mut runner = Reference
        .prepare(
            program.clone(),
            weights.to_vec(),
            Options {
                cache,
                ..Options::default()
            },
        )
        .unwrap();
    let sequence = runner.open(ids.len()).unwrap();
    let want = Want {
        logits: true,
        ..Want::default()
    };
    let step = |ids: &[u32]| {
        let part = Part {
            sequence,
            ids,
            rows: Rows::All,
        };
        runner
            .run(&[part], want, &AtomicBool::new(false))
            .unwrap()
            .logits
    };
    ids.chunks(chunk).flat_map(step).collect()
}

#[test]
fn chunks_do_not_matter_but_every_switch_does() {
    let ids: Vec<u32> = (0..60).map(|i| i * i % 50).collect();
    let run = |spec: &ModelSpec, all: &Shapes, chunk, cache| {
        let program = Arc::new(compiled(spec, all).unwrap());
        logits(
            &program,
            &common::weights(&program, all),
            &ids,
            chunk,
            cache,
        )
    };
    let base = (spec(), shapes(&spec()));
    let plain = run(&base.0, &base.1, 60, CacheType::F32);
    assert!(plain.iter().all(|v| v.is_finite()));
    for cache in [
        CacheType::F32,
        CacheType::F16,
        CacheType::BF16,
        CacheType::I8,
    ] {
        let whole = run(&base.0, &base.1, 60, cache);
        assert_eq!(whole, run(&base.0, &base.1, 7, cache));
        assert_eq!(whole, run(&base.0, &base.1, 1, cache));
        // By how much is for the tests of attention, which know every kind's rounding.
        assert_eq!(whole == plain, cache == CacheType::F32, "{cache:?}");
    }
    let mut seen = vec![plain];
    let mut differs = |what: &str, change: &dyn Fn(&mut ModelSpec, &mut Shapes)| {
        let (mut spec, mut all) = base.clone();
        change(&mut spec, &mut all);
        let got = run(&spec, &all, 60, CacheType::F32);
        assert_eq!(got, run(&spec, &all, 13, CacheType::F32), "{what}");
        assert!(
            got.iter().all(|v| v.is_finite()) && !seen.contains(&got),
            "{what} changes nothing"
        );
        seen.push(got);
    };
    for act in [
        "gelu",
        "gelu_tanh",
        "quick_gelu",
        "relu",
        "relu2",
        "identity",
    ] {
        differs(act, &|s, _| s.hidden_act = act.into());
    }
    differs("layer norm", &|s, _| s.norm = "layer".into());
    differs("parallel", &|s, _| s.parallel_residual = true);
    differs("no rope", &|s, _| s.layers[1].rope = None);
    differs("window", &|s, _| s.layers[0].sliding_window = Some(5));
    differs("alibi", &|s, _| s.alibi = true);
    differs("attention softcap", &|s, _| {
        s.attn_logit_softcapping = Some(1.5);
    });
    differs("final softcap", &|s, _| {
        s.final_logit_softcapping = Some(2.0);
    });
    differs("attention scale", &|s, _| s.attention_scale = 0.1);
    differs("embed scale", &|s, _| s.embed_scale = 3.0);
    differs("residual scale", &|s, _| s.residual_scale = 0.5);
    differs("logit scale", &|s, _| s.logit_scale = 0.5);
    differs("clip", &|s, _| s.clip_qkv = Some(0.25));
    differs("clamped", &|s, _| {
        s.mlp = "gated_clamped".into();
        (s.mlp_alpha, s.mlp_limit) = (Some(1.7), Some(0.2));
    });
    differs("plain MLP", &|s, all| {
        s.mlp = "plain".into();
        all.retain(|n, _| !n.contains("gate"));
    });
    for (name, shape) in [
        ("layers.1.attn.k.bias", vec![16]),
        ("layers.1.attn.q_norm.weight", vec![8]),
        ("layers.1.attn.k_norm.weight", vec![16]),
        ("layers.0.attn.sinks", vec![4]),
        ("layers.0.attn.out_norm.weight", vec![32]),
        ("layers.0.mlp.out_norm.bias", vec![32]),
        ("embed.norm.weight", vec![32]),
        ("head.weight", vec![50, 32]),
        ("head.bias", vec![50]),
    ] {
        differs(name, &|_, all| drop(all.insert(name.into(), shape.clone())));
    }
    differs("positions", &|_, all| {
        drop(all.insert("embed.positions.weight".into(), vec![66, 32]));
    });
    differs("positions with an offset", &|s, all| {
        all.insert("embed.positions.weight".into(), vec![66, 32]);
        s.position_offset = 2;
    });
    for routing in ["softmax_topk", "softmax_topk_renormalise", "topk_softmax"] {
        // Renormalising a softmax's best is the softmax of the best, up to rounding.
        differs(routing, &|s, all| {
            s.layers[1].experts = true;
            s.moe = Some(ExpertsSpec {
                num_experts: 3,
                num_experts_per_tok: 2,
                moe_intermediate_size: 24,
                routing: routing.into(),
            });
            all.retain(|n, _| !n.starts_with("layers.1.mlp.") || n.contains("norm"));
            all.insert("layers.1.mlp.router.weight".into(), vec![3, 32]);
            for e in 0..3 {
                for (p, shape) in [("gate", [24, 32]), ("up", [24, 32]), ("down", [32, 24])] {
                    all.insert(
                        format!("layers.1.mlp.experts.{e}.{p}.weight"),
                        shape.to_vec(),
                    );
                }
            }
        });
    }
}

#[test]
fn alibi_slopes_of_any_number_of_heads() {
    assert_eq!(
        alibi_slopes(8),
        [
            0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625
        ]
    );
    assert_eq!(
        alibi_slopes(6),
        [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    );
    let twelve = alibi_slopes(12);
    assert_eq!(twelve[..8], alibi_slopes(8));
    assert_eq!(
        twelve[8..],
        [0.707_106_77, 0.353_553_38, 0.176_776_69, 0.088_388_346]
    );
    assert_eq!(alibi_slopes(1), [0.00390625]);
}

/// The tables of `transformers.modeling_rope_utils` 5.17 for 16 rotated dimensions, worked out in float32 with NumPy.
#[test]
fn rotary_tables() {
    let table = |json: &str, max_positions, context| {
        let spec: RopeSpec = serde_json::from_str(json).unwrap();
        rope(&spec, max_positions, context).unwrap()
    };
    let near = |got: &[f32], wanted: [f32; 8]| {
        assert_eq!(got.len(), 8);
        for (g, w) in got.iter().zip(wanted) {
            assert!(
                (g - w).abs() <= 2.0 * f32::EPSILON * w,
                "{got:?} is not {wanted:?}"
            );
        }
    };
    let plain = table(
        r#"{"rope_type":"default","rope_theta":10000.0,"rotary_dim":16}"#,
        64,
        64,
    );
    near(
        &plain.inv_freq,
        [
            1.0,
            0.316227764,
            0.100000001,
            0.0316227786,
            0.00999999978,
            0.00316227786,
            0.00100000005,
            0.000316227786,
        ],
    );
    assert_eq!((plain.scale, plain.long), (1.0, None));
    let linear = table(
        r#"{"rope_type":"linear","rope_theta":10000.0,"rotary_dim":16,"factor":4.0}"#,
        64,
        64,
    );
    near(
        &linear.inv_freq,
        [
            0.25,
            0.079056941,
            0.0250000004,
            0.00790569466,
            0.00249999994,
            0.000790569466,
            0.000250000012,
            7.90569466e-05,
        ],
    );
    let dynamic = r#"{"rope_type":"dynamic","rope_theta":10000.0,"rotary_dim":16,"factor":2.0,"original_max_position_embeddings":64}"#;
    assert_eq!(table(dynamic, 256, 64).long, None);
    let dynamic = table(dynamic, 256, 256);
    assert_eq!(dynamic.inv_freq, plain.inv_freq);
    let long = dynamic.long.unwrap();
    near(
        &long.inv_freq,
        [
            1.0,
            0.239481375,
            0.057351321,
            0.0137345716,
            0.00328917429,
            0.00078769587,
            0.000188638471,
            4.51753949e-05,
        ],
    );
    assert_eq!((long.original, long.scale), (64, 1.0));
    let llama3 = r#"{"rope_type":"llama3","rope_theta":500000.0,"rotary_dim":16,"factor":8.0,"low_freq_factor":1.0,
        "high_freq_factor":4.0,"original_max_position_embeddings":64}"#;
    near(
        &table(llama3, 2048, 2048).inv_freq,
        [
            1.0,
            0.079403013,
            0.00470075384,
            0.000911583134,
            0.000176776681,
            3.42810235e-05,
            6.64787058e-06,
            1.28917316e-06,
        ],
    );
    let yarn = table(
        r#"{"rope_type":"yarn","rope_theta":10000.0,"rotary_dim":16,"factor":4.0,"original_max_position_embeddings":4096}"#,
        16384,
        16384,
    );
    near(
        &yarn.inv_freq,
        [
            1.0,
            0.316227764,
            0.100000001,
            0.025693506,
            0.00624999963,
            0.00138349656,
            0.000250000012,
            7.90569466e-05,
        ],
    );
    assert_eq!(yarn.scale, 1.138_629_4);
    let yarn = table(
        r#"{"rope_type":"yarn","rope_theta":150000.0,"rotary_dim":16,"factor":32.0,"beta_fast":32.0,"beta_slow":1.0,
        "truncate":false,"original_max_position_embeddings":4096}"#,
        131072,
        131072,
    );
    near(
        &yarn.inv_freq,
        [
            1.0,
            0.225418001,
            0.05081328,
            0.00679495931,
            0.000456483918,
            1.8188337e-05,
            4.09997847e-06,
            9.24208962e-07,
        ],
    );
    assert_eq!(yarn.scale, 1.346_573_6);
    // Without a factor: the ratio of the contexts; with both mscales: their quotient.
    let yarn = r#"{"rope_type":"yarn","rope_theta":10000.0,"rotary_dim":16,"mscale":0.707,"mscale_all_dim":1.0,
        "original_max_position_embeddings":4096}"#;
    assert_eq!(table(yarn, 163840, 4096).scale, 0.921_042_36);
    let longrope = r#"{"rope_type":"longrope","rope_theta":10000.0,"rotary_dim":16,"original_max_position_embeddings":4096,
        "short_factor":[1.0,1.1,1.25,1.5,2.0,2.5,3.0,4.0],"long_factor":[1.0,1.5,2.0,4.0,8.0,16.0,32.0,64.0]}"#;
    let longrope = table(longrope, 131072, 131072);
    near(
        &longrope.inv_freq,
        [
            1.0,
            0.287479758,
            0.0799999982,
            0.0210818499,
            0.00499999989,
            0.00126491114,
            0.00033333333,
            7.90569466e-05,
        ],
    );
    let long = longrope.long.unwrap();
    near(
        &long.inv_freq,
        [
            1.0,
            0.210818499,
            0.0500000007,
            0.00790569466,
            0.00124999997,
            0.000197642366,
            3.12500015e-05,
            4.94105916e-06,
        ],
    );
    assert_eq!(
        (longrope.scale, long.scale, long.original),
        (1.190_238_1, 1.190_238_1, 4096)
    );

    let refused = |json: &str| {
        rope(&serde_json::from_str::<RopeSpec>(json).unwrap(), 64, 64)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(r#"{"rope_type":"llama3","rope_theta":1e4,"rotary_dim":16,"factor":8.0}"#),
        "rope of type 'llama3': low_freq_factor is missing"
    );
    assert!(
        refused(r#"{"rope_type":"linear","rope_theta":1e4,"rotary_dim":16,"factor":0.0}"#)
            .contains("factor must be finite and positive, is 0")
    );
    assert!(
        refused(r#"{"rope_type":"default","rope_theta":0.0,"rotary_dim":16}"#)
            .contains("rope_theta")
    );
    assert!(
        refused(r#"{"rope_type":"spiral","rope_theta":1e4,"rotary_dim":16}"#).contains("'spiral'")
    );
    let short = r#"{"rope_type":"longrope","rope_theta":1e4,"rotary_dim":16,"short_factor":[1.0],"long_factor":[1.0]}"#;
    assert!(refused(short).contains("wants 8 entries (rotary_dim / 2), has 1"));
}
