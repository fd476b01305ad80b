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

    /// Tokens from which matrix tiles are faster than reading every weight once and decoding it in registers (`docs/performance.md`, *AMX*). Blocks of
    /// 32 inputs under floats fill half a tile; those of 16 would fill a quarter.
    pub(super) fn tiles_from(&self, bits: usize) -> Option<usize> {
        match self.step() {
            SUPER if self.ladder > 0 && bits <= 4 => Some(3),
            64.. => Some(5),
            32 => Some(9),
            _ => None,
        }
    }

    /// Inputs that one product of matrix tiles is over: those of a scale, or of a super-block where weights were scaled before.
    pub(super) fn step(&self) -> usize {
        if self.has_subs() { SUPER } else { self.block }
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

impl Scale {
    /// Whether dot products are weighed as integers before they meet a float.
    pub(super) fn has_subs(&self) -> bool {
        matches!(self.kind, Kind::Super { .. })
    }

    /// The integer scales of a block.
    ///
    /// # Safety
    /// `panel` is one of `layout` and `block` one of its blocks.
    #[inline(always)]
    pub(super) unsafe fn sub<S: Simd>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        block: usize,
    ) -> S::I32 {
        let at = panel.wrapping_add(layout.fine_at + block * LANES);
        // SAFETY: the fine section has 16 bytes a block.
        unsafe {
            match self.kind {
                Kind::Super {
                    sub: SubScale::I8, ..
                } => s.load_i8(sixteen(at)),
                Kind::Super {
                    sub: SubScale::U4, ..
                } => s.and_i32(s.load_u8(sixteen(at)), s.splat_i32(15)),
                _ => s.load_u8(sixteen(at)),
            }
        }
    }

    /// The integer minima of a block.
    ///
    /// # Safety
    /// As [`Scale::sub`], where there are minima.
    #[inline(always)]
    unsafe fn sub_min<S: Simd>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        block: usize,
    ) -> S::I32 {
        // SAFETY: sections have 16 bytes a block.
        unsafe {
            match self.kind {
                Kind::Super {
                    sub: SubScale::U4, ..
                } => s.shr_i32(
                    s.load_u8(sixteen(panel.add(layout.fine_at + block * LANES))),
                    4,
                ),
                _ => s.load_u8(sixteen(panel.add(layout.offset_at + block * LANES))),
            }
        }
    }

    /// The float scales, or minima, of a block.
    ///
    /// # Safety
    /// As [`Scale::sub`]; `section` is where they lie in a panel.
    #[inline(always)]
    unsafe fn float<S: Simd>(
        s: S,
        kind: ScaleType,
        panel: *const u8,
        section: usize,
        block: usize,
    ) -> S::F32 {
        // SAFETY: the section has 16 of them a block.
        unsafe { load_scale(s, kind, panel.add(section + block * LANES * kind.size())) }
    }

    /// The zero points of a block.
    ///
    /// # Safety
    /// As [`Scale::sub`], where there are zero points.
    #[inline(always)]
    unsafe fn zero<S: Simd>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        block: usize,
    ) -> S::I32 {
        // SAFETY: the section has 16 bytes a block.
        let stored = s.load_u8(unsafe { sixteen(panel.add(layout.offset_at + block * LANES)) });
        s.sub_i32(stored, s.splat_i32(self.zero_shift))
    }
}

/// What [`Settle`] does, block by block inside a kernel for many tokens. Sums and results are variables of the kernel, which says what of them stays in
/// registers: as fields of something all would be stored with every block.
impl Scale {
    /// Weighs the dot products of one block as integers, where it [`has_subs`](Scale::has_subs).
    ///
    /// # Safety
    /// As [`Scale::sub`].
    #[inline(always)]
    pub(super) unsafe fn weigh<S: Simd, const M: usize>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        block: usize,
        dots: &[S::I32; M],
        weighed: &mut [S::I32; M],
    ) {
        // SAFETY: as the caller says.
        let sub = unsafe { self.sub(s, layout, panel, block) };
        for n in 0..M {
            weighed[n] = s.add_i32(weighed[n], s.mul_i32(sub, dots[n]));
        }
    }

    /// Takes the dot products of one block under a float into the results.
    ///
    /// # Safety
    /// `panel` is one of `layout`, `block` one of its blocks, `tile` one of `M` tokens.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd, const M: usize>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        tile: &Tile,
        block: usize,
        dots: &[S::I32; M],
        y: &mut [S::F32; M],
    ) {
        let Kind::Float {
            scale: kind,
            offset,
        } = self.kind
        else {
            return;
        };
        // SAFETY: sections are indexed as `KLayout` lays them out, the tile as `acts.rs` does.
        unsafe {
            let factor = Scale::float(s, kind, panel, layout.fine_at, block);
            let sa = tile.scales.add(block * self.block / SUPER * M);
            let sums = tile
                .sums
                .wrapping_add(sum_index(tile, self.block, block) * M);
            match offset {
                Offset::None => {
                    for n in 0..M {
                        let factor = s.mul(factor, s.splat(*sa.add(n)));
                        y[n] = s.fma(s.to_f32(dots[n]), factor, y[n]);
                    }
                }
                Offset::Zero => {
                    let zero = self.zero(s, layout, panel, block);
                    for n in 0..M {
                        let shift = s.mul_i32(zero, s.splat_i32(*sums.add(n)));
                        let factor = s.mul(factor, s.splat(*sa.add(n)));
                        let dot = s.to_f32(s.sub_i32(dots[n], shift));
                        y[n] = s.fma(dot, factor, y[n]);
                    }
                }
                Offset::Min => {
                    let least = Scale::float(s, kind, panel, layout.offset_at, block);
                    for n in 0..M {
                        let sa = s.splat(*sa.add(n));
                        let sum = s.fma(s.to_f32(dots[n]), s.mul(factor, sa), y[n]);
                        let asum = s.splat(*sums.add(n) as f32);
                        y[n] = s.fma(asum, s.mul(least, sa), sum);
                    }
                }
            }
        }
    }

    /// Takes what was [`weighed`](Scale::weigh) of the blocks of super-block `sup` into the results.
    ///
    /// # Safety
    /// As [`Scale::add`].
    #[inline(always)]
    pub(super) unsafe fn settle<S: Simd, const M: usize>(
        &self,
        s: S,
        layout: &KLayout,
        panel: *const u8,
        tile: &Tile,
        sup: usize,
        weighed: &[S::I32; M],
        y: &mut [S::F32; M],
    ) {
        let Kind::Super { min, .. } = self.kind else {
            return;
        };
        let per = SUPER / self.block;
        let blocks = sup * per..layout.blocks.min(sup * per + per);
        // SAFETY: as the caller says.
        unsafe {
            let wide = panel.add(sup * layout.wide_bytes);
            let d = s.load_f16(sixteen(wide));
            let sa = tile.scales.add(sup * M);
            for n in 0..M {
                let d = s.mul(d, s.splat(*sa.add(n)));
                y[n] = s.fma(s.to_f32(weighed[n]), d, y[n]);
            }
            if min {
                let mut least = [s.splat_i32(0); M];
                for block in blocks {
                    let minima = self.sub_min(s, layout, panel, block);
                    let sums = tile
                        .sums
                        .wrapping_add(sum_index(tile, self.block, block) * M);
                    for n in 0..M {
                        let asum = s.splat_i32(*sums.add(n));
                        least[n] = s.add_i32(least[n], s.mul_i32(minima, asum));
                    }
                }
                let dmin = s.load_f16(sixteen(wide.add(32)));
                for n in 0..M {
                    let dmin = s.neg(s.mul(dmin, s.splat(*sa.add(n))));
                    y[n] = s.fma(s.to_f32(least[n]), dmin, y[n]);
                }
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
            match scale.kind {
                Kind::Wide => unreachable!("settle_wide takes these"),
                Kind::Float {
                    scale: kind,
                    offset,
                } => {
                    for j in 0..blocks {
                        let block = first + j;
                        factors[j].write(Scale::float(s, kind, panel, layout.fine_at, block));
                        match offset {
                            Offset::None => {}
                            Offset::Min => {
                                let least = Scale::float(s, kind, panel, layout.offset_at, block);
                                minima[j].write(least);
                            }
                            Offset::Zero => {
                                offsets[j].write(scale.zero(s, layout, panel, block));
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
                Kind::Super { min, .. } => {
                    for j in 0..blocks {
                        subs[j].write(scale.sub(s, layout, panel, first + j));
                        if min {
                            offsets[j].write(scale.sub_min(s, layout, panel, first + j));
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
