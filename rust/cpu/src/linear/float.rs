//! The float path (`docs/numerics.md` section 4): dense weights, f32 codebooks, f32 activations. Weights become an f32 tile
//! of 16 rows; each row and token has four chains of fused multiply-adds, by input mod 4.

use std::cell::RefCell;
use std::ops::Range;

use kbit_simd::{LANES, Simd, SimdOp};
use kbit_tensor::{
    Bytes, CHUNK, Codebook, DType, Error, KTensor, Offset, ROWS, Result, SUPER, Scales, SubScale,
    Tensor,
};

use super::Out;
use crate::acts::{Acts, Tile};

/// An array in panels of 16 rows: [panels][inputs][16 rows], missing rows zero.
#[derive(Debug)]
pub(super) struct Dense {
    pub dtype: DType,
    pub rows: usize,
    pub inputs: usize,
    panels: Bytes,
}

impl Dense {
    pub(super) fn new(array: &Tensor) -> Result<Self> {
        let &[rows, inputs] = array.shape() else {
            return Err(Error::Format(format!(
                "a matrix wants two dimensions, has shape {:?}",
                array.shape()
            )));
        };
        let dtype = match array.dtype() {
            d @ (DType::F16 | DType::BF16) => d,
            _ => DType::F32,
        };
        let converted = (dtype != array.dtype()).then(|| array.to_f32());
        let (from, size): (&[u8], _) = (
            converted
                .as_deref()
                .map_or(array.bytes(), bytemuck::cast_slice),
            dtype.size(),
        );
        let mut panels = Bytes::zeroed(rows.div_ceil(ROWS) * ROWS * inputs * size)?;
        for (row, values) in from.chunks_exact(inputs.max(1) * size).enumerate() {
            let at = row / ROWS * ROWS * inputs * size + row % ROWS * size;
            for (i, value) in values.chunks_exact(size).enumerate() {
                panels[at + i * ROWS * size..][..size].copy_from_slice(value);
            }
        }
        Ok(Self {
            dtype,
            rows,
            inputs,
            panels,
        })
    }

    pub(super) fn nbytes(&self) -> usize {
        self.panels.len()
    }

    /// What is stored from a panel on.
    pub(super) fn stream(&self, panel: usize) -> &[u8] {
        &self.panels[panel * self.inputs * ROWS * self.dtype.size()..]
    }

    /// The 16 rows of one input.
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, panel: usize, input: usize) -> S::F32 {
        let size = self.dtype.size();
        let at = self.panels[(panel * self.inputs + input) * ROWS * size..][..ROWS * size].as_ptr();
        // SAFETY: 16 values were just sliced; panels start on 64 bytes.
        unsafe {
            match self.dtype {
                DType::F16 => s.load_f16(&*at.cast()),
                DType::BF16 => s.load_bf16(&*at.cast()),
                _ => s.load(&*at.cast()),
            }
        }
    }
}

/// Where weights come from.
pub(super) enum Source<'a> {
    Quantised(&'a KTensor),
    Dense(&'a Dense),
}

thread_local! {
    static SCRATCH: RefCell<Vec<[f32; LANES]>> = const { RefCell::new(Vec::new()) };
}

/// Panels `panels` for some tiles of tokens.
#[inline(always)]
pub(super) fn run<S: Simd>(
    s: S,
    source: &Source<'_>,
    acts: &Acts,
    tiles: Range<usize>,
    panels: Range<usize>,
    out: Out<'_>,
) {
    let inputs = acts.input().inputs;
    if let (Source::Dense(dense), 1) = (source, acts.tokens()) {
        return s.run(One {
            s,
            dense,
            tile: *acts.tile(0),
            panels,
            out,
        });
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < inputs.next_multiple_of(CHUNK) {
            scratch.resize(inputs.next_multiple_of(CHUNK), [0.0; LANES]);
        }
        for panel in panels {
            s.run(Fill {
                s,
                source,
                panel,
                inputs,
                to: scratch,
            });
            for index in tiles.clone() {
                let job = Job {
                    weights: scratch,
                    tile: *acts.tile(index),
                    first: index * S::FLOATS,
                    panel,
                    inputs,
                    out,
                };
                match job.tile.padded {
                    1 => s.run(Product::<S, 1>(s, job)),
                    2 => s.run(Product::<S, 2>(s, job)),
                    4 => s.run(Product::<S, 4>(s, job)),
                    6 if const { S::FLOATS >= 6 } => s.run(Product::<S, 6>(s, job)),
                    8 if const { S::FLOATS >= 8 } => s.run(Product::<S, 8>(s, job)),
                    12 if const { S::FLOATS >= 12 } => s.run(Product::<S, 12>(s, job)),
                    n => unreachable!("a tile of {n} tokens"),
                }
            }
        }
    });
}

/// Where input `i` lies among those of its chain: [i mod 4][i / 4].
#[inline(always)]
fn place(i: usize, inputs: usize) -> usize {
    (i % 4) * (inputs.next_multiple_of(CHUNK) / 4) + i / 4
}

/// The four chains, added as the contract says.
#[inline(always)]
fn join<S: Simd>(s: S, p: [S::F32; 4]) -> S::F32 {
    s.add(s.add(p[0], p[2]), s.add(p[1], p[3]))
}

/// One token by a dense matrix, straight from the panels.
struct One<'a, S: Simd> {
    s: S,
    dense: &'a Dense,
    tile: Tile,
    panels: Range<usize>,
    out: Out<'a>,
}

impl<S: Simd> SimdOp for One<'_, S> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let (s, inputs, x) = (self.s, self.dense.inputs, self.tile.data.cast::<f32>());
        let bytes = ROWS * self.dense.dtype.size();
        for panel in self.panels {
            let mut p = [s.splat(0.0); 4];
            for i in 0..inputs {
                let w = self.dense.load(s, panel, i);
                s.prefetch(
                    self.dense
                        .panels
                        .as_ptr()
                        .wrapping_add((panel * inputs + i) * bytes + 2048),
                );
                // SAFETY: the tile holds `inputs` numbers.
                let a = s.splat(unsafe { *x.add(place(i, inputs)) });
                p[i % 4] = s.fma(w, a, p[i % 4]);
            }
            // SAFETY: `Matrix::run` has this part of the output to itself.
            unsafe { self.out.put(s, 0, panel, &[join(s, p)]) };
        }
    }
}

/// Makes the f32 tile of a panel, ordered by chain.
struct Fill<'a, S: Simd> {
    s: S,
    source: &'a Source<'a>,
    panel: usize,
    inputs: usize,
    to: &'a mut [[f32; LANES]],
}

impl<S: Simd> SimdOp for Fill<'_, S> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        match self.source {
            Source::Dense(dense) => {
                for i in 0..self.inputs {
                    let w = dense.load(self.s, self.panel, i);
                    self.s.store(w, &mut self.to[place(i, self.inputs)]);
                }
            }
            Source::Quantised(weight) => {
                for chunk in 0..weight.layout().chunks {
                    dequantise(weight, self.panel, chunk, |input, w| {
                        if input < self.inputs {
                            self.to[place(input, self.inputs)] = w;
                        }
                    });
                }
            }
        }
    }
}

/// The f32 weights of a chunk, 16 rows at a time, exactly as [`KTensor::dequantize_row`] computes them.
fn dequantise(
    weight: &KTensor,
    panel: usize,
    chunk: usize,
    mut each: impl FnMut(usize, [f32; ROWS]),
) {
    let (layout, bytes, block) = (weight.layout(), weight.bytes(), weight.scales().block());
    let mut codes = [0; CHUNK * ROWS];
    let at = panel * layout.panel_bytes + layout.codes_at + chunk * layout.bits * 128;
    layout.unpack_chunk(&bytes[at..at + layout.bits * 128], &mut codes);
    let values: Vec<f32> = match weight.codebook() {
        Codebook::I8(c) => c.iter().map(|&v| f32::from(v)).collect(),
        Codebook::F32(c) => c.clone(),
    };
    let row = panel * ROWS;
    let half =
        |at: usize| kbit_simd::half::f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let bf16 =
        |at: usize| kbit_simd::half::bf16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    // What multiplies, what is taken from the value before (zero points), what is added after, and the ladder.
    let (mut scale, mut zero, mut add, mut rung) =
        ([0.0; ROWS], [0.0; ROWS], [0.0; ROWS], [0; ROWS]);
    for i in 0..CHUNK {
        let input = chunk * CHUNK + i;
        let (k, sup) = (input / block, input / SUPER);
        if i == 0 || input.is_multiple_of(block) {
            for r in 0..ROWS {
                let wide = |which| layout.wide_offset(row + r, sup, which);
                match *weight.scales() {
                    Scales::Ladder { ref ladder, .. } => {
                        let (at, high) = layout.rung_offset(row + r, k);
                        rung[r] = i32::from(
                            ladder[usize::from(if high { bytes[at] >> 4 } else { bytes[at] & 15 })],
                        );
                        scale[r] = bf16(wide(0));
                    }
                    Scales::Row => scale[r] = bf16(wide(0)),
                    Scales::Block {
                        scale: kind,
                        offset,
                        ..
                    } => {
                        scale[r] = kind.read(&bytes[layout.fine_offset(row + r, k, kind.size())..]);
                        match offset {
                            Offset::None => {}
                            Offset::Min => {
                                add[r] = kind
                                    .read(&bytes[layout.offset_offset(row + r, k, kind.size())..]);
                            }
                            Offset::Zero => {
                                let shift = if layout.bits == 8 { 128.0 } else { 0.0 };
                                zero[r] =
                                    f32::from(bytes[layout.offset_offset(row + r, k, 1)]) - shift;
                            }
                        }
                    }
                    Scales::Super { sub, min, .. } => {
                        let byte = bytes[layout.fine_offset(row + r, k, 1)];
                        let (s, m) = match sub {
                            SubScale::U8 => (f32::from(byte), None),
                            SubScale::I8 => (f32::from(byte as i8), None),
                            SubScale::U4 => (f32::from(byte & 15), Some(byte >> 4)),
                        };
                        scale[r] = half(wide(0)) * s;
                        if min {
                            let m = m.unwrap_or_else(|| bytes[layout.offset_offset(row + r, k, 1)]);
                            add[r] = -(half(wide(1)) * f32::from(m));
                        }
                    }
                }
            }
        }
        let value = |r: usize| values[usize::from(codes[i / 4 * 64 + r * 4 + i % 4])];
        let w: [f32; ROWS] = match *weight.scales() {
            Scales::Ladder { .. } => {
                std::array::from_fn(|r| ((value(r) as i32 * rung[r] + 64) >> 7) as f32 * scale[r])
            }
            Scales::Row
            | Scales::Super { min: false, .. }
            | Scales::Block {
                offset: Offset::None,
                ..
            } => std::array::from_fn(|r| scale[r] * value(r)),
            Scales::Block {
                offset: Offset::Zero,
                ..
            } => std::array::from_fn(|r| scale[r] * (value(r) - zero[r])),
            Scales::Block {
                offset: Offset::Min,
                ..
            }
            | Scales::Super { min: true, .. } => {
                std::array::from_fn(|r| scale[r] * value(r) + add[r])
            }
        };
        each(input, w);
    }
}

/// One tile of tokens by the f32 tile of a panel.
struct Job<'a> {
    weights: &'a [[f32; LANES]],
    tile: Tile,
    /// First token of the tile.
    first: usize,
    panel: usize,
    inputs: usize,
    out: Out<'a>,
}

struct Product<'a, S: Simd, const M: usize>(S, Job<'a>);

impl<S: Simd, const M: usize> SimdOp for Product<'_, S, M> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self(s, job) = self;
        let quarter = job.inputs.next_multiple_of(CHUNK) / 4;
        let mut chains = [[s.splat(0.0); M]; 4];
        for (c, chain) in chains.iter_mut().enumerate() {
            let mut x = job.tile.data.cast::<f32>().wrapping_add(c * quarter * M);
            let mut p = [s.splat(0.0); M];
            for weights in &job.weights[c * quarter..][..(job.inputs + 3 - c) / 4] {
                let w = s.load(weights);
                for n in 0..M {
                    // SAFETY: the tile holds M numbers for each input of the chain.
                    p[n] = s.fma(w, s.splat(unsafe { *x.add(n) }), p[n]);
                }
                x = x.wrapping_add(M);
            }
            *chain = p;
        }
        let mut y = [s.splat(0.0); M];
        for n in 0..M {
            y[n] = join(s, [chains[0][n], chains[1][n], chains[2][n], chains[3][n]]);
        }
        let y = &y[..job.tile.tokens.min(M)];
        // SAFETY: `Matrix::run` has this part of the output to itself.
        unsafe { job.out.put(s, job.first, job.panel, y) };
    }
}
