//! Matrix kernels beside the limits of the machine, measured in one run:
//!
//! ```text
//! cargo run --release -p kbit-benches --bin kernels -- [decode] [batch] [prefill] [isa=NAME]... [threads=N] [only=TEXT]
//! ```
//!
//! Decode is given in GB/s of stored weights and per cent of the read bandwidth, batches in multiples of the tokens/s of one
//! token, prefill in TOPS (one multiply and one add count two). Figures are the best of several runs, of batches the middle of many turns.
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

/// A product that runs again and again; panels are handed out dynamically.
struct Product {
    x: Vec<f32>,
    acts: Acts,
    out: Vec<f32>,
    threads: usize,
}

impl Product {
    /// Of `tokens` tokens with matrices like `matrix`.
    fn new(matrix: &Matrix, isa: Isa, tokens: usize, threads: usize) -> Result<Self> {
        let mut acts = Acts::new()?;
        acts.reserve(isa, matrix.input(), tokens)?;
        Ok(Self {
            x: rows(tokens, matrix.inputs()),
            acts,
            out: vec![0.0; tokens * matrix.rows()],
            threads,
        })
    }

    /// Seconds of one, the mean of `repeat`, quantising included.
    fn seconds(&mut self, matrix: &Matrix, repeat: usize) -> f64 {
        let (x, acts, threads) = (&self.x, &self.acts, self.threads);
        let shared = &Shared(self.out.as_mut_ptr());
        let step = if acts.tokens() > 16 {
            8
        } else {
            (matrix.panels() / threads / 16).clamp(1, 64)
        };
        let (tiles, panels) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (tiles, panels, barrier) = (&tiles, &panels, &Barrier::new(threads));
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
        seconds / repeat as f64
    }
}

/// Best seconds of `runs` products of `matrix` with `tokens` tokens.
fn best(
    matrix: &Matrix,
    isa: Isa,
    tokens: usize,
    threads: usize,
    runs: usize,
    repeat: usize,
) -> Result<f64> {
    let mut product = Product::new(matrix, isa, tokens, threads)?;
    let mut least = f64::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        least = least.min(product.seconds(matrix, repeat));
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
            let cache = small.nbytes() as f64 / 1e9 / best(&small, isa, 1, 1, 10, 20)?;
            let one = limits::measure(isa, 1, 256 << 20, 4)?.read();
            let memory1 = large.nbytes() as f64 / 1e9 / best(&large, isa, 1, 1, 6, 1)?;
            let all = limits::measure(isa, wanted.threads, 256 << 20, 6)?.read();
            let memory = large.nbytes() as f64 / 1e9 / best(&large, isa, 1, wanted.threads, 15, 1)?;
            let (p1, p) = (100.0 * memory1 / one, 100.0 * memory / all);
            println!(
                "| {} | {bits:.2} | {isa} | {cache:.1} | {memory1:.1} | {p1:.0} % | {memory:.1} | {p:.0} % |",
                kind.name
            );
        }
    }
    Ok(())
}

/// Batches in turns, each time with another of many matrices: a shared machine reads memory at another rate a second later,
/// and what one of them just read lies in a cache.
fn batch(wanted: &Wanted) -> Result<()> {
    const TOKENS: [usize; 5] = [1, 2, 4, 8, 16];
    const TURNS: usize = 12;
    let (outputs, inputs) = (8192, 2048);
    println!(
        "\n## Small batches, {} threads, 512 MiB in matrices of {outputs} x {inputs}: tokens/s over one token, middle of turns\n",
        wanted.threads
    );
    println!("| type | isa | m=1, GB/s | 2 | 4 | 8 | 16 |\n|---|---|---|---|---|---|---|");
    for kind in wanted.kinds() {
        let mut all = vec![matrix(&kind, outputs, inputs)?];
        while all.len() * all[0].nbytes() < 512 << 20 {
            all.push(matrix(&kind, outputs, inputs)?);
        }
        for &isa in &wanted.isas {
            let product = |tokens| Product::new(&all[0], isa, tokens, wanted.threads);
            let mut products = TOKENS
                .into_iter()
                .map(product)
                .collect::<Result<Vec<_>>>()?;
            let mut seconds = [const { Vec::new() }; TOKENS.len()];
            for turn in 0..TURNS * TOKENS.len() {
                for (n, matrix) in all.iter().enumerate() {
                    let which = (turn + n) % TOKENS.len();
                    seconds[which].push(products[which].seconds(matrix, 1));
                }
            }
            let [one, others @ ..] = seconds.map(|mut all| {
                all.sort_by(f64::total_cmp);
                all[all.len() / 2]
            });
            let speed = all[0].nbytes() as f64 / 1e9 / one;
            print!("| {} | {isa} | {speed:.1} |", kind.name);
            for (tokens, other) in TOKENS[1..].iter().zip(others) {
                print!(" {:.1} |", *tokens as f64 * one / other);
            }
            println!();
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
        for kind in wanted.kinds() {
            let m = matrix(&kind, outputs, inputs)?;
            for &isa in &wanted.isas {
                let operations = 2.0 * (512 * outputs * inputs) as f64 / 1e12;
                let (p1, p) = (
                    limits::measure(isa, 1, 64 << 20, 3)?.int8,
                    limits::measure(isa, wanted.threads, 64 << 20, 3)?.int8,
                );
                let one = operations / best(&m, isa, 512, 1, 4, 1)?;
                let all = operations / best(&m, isa, 512, wanted.threads, 10, 1)?;
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
