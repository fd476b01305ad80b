//! Queries of one KV group against one chunk of 256 positions: `docs/numerics.md`, section 6.
//!
//! Keys come 16 positions at a time, so the 16 partial sums of a dot product (lane = dimension mod 16) are 16 vectors and
//! their reduction by halves is plain additions. Values come row by row under one chain per dimension. Both are read once
//! for a tile of queries.

use std::ops::Range;

use kbit_simd::{Isa, LANES, Simd, SimdOp, math};
use kbit_tensor::program::CacheType;

use super::page::{Element, Typed};
use crate::ask::ask_part;
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
    /// Keys of the chunk that comes next, or null; None where keys and values of this one are in a cache already.
    ///
    /// Memory is asked for at the pace of the work: for values while keys are read, and for the next keys while values are.
    /// Requests in one go would wait for each other before the work begins, and the hardware's own do not see
    /// through the strides in which keys are read.
    pub(crate) next_keys: Option<*const u8>,
}

impl SimdOp for Chunk<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let kind = self.kind;
        self.of_kind(s, kind);
    }
}

/// Whether the instruction set has registers for a tile of four queries.
#[inline(always)]
fn wide<S: Simd>() -> bool {
    matches!(S::ISA, Isa::Avx512 | Isa::Avx512Vbmi)
}

impl Typed for Chunk<'_> {
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
}

impl Chunk<'_> {
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
        let size = size_of::<E::Number>();
        let mut values = match self.next_keys {
            Some(_) if i == 0 => {
                let before = block * BLOCK * self.page.layout.value_stride;
                self.page.values.wrapping_add(before * size)
            }
            _ => std::ptr::null_mut(),
        };
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
                    if !values.is_null() {
                        ask_part(s, values, LANES / 4 * BLOCK * size, j, 4);
                    }
                }
                if !values.is_null() {
                    values = values.wrapping_add(LANES / 4 * BLOCK * size);
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
        let size = size_of::<E::Number>();
        let next_keys = match self.next_keys {
            Some(keys) if i == 0 && !keys.is_null() => keys.wrapping_add(at * size),
            _ => std::ptr::null(),
        };
        let p = self.scores[i * PAGE..(i + N) * PAGE].as_ptr();
        let out = &mut self.out[i * stride..(i + N) * stride];
        let mut acc = [[s.splat(0.0); D]; N];
        for n in 0..N {
            for d in 0..D {
                acc[n][d] = load_block(s, &out[n * stride + at + d * LANES..]);
            }
        }
        for position in positions {
            let row = next_keys.wrapping_add(position * self.page.layout.head_dim * size);
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
                    if !next_keys.is_null() {
                        ask_part(s, row, D * LANES * size, n * D + d, N * D);
                    }
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
