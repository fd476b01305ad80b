//! One token, or a few: every weight is read once, decoded in registers and multiplied at once.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use kbit_simd::{Isa, Simd, SimdOp, Vendor};
use kbit_tensor::{CHUNK, KLayout, SUPER};

use super::Out;
use super::codes::{Decode, Decoder, LadderDecode, LinearDecode, Method, Panels, TableDecode};
use super::scales::{BLOCKS, Scale, Settle, settle_wide, start};
use crate::acts::Tile;

/// Code vectors of a quarter chunk: 16 inputs, the smallest block.
const QUARTER: usize = 4;

/// Runs `$body` with `$g` as the number of each code vector of a chunk, a constant.
macro_rules! vectors {
    ($g:ident => $body:block) => {
        vectors!($g => $body; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    };
    ($g:ident => $body:block; $($i:literal)*) => { $({
        const $g: usize = $i;
        $body
    })* };
}

/// Tokens up to which there are kernels here, where [`Simd::DIRECT`] is as large. `tiles.rs` has all kinds, this file those that people use:
/// ladders up to 7 bits, tables up to 4, linear codebooks; more tokens than 4 with what `quantize` makes.
pub(super) fn most(decoder: &Decoder, scale: &Scale) -> usize {
    match (decoder.bits, decoder.method) {
        (..=7, Method::Ladder(32)) => 16,
        (7, Method::Linear { .. }) if !scale.wants_sums() => 16,
        // 16 tokens by 8 bits are faster as tiles.
        (8, Method::Linear { .. }) if !scale.wants_sums() => 8,
        (..=6, Method::Ladder(_)) | (..=4, Method::Table) | (_, Method::Linear { .. }) => 4,
        _ => 0,
    }
}

/// Panels `panels` for the few tokens of `tile`, at most [`most`].
#[inline(always)]
pub(super) fn run<S: Simd>(
    s: S,
    source: &Panels<'_>,
    decoder: &Decoder,
    scale: &Scale,
    tile: &Tile,
    panels: Range<usize>,
    out: Out<'_>,
) {
    let job = Job {
        decoder,
        source,
        scale,
        tile,
        panels,
        out,
    };
    // The last constant is the number of tokens, the one before it that of chains or inputs of a block.
    macro_rules! run {
        ($Kernel:ident, $D:ty, $of:expr, $m:literal) => {
            s.run($Kernel::<S, $D, { $of }, $m>(s, job, PhantomData))
        };
    }
    macro_rules! wide {
        ($D:ty) => {
            match tile.padded {
                1 => run!(Wide, $D, 4, 1),
                2 => run!(Wide, $D, 2, 2),
                4 if const { S::DIRECT >= 4 } => run!(Wide, $D, 1, 4),
                n => unreachable!("{n} tokens"),
            }
        };
    }
    macro_rules! wider {
        ($D:ty) => {
            match tile.padded {
                8 if const { S::DIRECT >= 8 } => run!(Wide, $D, 1, 8),
                16 if const { S::DIRECT >= 16 && <$D as Decode<S>>::BITS < 8 } => {
                    run!(Wide, $D, 1, 16)
                }
                _ => wide!($D),
            }
        };
    }
    macro_rules! ladder {
        ($bits:literal, $block:expr) => {
            match $block {
                16 => wide!(LadderDecode<S, $bits, 16>),
                32 if s.single::<$bits>() => wider!(LadderDecode<S, $bits, 32, true>),
                32 => wider!(LadderDecode<S, $bits, 32>),
                _ => wide!(LadderDecode<S, $bits, 64>),
            }
        };
    }
    macro_rules! block {
        ($D:ty, $block:literal) => {
            match tile.padded {
                1 => run!(Blocks, $D, $block, 1),
                2 => run!(Blocks, $D, $block, 2),
                4 if const { S::DIRECT >= 4 } => run!(Blocks, $D, $block, 4),
                n => unreachable!("{n} tokens"),
            }
        };
    }
    macro_rules! blocks {
        ($D:ty) => {
            blocks!($D, wide)
        };
        ($D:ty, $wide:ident) => {
            match scale.block {
                16 => block!($D, 16),
                32 => block!($D, 32),
                _ if !scale.wants_sums() => $wide!($D),
                _ => block!($D, 64),
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
        (7, Method::Linear { .. }) => blocks!(LinearDecode<S, 7>, wider),
        (8, Method::Linear { .. }) => blocks!(LinearDecode<S, 8>, wider),
        (bits, method) => unreachable!("{bits} bits, {method:?}"),
    }
}

/// What a kernel works on.
struct Job<'a> {
    decoder: &'a Decoder,
    source: &'a Panels<'a>,
    scale: &'a Scale,
    tile: &'a Tile,
    panels: Range<usize>,
    out: Out<'a>,
}

/// Bytes between reading and asking: more than the second cache takes to fetch, little of it.
pub(super) const AHEAD: usize = 8 << 10;
/// Chunks between them, where those are more: wide codes are decoded faster.
const CHUNKS_AHEAD: usize = 24;
/// Bytes of a page as the hardware's prefetchers know it, in huge pages too.
const SMALL_PAGE: usize = 4096;

/// The lines to ask for next. A thread reads its panels as one stream, of which the hardware's prefetchers fetch too little while a panel is decoded and lose the
/// rest where it jumps (400 ns a time, Zen 4), so it asks for every line in order, at an even pace, at a fixed distance ahead.
struct Stream {
    next: *const u8,
    /// Of every page, so many bytes at its beginning are asked for.
    asked: usize,
    /// Lines before the codes of a panel, shared out over its chunks.
    scales: usize,
    chunks: usize,
    /// What the chunks so far have saved up for the next of those lines, in parts of `chunks`.
    credit: usize,
}

impl Stream {
    /// For codes of `bits` bits, from the first panel on.
    #[inline(always)]
    fn new<S: Simd>(layout: &KLayout, panel: *const u8, bits: usize) -> Self {
        // A load and a dot product a line are almost plain reading, of which requests halve the speed on AMD's processors (Zen 4): they need them only
        // where a page begins, which they do not look beyond.
        let eight = bits == 8 && matches!(S::ISA, Isa::Avx512 | Isa::Avx512Vbmi);
        let (ahead, asked) = if eight && Vendor::here() == Vendor::Amd {
            (SMALL_PAGE / 2, SMALL_PAGE / 8)
        } else {
            (AHEAD.max(CHUNKS_AHEAD * bits * 128), SMALL_PAGE)
        };
        Self {
            // The codes of a panel come after its scales: they too are asked for so far ahead.
            next: panel.wrapping_add(layout.codes_at + ahead),
            asked,
            scales: layout.codes_at / 64,
            chunks: layout.chunks,
            credit: 0,
        }
    }

    /// Before code vector `g` of a chunk.
    #[inline(always)]
    fn vector<S: Simd>(&mut self, s: S, bits: usize, g: usize) {
        for _ in g * bits / 8..(g + 1) * bits / 8 {
            self.line(s);
        }
    }

    #[inline(always)]
    fn line<S: Simd>(&mut self, s: S) {
        if self.next.addr() % SMALL_PAGE < self.asked {
            s.prefetch_far(self.next);
        }
        self.next = self.next.wrapping_add(64);
    }

    /// Before a chunk: the lines that are not of its codes.
    #[inline(always)]
    fn chunk<S: Simd>(&mut self, s: S) {
        self.credit += self.scales;
        while self.credit >= self.chunks {
            self.credit -= self.chunks;
            self.line(s);
        }
    }
}

/// A copy of a panel's scales, made when the panel begins: its lines are then read in the order of their addresses, which is what the hardware's
/// prefetchers follow. With scales fetched between the codes they are lost (8 bits: half the speed, Zen 4).
#[repr(align(64))]
struct Near(MaybeUninit<[u8; Self::MOST]>);

impl Near {
    /// Larger ones, of rows of more than 16384 inputs, stay where they are: here they would drive the activations out of L1.
    const MOST: usize = 16 << 10;

    #[inline(always)]
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// Copies the scales of `panel`; where they can be read.
    ///
    /// # Safety
    /// `panel` is one of `layout`.
    #[inline(always)]
    unsafe fn scales(&mut self, layout: &KLayout, panel: *const u8) -> *const u8 {
        let n = layout.codes_at;
        if n > Self::MOST {
            return panel;
        }
        let to = self.0.as_mut_ptr().cast::<u8>();
        // SAFETY: the panel has `n` bytes before its codes, and there is room for them.
        unsafe { std::ptr::copy_nonoverlapping(panel, to, n) };
        to
    }
}

/// Activations of token `n` of `tokens` for code vector `g` of the chunk that starts at `acts`.
///
/// # Safety
/// `acts` is a chunk of a tile of `tokens`.
#[inline(always)]
unsafe fn activations<S: Simd>(
    s: S,
    acts: *const u8,
    g: usize,
    n: usize,
    tokens: usize,
) -> S::Acts {
    let fours = S::RUN / 4;
    let at = (g / fours * tokens + n) * fours + g % fours;
    // SAFETY: as the caller says.
    unsafe { s.acts(acts.add(at * four::<S>())) }
}

/// Bytes of four activations.
const fn four<S: Simd>() -> usize {
    if S::PAIRS { 8 } else { 4 }
}

/// One scale per 256 inputs: the sums of a super-block stay in registers, several a token (`CHAINS`) where that hides the latency of the dot product.
struct Wide<'a, S: Simd, D: Decode<S>, const CHAINS: usize, const M: usize>(
    S,
    Job<'a>,
    PhantomData<D>,
);

impl<S: Simd, D: Decode<S>, const CHAINS: usize, const M: usize> SimdOp
    for Wide<'_, S, D, CHAINS, M>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self(s, job, _) = self;
        let (layout, tile) = (job.source.layout, job.tile);
        let decode = D::new(s, job.decoder);
        let first = job.source.at(job.panels.start);
        let mut stream = Stream::new::<S>(layout, first, D::BITS);
        let mut near = Near::new();
        for panel in job.panels {
            let at = job.source.at(panel);
            // Products of 8 tokens take longer than reading, and the copy a fiftieth of them.
            let scales = if M >= 8 {
                at
            } else {
                // SAFETY: a panel of the matrix.
                unsafe { near.scales(layout, at) }
            };
            let mut y = [s.splat(0.0); M];
            // SAFETY: a chunk of the panel.
            let prepare = |chunk: usize, quarter| unsafe {
                decode.block(s, layout, scales, chunk.min(layout.chunks - 1), quarter)
            };
            // What a block needs takes long to make, so it is made a quarter before.
            let mut next = prepare(0, 0);
            let mut block = next;
            // So are weights, one code vector before: decoding takes as long as the products of the vector before it.
            // SAFETY: a chunk of the panel.
            let mut w = unsafe { decode.vector::<0>(s, &block, at.add(layout.codes_at)) };
            for sup in 0..layout.supers {
                // SAFETY: the tile was made for the inputs of the matrix.
                let start = unsafe { start::<S, M>(s, tile, SUPER, sup) };
                let mut chains = [[s.splat_i32(0); M]; CHAINS];
                chains[0] = start;
                for chunk in sup * 4..layout.chunks.min(sup * 4 + 4) {
                    stream.chunk(s);
                    // SAFETY: panel and chunk are in the matrix and the tile.
                    unsafe {
                        let codes = at.add(layout.codes_at + chunk * D::BITS * 128);
                        let after = if chunk + 1 < layout.chunks {
                            codes.add(D::BITS * 128)
                        } else {
                            codes
                        };
                        let acts = tile.data.add(chunk * CHUNK / 4 * four::<S>() * M);
                        vectors!(G => {
                            if (G * 4 + 4).is_multiple_of(D::BLOCK) {
                                block = next;
                            }
                            stream.vector(s, D::BITS, G);
                            let ahead = if G == 15 { after } else { codes };
                            let following = decode.vector::<{ (G + 1) % 16 }>(s, &block, ahead);
                            let chain = &mut chains[G % CHAINS];
                            for n in 0..M {
                                let a = activations(s, acts, G, n, M);
                                chain[n] = s.dot(chain[n], w, a);
                            }
                            w = following;
                            let end = G * 4 + 16;
                            if G.is_multiple_of(QUARTER) && end.is_multiple_of(D::BLOCK) {
                                next = prepare(chunk + end / CHUNK, end % CHUNK / 16);
                            }
                        });
                    }
                }
                for c in 1..CHAINS {
                    for n in 0..M {
                        chains[0][n] = s.add_i32(chains[0][n], chains[c][n]);
                    }
                }
                // SAFETY: as above.
                unsafe { settle_wide(s, layout, scales, tile, sup, &chains[0], &mut y) }
            }
            // SAFETY: `Matrix::run` has this part of the output to itself.
            unsafe { job.out.put(s, 0, panel, &y[..tile.tokens.min(M)]) };
        }
    }
}

/// One scale a block of 16, 32 or at least 64 inputs (`BLOCK`).
struct Blocks<'a, S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize>(
    S,
    Job<'a>,
    PhantomData<D>,
);

/// State within a panel.
struct State<S: Simd, const M: usize> {
    y: [S::F32; M],
    /// Partial sums of the block; two, so that the next dot product of one token need not wait for the last.
    chains: [[S::I32; 2]; M],
    /// Of the blocks of a super-block.
    dots: [[S::I32; M]; BLOCKS],
}

impl<S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize> SimdOp
    for Blocks<'_, S, D, BLOCK, M>
{
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let (s, job) = (self.0, &self.1);
        let (layout, tile) = (job.source.layout, job.tile);
        let decode = D::new(s, job.decoder);
        let first = job.source.at(job.panels.start);
        let mut stream = Stream::new::<S>(layout, first, D::BITS);
        let mut near = Near::new();
        for panel in job.panels.clone() {
            let at = job.source.at(panel);
            // SAFETY: a panel of the matrix.
            let scales = unsafe { near.scales(layout, at) };
            let zero = s.splat_i32(0);
            let mut state = State {
                y: [s.splat(0.0); M],
                chains: [[zero; 2]; M],
                dots: [[zero; M]; BLOCKS],
            };
            for sup in 0..layout.supers {
                for chunk in sup * 4..layout.chunks.min(sup * 4 + 4) {
                    stream.chunk(s);
                    // SAFETY: panel and chunk are in the matrix, the tile was made for its inputs.
                    unsafe {
                        self.chunk(
                            &decode,
                            layout,
                            (at, scales),
                            chunk,
                            &mut state,
                            &mut stream,
                        );
                    }
                }
                let (scale, dots) = (job.scale, state.dots.as_flattened());
                s.run(Settle {
                    s,
                    scale,
                    layout,
                    panel: scales,
                    tile,
                    sup,
                    dots,
                    y: &mut state.y,
                });
            }
            // SAFETY: `Matrix::run` has this part of the output to itself.
            unsafe { job.out.put(s, 0, panel, &state.y[..tile.tokens.min(M)]) };
        }
    }
}

impl<S: Simd, D: Decode<S>, const BLOCK: usize, const M: usize> Blocks<'_, S, D, BLOCK, M> {
    /// Inputs of a block.
    #[inline(always)]
    fn block(&self) -> usize {
        if BLOCK < 64 {
            BLOCK
        } else {
            self.1.scale.block
        }
    }

    /// One chunk of 64 inputs, unrolled: shifts are immediates.
    ///
    /// # Safety
    /// `at` is a panel of `layout`, `scales` what stands before its codes, and `chunk` one of its chunks.
    #[inline(always)]
    unsafe fn chunk(
        &self,
        decode: &D,
        layout: &KLayout,
        (at, scales): (*const u8, *const u8),
        chunk: usize,
        state: &mut State<S, M>,
        stream: &mut Stream,
    ) {
        let s = self.0;
        // SAFETY: as the caller says.
        unsafe {
            let codes = at.add(layout.codes_at + chunk * D::BITS * 128);
            let acts = self.1.tile.data.add(chunk * CHUNK / 4 * four::<S>() * M);
            let mut block = decode.block(s, layout, scales, chunk, 0);
            vectors!(G => {
                stream.vector(s, D::BITS, G);
                if G != 0 && (G * 4).is_multiple_of(D::BLOCK) {
                    block = decode.block(s, layout, scales, chunk, G / QUARTER);
                }
                if (G * 4).is_multiple_of(BLOCK) {
                    self.begin(state, chunk, G / QUARTER);
                }
                let w = decode.vector::<{ G }>(s, &block, codes);
                let chain = if M > 1 { 0 } else { G % 2 };
                for n in 0..M {
                    let a = activations(s, acts, G, n, M);
                    state.chains[n][chain] = s.dot(state.chains[n][chain], w, a);
                }
                if ((G + 1) * 4).is_multiple_of(BLOCK) {
                    self.end(layout, state, chunk, G / QUARTER);
                }
            });
        }
    }

    /// Before a quarter: starts the sums of a block, if one begins here.
    ///
    /// # Safety
    /// As [`Blocks::chunk`].
    #[inline(always)]
    unsafe fn begin(&self, state: &mut State<S, M>, chunk: usize, quarter: usize) {
        let input = chunk * CHUNK + quarter * 16;
        if BLOCK <= 32 || input.is_multiple_of(self.block()) {
            let zero = self.0.splat_i32(0);
            // SAFETY: as the caller says.
            let start =
                unsafe { start::<S, M>(self.0, self.1.tile, self.block(), input / self.block()) };
            for n in 0..M {
                state.chains[n] = [start[n], zero];
            }
        }
    }

    /// After a quarter: keeps the sums of a block, if one ends here.
    #[inline(always)]
    fn end(&self, layout: &KLayout, state: &mut State<S, M>, chunk: usize, quarter: usize) {
        let (s, next) = (self.0, chunk * CHUNK + quarter * 16 + 16);
        if BLOCK <= 32 || next % self.block() == 0 || next == layout.chunks * CHUNK {
            let dots = &mut state.dots[(next - 1) % SUPER / self.block()];
            for n in 0..M {
                let [a, b] = state.chains[n];
                dots[n] = if M == 1 { s.add_i32(a, b) } else { a };
            }
        }
    }
}
