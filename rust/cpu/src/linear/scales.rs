//! From exact int32 sums to f32, in the one order `docs/numerics.md` section 3 fixes, for every scale kind.

use std::mem::MaybeUninit;

use kbit_simd::{LANES, Simd, SimdOp};
use kbit_tensor::{KLayout, KTensor, Offset, SUPER, ScaleType, Scales, SubScale};

use crate::acts::{SUMS, Tile, sum_at};

/// What is done at the end of a block.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// One bf16 per 256 inputs.
    Wide,
    /// One float per block.
    Float { scale: ScaleType, offset: Offset },
    /// Integers per block under floats per 256 inputs.
    Super { sub: SubScale, min: bool },
}

/// The scale kind of a matrix, as kernels use it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    kind: Kind,
    /// Inputs of a block; 256 for the wide kinds.
    pub block: usize,
    /// Inputs of a ladder block, for the name.
    ladder: usize,
    /// What is taken from a stored zero point.
    zero_shift: i32,
}

impl Scale {
    pub(super) fn of(weight: &KTensor) -> Self {
        let zero_shift = if weight.bits() == 8 { 128 } else { 0 };
        let (kind, block, ladder) = match *weight.scales() {
            Scales::Ladder { block, .. } => (Kind::Wide, SUPER, block),
            Scales::Row => (Kind::Wide, SUPER, 0),
            Scales::Block {
                block,
                scale,
                offset,
            } => (Kind::Float { scale, offset }, block, 0),
            Scales::Super { block, sub, min } => (Kind::Super { sub, min }, block, 0),
        };
        Self {
            kind,
            block,
            ladder,
            zero_shift,
        }
    }

    /// Whether kernels need the sums of activations of each block.
    pub(super) fn wants_sums(&self) -> bool {
        !matches!(self.kind, Kind::Wide)
    }

    /// The const parameter of kernels: 16, 32, 64 for anything longer, 256 for the wide kinds.
    pub(super) fn unrolled(&self) -> usize {
        if self.wants_sums() {
            self.block.min(64)
        } else {
            SUPER
        }
    }

    /// For traces.
    pub(super) fn name(&self) -> String {
        match self.kind {
            Kind::Wide if self.ladder > 0 => format!("ladder{}", self.ladder),
            Kind::Wide => "row".into(),
            Kind::Float { scale, offset } => format!("block{} {scale:?} {offset:?}", self.block),
            Kind::Super { sub, min } => format!(
                "super{} {sub:?}{}",
                self.block,
                if min { " min" } else { "" }
            ),
        }
        .to_lowercase()
    }
}

/// 16 of something at an address.
///
/// # Safety
/// They are readable and aligned for `T`.
#[inline(always)]
unsafe fn sixteen<'a, T>(at: *const u8) -> &'a [T; LANES] {
    // SAFETY: as the caller says.
    unsafe { &*at.cast() }
}

/// The scales of 16 rows.
///
/// # Safety
/// `at` is good for 16 of them.
#[inline(always)]
unsafe fn load_scale<S: Simd>(s: S, kind: ScaleType, at: *const u8) -> S::F32 {
    // SAFETY: as the caller says; sections and their entries are aligned to 16 bytes.
    unsafe {
        match kind {
            ScaleType::F16 => s.load_f16(sixteen(at)),
            ScaleType::BF16 => s.load_bf16(sixteen(at)),
            ScaleType::F32 => s.load(sixteen(at)),
            ScaleType::E8M0 => {
                let e = s.of_bits(s.shl_i32(s.load_u8(sixteen(at)), 23));
                let least = s.max(e, s.of_bits(s.splat_i32(0x0040_0000)));
                s.select(s.lt(s.splat(f32::MAX), e), s.splat(f32::NAN), least)
            }
        }
    }
}

/// Where the dot products of block `block` of `inputs` inputs start.
///
/// # Safety
/// `tile` is one of `M` tokens, padding included, and holds the sums of that block.
#[inline(always)]
pub(super) unsafe fn start<S: Simd, const M: usize>(
    s: S,
    tile: &Tile,
    inputs: usize,
    block: usize,
) -> [S::I32; M] {
    let mut start = [s.splat_i32(0); M];
    if S::BIAS != 0 {
        let at = tile.starts.wrapping_add(sum_index(tile, inputs, block) * M);
        for n in 0..M {
            // SAFETY: as the caller says.
            start[n] = s.splat_i32(unsafe { *at.add(n) });
        }
    }
    start
}

/// Takes the dot product of super-block `sup` in the wide kinds.
///
/// # Safety
/// `panel` is one of `layout`; `tile` is one of `M` tokens, padding included.
#[inline(always)]
pub(super) unsafe fn settle_wide<S: Simd, const M: usize>(
    s: S,
    layout: &KLayout,
    panel: *const u8,
    tile: &Tile,
    sup: usize,
    dots: &[S::I32; M],
    y: &mut [S::F32; M],
) {
    // SAFETY: the wide section has 16 bf16 a super-block, the tile M scales.
    unsafe {
        let sw = s.load_bf16(sixteen(panel.add(sup * layout.wide_bytes)));
        for n in 0..M {
            let scale = s.mul(sw, s.splat(*tile.scales.add(sup * M + n)));
            y[n] = s.fma(s.to_f32(dots[n]), scale, y[n]);
        }
    }
}

/// Most blocks of a super-block.
pub(super) const BLOCKS: usize = 16;

/// Takes the dot products of all blocks of super-block `sup` into the results of a panel: one function for all kinds and numbers of tokens, beside the kernels, so that those stay small.
pub(super) struct Settle<'a, S: Simd> {
    pub s: S,
    pub scale: &'a Scale,
    pub layout: &'a KLayout,
    pub panel: *const u8,
    pub tile: &'a Tile,
    pub sup: usize,
    /// \[block of the super-block\]\[token\].
    pub dots: &'a [S::I32],
    /// \[token\].
    pub y: &'a mut [S::F32],
}

impl<S: Simd> SimdOp for Settle<'_, S> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self {
            s,
            scale,
            layout,
            panel,
            tile,
            sup,
            dots,
            y,
        } = self;
        let per = SUPER / scale.block;
        let (first, blocks) = (sup * per, per.min(layout.blocks - sup * per));
        let m = y.len();
        let row = |j: usize| (first + j) * LANES;
        let sums = tile
            .sums
            .wrapping_add(sum_index(tile, scale.block, first) * m);
        // Of the blocks of the super-block; only what the kind uses is set, and only that is read.
        let (mut factors, mut minima) = (
            [MaybeUninit::<S::F32>::uninit(); BLOCKS],
            [MaybeUninit::<S::F32>::uninit(); BLOCKS],
        );
        let (mut subs, mut offsets) = (
            [MaybeUninit::<S::I32>::uninit(); BLOCKS],
            [MaybeUninit::<S::I32>::uninit(); BLOCKS],
        );
        // SAFETY: all sections are indexed as `KLayout` lays them out, the tile as `acts.rs` does.
        unsafe {
            let (fine, more) = (panel.add(layout.fine_at), panel.add(layout.offset_at));
            match scale.kind {
                Kind::Wide => {
                    let sw = s.load_bf16(sixteen(panel.add(sup * layout.wide_bytes)));
                    for n in 0..m {
                        let factor = s.mul(sw, s.splat(*tile.scales.add(sup * m + n)));
                        y[n] = s.fma(s.to_f32(dots[n]), factor, y[n]);
                    }
                }
                Kind::Float {
                    scale: kind,
                    offset,
                } => {
                    for j in 0..blocks {
                        factors[j].write(load_scale(s, kind, fine.add(row(j) * kind.size())));
                        match offset {
                            Offset::None => {}
                            Offset::Min => {
                                minima[j].write(load_scale(
                                    s,
                                    kind,
                                    more.add(row(j) * kind.size()),
                                ));
                            }
                            Offset::Zero => {
                                let zero = s.load_u8(sixteen(more.add(row(j))));
                                offsets[j].write(s.sub_i32(zero, s.splat_i32(scale.zero_shift)));
                            }
                        }
                    }
                    for n in 0..m {
                        let sa = s.splat(*tile.scales.add(sup * m + n));
                        let mut sum = y[n];
                        for j in 0..blocks {
                            let mut dot = dots[j * m + n];
                            let asum = *sums.add(j * m + n);
                            if offset == Offset::Zero {
                                dot = s.sub_i32(
                                    dot,
                                    s.mul_i32(offsets[j].assume_init(), s.splat_i32(asum)),
                                );
                            }
                            sum = s.fma(s.to_f32(dot), s.mul(factors[j].assume_init(), sa), sum);
                            if offset == Offset::Min {
                                sum = s.fma(
                                    s.splat(asum as f32),
                                    s.mul(minima[j].assume_init(), sa),
                                    sum,
                                );
                            }
                        }
                        y[n] = sum;
                    }
                }
                Kind::Super { sub, min } => {
                    for j in 0..blocks {
                        let at = fine.add(row(j));
                        subs[j].write(match sub {
                            SubScale::U8 => s.load_u8(sixteen(at)),
                            SubScale::I8 => s.load_i8(sixteen(at)),
                            SubScale::U4 => s.and_i32(s.load_u8(sixteen(at)), s.splat_i32(15)),
                        });
                        if min {
                            offsets[j].write(match sub {
                                SubScale::U4 => s.shr_i32(s.load_u8(sixteen(at)), 4),
                                _ => s.load_u8(sixteen(more.add(row(j)))),
                            });
                        }
                    }
                    let wide = panel.add(sup * layout.wide_bytes);
                    let d = s.load_f16(sixteen(wide));
                    for n in 0..m {
                        let sa = s.splat(*tile.scales.add(sup * m + n));
                        let mut isum = s.splat_i32(0);
                        for j in 0..blocks {
                            isum =
                                s.add_i32(isum, s.mul_i32(subs[j].assume_init(), dots[j * m + n]));
                        }
                        y[n] = s.fma(s.to_f32(isum), s.mul(d, sa), y[n]);
                        if min {
                            let mut msum = s.splat_i32(0);
                            for j in 0..blocks {
                                let asum = s.splat_i32(*sums.add(j * m + n));
                                msum = s.add_i32(msum, s.mul_i32(offsets[j].assume_init(), asum));
                            }
                            let dmin = s.mul(s.load_f16(sixteen(wide.add(32))), sa);
                            y[n] = s.fma(s.to_f32(msum), s.neg(dmin), y[n]);
                        }
                    }
                }
            }
        }
    }
}

/// Index of the sum of a block among those of a tile, in tokens.
#[inline(always)]
fn sum_index(tile: &Tile, inputs: usize, block: usize) -> usize {
    let per = SUPER / inputs;
    let at = if tile.per_super == SUMS {
        sum_at(inputs)
    } else {
        0
    };
    block / per * tile.per_super + at + block % per
}
