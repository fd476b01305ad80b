//! What this machine can do at most, measured now: how fast memory is read and how fast integers are multiplied.
//!
//! Speeds are reported as fractions of these, from the same run, so that they travel between machines.

use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use kbit_simd::{Isa, LANES, Simd, SimdOp, dispatch};
use kbit_tensor::{Bytes, Error, Result};

/// Best of several runs on `threads` threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Threads that took part.
    pub threads: usize,
    /// Memory read with plain loads, 10^9 bytes a second.
    pub read_plain: f64,
    /// The same with software prefetch, at the better of two distances.
    pub read_prefetched: f64,
    /// int8 multiply-adds from registers, on AMX of tiles from L1; 10^12 operations a second (one multiply and one add count two).
    pub int8: f64,
}

impl Limits {
    /// The read bandwidth: the better of the two ways.
    pub fn read(&self) -> f64 {
        self.read_plain.max(self.read_prefetched)
    }
}

/// Measures on `isa` with `threads` threads, reading `bytes` of memory (1 GiB or more to get past the caches) in each of
/// `runs` runs.
///
/// # Errors
/// [`Error::Argument`] for nothing to do, [`Error::Memory`] without room for `bytes`.
pub fn measure(isa: Isa, threads: usize, bytes: usize, runs: usize) -> Result<Limits> {
    let share = bytes / threads.max(1) / READ * READ;
    if threads == 0 || runs == 0 || share == 0 {
        return Err(Error::Argument(format!(
            "limits: {runs} runs of {bytes} bytes on {threads} threads: each thread reads {READ} at least"
        )));
    }
    let bytes = share * threads;
    let mut memory = Bytes::zeroed(bytes)?;
    // Written by all threads, so that every page exists.
    std::thread::scope(|scope| {
        for part in memory.chunks_mut(share) {
            scope.spawn(move || part.fill(1));
        }
    });
    let memory = &memory;
    let read = |ahead| {
        let next = AtomicUsize::new(0);
        let seconds = best(threads, runs, &|| next.store(0, Ordering::Relaxed), &|| {
            // Blocks go to whoever is free, as the kernels' work does: with fixed shares the slowest core would set the limit.
            loop {
                let at = next.fetch_add(BLOCK, Ordering::Relaxed);
                if at >= bytes {
                    break;
                }
                let part = &memory[at..bytes.min(at + BLOCK)];
                black_box(dispatch(isa, Read { part, ahead }));
            }
        });
        bytes as f64 / seconds / 1e9
    };
    let rounds = 1 << 18;
    let operations = AtomicUsize::new(0);
    let seconds = best(threads, runs, &|| (), &|| {
        operations.store(dispatch(isa, Multiply { rounds }), Ordering::Relaxed);
    });
    Ok(Limits {
        threads,
        read_plain: read(0),
        read_prefetched: read(1024).max(read(3072)),
        int8: (operations.into_inner() * threads) as f64 / seconds / 1e12,
    })
}

/// Least seconds of `runs` runs of `part` on all threads at once, from the first thread's start to the last one's end; one
/// thread runs `prepare` before each.
fn best(threads: usize, runs: usize, prepare: &(dyn Fn() + Sync), part: &(dyn Fn() + Sync)) -> f64 {
    let gate = Barrier::new(threads);
    let clock = Instant::now();
    let nanoseconds = || clock.elapsed().as_nanos() as u64;
    let (first, last) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = || {
        let mut least = u64::MAX;
        for _ in 0..runs {
            if gate.wait().is_leader() {
                first.store(u64::MAX, Ordering::Relaxed);
                last.store(0, Ordering::Relaxed);
                prepare();
            }
            gate.wait();
            first.fetch_min(nanoseconds(), Ordering::Relaxed);
            part();
            last.fetch_max(nanoseconds(), Ordering::Relaxed);
            gate.wait();
            least = least.min(last.load(Ordering::Relaxed) - first.load(Ordering::Relaxed));
        }
        least as f64 * 1e-9
    };
    let run = &run;
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run()
    })
}

/// Bytes read in one turn of the loop.
const READ: usize = 512;

/// Bytes a thread takes at a time.
const BLOCK: usize = 1 << 20;

/// Reads everything once; the sum keeps the compiler from skipping it.
struct Read<'a> {
    part: &'a [u8],
    /// Prefetch distance in bytes; 0 for none.
    ahead: usize,
}

impl SimdOp for Read<'_> {
    type Output = i32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> i32 {
        let mut sums = [s.splat_i32(0); READ / 64];
        let turns: &[[u8; READ]] = bytemuck::cast_slice(self.part);
        for turn in turns {
            if self.ahead > 0 {
                for line in 0..READ / 64 {
                    // A prefetch past the end is only a hint.
                    s.prefetch(turn.as_ptr().wrapping_add(self.ahead + line * 64));
                }
            }
            let lines: &[[i32; LANES]; READ / 64] = bytemuck::cast_ref(turn);
            for line in 0..READ / 64 {
                sums[line] = s.add_i32(sums[line], s.load_i32(&lines[line]));
            }
        }
        let mut all = s.splat_i32(0);
        for sum in sums {
            all = s.add_i32(all, sum);
        }
        s.reduce_add_i32(all)
    }
}

/// Tokens and inputs of a product of tiles, which takes two panels: all of it stays in L1.
const TOKENS: usize = 32;
const INPUTS: usize = 256;
/// Rounds of dot products that take about as long as one of tiles.
const PRODUCT: usize = 64;

/// 64 weights as registers want them.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Vector(#[allow(dead_code, reason = "memory for products")] [u8; 64]);

/// Integer dot products out of registers, or products of tiles where there are those. Gives the number of operations.
struct Multiply {
    rounds: usize,
}

impl Multiply {
    #[inline(always)]
    fn tiles<S: Simd>(&self, s: S) -> usize {
        let (weights, acts) = ([[Vector([1; 64]); INPUTS / 4]; 2], [[1u8; INPUTS]; TOKENS]);
        let mut sums = MaybeUninit::uninit();
        s.begin_products(INPUTS, TOKENS);
        for _ in 0..self.rounds / PRODUCT {
            let (weights, acts) = black_box((&weights, &acts));
            let weights = weights.each_ref().map(|panel| panel.as_ptr().cast());
            let start = [s.splat_i32(0); TOKENS];
            // SAFETY: weights of two panels and activations are there for all inputs, and products have begun.
            unsafe {
                s.product(
                    weights,
                    acts.as_ptr().cast(),
                    0..INPUTS / 4,
                    start,
                    &mut sums,
                );
            };
            black_box(&sums);
        }
        s.end_products();
        self.rounds / PRODUCT * 2 * LANES * TOKENS * INPUTS * 2
    }

    /// With so many independent sums, which hide the latency of the product as far as registers have room for them.
    #[inline(always)]
    fn registers<S: Simd, const CHAINS: usize>(&self, s: S) -> usize {
        let weights = [1, 3].map(|w| s.weights(s.splat_bytes(w ^ S::BIAS)));
        let four = [1u8; 8];
        #[allow(unsafe_code, reason = "the trait's contract of 8 readable bytes")]
        // SAFETY: `four` has 8 bytes.
        let acts = [unsafe { s.acts(four.as_ptr()) }; 4];
        let mut sums = [s.splat_i32(0); CHAINS];
        for _ in 0..self.rounds {
            // Where multiplying and adding are two instructions, a product known to be the same again would be made once.
            let (weights, acts) = black_box((&weights, &acts));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = s.dot(*sum, weights[i % 2], acts[i / 2 % 4]);
            }
        }
        let mut all = s.splat_i32(0);
        for sum in sums {
            all = s.add_i32(all, sum);
        }
        black_box(s.reduce_add_i32(all));
        // Where four tokens lie as three rows, so many sums are those of more tokens.
        self.rounds * CHAINS * LANES * 4 * 2 * S::TILE / S::rows(S::TILE)
    }
}

impl SimdOp for Multiply {
    type Output = usize;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> usize {
        if const { S::TILE == TOKENS } {
            return self.tiles(s);
        }
        if const { S::DIRECT >= 16 } {
            self.registers::<S, 16>(s)
        } else {
            self.registers::<S, 6>(s)
        }
    }
}

#[cfg(test)]
#[path = "../../simd/tests/emulator/mod.rs"]
mod emulator;

#[cfg(test)]
mod tests {
    use super::emulator::instruction_sets;
    use super::*;

    #[test]
    fn every_instruction_set_is_measured() {
        for isa in instruction_sets() {
            let got = measure(isa, 2, 8 << 20, 1).expect("room for 8 MiB");
            assert!(got.read() > 0.01 && got.int8 > 1e-4, "{isa}: {got:?}");
        }
    }

    #[test]
    fn nothing_to_do_is_refused() {
        assert!(matches!(
            measure(Isa::Scalar, 0, 1 << 20, 1),
            Err(Error::Argument(_))
        ));
        assert!(matches!(
            measure(Isa::Scalar, 4, 100, 1),
            Err(Error::Argument(_))
        ));
    }

    #[test]
    fn the_read_reads_everything() {
        let bytes = Bytes::copy_of(&[1; 1024]).expect("room");
        for isa in instruction_sets() {
            assert_eq!(
                dispatch(
                    isa,
                    Read {
                        part: &bytes,
                        ahead: 0
                    }
                ),
                0x0101_0101_i32.wrapping_mul(256),
                "{isa}"
            );
        }
    }
}
