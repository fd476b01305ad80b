//! Queries of one KV group against one chunk of 256 positions: `docs/numerics.md`, section 6.
//!
//! Keys come 16 positions at a time, so the 16 partial sums of a dot product (lane = dimension mod 16) are 16 vectors and
//! their reduction by halves is plain additions. Values come row by row under one chain per dimension. Both are read once
//! for a tile of queries.

use std::ops::Range;

use kbit_simd::{Isa, LANES, Simd, SimdOp, math};
use kbit_tensor::program::CacheType;

use crate::cache::{BLOCK, HeadPage, PAGE};

/// What a query sees: a range of positions, and how distance counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// First position that the window leaves.
    pub(crate) first: usize,
    /// Its own position; the last one that it sees.
    pub(crate) position: usize,
    /// ALiBi slope.
    pub(crate) slope: f32,
}

impl Query {
    /// Visible positions of the chunk that starts at `start`, relative to it; may be empty.
    #[inline(always)]
    pub(crate) fn range(&self, start: usize) -> Range<usize> {
        let end = (self.position + 1).saturating_sub(start).min(PAGE);
        self.first.saturating_sub(start).min(end)..end
    }
}

/// How scores are made of dot products.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scoring {
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) alibi: bool,
}

/// Scores, probabilities and weighted values of one chunk.
pub(crate) struct Chunk<'a> {
    pub(crate) kind: CacheType,
    pub(crate) page: HeadPage,
    /// First position.
    pub(crate) start: usize,
    pub(crate) scoring: Scoring,
    pub(crate) queries: &'a [Query],
    /// (queries, `head_dim`).
    pub(crate) q: &'a [f32],
    /// (queries, 256): scores, then probabilities; what a query does not see is not written.
    pub(crate) scores: &'a mut [f32],
    /// (queries,): largest score.
    pub(crate) max: &'a mut [f32],
    /// (queries,): sum of probabilities.
    pub(crate) sum: &'a mut [f32],
    /// (queries, `value_stride`).
    pub(crate) out: &'a mut [f32],
    /// Leave the scores as they are: no probabilities, no output.
    pub(crate) scores_only: bool,
}

impl SimdOp for Chunk<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        match self.kind {
            CacheType::F16 => self.typed::<S, F16>(s),
            CacheType::BF16 => self.typed::<S, Bf16>(s),
            CacheType::F32 => self.typed::<S, F32>(s),
            CacheType::I8 => self.typed::<S, I8>(s),
        }
    }
}

/// How 16 cached numbers become f32.
trait Element {
    /// Dimension `dim` of the 16 positions of `block`.
    ///
    /// # Safety
    /// `page` is a page of this type, `block` and `dim` inside it, and nobody writes it.
    unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32;
    /// Dimensions `at..at + 16` of `position`.
    ///
    /// # Safety
    /// As [`Element::keys`]; `at` is a multiple of 16 below the stride.
    unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32;
}

/// Reads 16 numbers of type T as an array.
///
/// # Safety
/// `at` is good for them and aligned for T.
#[inline(always)]
unsafe fn sixteen<'a, T>(at: *const T) -> &'a [T; LANES] {
    // SAFETY: forwarded.
    unsafe { &*at.cast() }
}

macro_rules! element {
    ($name:ident, $number:ty, $load:ident) => {
        struct $name;
        impl Element for $name {
            #[inline(always)]
            unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32 {
                // SAFETY: inside the page by contract.
                unsafe {
                    s.$load(sixteen(
                        page.keys
                            .cast::<$number>()
                            .add((block * page.layout.head_dim + dim) * BLOCK),
                    ))
                }
            }
            #[inline(always)]
            unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32 {
                // SAFETY: inside the page by contract.
                unsafe {
                    s.$load(sixteen(
                        page.values
                            .cast::<$number>()
                            .add(position * page.layout.value_stride + at),
                    ))
                }
            }
        }
    };
}
element!(F16, u16, load_f16);
element!(Bf16, u16, load_bf16);
element!(F32, f32, load);

struct I8;
impl Element for I8 {
    #[inline(always)]
    unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32 {
        // SAFETY: inside the page by contract.
        unsafe {
            let q = s.load_i8(sixteen(
                page.keys
                    .cast::<i8>()
                    .add((block * page.layout.head_dim + dim) * BLOCK),
            ));
            s.mul(
                s.to_f32(q),
                s.load(sixteen(page.key_scales.add(block * BLOCK))),
            )
        }
    }
    #[inline(always)]
    unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32 {
        // SAFETY: inside the page by contract.
        unsafe {
            let q = s.load_i8(sixteen(
                page.values
                    .cast::<i8>()
                    .add(position * page.layout.value_stride + at),
            ));
            s.mul(s.to_f32(q), s.splat(*page.value_scales.add(position)))
        }
    }
}

/// Whether the instruction set has registers for a tile of four queries.
#[inline(always)]
fn wide<S: Simd>() -> bool {
    matches!(S::ISA, Isa::Avx512 | Isa::Avx512Vbmi | Isa::Amx)
}

impl Chunk<'_> {
    #[inline(always)]
    fn typed<S: Simd, E: Element>(mut self, s: S) {
        let n = self.queries.len();
        let head_dim = self.page.layout.head_dim;
        assert!(self.q.len() == n * head_dim && self.scores.len() == n * PAGE);
        if wide::<S>() {
            self.tiles::<S, E, 4>(s);
        } else {
            self.tiles::<S, E, 1>(s);
        }
        if self.scores_only {
            return;
        }
        assert!(
            self.out.len() == n * self.page.layout.value_stride
                && self.max.len() == n
                && self.sum.len() == n
        );
        for i in 0..n {
            self.softmax(s, i);
        }
        self.out.fill(0.0);
        let mut i = 0;
        while i < n {
            if wide::<S>() && n - i >= 4 {
                self.weigh::<S, E, 4, 4>(s, i);
                i += 4;
            } else if n - i >= 2 {
                self.weigh::<S, E, 2, 2>(s, i);
                i += 2;
            } else {
                self.weigh::<S, E, 1, 4>(s, i);
                i += 1;
            }
        }
    }

    /// Scores of all queries, N at a time.
    #[inline(always)]
    fn tiles<S: Simd, E: Element, const N: usize>(&mut self, s: S) {
        let whole = self.queries.len() / N * N;
        let (tiles, rest) = self.queries.split_at(whole);
        let spans: Vec<Range<usize>> = tiles.chunks(N).map(|q| blocks(q, self.start)).collect();
        let rest: Vec<Range<usize>> = rest.chunks(1).map(|q| blocks(q, self.start)).collect();
        // Blocks outside, so that a block of keys stays in the first cache for all queries.
        for block in blocks(self.queries, self.start) {
            for (i, _) in spans.iter().enumerate().filter(|(_, s)| s.contains(&block)) {
                self.tile::<S, E, N>(s, block, i * N);
            }
            for (i, _) in rest.iter().enumerate().filter(|(_, s)| s.contains(&block)) {
                self.tile::<S, E, 1>(s, block, whole + i);
            }
        }
    }

    /// Scores of queries `i..i + N` with the 16 positions of a block.
    #[inline(always)]
    fn tile<S: Simd, E: Element, const N: usize>(&mut self, s: S, block: usize, i: usize) {
        let head_dim = self.page.layout.head_dim;
        let q = self.q[i * head_dim..(i + N) * head_dim].as_ptr();
        let mut halves = [[s.splat(0.0); 2]; N];
        // Lanes g, g + 4, g + 8, g + 12 at a time; g in the order 0, 2, 1, 3 lets pairs be added as they come.
        for (turn, g) in [0, 2, 1, 3].into_iter().enumerate() {
            let mut lanes = [[s.splat(0.0); 4]; N];
            for base in (0..head_dim).step_by(LANES) {
                for j in 0..4 {
                    let dim = base + g + 4 * j;
                    if dim < head_dim {
                        // SAFETY: block < 16 and dim < head_dim are inside the page, whose head nobody else writes now.
                        let keys = unsafe { E::keys(s, &self.page, block, dim) };
                        for n in 0..N {
                            // SAFETY: n * head_dim + dim is inside the slice that `q` was taken from.
                            let q = s.splat(unsafe { *q.add(n * head_dim + dim) });
                            lanes[n][j] = s.fma(q, keys, lanes[n][j]);
                        }
                    }
                }
            }
            for n in 0..N {
                let [a, b, c, d] = lanes[n];
                let quarter = s.add(s.add(a, c), s.add(b, d));
                let half = &mut halves[n][turn / 2];
                *half = if turn % 2 == 0 {
                    quarter
                } else {
                    s.add(*half, quarter)
                };
            }
        }
        for n in 0..N {
            let mut x = s.mul(
                s.add(halves[n][0], halves[n][1]),
                s.splat(self.scoring.scale),
            );
            if let Some(cap) = self.scoring.softcap {
                x = s.mul(s.splat(cap), math::tanh(s, s.div(x, s.splat(cap))));
            }
            if self.scoring.alibi {
                let query = &self.queries[i + n];
                let first = (self.start + block * BLOCK) as f32 - query.position as f32;
                let distance = s.add(s.splat(first), s.load(&STEPS));
                x = s.add(x, s.mul(s.splat(query.slope), distance));
            }
            store_block(s, x, &mut self.scores[(i + n) * PAGE + block * BLOCK..]);
        }
    }

    /// Probabilities of query `i` in place of its scores, relative to its largest.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S, i: usize) {
        let seen = self.queries[i].range(self.start);
        let row = &mut self.scores[i * PAGE..(i + 1) * PAGE];
        let blocks = seen.start / BLOCK..seen.end.div_ceil(BLOCK);
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut max = lowest;
        for block in blocks.clone() {
            let at = block * BLOCK;
            let mut x = load_block(s, &row[at..]);
            if seen.end < at + BLOCK {
                x = s.select(s.first(seen.end - at), x, lowest);
            }
            if seen.start > at {
                x = s.select(s.first(seen.start - at), lowest, x);
            }
            store_block(s, x, &mut row[at..]);
            max = s.max(x, max);
        }
        let max = s.reduce_max(max);
        let mut sum = s.splat(0.0);
        for block in blocks {
            let at = block * BLOCK;
            let p = math::exp(s, s.sub(load_block(s, &row[at..]), s.splat(max)));
            store_block(s, p, &mut row[at..]);
            sum = s.add(sum, p);
        }
        self.max[i] = max;
        self.sum[i] = s.reduce_add(sum);
    }

    /// Adds the weighted values of queries `i..i + N`, 16 D dimensions at a time: together where all N see a position,
    /// one by one before and after, so that each keeps its order.
    #[inline(always)]
    fn weigh<S: Simd, E: Element, const N: usize, const D: usize>(&mut self, s: S, i: usize) {
        let mut ranges = [const { 0..0 }; N];
        for n in 0..N {
            ranges[n] = self.queries[i + n].range(self.start);
        }
        let from = ranges.iter().map(|r| r.start).max().unwrap_or(0);
        let to = ranges.iter().map(|r| r.end).min().unwrap_or(0);
        let together = if from < to { from..to } else { 0..0 };
        if together.is_empty() {
            for n in 0..N {
                self.columns::<S, E, 1, D>(s, i + n, ranges[n].clone());
            }
            return;
        }
        for n in 0..N {
            if ranges[n].start < from {
                self.columns::<S, E, 1, D>(s, i + n, ranges[n].start..from);
            }
        }
        self.columns::<S, E, N, D>(s, i, together);
        for n in 0..N {
            if ranges[n].end > to {
                self.columns::<S, E, 1, D>(s, i + n, to..ranges[n].end);
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd, E: Element, const N: usize, const D: usize>(
        &mut self,
        s: S,
        i: usize,
        positions: Range<usize>,
    ) {
        let stride = self.page.layout.value_stride;
        let mut at = 0;
        while at + D * LANES <= stride {
            self.accumulate::<S, E, N, D>(s, i, at, positions.clone());
            at += D * LANES;
        }
        while at < stride {
            self.accumulate::<S, E, N, 1>(s, i, at, positions.clone());
            at += LANES;
        }
    }

    #[inline(always)]
    fn accumulate<S: Simd, E: Element, const N: usize, const D: usize>(
        &mut self,
        s: S,
        i: usize,
        at: usize,
        positions: Range<usize>,
    ) {
        let stride = self.page.layout.value_stride;
        let p = self.scores[i * PAGE..(i + N) * PAGE].as_ptr();
        let out = &mut self.out[i * stride..(i + N) * stride];
        let mut acc = [[s.splat(0.0); D]; N];
        for n in 0..N {
            for d in 0..D {
                acc[n][d] = load_block(s, &out[n * stride + at + d * LANES..]);
            }
        }
        for position in positions {
            let mut values = [s.splat(0.0); D];
            for d in 0..D {
                // SAFETY: position < 256 and at + 16 d < stride are inside the page, whose head nobody else writes now.
                values[d] = unsafe { E::values(s, &self.page, position, at + d * LANES) };
            }
            for n in 0..N {
                // SAFETY: position < 256: inside the rows that `p` was taken from.
                let weight = s.splat(unsafe { *p.add(n * PAGE + position) });
                for d in 0..D {
                    acc[n][d] = s.fma(weight, values[d], acc[n][d]);
                }
            }
        }
        for n in 0..N {
            for d in 0..D {
                store_block(s, acc[n][d], &mut out[n * stride + at + d * LANES..]);
            }
        }
    }
}

/// Blocks of the chunk at `start` that some of the queries see.
fn blocks(queries: &[Query], start: usize) -> Range<usize> {
    let seen = || {
        queries
            .iter()
            .map(|q| q.range(start))
            .filter(|r| !r.is_empty())
    };
    let first = seen().map(|r| r.start).min().unwrap_or(0);
    first / BLOCK..seen().map(|r| r.end).max().unwrap_or(0).div_ceil(BLOCK)
}

/// 0, 1, ..., 15.
const STEPS: [f32; LANES] = [
    0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
];

#[inline(always)]
fn load_block<S: Simd>(s: S, x: &[f32]) -> S::F32 {
    match x.first_chunk() {
        Some(x) => s.load(x),
        None => unreachable!("rows are whole blocks"),
    }
}

#[inline(always)]
fn store_block<S: Simd>(s: S, v: S::F32, x: &mut [f32]) {
    match x.first_chunk_mut() {
        Some(x) => s.store(v, x),
        None => unreachable!("rows are whole blocks"),
    }
}

/// Turns the positions `0..end` of a page into f32, so that many queries read them without converting again.
pub(crate) struct Widen {
    pub(crate) kind: CacheType,
    pub(crate) from: HeadPage,
    /// An f32 page.
    pub(crate) to: HeadPage,
    pub(crate) end: usize,
}

impl SimdOp for Widen {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        match self.kind {
            CacheType::F16 => self.typed::<S, F16>(s),
            CacheType::BF16 => self.typed::<S, Bf16>(s),
            CacheType::F32 => self.typed::<S, F32>(s),
            CacheType::I8 => self.typed::<S, I8>(s),
        }
    }
}

impl Widen {
    #[inline(always)]
    fn typed<S: Simd, E: Element>(self, s: S) {
        let (head_dim, stride) = (self.from.layout.head_dim, self.from.layout.value_stride);
        for block in 0..self.end.div_ceil(BLOCK) {
            for dim in 0..head_dim {
                // SAFETY: both pages hold the block and dimension; `to` is this thread's own.
                unsafe {
                    let keys = E::keys(s, &self.from, block, dim);
                    s.store(
                        keys,
                        &mut *self
                            .to
                            .keys
                            .cast::<[f32; LANES]>()
                            .add(block * head_dim + dim),
                    );
                }
            }
        }
        for position in 0..self.end {
            for at in (0..stride).step_by(LANES) {
                // SAFETY: as above.
                unsafe {
                    let values = E::values(s, &self.from, position, at);
                    s.store(
                        values,
                        &mut *self
                            .to
                            .values
                            .cast::<[f32; LANES]>()
                            .add((position * stride + at) / LANES),
                    );
                }
            }
        }
    }
}

/// Writes the keys and values of one position: rounds them to the cache's type.
pub(crate) struct Append<'a> {
    pub(crate) kind: CacheType,
    pub(crate) page: HeadPage,
    /// Inside the page.
    pub(crate) position: usize,
    /// (`head_dim`).
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
}

impl SimdOp for Append<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (page, position) = (&self.page, self.position);
        assert!(
            self.key.len() == page.layout.head_dim
                && self.value.len() == page.layout.head_dim
                && position < PAGE
        );
        for (x, of_key) in [(self.key, true), (self.value, false)] {
            let scale = if self.kind == CacheType::I8 {
                Scale::of(s, x)
            } else {
                Scale {
                    scale: 0.0,
                    inverse: 0.0,
                }
            };
            if self.kind == CacheType::I8 {
                let scales = if of_key {
                    page.key_scales
                } else {
                    page.value_scales
                };
                // SAFETY: one scale per position of the page.
                unsafe { *scales.add(position) = scale.scale };
            }
            for at in (0..x.len()).step_by(LANES) {
                let n = LANES.min(x.len() - at);
                let v = crate::norm::load(s, &x[at..at + n]);
                // Element i of 16 goes to `first + i * step`.
                let (first, step) = if of_key {
                    (
                        (position / BLOCK * page.layout.head_dim + at) * BLOCK + position % BLOCK,
                        BLOCK,
                    )
                } else {
                    (position * page.layout.value_stride + at, 1)
                };
                let to = if of_key { page.keys } else { page.values };
                // SAFETY: `first + (n - 1) * step` is inside the head's keys or values; only this thread writes the
                // position of this head.
                unsafe {
                    match self.kind {
                        CacheType::F16 | CacheType::BF16 => {
                            let mut bits = [0u16; LANES];
                            if self.kind == CacheType::F16 {
                                s.store_f16(v, &mut bits);
                            } else {
                                s.store_bf16(v, &mut bits);
                            }
                            (0..n).for_each(|i| *to.cast::<u16>().add(first + i * step) = bits[i]);
                        }
                        CacheType::F32 => {
                            let mut values = [0f32; LANES];
                            s.store(v, &mut values);
                            (0..n)
                                .for_each(|i| *to.cast::<f32>().add(first + i * step) = values[i]);
                        }
                        CacheType::I8 => {
                            let mut codes = [0i8; LANES];
                            s.store_i8(s.to_i32(s.mul(v, s.splat(scale.inverse))), &mut codes);
                            (0..n).for_each(|i| *to.cast::<i8>().add(first + i * step) = codes[i]);
                        }
                    }
                }
            }
        }
    }
}

/// Section 2's scale of one row of at most a head.
struct Scale {
    scale: f32,
    inverse: f32,
}

impl Scale {
    #[inline(always)]
    fn of<S: Simd>(s: S, x: &[f32]) -> Self {
        let mut max = s.splat(0.0);
        for part in x.chunks(LANES) {
            max = s.max(s.abs(crate::norm::load(s, part)), max);
        }
        let amax = s.reduce_max(max);
        // `max` passes NaN by, so it is looked for apart.
        if !amax.is_finite() || x.iter().any(|v| v.is_nan()) {
            Self {
                scale: f32::NAN,
                inverse: 0.0,
            }
        } else if amax <= 1e-30 {
            Self {
                scale: 0.0,
                inverse: 0.0,
            }
        } else {
            Self {
                scale: amax / 127.0,
                inverse: 127.0 / amax,
            }
        }
    }
}

/// Merges a chunk into the running result of one query, or divides the result at the end.
pub(crate) struct Merge<'a> {
    /// Running maximum, sum and output.
    pub(crate) running: (&'a mut f32, &'a mut f32, &'a mut [f32]),
    /// The chunk's.
    pub(crate) chunk: (f32, f32, &'a [f32]),
}

impl SimdOp for Merge<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (big_m, big_l, big_o) = self.running;
        let (m, l, o) = self.chunk;
        let new = if m > *big_m { m } else { *big_m };
        let (a, b) = (exp(s, *big_m - new), exp(s, m - new));
        *big_l = *big_l * a + l * b;
        *big_m = new;
        for (big, o) in big_o.chunks_exact_mut(LANES).zip(o.chunks_exact(LANES)) {
            let sum = s.add(
                s.mul(load_block(s, big), s.splat(a)),
                s.mul(load_block(s, o), s.splat(b)),
            );
            store_block(s, sum, big);
        }
    }
}

/// One number's exponential.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(math::exp(s, s.splat(x)), &mut lanes);
    lanes[0]
}

/// The end of a query: the sink takes its share, `out = O / L`.
pub(crate) struct Finish<'a> {
    pub(crate) max: &'a mut f32,
    pub(crate) sum: &'a mut f32,
    /// (`value_stride`).
    pub(crate) running: &'a mut [f32],
    pub(crate) sink: Option<f32>,
    /// (`head_dim`).
    pub(crate) out: &'a mut [f32],
}

impl SimdOp for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let mut factor = None;
        if let Some(sink) = self.sink {
            let new = if sink > *self.max { sink } else { *self.max };
            let a = exp(s, *self.max - new);
            *self.sum = *self.sum * a + exp(s, sink - new);
            *self.max = new;
            factor = Some(a);
        }
        for (o, out) in self
            .running
            .chunks_exact(LANES)
            .zip(self.out.chunks_mut(LANES))
        {
            let mut o = load_block(s, o);
            if let Some(a) = factor {
                o = s.mul(o, s.splat(a));
            }
            crate::norm::store(s, s.div(o, s.splat(*self.sum)), out);
        }
    }
}

/// `exp(score - max) / sum`: attention weights as they are handed out.
pub(crate) struct Weights<'a> {
    pub(crate) scores: &'a [f32],
    pub(crate) max: f32,
    pub(crate) sum: f32,
    pub(crate) out: &'a mut [f32],
}

impl SimdOp for Weights<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (x, out) in self.scores.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
            let p = math::exp(s, s.sub(crate::norm::load(s, x), s.splat(self.max)));
            crate::norm::store(s, s.div(p, s.splat(self.sum)), out);
        }
    }
}
