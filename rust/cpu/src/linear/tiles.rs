//! Several tokens: a slab of some panels is decoded into memory that stays in cache and multiplied with every tile of
//! tokens. With many tiles the slabs of a group of panels lie in L2, and a tile's activations in L1 serve all of them; with
//! one tile the slab is small enough for L1.

use std::cell::RefCell;
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::Range;

use kbit_simd::{Simd, SimdOp, dispatch};
use kbit_tensor::{CHUNK, KLayout, SUPER};

use super::Out;
use super::codes::{Decode, Decoder, Panels, with_decode};
use super::scales::{BLOCKS, Scale, Settle, settle_wide, start};
use crate::acts::{Acts, Tile};

/// Super-blocks of a slab when there is one tile: 8 KiB of int8 a panel.
const SHORT: usize = 2;
/// Super-blocks of a slab when there are many: 32 KiB of int8 a panel.
const LONG: usize = 8;
/// Bytes of int8 activations of a tile and slab at most, so that they stay in L1 for all panels of a group.
const FIRST_CACHE: usize = 32 << 10;
/// Panels of a group when there are many tiles.
const GROUP: usize = 4;
/// Code vectors of a chunk.
const VECTORS: usize = CHUNK / 4;

/// 64-byte lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "memory for kernels")] [u8; 64]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Panels `panels` for all tokens.
#[inline(always)]
pub(super) fn run<S: Simd>(
    s: S,
    source: &Panels<'_>,
    decoder: &Decoder,
    scale: &Scale,
    acts: &Acts,
    panels: Range<usize>,
    out: Out,
) {
    let layout = source.layout;
    let side_by_side = if scale.wants_sums() || acts.tile(0).padded > S::TILE {
        1
    } else {
        S::PANELS
    };
    let tiles = acts.tiles();
    let (slab, group, ahead) = if tiles == 1 {
        (SHORT, side_by_side, 2)
    } else {
        (LONG.min(FIRST_CACHE / (S::TILE * SUPER)), GROUP, 1)
    };
    let slabs = layout.supers.div_ceil(slab);
    let panel_bytes = slab.min(layout.supers) * SUPER / CHUNK * VECTORS * S::WEIGHT_BYTES;
    SCRATCH.with_borrow_mut(|scratch| {
        let lines = (group * panel_bytes).div_ceil(64);
        if scratch.len() < lines {
            scratch.resize(lines, Line([0; 64]));
        }
        let to = scratch.as_mut_ptr().cast::<u8>();
        s.begin_products();
        for base in panels.clone().step_by(group) {
            let members = base..panels.end.min(base + group);
            for number in 0..slabs {
                let first = number * slab;
                let supers = first..layout.supers.min(first + slab);
                // What is asked for: a later slab of the same panels, or of those that come `later` on.
                let coming = number + ahead;
                let (later, coming) = (coming / slabs * group, coming % slabs * slab);
                let coming = source.stored(coming..coming + slab, decoder.bits);
                // In lines, and how many of them every tile asks for.
                let coming = coming.start / 64..coming.end / 64;
                let share = coming.len().div_ceil(tiles);
                let chunks = supers.start * 4..layout.chunks.min(supers.end * 4);
                for panel in members.clone() {
                    let to = to.wrapping_add((panel - base) * panel_bytes);
                    let chunks = chunks.clone();
                    dispatch(
                        S::ISA,
                        Slab {
                            source,
                            decoder,
                            panel,
                            chunks,
                            to,
                        },
                    );
                }
                for index in 0..tiles {
                    let (first, tile) = (index * S::TILE, acts.tile(index));
                    let asked = coming.end.min(coming.start + index * share);
                    let lines = share.min(coming.end - asked).div_ceil(supers.len());
                    for panel in members.clone().step_by(side_by_side) {
                        multiply(
                            s,
                            Job {
                                source,
                                scale,
                                tile: &tile,
                                first,
                                panel,
                                live: side_by_side.min(members.end - panel),
                                supers: supers.clone(),
                                weights: to.wrapping_add((panel - base) * panel_bytes),
                                panel_bytes,
                                ahead: source.ahead(panel + later).wrapping_add(asked * 64),
                                lines,
                                out,
                            },
                        );
                    }
                }
            }
        }
        s.end_products();
    });
}

/// Decodes chunks of a panel to `to`, which is 64-byte aligned and has room for 16 weight vectors a chunk. An operation of its own, as
/// AMX decodes like AVX-512.
struct Slab<'a> {
    source: &'a Panels<'a>,
    decoder: &'a Decoder,
    panel: usize,
    chunks: Range<usize>,
    to: *mut u8,
}

impl SimdOp for Slab<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self {
            source,
            decoder,
            panel,
            chunks,
            to,
        } = self;
        macro_rules! bits {
            ($bits:tt) => {{
                macro_rules! method {
                    ($D:ty) => {
                        s.run(Unpack::<S, $D> {
                            s,
                            decoder,
                            layout: source.layout,
                            panel: source.at(panel),
                            chunks,
                            to,
                            kind: PhantomData,
                        })
                    };
                }
                with_decode!(S, decoder, $bits, method)
            }};
        }
        match decoder.bits {
            2 => bits!(2),
            3 => bits!(3),
            4 => bits!(4),
            5 => bits!(5),
            6 => bits!(6),
            7 => bits!(7),
            _ => bits!(8),
        }
    }
}

/// Decoding of some chunks of a panel.
struct Unpack<'a, S: Simd, D: Decode<S>> {
    s: S,
    decoder: &'a Decoder,
    layout: &'a KLayout,
    panel: *const u8,
    chunks: Range<usize>,
    to: *mut u8,
    kind: PhantomData<D>,
}

impl<S: Simd, D: Decode<S>> SimdOp for Unpack<'_, S, D> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let (s, layout) = (self.s, self.layout);
        let decode = D::new(s, self.decoder);
        let mut to = self.to;
        for chunk in self.chunks {
            // SAFETY: the chunk is in the panel; the maker of `Unpack` gave room for 16 vectors a chunk.
            unsafe {
                let codes = self.panel.add(layout.codes_at + chunk * D::BITS * 128);
                let mut block = decode.block(s, layout, self.panel, chunk, 0);
                macro_rules! quarter {
                    ($q:literal) => {{
                        if $q > 0 && $q * 16 % D::BLOCK == 0 {
                            block = decode.block(s, layout, self.panel, chunk, $q);
                        }
                        quarter!($q * 4, 0, 2);
                    }};
                    ($g:expr, $($i:literal),*) => { $(
                        let w = [
                            decode.vector::<{ $g + $i }>(s, &block, codes),
                            decode.vector::<{ $g + $i + 1 }>(s, &block, codes),
                        ];
                        s.store_pair(w, to.add(($g + $i) * S::WEIGHT_BYTES));
                    )* };
                }
                quarter!(0);
                quarter!(1);
                quarter!(2);
                quarter!(3);
                to = to.add(VECTORS * S::WEIGHT_BYTES);
            }
        }
    }
}

/// One tile of tokens by decoded panels.
struct Job<'a> {
    source: &'a Panels<'a>,
    scale: &'a Scale,
    tile: &'a Tile,
    /// First token of the tile.
    first: usize,
    /// First panel.
    panel: usize,
    /// Panels: one at an odd end, where it is its own partner.
    live: usize,
    supers: Range<usize>,
    weights: *const u8,
    /// From the weights of one panel to those of the next.
    panel_bytes: usize,
    /// What to ask for meanwhile, of the first panel (those of the others lie behind): so many lines a super-block.
    ahead: *const u8,
    lines: usize,
    out: Out,
}

impl Job<'_> {
    /// Asks for what comes later, at an even pace: with super-block `sup`.
    #[inline(always)]
    fn ask<S: Simd, const P: usize>(&self, s: S, sup: usize) {
        let at = (sup - self.supers.start) * self.lines;
        for p in 0..P {
            let ahead = self.ahead.wrapping_add(p * self.source.layout.panel_bytes);
            for line in at..at + self.lines {
                s.prefetch_far(ahead.wrapping_add(line * 64));
            }
        }
    }
}

/// Finds the kernel for the number of tokens and the scale kind.
#[inline(always)]
fn multiply<S: Simd>(s: S, job: Job<'_>) {
    macro_rules! full {
        ($m:literal) => {
            match (job.scale.unrolled(), job.scale.has_subs()) {
                (16, true) if const { S::RUN <= 16 } => s.run(Full::<S, $m, 16, true>(s, job)),
                (16, false) if const { S::RUN <= 16 } => s.run(Full::<S, $m, 16, false>(s, job)),
                (32, true) if const { S::RUN <= 32 } => s.run(Full::<S, $m, 32, true>(s, job)),
                (32, false) if const { S::RUN <= 32 } => s.run(Full::<S, $m, 32, false>(s, job)),
                (_, true) => s.run(Full::<S, $m, 64, true>(s, job)),
                (_, false) => s.run(Full::<S, $m, 64, false>(s, job)),
            }
        };
    }
    if job.scale.wants_sums() && job.tile.padded == S::TILE {
        match S::TILE {
            4 if const { S::TILE == 4 } => return full!(4),
            12 if const { S::TILE == 12 } => return full!(12),
            32 if const { S::TILE == 32 } => return full!(32),
            _ => {}
        }
    }
    macro_rules! tokens {
        ($m:literal) => {
            match job.scale.unrolled() {
                16 if const { S::RUN <= 16 } => s.run(Product::<S, 1, $m, 16>(s, job)),
                32 if const { S::RUN <= 32 } => s.run(Product::<S, 1, $m, 32>(s, job)),
                64 => s.run(Product::<S, 1, $m, 64>(s, job)),
                _ if const { S::PANELS == 2 && $m <= S::TILE } => {
                    s.run(Product::<S, 2, $m, 256>(s, job))
                }
                _ => s.run(Product::<S, 1, $m, 256>(s, job)),
            }
        };
    }
    macro_rules! kernels {
        ($($m:literal)*) => {
            match job.tile.padded {
                $($m if const { exists::<S>($m) } => tokens!($m),)*
                n => unreachable!("a tile of {n} tokens"),
            }
        };
    }
    kernels!(1 2 4 6 8 12 16 32);
}

/// Whether the instruction set has tiles of `tokens` tokens: those of many, and the only one of a few.
const fn exists<S: Simd>(tokens: usize) -> bool {
    S::LEAST <= tokens && (tokens <= S::TILE || tokens <= S::DIRECT && tokens.is_power_of_two())
}

/// The register tile: `P` panels by `M` tokens.
struct Product<'a, S: Simd, const P: usize, const M: usize, const BLOCK: usize>(S, Job<'a>);

impl<S: Simd, const P: usize, const M: usize, const BLOCK: usize> SimdOp
    for Product<'_, S, P, M, BLOCK>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self(s, job) = self;
        let (scale, tile, layout) = (job.scale, job.tile, job.source.layout);
        let block = if BLOCK < 64 {
            BLOCK
        } else if BLOCK == SUPER {
            SUPER
        } else {
            scale.block
        };
        let mut panels = [job.source.at(job.panel); P];
        let mut weights = [job.weights; P];
        let mut y = [[s.splat(0.0); M]; P];
        let mut all = [[s.splat_i32(0); M]; BLOCKS];
        for p in 0..P {
            let side = p.min(job.live - 1);
            panels[p] = job.source.at(job.panel + side);
            weights[p] = job.weights.wrapping_add(side * job.panel_bytes);
            if p == side && job.supers.start > 0 {
                for n in 0..tile.tokens.min(M) {
                    // SAFETY: what the part before stored.
                    y[p][n] = s.load_part(unsafe { job.out.part(job.first + n, job.panel + p) });
                }
            }
        }
        for sup in job.supers.clone() {
            job.ask::<S, P>(s, sup);
            let end = (layout.chunks * CHUNK).min(sup * SUPER + SUPER);
            let mut input = sup * SUPER;
            while input < end {
                let index = input / block;
                let groups = block.min(end - input) / 4;
                // SAFETY: the decoded part and the tile hold this block.
                unsafe {
                    let mut dots = [start::<S, M>(s, tile, block, index); P];
                    s.product(weights, tile.data, input / 4..input / 4 + groups, &mut dots);
                    for p in 0..P {
                        weights[p] = weights[p].add(groups * S::WEIGHT_BYTES);
                    }
                    if BLOCK == SUPER {
                        for p in 0..P {
                            settle_wide(s, layout, panels[p], tile, sup, &dots[p], &mut y[p]);
                        }
                        // The only one. Compilers that do not know so prepare its scales before the product, without registers for them.
                        break;
                    }
                    all[input % SUPER / block] = dots[0];
                }
                input += block;
            }
            if BLOCK < SUPER {
                let (panel, dots) = (panels[0], all.as_flattened());
                s.run(Settle {
                    s,
                    scale,
                    layout,
                    panel,
                    tile,
                    sup,
                    dots,
                    y: &mut y[0],
                });
            }
        }
        for p in 0..P.min(job.live) {
            for n in 0..tile.tokens.min(M) {
                // SAFETY: `Matrix::run` has this part of the output to itself.
                s.store_part(y[p][n], unsafe {
                    job.out.part(job.first + n, job.panel + p)
                });
            }
        }
    }
}

/// A full tile of tokens under scales of blocks: sums of a block stay in registers, and with integer scales those of a super-block.
struct Full<'a, S: Simd, const M: usize, const BLOCK: usize, const SUBS: bool>(S, Job<'a>);

impl<S: Simd, const M: usize, const BLOCK: usize, const SUBS: bool> SimdOp
    for Full<'_, S, M, BLOCK, SUBS>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self(s, job) = self;
        let (scale, tile, layout) = (job.scale, job.tile, job.source.layout);
        let block = if BLOCK < 64 { BLOCK } else { scale.block };
        let panel = job.source.at(job.panel);
        let mut y = [s.splat(0.0); M];
        if job.supers.start > 0 {
            for n in 0..tile.tokens.min(M) {
                // SAFETY: what the part before stored.
                y[n] = s.load_part(unsafe { job.out.part(job.first + n, job.panel) });
            }
        }
        let mut weights = job.weights;
        for sup in job.supers.clone() {
            job.ask::<S, 1>(s, sup);
            let end = (layout.chunks * CHUNK).min(sup * SUPER + SUPER);
            let mut weighed = [s.splat_i32(0); M];
            for input in (sup * SUPER..end).step_by(block) {
                let groups = input / 4..(input + block).min(end) / 4;
                // SAFETY: the decoded part and the tile hold this block, the panel its scales.
                unsafe {
                    let mut dots = [start::<S, M>(s, tile, block, input / block)];
                    s.product([weights], tile.data, groups.clone(), &mut dots);
                    weights = weights.add(groups.len() * S::WEIGHT_BYTES);
                    let index = input / block;
                    let dots = &dots[0];
                    if SUBS {
                        scale.weigh(s, layout, panel, index, dots, &mut weighed);
                    } else {
                        scale.add(s, layout, panel, tile, index, dots, &mut y);
                        // Left in memory: kept in registers they are moved about between blocks (Q4_0 a twentieth slower).
                        black_box(&mut y);
                    }
                }
            }
            if SUBS {
                // SAFETY: as above.
                unsafe { scale.settle(s, layout, panel, tile, sup, &weighed, &mut y) }
            }
        }
        for n in 0..tile.tokens.min(M) {
            // SAFETY: `Matrix::run` has this part of the output to itself.
            s.store_part(y[n], unsafe { job.out.part(job.first + n, job.panel) });
        }
    }
}
