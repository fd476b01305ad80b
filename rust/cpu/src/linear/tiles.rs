//! Several tokens: some super-blocks of one to four panels are decoded into the first cache and multiplied with every tile of tokens before the
//! next are. So weights are read from there whatever the number of tokens; the results of a tile rest in the second cache meanwhile, and its activations of
//! those super-blocks come from there or beyond, both a small part of what the products take.

use std::cell::RefCell;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;

use kbit_simd::{Simd, SimdOp, dispatch};
use kbit_tensor::{CHUNK, KLayout, SUPER};

use super::Codes;
use super::scales::{BLOCKS, Scale, Settle, settle_wide, start};
use super::stored::Late;
use super::unpack::{Coming, Find, Scaled, Unpacker};
use crate::acts::Tile;

/// Bytes of results of some panels at most; more tokens than have room there are done one after the other.
const RESULTS: usize = 256 << 10;
/// Bytes of weights decoded at a time: a part of the first cache.
const STAGE: usize = 16 << 10;
/// Most panels whose super-blocks a stage holds.
const MOST: usize = 8;
/// Tiles that are many: their activations come from farther away, so they meet as many panels as a stage holds one super-block of. Kernels of two panels
/// have no use for more.
const MANY: usize = 16;
/// Tiles of which activations come from farther away than decoded weights do: where products run beside what settles them, a super-block of several
/// pairs of panels lies in the second cache and meets the tile before it goes.
const SEVERAL: usize = 4;
/// Super-blocks between asking for codes and decoding them, at least those of a stage.
const AHEAD: usize = 4;

/// 64-byte lines: vectors.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "memory for kernels")] [u8; 64]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Some panels for some tiles of tokens.
#[inline(always)]
pub(super) fn run<S: Simd>(s: S, job: Codes<'_>) {
    let scale = job.scale;
    macro_rules! tiles {
        ($m:literal) => {
            match (scale.unrolled(), scale.has_subs()) {
                (_, true) if const { S::STORED } => s.run(Tiles::<S, 1, $m, 64, true>(s, job)),
                (64 | 32, _) if const { S::STORED } => s.run(Tiles::<S, 2, $m, 64, false>(s, job)),
                (16, true) if const { S::RUN <= 16 } => s.run(Tiles::<S, 1, $m, 16, true>(s, job)),
                (16, false) if const { S::RUN <= 16 } => {
                    s.run(Tiles::<S, 1, $m, 16, false>(s, job))
                }
                (32, true) if const { S::RUN <= 32 } => s.run(Tiles::<S, 1, $m, 32, true>(s, job)),
                (32, false) if const { S::RUN <= 32 } => {
                    s.run(Tiles::<S, 1, $m, 32, false>(s, job))
                }
                (SUPER, _) if const { S::PANELS == 2 } => {
                    s.run(Tiles::<S, 2, $m, SUPER, false>(s, job))
                }
                (SUPER, _) => s.run(Tiles::<S, 1, $m, SUPER, false>(s, job)),
                (64, true) if const { !S::STORED } => s.run(Tiles::<S, 1, $m, 64, true>(s, job)),
                (64, false) if const { !S::STORED } => s.run(Tiles::<S, 1, $m, 64, false>(s, job)),
                (n, _) => unreachable!("blocks of {n} on {}", S::ISA),
            }
        };
    }
    // A matrix tile that is all there is may be small; one behind others lies where theirs do.
    let first = job.acts.tile(0).padded;
    s.begin_products(scale.step(), first);
    match if S::STORED { first } else { S::TILE } {
        4 if const { S::STORED || S::TILE == 4 } => tiles!(4),
        6 if const { S::STORED || S::TILE == 6 } => tiles!(6),
        8 if const { S::STORED || S::TILE == 8 } => tiles!(8),
        12 if const { S::STORED || S::TILE == 12 } => tiles!(12),
        16 if const { S::STORED } => tiles!(16),
        32 if const { S::STORED } => tiles!(32),
        n => unreachable!("tiles of {n} tokens"),
    }
    s.end_products();
}

/// `P` panels at a time by tiles of `M` tokens; scales by blocks of `BLOCK` inputs, with integers below them or not (`SUBS`).
pub(super) struct Tiles<
    'a,
    S: Simd,
    const P: usize,
    const M: usize,
    const BLOCK: usize,
    const SUBS: bool,
>(pub S, pub Codes<'a>);

impl<S: Simd, const P: usize, const M: usize, const BLOCK: usize, const SUBS: bool> SimdOp
    for Tiles<'_, S, P, M, BLOCK, SUBS>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let job = &self.1;
        let tiles = job.tiles.clone();
        let side = if S::STORED && tiles.len() >= SEVERAL {
            (MOST / Self::PLANES).min(job.panels.len().next_multiple_of(P))
        } else if P == 1 && !S::STORED && tiles.len() >= MANY {
            Self::STAGED
        } else {
            P
        };
        let together = if S::STORED {
            Self::STAGED / P
        } else {
            Self::STAGED / side
        };
        let stage = side * together * Self::SUPER_BYTES / 64;
        let band = tiles.len().min(RESULTS / 64 / (side * M));
        let lines = stage + band * side * M;
        // Out of its place meanwhile: what a closure holds is not always compiled for the instruction set.
        let mut scratch = SCRATCH.take();
        if scratch.len() < lines {
            scratch.resize(lines, Line([0; 64]));
        }
        let (stage, results) = scratch.split_at_mut(stage);
        let room = Room {
            side,
            together,
            stage: stage.as_mut_ptr().cast(),
            results: results.as_mut_ptr().cast(),
        };
        let unpack = dispatch(S::ISA, Find(job.decoder));
        for first in tiles.clone().step_by(band) {
            let tiles = first..tiles.end.min(first + band);
            let whole = tiles.len() == 1 && job.acts.tile(tiles.start).padded == M;
            if S::STORED && (SUBS || BLOCK == SUPER) && whole {
                self.flow(tiles.start, unpack, &room);
                continue;
            }
            for first in job.panels.clone().step_by(side) {
                let panels = first..job.panels.end.min(first + side);
                self.panels(panels, tiles.clone(), unpack, &room);
            }
        }
        SCRATCH.set(scratch);
    }
}

/// Memory for some panels at a time.
pub(super) struct Room<S: Simd> {
    /// So many panels.
    side: usize,
    /// So many super-blocks of each.
    together: usize,
    /// Their decoded super-blocks.
    pub stage: *mut u8,
    /// \[tile\]\[panel\]\[M\].
    results: *mut S::F32,
}

impl<S: Simd, const P: usize, const M: usize, const BLOCK: usize, const SUBS: bool>
    Tiles<'_, S, P, M, BLOCK, SUBS>
{
    /// Planes of decoded weights, two where they are scaled as integers.
    pub(super) const PLANES: usize = if S::STORED && SUBS { 2 } else { 1 };
    /// Bytes of a decoded super-block of a panel, both planes.
    const SUPER_BYTES: usize = Self::PLANES * (SUPER / 4) * S::WEIGHT_BYTES;
    /// Super-blocks of a stage, of all its panels.
    const STAGED: usize = STAGE / Self::SUPER_BYTES;

    /// Some panels by some tiles of tokens.
    #[inline(always)]
    fn panels(&self, panels: Range<usize>, tiles: Range<usize>, unpack: Unpacker, room: &Room<S>) {
        let Self(s, job) = self;
        let (s, layout) = (*s, job.source.layout);
        let together = room.together;
        // Of each panel; at an odd end a panel is its own partner.
        let mut at = [job.source.at(panels.start); MOST];
        let mut weights = [room.stage.cast_const(); MOST];
        for n in 0..room.side {
            let partner = n.min(panels.len() - 1);
            at[n] = job.source.at(panels.start + partner);
            weights[n] = room
                .stage
                .wrapping_add(partner * together * Self::SUPER_BYTES);
        }
        let per_tile = room.side * M;
        for n in 0..tiles.len() * per_tile {
            // SAFETY: there are so many.
            unsafe { room.results.add(n).write(s.splat(0.0)) }
        }
        let scaled = (Self::PLANES == 2).then_some(Scaled {
            scale: job.scale,
            apart: together * Self::SUPER_BYTES / 2,
        });
        let mut late = Late::<S, P, M>::new(s, job.scale, layout);
        let stages = layout.supers.div_ceil(together);
        for stage in 0..stages {
            let first = stage * together;
            let end = layout.supers.min(first + together);
            let chunks = first * 4..layout.chunks.min(end * 4);
            let coming = stage + AHEAD / together;
            let (later, coming) = (coming / stages * room.side, coming % stages * together);
            let coming = job
                .source
                .stored(coming * 4..(coming + together) * 4, job.decoder.bits);
            let ahead = job
                .source
                .ahead(panels.start + later)
                .wrapping_add(coming.start);
            // Lines of each panel: as many beside decoding as with a tile, so many with every super-block of one.
            let lines = coming.len().div_ceil(64);
            let early = lines / (tiles.len() + 1);
            let share = (lines - early).div_ceil(tiles.len() * (end - first));
            for n in 0..panels.len() {
                let to = weights[n].cast_mut();
                let coming = Coming {
                    next: ahead.wrapping_add(n * layout.panel_bytes),
                    lines: early,
                };
                let chunks = chunks.clone();
                // SAFETY: a panel of the matrix; the stage has room for so much.
                unsafe { unpack(job.decoder, layout, at[n], chunks, scaled, coming, to) }
            }
            for (t, number) in tiles.clone().enumerate() {
                let asked = early + t * share * (end - first);
                let mut place = Place {
                    s,
                    scale: job.scale,
                    layout,
                    tile: job.acts.tile(number),
                    supers: first..end,
                    panels: [at[0]; P],
                    weights: [weights[0]; P],
                    apart: scaled.map_or(0, |scaled| scaled.apart),
                    ahead: ahead.wrapping_add(asked * 64),
                    lines: share.min(lines.saturating_sub(asked)),
                };
                for set in (0..panels.len()).step_by(P) {
                    place.panels.copy_from_slice(&at[set..set + P]);
                    place.weights.copy_from_slice(&weights[set..set + P]);
                    let y = room.results.wrapping_add(t * per_tile + set * M);
                    // SAFETY: weights are those of these super-blocks; the tile has room for its results.
                    unsafe { self.multiply(&place, y, &mut late) }
                    place.ahead = place.ahead.wrapping_add(P * layout.panel_bytes);
                }
            }
        }
        // SAFETY: the results of the last tile are still there.
        unsafe { late.settle() }
        for (t, number) in tiles.enumerate() {
            let tile = job.acts.tile(number);
            for n in 0..panels.len() {
                let (set, p) = (n / P * P, n % P);
                let y = t * per_tile + set * M + p * tile.padded;
                // SAFETY: the tile's results are there, and `Matrix::run` has this part of the output to itself.
                unsafe {
                    let y = std::slice::from_raw_parts(room.results.add(y), tile.tokens);
                    job.out.put(s, number * M, panels.start + n, y);
                }
            }
        }
    }

    /// Finds the kernel for the size of the tile: a whole one here, others apart.
    ///
    /// # Safety
    /// As [`Place`] says; `y` is good for the results of the tile, \[panel\]\[token\].
    #[inline(always)]
    unsafe fn multiply<'a>(
        &self,
        place: &Place<'a, S, P>,
        y: *mut S::F32,
        late: &mut Late<'a, S, P, M>,
    ) {
        let s = self.0;
        // SAFETY: as the caller says.
        unsafe {
            if place.tile.padded == M {
                if S::STORED {
                    late.add(place, y.cast());
                } else if BLOCK == SUPER {
                    place.wide(&mut *y.cast::<[[S::F32; M]; P]>());
                } else {
                    place.full::<M, BLOCK, SUBS>(&mut *y.cast());
                }
                return;
            }
            macro_rules! rest {
                ($($n:literal)*) => {
                    match place.tile.padded {
                        $($n if const { S::LEAST <= $n && $n < S::TILE && !(S::PAIRS && $n == 6) } => s.run(Rest::<S, P, $n, BLOCK>(place, y)),)*
                        n => unreachable!("a tile of {n} tokens"),
                    }
                };
            }
            rest!(1 2 4 6 8 12 16);
        }
    }
}

/// A tile by some super-blocks of `P` panels.
pub(super) struct Place<'a, S: Simd, const P: usize> {
    s: S,
    scale: &'a Scale,
    layout: &'a KLayout,
    pub tile: &'a Tile,
    pub supers: Range<usize>,
    pub panels: [*const u8; P],
    /// The super-blocks, decoded.
    pub weights: [*const u8; P],
    /// From there to their second plane, where there is one.
    pub apart: usize,
    /// What to ask for meanwhile, of the first panel (that of the other lies behind): so many lines a super-block.
    ahead: *const u8,
    lines: usize,
}

/// A tile of `N` tokens, fewer or more than usual, as a function of its own.
struct Rest<'a, S: Simd, const P: usize, const N: usize, const BLOCK: usize>(
    &'a Place<'a, S, P>,
    *mut S::F32,
);

impl<S: Simd, const P: usize, const N: usize, const BLOCK: usize> SimdOp
    for Rest<'_, S, P, N, BLOCK>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self(place, y) = self;
        // SAFETY: as the maker says.
        unsafe {
            if S::STORED {
                let mut late = Late::<S, P, N>::new(place.s, place.scale, place.layout);
                late.add(place, y.cast());
                late.settle();
            } else if BLOCK < SUPER {
                place.blocks::<N, BLOCK>(&mut *y.cast());
            } else {
                place.wide(&mut *y.cast::<[[S::F32; N]; P]>());
            }
        }
    }
}

impl<S: Simd, const P: usize> Place<'_, S, P> {
    /// Asks for what comes later, at an even pace: with super-block `sup`.
    #[inline(always)]
    pub(super) fn ask(&self, sup: usize) {
        let first = (sup - self.supers.start) * self.lines;
        for line in first..first + self.lines {
            for p in 0..P {
                let at = p * self.layout.panel_bytes + line * 64;
                self.s.prefetch_far(self.ahead.wrapping_add(at));
            }
        }
    }

    /// The inputs of a super-block.
    #[inline(always)]
    pub(super) fn inputs(&self, sup: usize) -> Range<usize> {
        sup * SUPER..(self.layout.chunks * CHUNK).min(sup * SUPER + SUPER)
    }

    /// One scale a super-block.
    ///
    /// # Safety
    /// The tile is one of `N` tokens.
    #[inline(always)]
    unsafe fn wide<const N: usize>(&self, y: &mut [[S::F32; N]; P]) {
        let (s, layout, tile) = (self.s, self.layout, self.tile);
        let mut weights = self.weights;
        for sup in self.supers.clone() {
            self.ask(sup);
            let inputs = self.inputs(sup);
            let groups = inputs.start / 4..inputs.end / 4;
            // SAFETY: the decoded part and the tile hold the super-block, the panels its scales.
            unsafe {
                let mut dots = MaybeUninit::uninit();
                let start = start::<S, N>(s, tile, SUPER, sup);
                s.product(weights, tile.data, groups.clone(), start, &mut dots);
                let dots = dots.assume_init_ref();
                for p in 0..P {
                    weights[p] = weights[p].add(groups.len() * S::WEIGHT_BYTES);
                    settle_wide(s, layout, self.panels[p], tile, sup, &dots[p], &mut y[p]);
                }
            }
        }
    }

    /// One scale a block, in a whole tile: sums of a block stay in registers, and with integer scales those of the super-block.
    ///
    /// # Safety
    /// The tile is one of `N` tokens.
    #[inline(always)]
    unsafe fn full<const N: usize, const BLOCK: usize, const SUBS: bool>(
        &self,
        y: &mut [S::F32; N],
    ) {
        let (s, scale, layout, tile) = (self.s, self.scale, self.layout, self.tile);
        let (panel, mut weights) = (self.panels[0], self.weights[0]);
        let block = if BLOCK < 64 { BLOCK } else { scale.block };
        for sup in self.supers.clone() {
            self.ask(sup);
            let inputs = self.inputs(sup);
            let mut weighed = [s.splat_i32(0); N];
            for input in inputs.clone().step_by(block) {
                let groups = input / 4..(input + block).min(inputs.end) / 4;
                // SAFETY: the decoded part and the tile hold this block, the panel its scales.
                unsafe {
                    let index = input / block;
                    let mut dots = MaybeUninit::uninit();
                    let start = start::<S, N>(s, tile, block, index);
                    s.product([weights], tile.data, groups.clone(), start, &mut dots);
                    weights = weights.add(groups.len() * S::WEIGHT_BYTES);
                    let dots = &dots.assume_init_ref()[0];
                    if SUBS {
                        scale.weigh(s, layout, panel, index, dots, &mut weighed);
                    } else {
                        scale.add(s, layout, panel, tile, index, dots, y);
                        // Left in memory: kept in registers they are moved about between blocks (Q4_0 a twentieth slower).
                        black_box(&mut *y);
                    }
                }
            }
            if SUBS {
                // SAFETY: as above.
                unsafe { scale.settle(s, layout, panel, tile, sup, &weighed, y) }
            }
        }
    }

    /// One scale a block.
    ///
    /// # Safety
    /// The tile is one of `N` tokens.
    #[inline(always)]
    unsafe fn blocks<const N: usize, const BLOCK: usize>(&self, y: &mut [S::F32; N]) {
        let (s, scale, layout, tile) = (self.s, self.scale, self.layout, self.tile);
        let (panel, mut weights) = (self.panels[0], self.weights[0]);
        let block = if BLOCK < 64 { BLOCK } else { scale.block };
        let mut all = [[s.splat_i32(0); N]; BLOCKS];
        for sup in self.supers.clone() {
            self.ask(sup);
            let inputs = self.inputs(sup);
            for input in inputs.clone().step_by(block) {
                let groups = input / 4..(input + block).min(inputs.end) / 4;
                // SAFETY: the decoded part and the tile hold this block.
                unsafe {
                    let mut dots = MaybeUninit::uninit();
                    let start = start::<S, N>(s, tile, block, input / block);
                    s.product([weights], tile.data, groups.clone(), start, &mut dots);
                    weights = weights.add(groups.len() * S::WEIGHT_BYTES);
                    all[input % SUPER / block] = dots.assume_init_ref()[0];
                }
            }
            let (dots, y) = (all.as_flattened(), &mut *y);
            s.run(Settle {
                s,
                scale,
                layout,
                panel,
                tile,
                sup,
                dots,
                y,
            });
        }
    }
}
