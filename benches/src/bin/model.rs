//! Prefill and decode of a random model end to end on the CPU device, beside the read bandwidth of the same run.
//!
//! ```text
//! cargo run --profile quick -p kbit-benches --bin model -- [bits] [threads] [what...] [shape=0.5B]
//! ```
//! `what`: any of `decode`, `prefill`, `deep` (both at depth 4096), `batch`; all by default. The shape is that of
//! Llama-3.2-1B or Qwen2.5-0.5B, both with tied heads.
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
use kbit_tensor::{Bytes, Codebook, Error, KLayout, KTensor, Result, Scales, Tensor, Weight};

/// Sizes of a model.
struct Shape {
    layers: usize,
    hidden: usize,
    inner: usize,
    vocab: usize,
    /// Query heads, key-value heads, their width.
    heads: (usize, usize, usize),
}

const SMALL: Shape = Shape {
    layers: 24,
    hidden: 896,
    inner: 4864,
    vocab: 151_936,
    heads: (14, 2, 64),
};
const USUAL: Shape = Shape {
    layers: 16,
    hidden: 2048,
    inner: 8192,
    vocab: 128_256,
    heads: (32, 8, 64),
};
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
    let words = arguments.iter().skip(2);
    let (shapes, parts): (Vec<_>, Vec<_>) = words.partition(|a| a.starts_with("shape="));
    let asked = |what: &str| parts.is_empty() || parts.iter().any(|a| *a == what);
    let shape = match shapes.first().map(|a| a.as_str()) {
        None | Some("shape=1B") => USUAL,
        Some("shape=0.5B") => SMALL,
        Some(other) => {
            return Err(Error::Argument(format!("{other}: shapes are 0.5B and 1B")));
        }
    };

    let (program, weights) = model(bits, &shape)?;
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
    let isa = kbit_simd::Isa::chosen().map_err(|e| Error::Argument(e.to_string()))?;
    let bandwidth = limits::measure(isa, runner.threads(), 1 << 30, 3)?.read() * 1e9;
    println!("read bandwidth {:.1} GB/s", bandwidth / 1e9);

    for depth in [0, 4096] {
        if depth > 0 && !asked("deep") {
            continue;
        }
        let sequence = runner.open(CONTEXT)?;
        if depth > 0 {
            shape.step(&mut *runner, &[sequence], depth, Rows::None)?;
        }
        if depth > 0 || asked("prefill") {
            let time = best(3, || {
                let time = shape.step(&mut *runner, &[sequence], 512, Rows::Last)?;
                runner.truncate(sequence, depth);
                Ok(time)
            })?;
            println!(
                "depth {depth}: prefill 512 at {:.1} tokens/s",
                512.0 / time.as_secs_f64()
            );
        }
        if depth > 0 || asked("decode") {
            let kv = shape.layers * shape.heads.1 * shape.heads.2 * 2 * 2 * depth;
            let time = best(5, || {
                let start = Instant::now();
                for _ in 0..20 {
                    shape.step(&mut *runner, &[sequence], 1, Rows::Last)?;
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
                    shape.step(&mut *runner, &sequences, 1, Rows::Last)?;
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

impl Shape {
    /// One step of `n` tokens a sequence.
    fn step(
        &self,
        runner: &mut dyn Runner,
        sequences: &[SequenceId],
        n: usize,
        rows: Rows,
    ) -> Result<Duration> {
        let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % self.vocab) as u32).collect();
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
}

/// The program and random weights.
fn model(bits: usize, shape: &Shape) -> Result<(Program, Vec<Weight>)> {
    let Shape {
        layers,
        hidden,
        inner,
        vocab,
        heads: (q, kv, d),
    } = *shape;
    let mut program = Program {
        vocab_size: vocab,
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
    let widths = [hidden, hidden, (q + 2 * kv) * d, q * d, inner];
    program.buffers = widths
        .map(|width| Buffer {
            name: width.to_string(),
            width,
        })
        .to_vec();
    let [h, x, qkv, heads, between] = [0, 1, 2, 3, 4].map(BufferId);
    let inv_freq = (0..d / 2)
        .map(|j| 500_000f32.powf(-2.0 * j as f32 / d as f32))
        .collect();
    program.ropes.push(Rope {
        inv_freq,
        scale: 1.0,
        long: None,
    });
    let table = add(&mut program, vocab, hidden)?;
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
    for layer in 0..layers {
        let weight = add(&mut program, hidden, 0)?;
        program.ops.push(Op::Norm {
            x: h,
            norm: norm(weight),
            out: x,
        });
        let parts = [q * d, kv * d, kv * d]
            .into_iter()
            .map(|rows| add(&mut program, rows, hidden).map(linear));
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
        let parts = vec![linear(add(&mut program, hidden, q * d)?)];
        program.ops.push(Op::Linear {
            x: heads,
            parts,
            epilogue: Epilogue::AddTo { scale: 1.0 },
            out: h,
        });
        let weight = add(&mut program, hidden, 0)?;
        program.ops.push(Op::Norm {
            x: h,
            norm: norm(weight),
            out: x,
        });
        let parts = vec![
            linear(add(&mut program, inner, hidden)?),
            linear(add(&mut program, inner, hidden)?),
        ];
        program.ops.push(Op::Linear {
            x,
            parts,
            epilogue: Epilogue::Gated(Activation::Silu),
            out: between,
        });
        let parts = vec![linear(add(&mut program, hidden, inner)?)];
        program.ops.push(Op::Linear {
            x: between,
            parts,
            epilogue: Epilogue::AddTo { scale: 1.0 },
            out: h,
        });
    }
    let weight = add(&mut program, hidden, 0)?;
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
