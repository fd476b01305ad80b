//! Matrix kernels beside the limits of the machine, measured in one run:
//!
//! ```text
//! cargo run --release -p kbit-benches --bin kernels -- [decode] [batch] [prefill] [isa=NAME]... [threads=N] [only=TEXT]
//! ```
//!
//! Decode is given in GB/s of stored weights and per cent of the read bandwidth, batches in multiples of the tokens/s of one
//! token, prefill in TOPS (one multiply and one add count two). Every figure is the best of several runs.
#![allow(unsafe_code, reason = "Matrix::run writes where its caller says")]
#![allow(clippy::print_stdout, reason = "a report")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kbit_cpu::acts::Acts;
use kbit_cpu::{limits, linear::Matrix};
use kbit_simd::Isa;
use kbit_tensor::program::Activations;
use kbit_tensor::{
    Bytes, Codebook, KLayout, KTensor, Offset, Result, ScaleType, Scales, SubScale, Weight,
};

/// A k-bit type by name.
struct Kind {
    name: String,
    bits: usize,
    scales: Scales,
    codebook: Codebook,
}

fn kinds() -> Vec<Kind> {
    let ladder = std::array::from_fn(|i| (128.0 * 1.08f64.powi(i as i32 - 15)).round() as u8);
    let linear = |bits: usize| {
        (0..1i32 << bits)
            .map(move |c| (c - (1 << (bits - 1))).max(-127) as i8)
            .collect()
    };
    let spread = |bits: usize| {
        (0..1i32 << bits)
            .map(move |c| (c * 254 / ((1 << bits) - 1) - 127) as i8)
            .collect()
    };
    let kind = |name: &str, bits, scales, codebook| Kind {
        name: name.into(),
        bits,
        scales,
        codebook: Codebook::I8(codebook),
    };
    let mut all = Vec::new();
    for bits in 2..=6 {
        all.push(kind(
            &format!("k={bits} ladder 32"),
            bits,
            Scales::Ladder { block: 32, ladder },
            spread(bits),
        ));
    }
    all.push(kind(
        "k=6 ladder 16",
        6,
        Scales::Ladder { block: 16, ladder },
        spread(6),
    ));
    for bits in 7..=8 {
        all.push(kind(
            &format!("k={bits} row"),
            bits,
            Scales::Row,
            linear(bits),
        ));
    }
    let f16 = |offset| Scales::Block {
        block: 32,
        scale: ScaleType::F16,
        offset,
    };
    let above = |bits: usize| (0..1i32 << bits).map(|c| c as i8).collect();
    all.push(kind("Q4_0", 4, f16(Offset::None), linear(4)));
    all.push(kind(
        "Q4_K",
        4,
        Scales::Super {
            block: 32,
            sub: SubScale::U8,
            min: true,
        },
        above(4),
    ));
    all.push(kind(
        "Q6_K",
        6,
        Scales::Super {
            block: 16,
            sub: SubScale::I8,
            min: false,
        },
        linear(6),
    ));
    all.push(kind("Q8_0", 8, f16(Offset::None), linear(8)));
    let gptq = Scales::Block {
        block: 128,
        scale: ScaleType::F16,
        offset: Offset::Zero,
    };
    all.push(kind("GPTQ 4, 128", 4, gptq, above(4)));
    all
}

/// Random codes under scales that keep results finite.
fn matrix(kind: &Kind, rows: usize, inputs: usize) -> Result<Matrix> {
    let layout = KLayout::new(kind.bits, rows, inputs, &kind.scales)?;
    let mut bytes = Bytes::zeroed(layout.nbytes())?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    // 0x2ca0 is 0.07 in half precision and tiny in bfloat16.
    let float = [0xa0, 0x2c];
    for panel in bytes.chunks_exact_mut(layout.panel_bytes) {
        let sections = match kind.scales {
            Scales::Block {
                offset: Offset::Zero,
                ..
            } => 0..layout.offset_at,
            Scales::Block { .. } => 0..layout.codes_at,
            _ => 0..layout.fine_at,
        };
        for scale in panel[sections].chunks_exact_mut(2) {
            scale.copy_from_slice(&float);
        }
    }
    let (codebook, scales) = (kind.codebook.clone(), kind.scales.clone());
    let k = KTensor::new(
        kind.bits,
        rows,
        inputs,
        codebook,
        scales,
        None,
        bytes.into(),
        0,
    )?;
    Matrix::prepare(&Weight::Quantised(k), Activations::Int8)
}

/// Where threads write.
struct Shared(*mut f32);
// SAFETY: threads write different panels.
unsafe impl Sync for Shared {}

/// Best seconds of `runs` products of `matrix` with `x`, quantising included; panels are handed out dynamically.
fn best(
    matrix: &Matrix,
    isa: Isa,
    x: &[f32],
    threads: usize,
    runs: usize,
    repeat: usize,
) -> Result<f64> {
    let tokens = x.len() / matrix.inputs();
    let mut out = vec![0f32; tokens * matrix.rows()];
    let shared = &Shared(out.as_mut_ptr());
    let mut acts = Acts::new()?;
    acts.reserve(isa, matrix.input(), tokens)?;
    let (acts, step) = (
        &acts,
        if tokens > 16 {
            8
        } else {
            (matrix.panels() / threads / 16).clamp(1, 64)
        },
    );
    let (tiles, panels) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (tiles, panels, barrier) = (&tiles, &panels, &Barrier::new(threads));
    let mut least = f64::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        let seconds = std::thread::scope(|scope| {
            let work = move || {
                barrier.wait();
                let start = Instant::now();
                for _ in 0..repeat {
                    loop {
                        let tile = tiles.fetch_add(1, Ordering::Relaxed);
                        if tile >= acts.tiles() {
                            break;
                        }
                        // SAFETY: each tile is taken once; the barrier comes before reading.
                        unsafe { acts.fill(x.as_ptr(), matrix.inputs(), tile..tile + 1) };
                    }
                    barrier.wait();
                    loop {
                        let from = panels.fetch_add(step, Ordering::Relaxed);
                        if from >= matrix.panels() {
                            break;
                        }
                        let range = from..matrix.panels().min(from + step);
                        // SAFETY: each range is taken once and `out` has a row for every token.
                        unsafe {
                            matrix.run(acts, 0..acts.tokens(), range, { shared }.0, matrix.rows());
                        };
                    }
                    if barrier.wait().is_leader() {
                        tiles.store(0, Ordering::Relaxed);
                        panels.store(0, Ordering::Relaxed);
                    }
                    barrier.wait();
                }
                start.elapsed().as_secs_f64()
            };
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut seconds = work();
            for other in others {
                seconds = f64::max(seconds, other.join().expect("a benchmark thread"));
            }
            seconds
        });
        least = least.min(seconds / repeat as f64);
        if start.elapsed().as_secs_f64() > 3.0 {
            break;
        }
    }
    Ok(least)
}

fn rows(tokens: usize, inputs: usize) -> Vec<f32> {
    (0..tokens * inputs)
        .map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0)
        .collect()
}

struct Wanted {
    isas: Vec<Isa>,
    threads: usize,
    only: String,
    parts: Vec<String>,
}

impl Wanted {
    fn part(&self, name: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|p| p == name)
    }
    fn kinds(&self) -> impl Iterator<Item = Kind> {
        kinds().into_iter().filter(|k| k.name.contains(&self.only))
    }
}

fn decode(wanted: &Wanted) -> Result<()> {
    let inputs = 2048;
    println!("\n## One token, GB/s of stored weights, {inputs} inputs, 256 MiB from memory\n");
    println!(
        "| type | bits | isa | L2, 1 thread | memory, 1 thread | of read | memory, {0} threads | of read |",
        wanted.threads
    );
    println!("|---|---|---|---|---|---|---|---|");
    for kind in wanted.kinds() {
        let small = matrix(&kind, 256, inputs)?;
        let bits = small.nbytes() as f64 * 8.0 / (256 * inputs) as f64;
        let large = matrix(
            &kind,
            ((256 << 20) as f64 * 8.0 / bits / inputs as f64) as usize / 64 * 64,
            inputs,
        )?;
        for &isa in &wanted.isas {
            let x = rows(1, inputs);
            let cache = small.nbytes() as f64 / 1e9 / best(&small, isa, &x, 1, 10, 20)?;
            let one = limits::measure(isa, 1, 256 << 20, 4)?.read();
            let memory1 = large.nbytes() as f64 / 1e9 / best(&large, isa, &x, 1, 6, 1)?;
            let all = limits::measure(isa, wanted.threads, 256 << 20, 6)?.read();
            let memory =
                large.nbytes() as f64 / 1e9 / best(&large, isa, &x, wanted.threads, 15, 1)?;
            let (p1, p) = (100.0 * memory1 / one, 100.0 * memory / all);
            println!(
                "| {} | {bits:.2} | {isa} | {cache:.1} | {memory1:.1} | {p1:.0} % | {memory:.1} | {p:.0} % |",
                kind.name
            );
        }
    }
    Ok(())
}

fn batch(wanted: &Wanted) -> Result<()> {
    let inputs = 2048;
    println!(
        "\n## Small batches, {} threads, 256 MiB from memory: tokens/s over one token\n",
        wanted.threads
    );
    println!("| type | isa | m=1, GB/s | 2 | 4 | 8 | 16 |\n|---|---|---|---|---|---|---|");
    for kind in wanted.kinds() {
        let bits = matrix(&kind, 256, inputs)?.nbytes() as f64 * 8.0 / (256 * inputs) as f64;
        let large = matrix(
            &kind,
            ((256 << 20) as f64 * 8.0 / bits / inputs as f64) as usize / 64 * 64,
            inputs,
        )?;
        for &isa in &wanted.isas {
            let mut seconds = Vec::new();
            for tokens in [1, 2, 4, 8, 16] {
                seconds.push(best(
                    &large,
                    isa,
                    &rows(tokens, inputs),
                    wanted.threads,
                    8,
                    1,
                )?);
            }
            let times = |i: usize| (1 << i) as f64 * seconds[0] / seconds[i];
            let speed = large.nbytes() as f64 / 1e9 / seconds[0];
            println!(
                "| {} | {isa} | {speed:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
                kind.name,
                times(1),
                times(2),
                times(3),
                times(4)
            );
        }
    }
    Ok(())
}

fn prefill(wanted: &Wanted) -> Result<()> {
    println!("\n## Prefill, 512 tokens: TOPS, quantising and decoding included\n");
    println!(
        "| rows x inputs | type | isa | 1 thread | of peak | {0} threads | of peak |",
        wanted.threads
    );
    println!("|---|---|---|---|---|---|---|");
    for (outputs, inputs) in [(8192, 2048), (2048, 8192)] {
        let x = rows(512, inputs);
        for kind in wanted.kinds() {
            let m = matrix(&kind, outputs, inputs)?;
            for &isa in &wanted.isas {
                let operations = 2.0 * (512 * outputs * inputs) as f64 / 1e12;
                let (p1, p) = (
                    limits::measure(isa, 1, 64 << 20, 3)?.int8,
                    limits::measure(isa, wanted.threads, 64 << 20, 3)?.int8,
                );
                let one = operations / best(&m, isa, &x, 1, 4, 1)?;
                let all = operations / best(&m, isa, &x, wanted.threads, 10, 1)?;
                let (f1, f) = (100.0 * one / p1, 100.0 * all / p);
                println!(
                    "| {outputs} x {inputs} | {} | {isa} | {one:.3} | {f1:.0} % | {all:.3} | {f:.0} % |",
                    kind.name
                );
            }
        }
    }
    Ok(())
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut wanted = Wanted {
        isas: Vec::new(),
        threads: cores.min(4),
        only: String::new(),
        parts: Vec::new(),
    };
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("isa", name)) => wanted.isas.push(Isa::parse(name)?),
            Some(("threads", n)) => wanted.threads = n.parse()?,
            Some(("only", text)) => text.clone_into(&mut wanted.only),
            None if ["decode", "batch", "prefill"].contains(&argument.as_str()) => {
                wanted.parts.push(argument);
            }
            _ => return Err(format!("unknown argument {argument:?}").into()),
        }
    }
    if wanted.isas.is_empty() {
        wanted.isas = Isa::available()
            .into_iter()
            .filter(|&isa| isa != Isa::Scalar)
            .collect();
    }
    if wanted.part("decode") {
        decode(&wanted)?;
    }
    if wanted.part("batch") {
        batch(&wanted)?;
    }
    if wanted.part("prefill") {
        prefill(&wanted)?;
    }
    Ok(())
}
