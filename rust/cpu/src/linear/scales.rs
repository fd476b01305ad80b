//! From exact int32 sums to f32, in the one order `docs/numerics.md` section 3 fixes, for every scale kind.

use kbit_simd::{LANES, Simd};
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

/// Running results of `P` panels by `M` tokens.
pub(super) struct Sums<S: Simd, const P: usize, const M: usize> {
    pub y: [[S::F32; M]; P],
    /// Of sub-scales times dots and of minima times activation sums, over a super-block.
    scaled: [[S::I32; M]; P],
    minima: [[S::I32; M]; P],
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
                let mut all = [0.0; LANES];
                for (to, &e) in all.iter_mut().zip(sixteen::<u8>(at)) {
                    *to = ScaleType::E8M0.read(&[e]);
                }
                s.load(&all)
            }
        }
    }
}

impl<S: Simd, const P: usize, const M: usize> Sums<S, P, M> {
    #[inline(always)]
    pub(super) fn new(s: S) -> Self {
        Self {
            y: [[s.splat(0.0); M]; P],
            scaled: [[s.splat_i32(0); M]; P],
            minima: [[s.splat_i32(0); M]; P],
        }
    }

    /// Where the dot products of block `block` of `inputs` inputs start, for the panels of a token alike.
    ///
    /// # Safety
    /// `tile` holds the sums of that block.
    #[inline(always)]
    pub(super) unsafe fn start(s: S, tile: &Tile, inputs: usize, block: usize) -> [S::I32; M] {
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

    /// Takes the dot products of block `block`; in the wide kinds a block is a super-block.
    ///
    /// # Safety
    /// `panels` are panels of `layout`, `tile` holds the sums of that block.
    #[inline(always)]
    pub(super) unsafe fn settle<const BLOCK: usize>(
        &mut self,
        s: S,
        scale: &Scale,
        layout: &KLayout,
        panels: &[*const u8; P],
        tile: &Tile,
        block: usize,
        dots: &[[S::I32; M]; P],
    ) {
        // SAFETY: all sections are indexed as `KLayout` lays them out, the tile as `acts.rs` does.
        unsafe {
            let sums = tile
                .sums
                .wrapping_add(sum_index(tile, scale.block, block) * M);
            let kind = if BLOCK == SUPER {
                Kind::Wide
            } else {
                scale.kind
            };
            match kind {
                Kind::Float {
                    scale: kind,
                    offset,
                } => {
                    let scales = tile.scales.wrapping_add(block * scale.block / SUPER * M);
                    for p in 0..P {
                        let row = block * LANES;
                        let sw =
                            load_scale(s, kind, panels[p].add(layout.fine_at + row * kind.size()));
                        let offsets = panels[p].wrapping_add(layout.offset_at);
                        for n in 0..M {
                            let sa = s.splat(*scales.add(n));
                            let mut dot = dots[p][n];
                            if offset == Offset::Zero {
                                let zero = s.load_u8(sixteen(offsets.add(row)));
                                let zero = s.sub_i32(zero, s.splat_i32(scale.zero_shift));
                                dot = s.sub_i32(dot, s.mul_i32(zero, s.splat_i32(*sums.add(n))));
                            }
                            self.y[p][n] = s.fma(s.to_f32(dot), s.mul(sw, sa), self.y[p][n]);
                            if offset == Offset::Min {
                                let min = load_scale(s, kind, offsets.add(row * kind.size()));
                                let asum = s.splat(*sums.add(n) as f32);
                                self.y[p][n] = s.fma(asum, s.mul(min, sa), self.y[p][n]);
                            }
                        }
                    }
                }
                Kind::Super { sub, min } => {
                    for p in 0..P {
                        let fine = panels[p].add(layout.fine_at + block * LANES);
                        let (sub, minimum) = match sub {
                            SubScale::U8 => (s.load_u8(sixteen(fine)), None),
                            SubScale::I8 => (s.load_i8(sixteen(fine)), None),
                            SubScale::U4 => {
                                let both = s.load_u8(sixteen(fine));
                                (s.and_i32(both, s.splat_i32(15)), Some(s.shr_i32(both, 4)))
                            }
                        };
                        for n in 0..M {
                            self.scaled[p][n] =
                                s.add_i32(self.scaled[p][n], s.mul_i32(sub, dots[p][n]));
                        }
                        if min {
                            let minimum = match minimum {
                                Some(m) => m,
                                None => s.load_u8(sixteen(
                                    panels[p].add(layout.offset_at + block * LANES),
                                )),
                            };
                            for n in 0..M {
                                let part = s.mul_i32(minimum, s.splat_i32(*sums.add(n)));
                                self.minima[p][n] = s.add_i32(self.minima[p][n], part);
                            }
                        }
                    }
                }
                Kind::Wide => {
                    let scales = tile.scales.wrapping_add(block * M);
                    for p in 0..P {
                        let sw = s.load_bf16(sixteen(panels[p].add(block * layout.wide_bytes)));
                        for n in 0..M {
                            let scale = s.mul(sw, s.splat(*scales.add(n)));
                            self.y[p][n] = s.fma(s.to_f32(dots[p][n]), scale, self.y[p][n]);
                        }
                    }
                }
            }
        }
    }

    /// Ends super-block `sup`.
    ///
    /// # Safety
    /// As [`Sums::settle`].
    #[inline(always)]
    pub(super) unsafe fn end_super<const BLOCK: usize>(
        &mut self,
        s: S,
        scale: &Scale,
        layout: &KLayout,
        panels: &[*const u8; P],
        tile: &Tile,
        sup: usize,
    ) {
        let Kind::Super { min, .. } = scale.kind else {
            return;
        };
        if BLOCK == SUPER {
            return;
        }
        // SAFETY: the wide section has one or two f16 of 16 rows per super-block.
        unsafe {
            let scales = tile.scales.wrapping_add(sup * M);
            for p in 0..P {
                let wide = panels[p].add(sup * layout.wide_bytes);
                let d = s.load_f16(sixteen(wide));
                for n in 0..M {
                    let sa = s.splat(*scales.add(n));
                    self.y[p][n] = s.fma(s.to_f32(self.scaled[p][n]), s.mul(d, sa), self.y[p][n]);
                    self.scaled[p][n] = s.splat_i32(0);
                    if min {
                        let dmin = s.neg(s.mul(s.load_f16(sixteen(wide.add(32))), sa));
                        self.y[p][n] = s.fma(s.to_f32(self.minima[p][n]), dmin, self.y[p][n]);
                        self.minima[p][n] = s.splat_i32(0);
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
