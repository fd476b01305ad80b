//! Matrix products: `y = W x` for k-bit and dense W and any number of tokens, exactly as `docs/numerics.md` says.
//!
//! ```text
//! Matrix::prepare(weight)      once: tables, or 16-row panels of a dense array
//! Acts::reserve, Acts::fill    per step: input rows in the form Matrix::input() names
//! Matrix::run(acts, panels)    any thread, any range of 16-row panels
//! ```
//!
//! | file | what |
//! |---|---|
//! | `codes.rs` | a code vector of 16 rows x 4 inputs out of bit planes, as int8 weights |
//! | `scales.rs` | from exact int32 sums to f32: one function for every scale kind and kernel |
//! | `direct.rs` | one token or a few: decode in registers, read every weight once |
//! | `tiles.rs` | more tokens: decode some super-blocks into the first cache, multiply them with every tile of tokens |
//! | `stored.rs` | the same with matrix tiles, whose sums lie in memory |
//! | `unpack.rs` | decoding to memory |
//! | `out.rs` | where results go, and the epilogue on the way there |
//! | `float.rs` | dense weights, f32 codebooks and f32 activations |
//! | `trace.rs` | which kernels ran |

mod codes;
mod direct;
mod float;
pub(crate) mod out;
mod scales;
mod stored;
mod tiles;
pub mod trace;
mod unpack;

use std::ops::Range;

use kbit_simd::{Book, Simd, SimdOp, dispatch};
use kbit_tensor::program::Activations;
use kbit_tensor::{Codebook, KTensor, ROWS, Result, Scales, Weight};

use crate::acts::{Acts, Form, Input};
use codes::Decoder;
use float::Dense;
use out::{Finish, Out, Target};
use scales::Scale;

/// A weight, ready to be multiplied.
#[derive(Debug)]
pub struct Matrix {
    store: Store,
    input: Input,
    rows: usize,
    inputs: usize,
}

#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one a matrix; a box would cost a hop for every item of work"
)]
enum Store {
    /// Int8 path: panels as stored.
    Codes {
        weight: KTensor,
        decoder: Decoder,
        scale: Scale,
    },
    /// Float path of a k-bit matrix.
    Floats(KTensor),
    /// Float path of an array.
    Dense(Dense),
}

impl Matrix {
    /// Binds a weight of shape (out_features, in_features). K-bit panels are used where they lie; dense arrays are copied
    /// into panels of 16 rows in their own type (f32, f16, bf16; others as f32).
    ///
    /// # Errors
    /// [`Error::Format`](kbit_tensor::Error::Format) for arrays that are not matrices,
    /// [`Error::Memory`](kbit_tensor::Error::Memory) without room for panels.
    pub fn prepare(weight: &Weight, activations: Activations) -> Result<Self> {
        match weight {
            Weight::Dense(array) => {
                let dense = Dense::new(array)?;
                let (rows, inputs) = (dense.rows, dense.inputs);
                let input = Input {
                    form: Form::F32,
                    inputs,
                    permutation: None,
                };
                Ok(Self {
                    store: Store::Dense(dense),
                    input,
                    rows,
                    inputs,
                })
            }
            Weight::Quantised(k) => {
                let (rows, inputs) = (k.rows(), k.inputs());
                let (store, form) = match (k.codebook(), activations) {
                    (Codebook::I8(codebook), Activations::Int8) => {
                        let ladder = match k.scales() {
                            Scales::Ladder { ladder, .. } => *ladder,
                            _ => [128; 16],
                        };
                        let scale = Scale::of(k);
                        let decoder = Decoder::new(Book::new(k.bits(), codebook, ladder), k);
                        let form = Form::Int8 {
                            sums: scale.wants_sums(),
                            direct: direct::most(&decoder, &scale),
                            tiles: scale.tiles_from(decoder.bits),
                        };
                        (
                            Store::Codes {
                                weight: k.clone(),
                                decoder,
                                scale,
                            },
                            form,
                        )
                    }
                    _ => (Store::Floats(k.clone()), Form::F32),
                };
                let permutation = k.permutation().cloned();
                Ok(Self {
                    store,
                    input: Input {
                        form,
                        inputs,
                        permutation,
                    },
                    rows,
                    inputs,
                })
            }
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Panels of 16 rows: the unit in which threads share the work.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// What is stored from a panel on: what a stream from there reads.
    pub(crate) fn stream(&self, panel: usize) -> &[u8] {
        match &self.store {
            Store::Codes { weight, .. } | Store::Floats(weight) => {
                &weight.bytes()[panel * weight.layout().panel_bytes..]
            }
            Store::Dense(dense) => dense.stream(panel),
        }
    }

    /// What [`Acts`] must hold for this matrix. Matrices with equal inputs can share them.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Bytes read when every weight is used once.
    pub fn nbytes(&self) -> usize {
        match &self.store {
            Store::Codes { weight, .. } | Store::Floats(weight) => weight.nbytes(),
            Store::Dense(dense) => dense.nbytes(),
        }
    }

    /// Writes output features `16 * panels.start .. 16 * panels.end` (as far as there are) of some tokens:
    /// feature r of token t at `out + t * stride + r`. The result does not depend on how tokens and panels are split.
    ///
    /// # Panics
    /// When `acts` were made for another [`Input`], `panels` are out of range or `tokens` begin or end inside a tile: multiples of
    /// [`WHOLE_TILES`](crate::acts::WHOLE_TILES) do not.
    ///
    /// # Safety
    /// Those places are writable and no other thread uses them; `acts` are filled.
    pub unsafe fn run(
        &self,
        acts: &Acts,
        tokens: Range<usize>,
        panels: Range<usize>,
        out: *mut f32,
        stride: usize,
    ) {
        let to = Target { at: out, stride };
        // SAFETY: as the caller says.
        unsafe { self.run_into(acts, tokens, panels, to, Finish::STORE) };
    }

    /// [`Matrix::run`] with an epilogue: each output finished and stored while it is at hand.
    ///
    /// # Panics
    /// As there, and when `finish` does not fit the matrix.
    ///
    /// # Safety
    /// As there. What the epilogue adds to, or the gate, was written before at the same places.
    pub(crate) unsafe fn run_into(
        &self,
        acts: &Acts,
        tokens: Range<usize>,
        panels: Range<usize>,
        to: Target,
        finish: Finish<'_>,
    ) {
        assert!(
            *acts.input() == self.input,
            "activations made for {:?}, wanted {:?}",
            acts.input(),
            self.input
        );
        assert!(
            panels.end <= self.panels(),
            "panels {panels:?} of {}",
            self.panels()
        );
        let tiles = acts.tiles_of(tokens);
        if panels.is_empty() || tiles.is_empty() {
            return;
        }
        if panels.start == 0 && tiles.start == 0 {
            // A product counts once, however threads share its panels and tokens.
            trace::count(|| format!("{} {} m{}", self.kind(), acts.isa(), acts.tokens()));
        }
        let out = Out::new(to, self.rows, finish);
        let isa = acts.isa();
        match &self.store {
            Store::Codes {
                weight,
                decoder,
                scale,
            } => dispatch(
                isa,
                Codes {
                    source: codes::Panels::new(weight),
                    decoder,
                    scale,
                    acts,
                    tiles,
                    panels,
                    out,
                },
            ),
            Store::Floats(weight) => {
                let source = float::Source::Quantised(weight);
                dispatch(isa, Floats(source, acts, tiles, panels, out));
            }
            Store::Dense(dense) => {
                let source = float::Source::Dense(dense);
                dispatch(isa, Floats(source, acts, tiles, panels, out));
            }
        }
    }

    /// All of [`Matrix::run`] on this thread: `x` (tokens, inputs), gives (tokens, rows).
    ///
    /// # Errors
    /// [`Error::Memory`](kbit_tensor::Error::Memory) without room for activations.
    pub fn multiply(&self, isa: kbit_simd::Isa, x: &[f32]) -> Result<Vec<f32>> {
        let tokens = x.len() / self.inputs;
        let mut acts = Acts::new()?;
        acts.reserve(isa, &self.input, tokens)?;
        acts.fill_all(x, self.inputs);
        let mut out = vec![0.0; tokens * self.rows];
        // SAFETY: `out` has a place for every token and row, and only this thread writes.
        unsafe {
            self.run(
                &acts,
                0..tokens,
                0..self.panels(),
                out.as_mut_ptr(),
                self.rows,
            );
        };
        Ok(out)
    }

    /// For traces: width and scale kind.
    fn kind(&self) -> String {
        match &self.store {
            Store::Codes { weight, scale, .. } => format!("k{} {}", weight.bits(), scale.name()),
            Store::Floats(weight) => format!("k{} float", weight.bits()),
            Store::Dense(dense) => format!("dense {}", dense.dtype.name()),
        }
    }
}

/// The int8 path.
struct Codes<'a> {
    source: codes::Panels<'a>,
    decoder: &'a Decoder,
    scale: &'a Scale,
    acts: &'a Acts,
    tiles: Range<usize>,
    panels: Range<usize>,
    out: Out<'a>,
}

impl SimdOp for Codes<'_> {
    type Output = ();
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        if const { S::DIRECT > 0 } && self.acts.are_few() {
            let tile = self.acts.tile(0);
            direct::run(
                s,
                &self.source,
                self.decoder,
                self.scale,
                tile,
                self.panels,
                self.out,
            );
        } else {
            tiles::run(s, self);
        }
    }
}

/// The float path.
struct Floats<'a>(
    float::Source<'a>,
    &'a Acts,
    Range<usize>,
    Range<usize>,
    Out<'a>,
);

impl SimdOp for Floats<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self(source, acts, tiles, panels, out) = self;
        float::run(s, &source, acts, tiles, panels, out);
    }
}
