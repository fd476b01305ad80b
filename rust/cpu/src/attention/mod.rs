//! Attention over the cache, split into work items that do not depend on the number of threads.
//!
//! An item is one KV head of one sequence with either a block of new tokens (all chunks in order, for prompts) or a single
//! chunk of 256 positions (all new tokens, for decoding); in the second case whoever finishes the last chunk merges them in
//! order. When few tokens are new, an item also rotates its queries and appends the keys of its chunk itself, which
//! saves a barrier ([`Rotation`]).

pub(crate) mod chunk;
mod page;
#[cfg(test)]
mod tests;
mod work;

use std::sync::atomic::{AtomicU32, Ordering};

use kbit_simd::{Isa, dispatch};
use kbit_tensor::program::CacheType;
use kbit_tensor::{Bytes, Result};

use crate::ask::ask;
use crate::buffers::Rows;
use crate::cache::{HeadLayout, HeadPage, PAGE};
use crate::norm::{Norm, norm_in_place};
use crate::rope::{Tables, rotate};
use chunk::{Chunk, Finish, Merge, Query, Scoring, Weights};
use page::{Append, Widen};
use work::Item;
pub(crate) use work::{Work, is_split};

/// Queries from which a chunk is turned into f32 first.
const WIDEN: usize = 9;

/// One attention layer.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Cache layer.
    pub(crate) layer: usize,
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scoring: Scoring,
    pub(crate) window: Option<usize>,
    pub(crate) slopes: Option<Vec<f32>>,
    pub(crate) sinks: Option<Vec<f32>>,
}

/// What happens to queries and keys before: clamp, norm, rotation.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// Index of the tables.
    pub(crate) rope: Option<usize>,
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
    pub(crate) clip: Option<f32>,
}

/// New tokens of one sequence in a pass.
pub(crate) struct View {
    /// Row of its first token in the buffers.
    pub(crate) row: usize,
    pub(crate) tokens: usize,
    /// Position of its first token.
    pub(crate) start: usize,
    pub(crate) planned: usize,
    /// In order of positions.
    pub(crate) pages: Vec<*mut u8>,
    /// Per layer, where attention weights go, if asked for.
    pub(crate) weights: Vec<WeightsOut>,
}

// SAFETY: the pointers are to pages and outputs that outlive the pass; see `cache::Page` for who touches what.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

/// (`q_heads`, tokens, positions) of one part and layer, of which a pass fills some tokens.
pub(crate) struct WeightsOut {
    pub(crate) at: *mut f32,
    /// Tokens of the part, and its tokens before this pass.
    pub(crate) tokens: usize,
    pub(crate) skip: usize,
    pub(crate) positions: usize,
}

/// Memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    queries: Vec<Query>,
    q: Vec<f32>,
    row: Vec<f32>,
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
    running_max: Vec<f32>,
    running_sum: Vec<f32>,
    running: Vec<f32>,
    page: Option<Bytes>,
}

/// What all threads share during a pass.
pub(crate) struct Shared<'a> {
    pub(crate) isa: Isa,
    pub(crate) kind: CacheType,
    pub(crate) head: HeadLayout,
    /// Where the layer's heads begin in a page.
    pub(crate) heads_at: usize,
    pub(crate) views: &'a [View],
    pub(crate) tables: &'a [Tables],
    pub(crate) qkv: &'a Rows,
    pub(crate) out: &'a Rows,
    /// (slots, `value_stride` + 2): outputs, maxima and sums of chunks.
    pub(crate) partials: &'a Rows,
    /// One per group; zero between operations.
    pub(crate) finished: &'a [AtomicU32],
}

impl Shared<'_> {
    fn page(&self, view: &View, index: usize, kv_head: usize) -> HeadPage {
        let at = self.heads_at + kv_head * self.head.bytes;
        // SAFETY: `Cache::reserve` made pages for all positions of the pass, with `kv_heads` heads of this layer each.
        unsafe { HeadPage::new(self.head, view.pages[index].add(at)) }
    }

    /// Writes key and value (`head_dim`,) of a position.
    fn put(&self, view: &View, position: usize, kv_head: usize, key: &[f32], value: &[f32]) {
        let append = Append {
            kind: self.kind,
            page: self.page(view, position / PAGE, kv_head),
            position: position % PAGE,
            key,
            value,
        };
        dispatch(self.isa, append);
    }

    /// The page that an item begins with.
    fn first_page(&self, item: &Item) -> HeadPage {
        let start = item.chunk.as_ref().map_or(0, |split| split.start);
        self.page(&self.views[item.view], start / PAGE, item.kv_head)
    }
}

impl Attention {
    /// Clamps, norms, rotates and appends one token in place, all heads.
    ///
    /// # Safety
    /// Only this thread touches the token's row and its position of the cache.
    pub(crate) unsafe fn rotate_and_append(
        &self,
        s: &Shared<'_>,
        rotation: &Rotation,
        view: &View,
        token: usize,
    ) {
        let (d, position) = (self.head_dim, view.start + token);
        // SAFETY: the row is ours by contract.
        let row = unsafe { s.qkv.row_mut(view.row + token) };
        if let Some(clip) = rotation.clip {
            clamp(row, clip);
        }
        let (q, kv) = row.split_at_mut(self.q_heads * d);
        let (k, v) = kv.split_at_mut(self.kv_heads * d);
        for (x, norm) in [(&mut *q, &rotation.q_norm), (&mut *k, &rotation.k_norm)] {
            if let Some(norm) = norm {
                norm_in_place(s.isa, norm, x, norm_width(norm, d));
            }
            if let Some(rope) = rotation.rope {
                rotate(s.isa, x, d, s.tables[rope].row(view.planned, position));
            }
        }
        for (head, (key, value)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            s.put(view, position, head, key, value);
        }
    }

    /// Asks for what an item reads of the new tokens.
    fn ask(&self, s: &Shared<'_>, item: &Item) {
        let view = &s.views[item.view];
        let (d, group) = (self.head_dim, self.q_heads / self.kv_heads);
        // SAFETY: as in `item`.
        let row = unsafe { s.qkv.row(view.row + item.tokens.start) };
        let (q, kv) = row.split_at(self.q_heads * d);
        ask(
            s.isa,
            q[item.kv_head * group * d..].as_ptr().cast(),
            group * d * 4,
        );
        for head in [item.kv_head, self.kv_heads + item.kv_head] {
            ask(s.isa, kv[head * d..].as_ptr().cast(), d * 4);
        }
    }

    /// The first of `items`, while it asks for what the second reads. With `rotation` queries are taken as projected and
    /// keys are appended here.
    ///
    /// # Safety
    /// No thread writes the rows of `qkv` now, and every item of the work is done by one thread.
    pub(crate) unsafe fn item(
        &self,
        s: &Shared<'_>,
        rotation: Option<&Rotation>,
        items: &[Item],
        t: &mut Scratch,
    ) -> Result<()> {
        let Some((item, later)) = items.split_first() else {
            return Ok(());
        };
        let next = later.first();
        if let Some(next) = next {
            self.ask(s, next);
        }
        let view = &s.views[item.view];
        self.load_queries(s, rotation, view, item, t);
        let Some(split) = &item.chunk else {
            return self.all_chunks(s, view, item, t);
        };
        if let Some(rotation) = rotation {
            self.append(s, rotation, view, item, split.start, t);
        }
        let next = next.map_or(std::ptr::null(), |next| s.first_page(next).keys);
        self.chunk(s, view, item.kv_head, split.start, next, t, false)?;
        let (n, stride) = (t.queries.len(), s.head.value_stride);
        if split.chunks == 1 {
            t.only_chunk();
            self.finish(s, view, item, t);
            return Ok(());
        }
        for i in 0..n {
            // SAFETY: the row of this chunk and query is this item's.
            let row = unsafe { s.partials.row_mut(split.row + i) };
            row[..stride].copy_from_slice(&t.out[i * stride..(i + 1) * stride]);
            (row[stride], row[stride + 1]) = (t.max[i], t.sum[i]);
        }
        // Whoever is last sees the rows of all.
        if s.finished[split.group].fetch_add(1, Ordering::AcqRel) as usize + 1 < split.chunks {
            return Ok(());
        }
        s.finished[split.group].store(0, Ordering::Relaxed);
        t.start_running(n, stride);
        let first_chunk = split.start / PAGE - (split.row - split.first_row) / n;
        for c in 0..split.chunks {
            for i in 0..n {
                // SAFETY: all items of the group are done.
                let row = unsafe { s.partials.row(split.first_row + c * n + i) };
                t.out[i * stride..(i + 1) * stride].copy_from_slice(&row[..stride]);
                (t.max[i], t.sum[i]) = (row[stride], row[stride + 1]);
            }
            t.merge(s.isa, (first_chunk + c) * PAGE, stride);
        }
        self.finish(s, view, item, t);
        Ok(())
    }

    /// A block of tokens over its whole context.
    fn all_chunks(&self, s: &Shared<'_>, view: &View, item: &Item, t: &mut Scratch) -> Result<()> {
        let first = t.queries.first().map_or(0, |q| q.first) / PAGE;
        let last = t.queries.last().map_or(0, |q| q.position) / PAGE;
        let nothing = std::ptr::null();
        t.start_running(t.queries.len(), s.head.value_stride);
        for chunk in first..=last {
            self.chunk(s, view, item.kv_head, chunk * PAGE, nothing, t, false)?;
            t.merge(s.isa, chunk * PAGE, s.head.value_stride);
        }
        self.finish(s, view, item, t);
        if !view.weights.is_empty() {
            for chunk in first..=last {
                self.chunk(s, view, item.kv_head, chunk * PAGE, nothing, t, true)?;
                self.write_weights(s, view, item, chunk * PAGE, t);
            }
        }
        Ok(())
    }

    fn load_queries(
        &self,
        s: &Shared<'_>,
        rotation: Option<&Rotation>,
        view: &View,
        item: &Item,
        t: &mut Scratch,
    ) {
        let (d, group) = (self.head_dim, self.q_heads / self.kv_heads);
        let heads = item.kv_head * group..(item.kv_head + 1) * group;
        t.queries.clear();
        t.q.clear();
        for token in item.tokens.clone() {
            let position = view.start + token;
            // SAFETY: nobody writes the rows now, by the contract of `item`.
            let row = unsafe { s.qkv.row(view.row + token) };
            let slope = |head| self.slopes.as_ref().map_or(0.0, |slopes| slopes[head]);
            t.queries.extend(heads.clone().map(|head| Query {
                first: self.first(position),
                position,
                slope: slope(head),
            }));
            let at = t.q.len();
            t.q.extend_from_slice(&row[heads.start * d..heads.end * d]);
            if let Some(rotation) = rotation {
                let own = &mut t.q[at..];
                self.prepare(
                    s,
                    rotation,
                    rotation.q_norm.as_ref(),
                    &row[..self.q_heads * d],
                    heads.start * d,
                    own,
                    &mut t.row,
                    (view, position),
                );
            }
        }
    }

    /// Clamp, norm and rotation of `own`, the elements of `all` from `from` on.
    fn prepare(
        &self,
        s: &Shared<'_>,
        rotation: &Rotation,
        norm: Option<&Norm>,
        all: &[f32],
        from: usize,
        own: &mut [f32],
        row: &mut Vec<f32>,
        at: (&View, usize),
    ) {
        if let Some(clip) = rotation.clip {
            clamp(own, clip);
        }
        if let Some(norm) = norm {
            let width = norm_width(norm, self.head_dim);
            if width == self.head_dim {
                norm_in_place(s.isa, norm, own, width);
            } else {
                row.clear();
                row.extend_from_slice(all);
                if let Some(clip) = rotation.clip {
                    clamp(row, clip);
                }
                norm_in_place(s.isa, norm, row, width);
                own.copy_from_slice(&row[from..from + own.len()]);
            }
        }
        if let Some(rope) = rotation.rope {
            rotate(
                s.isa,
                own,
                self.head_dim,
                s.tables[rope].row(at.0.planned, at.1),
            );
        }
    }

    /// Appends the new keys and values of one head that belong to the chunk at `start`.
    fn append(
        &self,
        s: &Shared<'_>,
        rotation: &Rotation,
        view: &View,
        item: &Item,
        start: usize,
        t: &mut Scratch,
    ) {
        let d = self.head_dim;
        for token in item.tokens.clone() {
            let position = view.start + token;
            if position / PAGE != start / PAGE {
                continue;
            }
            // SAFETY: as in `load_queries`.
            let row = unsafe { s.qkv.row(view.row + token) };
            let (k, v) = row[self.q_heads * d..].split_at(self.kv_heads * d);
            let own = item.kv_head * d..(item.kv_head + 1) * d;
            t.out.clear();
            t.out.extend_from_slice(&k[own.clone()]);
            t.out.extend_from_slice(&v[own.clone()]);
            let (key, value) = t.out.split_at_mut(d);
            self.prepare(
                s,
                rotation,
                rotation.k_norm.as_ref(),
                k,
                own.start,
                key,
                &mut t.row,
                (view, position),
            );
            if let Some(clip) = rotation.clip {
                clamp(value, clip);
            }
            s.put(view, position, item.kv_head, key, value);
        }
    }

    /// All queries of the scratch against one chunk, before one that begins with `next_keys` (null: not known).
    fn chunk(
        &self,
        s: &Shared<'_>,
        view: &View,
        kv_head: usize,
        start: usize,
        next_keys: *const u8,
        t: &mut Scratch,
        scores_only: bool,
    ) -> Result<()> {
        let n = t.queries.len();
        let mut page = s.page(view, start / PAGE, kv_head);
        let mut kind = s.kind;
        let mut next_keys = Some(next_keys);
        if n >= WIDEN && kind != CacheType::F32 {
            let layout = HeadLayout::new(self.head_dim, CacheType::F32);
            let wanted = PAGE * 4 * (layout.head_dim + layout.value_stride);
            if t.page.as_ref().is_none_or(|p| p.len() < wanted) {
                t.page = Some(Bytes::zeroed(wanted)?);
            }
            if let Some(bytes) = &mut t.page {
                // SAFETY: as large as an f32 head, without scales.
                let to = unsafe { HeadPage::new(layout, bytes.as_mut_ptr()) };
                let end = t
                    .queries
                    .iter()
                    .map(|q| q.range(start).end)
                    .max()
                    .unwrap_or(0);
                dispatch(
                    s.isa,
                    Widen {
                        kind,
                        from: page,
                        to,
                        end,
                    },
                );
                (page, kind, next_keys) = (to, CacheType::F32, None);
            }
        }
        t.scores.resize(n * PAGE, 0.0);
        t.max.resize(n, 0.0);
        t.sum.resize(n, 0.0);
        t.out.resize(n * s.head.value_stride, 0.0);
        dispatch(
            s.isa,
            Chunk {
                kind,
                page,
                start,
                scoring: self.scoring,
                queries: &t.queries,
                q: &t.q,
                scores: &mut t.scores,
                max: &mut t.max,
                sum: &mut t.sum,
                out: &mut t.out,
                scores_only,
                next_keys,
            },
        );
        Ok(())
    }

    /// Running results to the rows of `out`.
    fn finish(&self, s: &Shared<'_>, view: &View, item: &Item, t: &mut Scratch) {
        let (d, stride, group) = (
            self.head_dim,
            s.head.value_stride,
            self.q_heads / self.kv_heads,
        );
        for (i, token) in item.tokens.clone().enumerate() {
            // SAFETY: these heads of these tokens are this item's.
            let to = unsafe {
                s.out
                    .part_mut(view.row + token, item.kv_head * group * d, group * d)
            };
            for (g, out) in to.chunks_exact_mut(d).enumerate() {
                let q = i * group + g;
                let sink = self
                    .sinks
                    .as_ref()
                    .map(|sinks| sinks[item.kv_head * group + g]);
                let running = &mut t.running[q * stride..(q + 1) * stride];
                let (max, sum) = (&mut t.running_max[q], &mut t.running_sum[q]);
                dispatch(
                    s.isa,
                    Finish {
                        max,
                        sum,
                        running,
                        sink,
                        out,
                    },
                );
            }
        }
    }

    /// Attention weights of a chunk whose scores are in the scratch, given the final maxima and sums.
    fn write_weights(&self, s: &Shared<'_>, view: &View, item: &Item, start: usize, t: &Scratch) {
        let group = self.q_heads / self.kv_heads;
        let to = &view.weights[self.layer];
        for (i, query) in t.queries.iter().enumerate() {
            let (token, head) = (
                item.tokens.start + i / group,
                item.kv_head * group + i % group,
            );
            let seen = query.range(start);
            if seen.is_empty() {
                continue;
            }
            let at = (head * to.tokens + to.skip + token) * to.positions + start + seen.start;
            // SAFETY: (head, token, positions seen) is inside the output and this item's alone.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at.add(at), seen.len()) };
            let scores = &t.scores[i * PAGE + seen.start..i * PAGE + seen.end];
            dispatch(
                s.isa,
                Weights {
                    scores,
                    max: t.running_max[i],
                    sum: t.running_sum[i],
                    out,
                },
            );
        }
    }
}

impl Scratch {
    fn start_running(&mut self, queries: usize, stride: usize) {
        for (v, n, value) in [
            (&mut self.running_max, queries, f32::NEG_INFINITY),
            (&mut self.running_sum, queries, 0.0),
            (&mut self.running, queries * stride, 0.0),
        ] {
            v.clear();
            v.resize(n, value);
        }
    }

    /// What merging the only chunk of a context gives.
    fn only_chunk(&mut self) {
        std::mem::swap(&mut self.running_max, &mut self.max);
        std::mem::swap(&mut self.running_sum, &mut self.sum);
        self.running.clear();
        // Merging adds it to a zero, which is seen where it is -0.
        self.running.extend(self.out.iter().map(|o| o + 0.0));
    }

    /// Merges the chunk that starts at `start` for the queries that see it.
    fn merge(&mut self, isa: Isa, start: usize, stride: usize) {
        for (i, query) in self.queries.iter().enumerate() {
            if query.range(start).is_empty() {
                continue;
            }
            let own = i * stride..(i + 1) * stride;
            let running = (
                &mut self.running_max[i],
                &mut self.running_sum[i],
                &mut self.running[own.clone()],
            );
            dispatch(
                isa,
                Merge {
                    running,
                    chunk: (self.max[i], self.sum[i], &self.out[own]),
                },
            );
        }
    }
}

/// Elements that one norm of queries or keys covers: a head or all of them, told by the learned parts.
fn norm_width(norm: &Norm, head_dim: usize) -> usize {
    norm.weight
        .as_ref()
        .or(norm.bias.as_ref())
        .map_or(head_dim, Vec::len)
}

fn clamp(x: &mut [f32], limit: f32) {
    x.iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
}
