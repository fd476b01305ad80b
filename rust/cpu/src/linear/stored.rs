//! Matrix tiles: products whose sums lie in memory ([`Simd::STORED`]), from which they cannot be loaded at once. So they are taken into the results one step
//! later, while the next products run.

use std::mem::MaybeUninit;

use kbit_simd::Simd;
use kbit_tensor::KLayout;

use super::direct::AHEAD;
use super::scales::{Scale, settle_wide};
use super::tiles::{Place, Room, Tiles};
use super::unpack::{Coming, Scaled, Unpacker, VECTORS};
use crate::acts::Tile;

/// Products whose sums lie in memory ([`Simd::STORED`]): those of one step, the inputs of a scale, are taken into the results while the next
/// step's products run, whatever tile and panels that is of.
pub(super) struct Late<'a, S: Simd, const P: usize, const N: usize> {
    s: S,
    scale: &'a Scale,
    layout: &'a KLayout,
    /// Of two panels, or of both planes of one; one of the rooms is written while the other is read.
    rooms: [MaybeUninit<[[S::I32; N]; 2]>; 2],
    turn: usize,
    /// What is in the other room.
    waiting: Option<Waiting<'a, S, P, N>>,
}

/// Sums of a step, which is the number of a block or super-block.
struct Waiting<'a, S: Simd, const P: usize, const N: usize> {
    panels: [*const u8; P],
    tile: &'a Tile,
    step: usize,
    /// Their results.
    y: *mut [[S::F32; N]; P],
}

impl<'a, S: Simd, const P: usize, const N: usize> Late<'a, S, P, N> {
    /// Nothing waits.
    pub(super) fn new(s: S, scale: &'a Scale, layout: &'a KLayout) -> Self {
        Self {
            s,
            scale,
            layout,
            rooms: [const { MaybeUninit::uninit() }; 2],
            turn: 0,
            waiting: None,
        }
    }

    /// All of a place, into `y`.
    ///
    /// # Safety
    /// The tile is one of `N` tokens; `y` and what the place names are there until it is settled.
    #[inline(always)]
    pub(super) unsafe fn add(&mut self, place: &Place<'a, S, P>, y: *mut [[S::F32; N]; P]) {
        let (s, scale, tile) = (self.s, self.scale, place.tile);
        let block = scale.step();
        let mut weights = [place.weights[0]; 2];
        weights[1] = if P == 2 {
            place.weights[1]
        } else {
            weights[0].wrapping_add(place.apart)
        };
        for sup in place.supers.clone() {
            place.ask(sup);
            let inputs = place.inputs(sup);
            for input in inputs.clone().step_by(block) {
                let groups = input / 4..(input + block).min(inputs.end) / 4;
                // SAFETY: the decoded part and the tile hold these inputs.
                unsafe {
                    let start = [s.splat_i32(0); N];
                    let sums = &mut self.rooms[self.turn];
                    s.product(weights, tile.data, groups.clone(), start, sums);
                    self.waits(Waiting {
                        panels: place.panels,
                        tile,
                        step: input / block,
                        y,
                    });
                }
                for plane in &mut weights {
                    *plane = plane.wrapping_add(groups.len() * S::WEIGHT_BYTES);
                }
            }
        }
    }

    /// What was just written waits, and what waited is taken into its results.
    ///
    /// # Safety
    /// As [`Late::settle`]; the room whose turn it is holds sums.
    #[inline(always)]
    unsafe fn waits(&mut self, sums: Waiting<'a, S, P, N>) {
        // SAFETY: as the caller says.
        unsafe { self.settle() }
        self.waiting = Some(sums);
        self.turn ^= 1;
    }

    /// Takes what waits into its results.
    ///
    /// # Safety
    /// Those are still there.
    #[inline(always)]
    pub(super) unsafe fn settle(&mut self) {
        let Some(waiting) = self.waiting.take() else {
            return;
        };
        let Waiting {
            panels,
            tile,
            step,
            y,
        } = waiting;
        let (s, scale, layout) = (self.s, self.scale, self.layout);
        // SAFETY: the room was written when this began to wait.
        unsafe {
            let sums = self.rooms[self.turn ^ 1].assume_init_ref();
            if P == 2 && scale.wants_sums() {
                for p in 0..P {
                    let y = &mut (&mut *y)[p];
                    scale.add(s, layout, panels[p], tile, step, &sums[p], y);
                }
                return;
            }
            settle(s, scale, layout, &panels, tile, step, sums, &mut *y);
        }
    }
}

/// Takes the sums of a super-block into the results: those of two panels, or of both planes of one ([`Simd::scale`]).
///
/// # Safety
/// `at` are panels of `layout`; `tile` is one of `N` tokens, padding included.
#[inline(always)]
unsafe fn settle<S: Simd, const P: usize, const N: usize>(
    s: S,
    scale: &Scale,
    layout: &KLayout,
    at: &[*const u8; P],
    tile: &Tile,
    sup: usize,
    sums: &[[S::I32; N]; 2],
    y: &mut [[S::F32; N]; P],
) {
    // SAFETY: as the caller says.
    unsafe {
        if P == 1 {
            let mut weighed = [s.splat_i32(0); N];
            for n in 0..N {
                weighed[n] = s.add_i32(s.shl_i32(sums[0][n], 8), sums[1][n]);
            }
            scale.settle(s, layout, at[0], tile, sup, &weighed, &mut y[0]);
        } else {
            for p in 0..P {
                settle_wide(s, layout, at[p], tile, sup, &sums[p], &mut y[p]);
            }
        }
    }
}

impl<S: Simd, const P: usize, const M: usize, const BLOCK: usize, const SUBS: bool>
    Tiles<'_, S, P, M, BLOCK, SUBS>
{
    /// All panels by one tile of `M` tokens, where decoding takes longer than products: a chunk of panels side by side is decoded, then the chunk
    /// before it multiplied, as what was just written cannot be loaded as a tile until it has left for the first cache. Nothing stops where panels
    /// end: the next are decoded while the last products run and before their results are written.
    #[inline(always)]
    pub(super) fn flow(&self, number: usize, unpack: Unpacker, room: &Room<S>) {
        let Self(s, job) = self;
        let (s, layout, tile) = (*s, job.source.layout, job.acts.tile(number));
        let plane = VECTORS * S::WEIGHT_BYTES;
        let scaled = (Self::PLANES == 2).then_some(Scaled {
            scale: job.scale,
            apart: plane,
        });
        // Of a chunk two panels, or both planes of one; one is multiplied while the other is written.
        let stages = [0, 2 * plane].map(|at| room.stage.wrapping_add(at));
        let mut late = Late::<S, P, M>::new(s, job.scale, layout);
        let mut results = [[s.splat(0.0); M]; P];
        let y = &raw mut results;
        let (end, chunks) = (job.panels.end, layout.chunks);
        let ahead = (AHEAD / (job.decoder.bits * 128)).min(chunks);
        let lines = layout.panel_bytes / 64;
        let mut decoded = (job.panels.start, 0);
        // The chunk before that, and the panels whose last sums wait.
        let (mut before, mut summed): (Option<(usize, usize)>, _) = (None, None);
        for turn in 0.. {
            let (panel, chunk) = decoded;
            if panel < end {
                // As many lines with every chunk, scales included.
                let coming = chunk + ahead;
                let (later, coming) = (coming / chunks * P, coming % chunks);
                let share = coming * lines / chunks..(coming + 1) * lines / chunks;
                for n in 0..P.min(end - panel) {
                    let next = job.source.ahead(panel + later + n);
                    let coming = Coming {
                        next: next.wrapping_add(share.start * 64),
                        lines: share.len(),
                    };
                    let (at, to) = (
                        job.source.at(panel + n),
                        stages[turn % 2].wrapping_add(n * plane),
                    );
                    // SAFETY: a chunk of a panel of the matrix; the stage has room for it.
                    unsafe {
                        let chunks = chunk..chunk + 1;
                        unpack(job.decoder, layout, at, chunks, scaled, coming, to);
                    }
                }
                decoded = if chunk + 1 < chunks {
                    (panel, chunk + 1)
                } else {
                    (panel + P, 0)
                };
            }
            if let Some((panel, chunk)) = before {
                // At an odd end a panel is its own partner.
                let partner = (panel + P).min(end) - 1;
                let last = chunk + 1 == chunks;
                let from = stages[(turn + 1) % 2].cast_const();
                let apart = if P == 2 && partner == panel { 0 } else { plane };
                let weights = [from, from.wrapping_add(apart)];
                let groups = chunk * VECTORS..(chunk + 1) * VECTORS;
                // SAFETY: the chunk was decoded, and the tile holds it. Sums are written before they are settled, one super-block later.
                unsafe {
                    if chunk % 4 == 0 {
                        s.begin_sums::<M>();
                    }
                    s.add_products::<2, M>(weights, tile.data, groups);
                    if chunk % 4 == 3 || last {
                        s.end_sums(&mut late.rooms[late.turn]);
                        let mut panels = [job.source.at(panel); P];
                        panels[P - 1] = job.source.at(partner);
                        late.waits(Waiting {
                            panels,
                            tile,
                            step: chunk / 4,
                            y,
                        });
                        self.put(summed.take(), number, y);
                    }
                }
                if last {
                    summed = Some(panel);
                }
            }
            if panel >= end {
                break;
            }
            before = Some((panel, chunk));
        }
        // SAFETY: the last panels are there.
        unsafe {
            late.settle();
            self.put(summed, number, y);
        }
    }

    /// Writes the results of panels side by side, and begins those of the next.
    ///
    /// # Safety
    /// `Matrix::run` has this part of the output to itself, and the caller `y`.
    #[inline(always)]
    unsafe fn put(&self, panel: Option<usize>, number: usize, y: *mut [[S::F32; M]; P]) {
        let Self(s, job) = self;
        let Some(panel) = panel else {
            return;
        };
        let tokens = job.acts.tile(number).tokens;
        // SAFETY: as the caller says.
        unsafe {
            let y = &mut *y;
            for n in 0..P.min(job.panels.end - panel) {
                job.out.put(*s, number * M, panel + n, &y[n][..tokens]);
            }
            *y = [[s.splat(0.0); M]; P];
        }
    }
}
