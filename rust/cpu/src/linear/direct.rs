//! One token, or a few: every weight is read once, decoded in registers and multiplied at once.

use std::marker::PhantomData;
use std::ops::Range;

use kbit_simd::{Simd, SimdOp};
use kbit_tensor::{CHUNK, KLayout, SUPER};

use super::Out;
use super::codes::{Decode, Decoder, LadderDecode, LinearDecode, Method, Panels, TableDecode};
use super::scales::{BLOCKS, Scale, Settle, settle_wide, start};
use crate::acts::Tile;

/// How far ahead of the codes in use the next ones are asked for, in bytes.
const AHEAD: usize = 3072;
/// Code vectors of a quarter chunk: 16 inputs, the smallest block.
const QUARTER: usize = 4;

/// Panels `panels` for the few tokens of `tile`. False when there is no such kernel: `tiles.rs` has all of them, this file those
/// that people use (ladders up to 7 bits, tables up to 4, linear codebooks).
#[inline(always)]
pub(super) fn run<S: Simd>(
    s: S,
    source: &Panels<'_>,
    decoder: &Decoder,
    scale: &Scale,
    tile: &Tile,
    panels: Range<usize>,
    out: Out,
) -> bool {
    macro_rules! direct {
        ($D:ty, $block:literal, $m:literal) => {
            s.run(Direct::<S, $D, $block, $m> {
                s,
                decoder,
                source,
                scale,
                tile,
                panels,
                out,
                kind: PhantomData,
            })
        };
        ($D:ty, $block:literal) => {
            match tile.padded {
                1 => direct!($D, $block, 1),
                2 => direct!($D, $block, 2),
                4 if const { S::DIRECT >= 4 } => direct!($D, $block, 4),
                _ => return false,
            }
        };
    }
    // Blocks of 32 are what `quantize` makes.
    macro_rules! ladder {
        ($bits:literal, $block:expr) => {
            match ($block, tile.padded) {
                (32, 8) if const { S::DIRECT >= 8 } => direct!(LadderDecode<S, $bits, 32>, 256, 8),
                (32, 16) if const { S::DIRECT >= 16 } => direct!(LadderDecode<S, $bits, 32>, 256, 16),
                (16, _) => direct!(LadderDecode<S, $bits, 16>, 256),
                (32, _) => direct!(LadderDecode<S, $bits, 32>, 256),
                _ => direct!(LadderDecode<S, $bits, 64>, 256),
            }
        };
    }
    macro_rules! blocks {
        ($D:ty) => {
            match scale.block {
                16 => direct!($D, 16),
                32 => direct!($D, 32),
                _ => direct!($D, 64),
            }
        };
    }
    match (decoder.bits, decoder.method) {
        (2, Method::Ladder(block)) => ladder!(2, block),
        (3, Method::Ladder(block)) => ladder!(3, block),
        (4, Method::Ladder(block)) => ladder!(4, block),
        (5, Method::Ladder(block)) => ladder!(5, block),
        (6, Method::Ladder(block)) => ladder!(6, block),
        (7, Method::Ladder(32)) => ladder!(7, 32),
        (2, Method::Table) => blocks!(TableDecode<S, 2>),
        (3, Method::Table) => blocks!(TableDecode<S, 3>),
        (4, Method::Table) => blocks!(TableDecode<S, 4>),
        (5, Method::Linear { .. }) => blocks!(LinearDecode<S, 5>),
        (6, Method::Linear { .. }) => blocks!(LinearDecode<S, 6>),
        (7, Method::Linear { .. }) => blocks!(LinearDecode<S, 7>),
        (8, Method::Linear { .. }) => blocks!(LinearDecode<S, 8>),
        _ => return false,
    }
    true
}

struct Direct<'a, S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize> {
    s: S,
    decoder: &'a Decoder,
    source: &'a Panels<'a>,
    scale: &'a Scale,
    tile: &'a Tile,
    panels: Range<usize>,
    out: Out,
    kind: PhantomData<D>,
}

/// State within a panel.
struct State<S: Simd, const M: usize> {
    y: [S::F32; M],
    /// Partial sums of the block; several, so that the next dot product need not wait for the last.
    chains: [[S::I32; 4]; M],
    /// Of the blocks of a super-block.
    dots: [[S::I32; M]; BLOCKS],
}

impl<S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize> SimdOp
    for Direct<'_, S, D, BLOCK, M>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let s = self.s;
        let layout = self.source.layout;
        let decode = D::new(s, self.decoder);
        let chunk_bytes = D::BITS * 128;
        // What lies before the codes of a panel is asked for evenly over its chunks.
        let extra = layout.codes_at.div_ceil(64).div_ceil(layout.chunks);
        for panel in self.panels.clone() {
            let at = self.source.at(panel);
            let mut ahead = at.wrapping_add(AHEAD);
            let zero = s.splat_i32(0);
            let mut state = State {
                y: [s.splat(0.0); M],
                chains: [[zero; 4]; M],
                dots: [[zero; M]; BLOCKS],
            };
            for sup in 0..layout.supers {
                for chunk in sup * 4..layout.chunks.min(sup * 4 + 4) {
                    for line in 0..2 * D::BITS {
                        s.prefetch(ahead.wrapping_add(line * 64));
                    }
                    ahead = ahead.wrapping_add(chunk_bytes);
                    for _ in 0..extra {
                        s.prefetch(ahead);
                        ahead = ahead.wrapping_add(64);
                    }
                    // SAFETY: panel and chunk are in the matrix, the tile was made for its inputs.
                    unsafe { self.chunk(&decode, layout, at, chunk, &mut state) }
                }
                if BLOCK == SUPER {
                    // SAFETY: as above.
                    unsafe {
                        settle_wide(s, layout, at, self.tile, sup, &state.dots[0], &mut state.y);
                    }
                } else {
                    let (scale, tile, dots) = (self.scale, self.tile, state.dots.as_flattened());
                    s.run(Settle {
                        s,
                        scale,
                        layout,
                        panel: at,
                        tile,
                        sup,
                        dots,
                        y: &mut state.y,
                    });
                }
            }
            for n in 0..self.tile.tokens.min(M) {
                // SAFETY: `Matrix::run` has this part of the output to itself.
                s.store_part(state.y[n], unsafe { self.out.part(n, panel) });
            }
        }
    }
}

impl<S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize> Direct<'_, S, D, BLOCK, M> {
    /// Inputs of a block.
    #[inline(always)]
    fn block(&self) -> usize {
        if BLOCK < 64 {
            BLOCK
        } else if BLOCK == SUPER {
            SUPER
        } else {
            self.scale.block
        }
    }

    /// One chunk of 64 inputs, unrolled: shifts are immediates.
    ///
    /// # Safety
    /// `at` is a panel of `layout` and `chunk` one of its chunks.
    #[inline(always)]
    unsafe fn chunk(
        &self,
        decode: &D,
        layout: &KLayout,
        at: *const u8,
        chunk: usize,
        state: &mut State<S, M>,
    ) {
        let s = self.s;
        // SAFETY: as the caller says.
        unsafe {
            let codes = at.add(layout.codes_at + chunk * D::BITS * 128);
            let (four, fours) = (4 * if S::PAIRS { 2 } else { 1 }, S::RUN / 4);
            let acts = self.tile.data.add(chunk * CHUNK / 4 * four * M);
            let mut block = decode.block(s, layout, at, chunk, 0);
            macro_rules! vector {
                ($g:expr) => {{
                    let w = decode.vector::<{ $g }>(s, &block, codes);
                    let chain = if M > 1 {
                        0
                    } else if BLOCK == SUPER {
                        $g % 4
                    } else {
                        $g % 2
                    };
                    for n in 0..M {
                        let at = ($g / fours * M + n) * fours + $g % fours;
                        let a = s.acts(acts.add(at * four));
                        state.chains[n][chain] = s.dot(state.chains[n][chain], w, a);
                    }
                }};
            }
            macro_rules! quarter {
                ($q:literal) => {{
                    if $q > 0 && $q * 16 % D::BLOCK == 0 {
                        block = decode.block(s, layout, at, chunk, $q);
                    }
                    if $q * 16 % BLOCK.min(64) == 0 {
                        self.begin(state, chunk, $q);
                    }
                    vector!($q * QUARTER);
                    vector!($q * QUARTER + 1);
                    vector!($q * QUARTER + 2);
                    vector!($q * QUARTER + 3);
                    if ($q + 1) * 16 % BLOCK.min(64) == 0 {
                        self.end(layout, state, chunk, $q);
                    }
                }};
            }
            quarter!(0);
            quarter!(1);
            quarter!(2);
            quarter!(3);
        }
    }

    /// Before a quarter: starts the sums of a block, if one begins here.
    ///
    /// # Safety
    /// As [`Direct::chunk`].
    #[inline(always)]
    unsafe fn begin(&self, state: &mut State<S, M>, chunk: usize, quarter: usize) {
        let input = chunk * CHUNK + quarter * 16;
        if BLOCK <= 32 || input.is_multiple_of(self.block()) {
            let zero = self.s.splat_i32(0);
            // SAFETY: as the caller says.
            let start =
                unsafe { start::<S, M>(self.s, self.tile, self.block(), input / self.block()) };
            for n in 0..M {
                state.chains[n] = [start[n], zero, zero, zero];
            }
        }
    }

    /// After a quarter: keeps the sums of a block, if one ends here.
    #[inline(always)]
    fn end(&self, layout: &KLayout, state: &mut State<S, M>, chunk: usize, quarter: usize) {
        let (s, next) = (self.s, chunk * CHUNK + quarter * 16 + 16);
        if BLOCK <= 32 || next % self.block() == 0 || next == layout.chunks * CHUNK {
            let dots = &mut state.dots[(next - 1) % SUPER / self.block()];
            for n in 0..M {
                let [a, b, c, d] = state.chains[n];
                dots[n] = a;
                if M == 1 {
                    dots[n] = s.add_i32(a, b);
                    if BLOCK == SUPER {
                        dots[n] = s.add_i32(dots[n], s.add_i32(c, d));
                    }
                }
            }
        }
    }
}
