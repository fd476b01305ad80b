//! Prefill and decode of a random model end to end on the CPU device, beside the read bandwidth of the same run.
//!
//! ```text
//! cargo run --profile quick -p kbit-benches --bin model -- [bits] [threads] [what...]
//! ```
//! `what`: any of `decode`, `prefill`, `deep` (both at depth 4096), `batch`; all by default. The shape is that of
//! Llama-3.2-1B: 16 layers, hidden 2048, 32 query and 8 key-value heads of 64, MLP 8192, vocabulary 128256, tied head.
#![allow(clippy::print_stdout, reason = "a report")]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kbit_cpu::Cpu;
use kbit_cpu::limits;
use kbit_tensor::program::{
    Activation, Buffer, BufferId, CacheLayer, Device, Epilogue, Linear, Norm, NormKind, Op,
    Options, Part, Program, Rope, Rows, Runner, SequenceId, Want, WeightId,
};
use kbit_tensor::{Bytes, Codebook, KLayout, KTensor, Result, Scales, Tensor, Weight};

const LAYERS: usize = 16;
const HIDDEN: usize = 2048;
const INNER: usize = 8192;
const VOCAB: usize = 128_256;
const HEADS: (usize, usize, usize) = (32, 8, 64);
const CONTEXT: usize = 8192;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default| {
        arguments
            .get(i)
            .and_then(|a| a.parse().ok())
            .unwrap_or(default)
    };
    let (bits, threads) = (number(0, 4), number(1, 0));
    let asked = |what: &str| arguments.len() < 3 || arguments[2..].iter().any(|a| a == what);

    let (program, weights) = model(bits)?;
    let bytes: usize = weights.iter().map(Weight::nbytes).sum();
    let options = Options {
        threads,
        ..Options::default()
    };
    let start = Instant::now();
    let mut runner = Cpu::new()?.prepare(Arc::new(program), weights, options)?;
    println!(
        "{bits} bits: {} MB, {} threads, prepared in {:.2?}",
        bytes / 1_000_000,
        runner.threads(),
        start.elapsed()
    );
    let isa = kbit_simd::Isa::chosen().map_err(|e| kbit_tensor::Error::Argument(e.to_string()))?;
    let bandwidth = limits::measure(isa, runner.threads(), 1 << 30, 3)?.read() * 1e9;
    println!("read bandwidth {:.1} GB/s", bandwidth / 1e9);

    for depth in [0, 4096] {
        if depth > 0 && !asked("deep") {
            continue;
        }
        let sequence = runner.open(CONTEXT)?;
        if depth > 0 {
            step(&mut *runner, &[sequence], depth, Rows::None)?;
        }
        if depth > 0 || asked("prefill") {
            let time = best(3, || {
                let time = step(&mut *runner, &[sequence], 512, Rows::Last)?;
                runner.truncate(sequence, depth);
                Ok(time)
            })?;
            println!(
                "depth {depth}: prefill 512 at {:.1} tokens/s",
                512.0 / time.as_secs_f64()
            );
        }
        if depth > 0 || asked("decode") {
            let kv = LAYERS * HEADS.1 * HEADS.2 * 2 * 2 * depth;
            let time = best(5, || {
                let start = Instant::now();
                for _ in 0..20 {
                    step(&mut *runner, &[sequence], 1, Rows::Last)?;
                }
                runner.truncate(sequence, depth);
                Ok(start.elapsed() / 20)
            })?;
            let rate = 1.0 / time.as_secs_f64();
            let part = (bytes + kv) as f64 * rate / bandwidth;
            println!(
                "depth {depth}: decode {rate:.1} tokens/s, {:.0} % of the read bandwidth",
                part * 100.0
            );
        }
        runner.close(sequence);
    }
    if asked("batch") {
        for n in [1, 2, 4, 8, 16] {
            let sequences: Vec<_> = (0..n)
                .map(|_| runner.open(CONTEXT))
                .collect::<Result<_>>()?;
            let time = best(5, || {
                let start = Instant::now();
                for _ in 0..8 {
                    step(&mut *runner, &sequences, 1, Rows::Last)?;
                }
                Ok(start.elapsed() / 8)
            })?;
            println!("batch {n}: {:.1} tokens/s", n as f64 / time.as_secs_f64());
            sequences.into_iter().for_each(|s| runner.close(s));
        }
    }
    Ok(())
}

/// The shortest of `n` runs.
fn best(n: usize, mut run: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    (0..n)
        .map(|_| run())
        .try_fold(Duration::MAX, |best, time| Ok(best.min(time?)))
}

/// One step of `n` tokens a sequence.
fn step(
    runner: &mut dyn Runner,
    sequences: &[SequenceId],
    n: usize,
    rows: Rows,
) -> Result<Duration> {
    let ids: Vec<u32> = (0..n as u32).map(|i| i * 7919 % VOCAB as u32).collect();
    let batch: Vec<Part<'_>> = sequences
        .iter()
        .map(|&sequence| Part {
            sequence,
            ids: &ids,
            rows,
        })
        .collect();
    let start = Instant::now();
    runner.run(&batch, Want::default(), &AtomicBool::new(false))?;
    Ok(start.elapsed())
}

/// The program and random weights.
fn model(bits: usize) -> Result<(Program, Vec<Weight>)> {
    let (q, kv, d) = HEADS;
    let mut program = Program {
        vocab_size: VOCAB,
        context: CONTEXT,
        ..Program::default()
    };
    let mut weights = Vec::new();
    let mut random = 1u64;
    let mut add = |program: &mut Program, rows: usize, inputs: usize| -> Result<WeightId> {
        program.weights.push(format!("{rows} x {inputs}"));
        weights.push(if inputs == 0 {
            Weight::Dense(Tensor::from_f32(&[rows], &vec![1.0; rows])?)
        } else {
            Weight::Quantised(matrix(bits, rows, inputs, &mut random)?)
        });
        Ok(WeightId(program.weights.len() as u32 - 1))
    };
    let widths = [HIDDEN, HIDDEN, (q + 2 * kv) * d, q * d, INNER];
    program.buffers = widths
        .map(|width| Buffer {
            name: width.to_string(),
            width,
        })
        .to_vec();
    let [h, x, qkv, heads, inner] = [0, 1, 2, 3, 4].map(BufferId);
    let inv_freq = (0..d / 2)
        .map(|j| 500_000f32.powf(-2.0 * j as f32 / d as f32))
        .collect();
    program.ropes.push(Rope {
        inv_freq,
        scale: 1.0,
        long: None,
    });
    let table = add(&mut program, VOCAB, HIDDEN)?;
    program.ops.push(Op::Embed {
        table,
        scale: 1.0,
        positions: None,
        out: h,
    });
    let linear = |weight| Linear { weight, bias: None };
    let norm = |weight| Norm {
        kind: NormKind::Rms,
        eps: 1e-5,
        weight: Some(weight),
        bias: None,
    };
    for layer in 0..LAYERS {
        let weight = add(&mut program, HIDDEN, 0)?;
        program.ops.push(Op::Norm {
            x: h,
            norm: norm(weight),
            out: x,
        });
        let parts = [q * d, kv * d, kv * d]
            .into_iter()
            .map(|rows| add(&mut program, rows, HIDDEN).map(linear));
        let parts = parts.collect::<Result<_>>()?;
        program.ops.push(Op::Linear {
            x,
            parts,
            epilogue: Epilogue::Store,
            out: qkv,
        });
        program.ops.push(Op::RopeAppend {
            qkv,
            layer,
            rope: Some(0),
            q_norm: None,
            k_norm: None,
            clip: None,
        });
        program.ops.push(Op::Attention {
            qkv,
            layer,
            scale: 0.125,
            window: None,
            softcap: None,
            alibi: None,
            sinks: None,
            out: heads,
        });
        program.cache.push(CacheLayer {
            kv_heads: kv,
            q_heads: q,
            head_dim: d,
            window: None,
        });
        let parts = vec![linear(add(&mut program, HIDDEN, q * d)?)];
        program.ops.push(Op::Linear {
            x: heads,
            parts,
            epilogue: Epilogue::AddTo { scale: 1.0 },
            out: h,
        });
        let weight = add(&mut program, HIDDEN, 0)?;
        program.ops.push(Op::Norm {
            x: h,
            norm: norm(weight),
            out: x,
        });
        let parts = vec![
            linear(add(&mut program, INNER, HIDDEN)?),
            linear(add(&mut program, INNER, HIDDEN)?),
        ];
        program.ops.push(Op::Linear {
            x,
            parts,
            epilogue: Epilogue::Gated(Activation::Silu),
            out: inner,
        });
        let parts = vec![linear(add(&mut program, HIDDEN, INNER)?)];
        program.ops.push(Op::Linear {
            x: inner,
            parts,
            epilogue: Epilogue::AddTo { scale: 1.0 },
            out: h,
        });
    }
    let weight = add(&mut program, HIDDEN, 0)?;
    program.ops.push(Op::Norm {
        x: h,
        norm: norm(weight),
        out: x,
    });
    program.ops.push(Op::Head {
        x,
        linear: linear(table),
        scale: 1.0,
        softcap: None,
    });
    Ok((program, weights))
}

/// Random codes and sub-scales under the native ladder, block 32.
fn matrix(bits: usize, rows: usize, inputs: usize, random: &mut u64) -> Result<KTensor> {
    let ladder = std::array::from_fn(|i| (128.0 * 0.86f32.powi(15 - i as i32)) as u8);
    let scales = Scales::Ladder { block: 32, ladder };
    let layout = KLayout::new(bits, rows, inputs, &scales)?;
    let mut bytes = Bytes::zeroed(layout.nbytes())?;
    for word in bytes.chunks_exact_mut(8) {
        *random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(*random ^ *random >> 29).to_le_bytes());
    }
    for row in 0..rows.next_multiple_of(16) {
        for sup in 0..layout.supers {
            let at = layout.wide_offset(row, sup, 0);
            bytes[at..at + 2].copy_from_slice(&half::bf16::from_f32(3e-4).to_le_bytes());
        }
    }
    let entries = 1usize << bits;
    let codebook = (0..entries)
        .map(|i| (i as f32 * 254.0 / (entries - 1) as f32 - 127.0) as i8)
        .collect();
    KTensor::new(
        bits,
        rows,
        inputs,
        Codebook::I8(codebook),
        scales,
        None,
        Arc::new(bytes),
        0,
    )
}
