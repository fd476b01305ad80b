//! Decoding of some chunks of a panel to memory, for many tokens.

use std::marker::PhantomData;
use std::ops::Range;

use kbit_simd::{Simd, SimdOp};
use kbit_tensor::{CHUNK, KLayout};

use super::codes::{Decode, Decoder, with_decode};
use super::scales::Scale;

/// Code vectors of a chunk.
pub(super) const VECTORS: usize = CHUNK / 4;

/// Weights scaled as integers while they are decoded: the second plane so many bytes behind the first.
#[derive(Clone, Copy)]
pub(super) struct Scaled<'a> {
    pub scale: &'a Scale,
    pub apart: usize,
}

/// Lines to ask for while decoding: so many of them, at an even pace.
#[derive(Clone, Copy)]
pub(super) struct Coming {
    pub next: *const u8,
    pub lines: usize,
}

/// Decodes some chunks of a panel: to an address that is 64-byte aligned and has room for 16 weight vectors a chunk.
pub(super) type Unpacker =
    unsafe fn(&Decoder, &KLayout, *const u8, Range<usize>, Option<Scaled<'_>>, Coming, *mut u8);

/// Finds the function that decodes a matrix.
pub(super) struct Find<'a>(pub &'a Decoder);

impl SimdOp for Find<'_> {
    type Output = Unpacker;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> Unpacker {
        let decoder = self.0;
        macro_rules! bits {
            ($bits:tt) => {{
                macro_rules! method {
                    ($D:ty) => {
                        unpack::<S, $D>
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

/// An [`Unpacker`].
///
/// # Safety
/// The chunks are in the panel, which is one of `layout`; `to` as the type says.
unsafe fn unpack<S: Simd, D: Decode<S>>(
    decoder: &Decoder,
    layout: &KLayout,
    panel: *const u8,
    chunks: Range<usize>,
    scaled: Option<Scaled<'_>>,
    coming: Coming,
    to: *mut u8,
) {
    if let Some(s) = S::new() {
        s.run(Unpack::<S, D> {
            s,
            decoder,
            layout,
            panel,
            chunks,
            scaled,
            coming,
            to,
            kind: PhantomData,
        });
    }
}

/// Decoding of some chunks of a panel.
struct Unpack<'a, S: Simd, D: Decode<S>> {
    s: S,
    decoder: &'a Decoder,
    layout: &'a KLayout,
    panel: *const u8,
    chunks: Range<usize>,
    scaled: Option<Scaled<'a>>,
    coming: Coming,
    to: *mut u8,
    kind: PhantomData<D>,
}

impl<S: Simd, D: Decode<S>> SimdOp for Unpack<'_, S, D> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let (s, layout) = (self.s, self.layout);
        let decode = D::new(s, self.decoder);
        let (mut to, Coming { mut next, lines }) = (self.to, self.coming);
        let pairs = self.chunks.len() * VECTORS / 2;
        let mut credit = 0;
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
                        let by = match self.scaled {
                            Some(scaled) if const { S::STORED && !D::FOLDED } => {
                                let block = (chunk * CHUNK + $q * 16) / scaled.scale.block;
                                Some((scaled.scale.sub(s, layout, self.panel, block), scaled.apart))
                            }
                            _ => None,
                        };
                        quarter!($q * 4, by, 0, 2);
                    }};
                    ($g:expr, $by:ident, $($i:literal),*) => { $(
                        credit += lines;
                        while credit >= pairs {
                            credit -= pairs;
                            s.prefetch_far(next);
                            next = next.wrapping_add(64);
                        }
                        let w = [
                            decode.vector::<{ $g + $i }>(s, &block, codes),
                            decode.vector::<{ $g + $i + 1 }>(s, &block, codes),
                        ];
                        let here = to.add(($g + $i) * S::WEIGHT_BYTES);
                        if let Some((by, apart)) = $by {
                            // Written out: what a closure holds is not always compiled for the instruction set.
                            let w = [s.scale(w[0], by), s.scale(w[1], by)];
                            s.store_pair([w[0][0], w[1][0]], here);
                            s.store_pair([w[0][1], w[1][1]], here.add(apart));
                        } else {
                            s.store_pair(w, here);
                        }
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
