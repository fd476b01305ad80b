//! Matrix tiles: products whose sums lie in memory ([`Simd::STORED`]), from which they cannot be loaded at once. So they are taken into the results one step
//! later, while the next products run.

use std::mem::MaybeUninit;
use std::ops::Range;

use kbit_simd::Simd;
use kbit_tensor::KLayout;

use super::direct::AHEAD;
use super::scales::{Scale, settle_wide};
use super::tiles::{Place, Room, Tiles};
use super::unpack::{Coming, Scaled, Unpacker, VECTORS};
use crate::acts::Tile;

/// Chunks decoded before one is multiplied: what was just written cannot be loaded as a tile until it has left for the first cache.
const LAG: usize = 2;

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
                    self.settle();
                }
                for plane in &mut weights {
                    *plane = plane.wrapping_add(groups.len() * S::WEIGHT_BYTES);
                }
                self.waiting = Some(Waiting {
                    panels: place.panels,
                    tile,
                    step: input / block,
                    y,
                });
                self.turn ^= 1;
            }
        }
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
    /// Panels side by side by one tile of `M` tokens, where decoding takes longer than products: a chunk is decoded while one before it is multiplied.
    #[inline(always)]
    pub(super) fn beside(
        &self,
        panels: Range<usize>,
        number: usize,
        unpack: Unpacker,
        room: &Room<S>,
    ) {
        let Self(s, job) = self;
        let (s, layout, tile) = (*s, job.source.layout, *job.acts.tile(number));
        let plane = VECTORS * S::WEIGHT_BYTES;
        let scaled = (Self::PLANES == 2).then_some(Scaled {
            scale: job.scale,
            apart: plane,
        });
        let mut at = [job.source.at(panels.start); P];
        if P == 2 {
            at[P - 1] = job.source.at(panels.end - 1);
        }
        // Of each chunk two panels, or both planes of one.
        let ring = [0, 1, 2, 3].map(|n| room.stage.wrapping_add(2 * plane * n));
        // Of two super-blocks.
        let mut sums = [const { MaybeUninit::<[[S::I32; M]; 2]>::uninit() }; 2];
        let mut y = [[s.splat(0.0); M]; P];
        let ahead = (AHEAD / (job.decoder.bits * 128)).min(layout.chunks);
        for chunk in 0..layout.chunks + LAG {
            if chunk < layout.chunks {
                for n in 0..panels.len() {
                    let later = (chunk + ahead) / layout.chunks * P;
                    let coming = (chunk + ahead) % layout.chunks;
                    let coming = job.source.stored(coming..coming + 1, job.decoder.bits);
                    let coming = Coming {
                        next: job
                            .source
                            .ahead(panels.start + n + later)
                            .wrapping_add(coming.start),
                        lines: coming.len().div_ceil(64),
                    };
                    let to = ring[chunk % 4].wrapping_add(n * plane);
                    // SAFETY: a chunk of a panel of the matrix; the ring has room for it.
                    unsafe {
                        unpack(
                            job.decoder,
                            layout,
                            at[n],
                            chunk..chunk + 1,
                            scaled,
                            coming,
                            to,
                        );
                    }
                }
            }
            let Some(chunk) = chunk.checked_sub(LAG) else {
                continue;
            };
            let (sup, last) = (chunk / 4, chunk + 1 == layout.chunks);
            // At an odd end a panel is its own partner.
            let second = if P == 2 && panels.len() == 1 {
                0
            } else {
                plane
            };
            let weights = [
                ring[chunk % 4].cast_const(),
                ring[chunk % 4].wrapping_add(second).cast_const(),
            ];
            let groups = chunk * VECTORS..(chunk + 1) * VECTORS;
            // SAFETY: the chunk was decoded, and the tile holds it. Sums are written before they are settled, one super-block later.
            unsafe {
                if chunk % 4 == 0 {
                    s.begin_sums::<M>();
                }
                s.add_products::<2, M>(weights, tile.data, groups);
                if chunk % 4 == 3 || last {
                    s.end_sums(&mut sums[sup % 2]);
                    let before = sup.checked_sub(1);
                    for sup in before.into_iter().chain(last.then_some(sup)) {
                        let sums = sums[sup % 2].assume_init_ref();
                        settle(s, job.scale, layout, &at, &tile, sup, sums, &mut y);
                    }
                }
            }
        }
        for n in 0..panels.len() {
            let y = &y[n][..tile.tokens];
            // SAFETY: `Matrix::run` has this part of the output to itself.
            unsafe { job.out.put(s, number * M, panels.start + n, y) };
        }
    }
}
