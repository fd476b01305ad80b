//! Which items a layer's attention has in a pass.

use std::ops::Range;

use super::{Attention, View};
use crate::cache::PAGE;
use crate::plan::FEW;

/// Queries of an item of a prompt.
const QUERIES: usize = 128;
/// New tokens of a sequence up to which its context is split into chunks.
const SPLIT: usize = 8;
const _: () = assert!(
    FEW <= SPLIT,
    "plans of few tokens leave rotating to these items"
);

/// Whether the items of a sequence with so many new tokens are chunks of its context, which rotate and append on the fly. `whole`: never.
pub(crate) fn is_split(tokens: usize, whole: bool) -> bool {
    tokens <= SPLIT && !whole
}

/// A unit of work.
#[derive(Debug)]
pub(crate) struct Item {
    pub(super) view: usize,
    pub(super) kv_head: usize,
    pub(super) tokens: Range<usize>,
    /// None: all chunks in order.
    pub(super) chunk: Option<Split>,
}

/// One chunk of several that belong together.
#[derive(Debug)]
pub(super) struct Split {
    /// First position.
    pub(super) start: usize,
    /// Which counter.
    pub(super) group: usize,
    /// Rows of partial results: this chunk's first, the group's first, and how many chunks there are.
    pub(super) row: usize,
    pub(super) first_row: usize,
    pub(super) chunks: usize,
}

/// Items of one kind of layer.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) items: Vec<Item>,
    /// Rows of partial results.
    pub(crate) partials: usize,
    /// Counters.
    pub(crate) groups: usize,
}

impl Attention {
    /// First position that the window leaves to the query at `position`.
    pub(super) fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// The work of this layer for a pass. `whole`: never split by chunk.
    pub(crate) fn work(&self, views: &[View], whole: bool) -> Work {
        let group = self.q_heads / self.kv_heads;
        let mut work = Work::default();
        for (v, view) in views.iter().enumerate() {
            let chunks = self.first(view.start) / PAGE..(view.start + view.tokens).div_ceil(PAGE);
            if !is_split(view.tokens, whole) {
                let block = (QUERIES / group).clamp(4, 64);
                for kv_head in 0..self.kv_heads {
                    // The longest contexts first: threads finish together only if what comes last is short.
                    let blocks = (0..view.tokens)
                        .step_by(block)
                        .rev()
                        .map(|from| from..view.tokens.min(from + block));
                    work.items.extend(blocks.map(|tokens| Item {
                        view: v,
                        kv_head,
                        tokens,
                        chunk: None,
                    }));
                }
                continue;
            }
            // Heads lie side by side in a page: one after the other, memory is read as a stream.
            let (rows, groups) = (chunks.len() * view.tokens * group, work.groups);
            for (i, chunk) in chunks.clone().enumerate() {
                work.items.extend((0..self.kv_heads).map(|kv_head| {
                    let first_row = work.partials + kv_head * rows;
                    let split = Split {
                        start: chunk * PAGE,
                        group: groups + kv_head,
                        row: first_row + i * view.tokens * group,
                        first_row,
                        chunks: chunks.len(),
                    };
                    Item {
                        view: v,
                        kv_head,
                        tokens: 0..view.tokens,
                        chunk: Some(split),
                    }
                }));
            }
            work.partials += self.kv_heads * rows;
            work.groups += self.kv_heads;
        }
        work
    }
}
