//! Several tokens: a part of one or two panels is decoded into memory that stays in cache and multiplied with every
//! tile of tokens. With one tile the part is small enough for L1; with many it is the whole panel, in L2.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use kbit_simd::{Simd, SimdOp};
use kbit_tensor::{CHUNK, KLayout, SUPER};

use super::Out;
use super::codes::{Decode, Decoder, Panels, with_decode};
use super::scales::{Scale, Sums};
use crate::acts::{Acts, Tile};

/// Super-blocks decoded at a time when there is one tile: 16 KiB of int8.
const PART: usize = 4;
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
    let part = if acts.tiles() == 1 {
        PART
    } else {
        layout.supers
    };
    let panel_bytes = part.min(layout.supers) * SUPER / CHUNK * VECTORS * S::WEIGHT_BYTES;
    SCRATCH.with_borrow_mut(|scratch| {
        let lines = (S::PANELS * panel_bytes).div_ceil(64);
        if scratch.len() < lines {
            scratch.resize(lines, Line([0; 64]));
        }
        let to = scratch.as_mut_ptr().cast::<u8>();
        let mut panel = panels.start;
        while panel < panels.end {
            let live = S::PANELS.min(panels.end - panel);
            for first in (0..layout.supers).step_by(part) {
                let supers = first..layout.supers.min(first + part);
                for side in 0..live {
                    let chunks = supers.start * 4..layout.chunks.min(supers.end * 4);
                    // SAFETY: the scratch has room for the chunks of `PANELS` panels.
                    unsafe {
                        decode(
                            s,
                            source,
                            decoder,
                            panel + side,
                            chunks,
                            to.add(side * panel_bytes),
                        )
                    };
                }
                for index in 0..acts.tiles() {
                    let (first, tile, supers) = (index * S::TILE, acts.tile(index), supers.clone());
                    let job = Job {
                        source,
                        scale,
                        tile: &tile,
                        first,
                        panel,
                        live,
                        supers,
                        weights: to,
                        panel_bytes,
                        out,
                    };
                    multiply(s, job);
                }
            }
            panel += live;
        }
    });
}

/// Decodes chunks of a panel to `to`.
///
/// # Safety
/// `to` is 64-byte aligned and has room for 16 weight vectors a chunk.
#[inline(always)]
unsafe fn decode<S: Simd>(
    s: S,
    source: &Panels<'_>,
    decoder: &Decoder,
    panel: usize,
    chunks: Range<usize>,
    to: *mut u8,
) {
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
                for line in 0..2 * D::BITS {
                    s.prefetch(codes.wrapping_add(2048 + line * 64));
                }
                let mut block = decode.block(s, layout, self.panel, chunk, 0);
                macro_rules! quarter {
                    ($q:literal) => {{
                        if $q > 0 && $q * 16 % D::BLOCK == 0 {
                            block = decode.block(s, layout, self.panel, chunk, $q);
                        }
                        quarter!($q * 4, 0, 1, 2, 3);
                    }};
                    ($g:expr, $($i:literal),*) => { $(
                        let w = decode.vector::<{ $g + $i }>(s, &block, codes);
                        s.store_weights(w, to.add(($g + $i) * S::WEIGHT_BYTES));
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
    out: Out,
}

/// Finds the kernel for the number of tokens and the scale kind.
#[inline(always)]
fn multiply<S: Simd>(s: S, job: Job<'_>) {
    macro_rules! blocks {
        ($p:literal, $m:literal) => {
            match job.scale.unrolled() {
                16 => s.run(Product::<S, $p, $m, 16>(s, job)),
                32 => s.run(Product::<S, $p, $m, 32>(s, job)),
                64 => s.run(Product::<S, $p, $m, 64>(s, job)),
                _ => s.run(Product::<S, $p, $m, 256>(s, job)),
            }
        };
    }
    macro_rules! tokens {
        ($m:literal) => {
            if const { S::PANELS == 2 } {
                blocks!(2, $m)
            } else {
                blocks!(1, $m)
            }
        };
    }
    match job.tile.padded {
        1 => tokens!(1),
        2 => tokens!(2),
        4 => tokens!(4),
        6 if const { S::TILE >= 6 } => tokens!(6),
        8 if const { S::TILE >= 8 } => tokens!(8),
        12 if const { S::TILE >= 12 } => tokens!(12),
        n => unreachable!("a tile of {n} tokens"),
    }
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
        let mut sums = Sums::<S, P, M>::new(s);
        for p in 0..P {
            let side = p.min(job.live - 1);
            panels[p] = job.source.at(job.panel + side);
            weights[p] = job.weights.wrapping_add(side * job.panel_bytes);
            if p == side && job.supers.start > 0 {
                for n in 0..tile.tokens.min(M) {
                    // SAFETY: what the part before stored.
                    sums.y[p][n] =
                        s.load_part(unsafe { job.out.part(job.first + n, job.panel + p) });
                }
            }
        }
        let group_bytes = 4 * if S::PAIRS { 2 } else { 1 } * M;
        let mut acts: *const u8 = tile
            .data
            .wrapping_add(job.supers.start * SUPER / 4 * group_bytes);
        for sup in job.supers.clone() {
            let end = (layout.chunks * CHUNK).min(sup * SUPER + SUPER);
            let mut input = sup * SUPER;
            while input < end {
                let index = input / block;
                let groups = block.min(end - input) / 4;
                // SAFETY: the decoded part and the tile hold this block.
                unsafe {
                    let mut dots = [Sums::<S, P, M>::start(s, tile, block, index); P];
                    for _ in 0..groups {
                        for p in 0..P {
                            let w = s.load_weights(weights[p]);
                            weights[p] = weights[p].add(S::WEIGHT_BYTES);
                            for n in 0..M {
                                let a = s.acts(acts.add(n * group_bytes / M));
                                dots[p][n] = s.dot(dots[p][n], w, a);
                            }
                        }
                        acts = acts.add(group_bytes);
                    }
                    sums.settle::<BLOCK>(s, scale, layout, &panels, tile, index, &dots);
                }
                input += block;
            }
            // SAFETY: as above.
            unsafe { sums.end_super::<BLOCK>(s, scale, layout, &panels, tile, sup) }
        }
        for p in 0..P.min(job.live) {
            for n in 0..tile.tokens.min(M) {
                // SAFETY: `Matrix::run` has this part of the output to itself.
                s.store_part(sums.y[p][n], unsafe {
                    job.out.part(job.first + n, job.panel + p)
                });
            }
        }
    }
}
