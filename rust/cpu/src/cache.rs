//! The KV cache: per sequence, pages of 256 positions at absolute multiples of 256.
//!
//! A page holds the keys and values of all layers and KV heads, which mostly makes it large enough for huge pages of the
//! system: of small ones the processor looks up an address for every 4 KiB (`docs/performance.md`, *Decode is a stream*).
//!
//! Per head, keys lie in blocks of 16 positions with the positions innermost (block, dimension, position), so that 16 dot
//! products run at once without a sum across lanes; values lie row by row (position, dimension), rows padded to 16. Int8
//! heads end with one f32 scale per position for keys and one for values. Sequences share pages after [`Cache::fork`]; a
//! page is copied before it is written while shared.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kbit_tensor::program::{CacheLayer, CacheType, SequenceId};
use kbit_tensor::{Bytes, Error, Result};

/// Positions of a page, and of a chunk of attention.
pub(crate) const PAGE: usize = 256;
/// Positions of a block of keys.
pub(crate) const BLOCK: usize = 16;

/// Bytes of one cached number.
pub(crate) const fn element_size(kind: CacheType) -> usize {
    match kind {
        CacheType::F16 | CacheType::BF16 => 2,
        CacheType::F32 => 4,
        CacheType::I8 => 1,
    }
}

/// Where the parts of a head lie in its page, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadLayout {
    pub(crate) head_dim: usize,
    /// Elements from one position's values to the next: `head_dim` padded to 16.
    pub(crate) value_stride: usize,
    values_at: usize,
    key_scales_at: usize,
    value_scales_at: usize,
    /// From head to head.
    pub(crate) bytes: usize,
}

impl HeadLayout {
    pub(crate) fn new(head_dim: usize, kind: CacheType) -> Self {
        let value_stride = head_dim.next_multiple_of(16);
        let values_at = PAGE * head_dim * element_size(kind);
        let key_scales_at = values_at + PAGE * value_stride * element_size(kind);
        let scales = if kind == CacheType::I8 { 4 * PAGE } else { 0 };
        Self {
            head_dim,
            value_stride,
            values_at,
            key_scales_at,
            value_scales_at: key_scales_at + scales,
            bytes: key_scales_at + 2 * scales,
        }
    }
}

/// One head of one page: raw, because the threads of a step write new positions while others read old ones.
#[derive(Clone, Copy)]
pub(crate) struct HeadPage {
    pub(crate) layout: HeadLayout,
    /// (blocks of 16 positions, `head_dim`, 16).
    pub(crate) keys: *mut u8,
    /// (positions, `value_stride`).
    pub(crate) values: *mut u8,
    /// (positions,) with int8, else meaningless.
    pub(crate) key_scales: *mut f32,
    /// As `key_scales`.
    pub(crate) value_scales: *mut f32,
}

impl HeadPage {
    /// The head whose `layout.bytes` bytes start at `at`.
    ///
    /// # Safety
    /// `at` is good for as many bytes as the layout says, 64-byte aligned.
    pub(crate) unsafe fn new(layout: HeadLayout, at: *mut u8) -> Self {
        // SAFETY: all offsets are inside the head's bytes.
        unsafe {
            Self {
                layout,
                keys: at,
                values: at.add(layout.values_at),
                key_scales: at.add(layout.key_scales_at).cast(),
                value_scales: at.add(layout.value_scales_at).cast(),
            }
        }
    }
}

/// 256 positions of all layers. Counted in the cache's use of memory while it lives.
struct Page {
    /// Owns what `at` points to.
    bytes: Bytes,
    at: *mut u8,
    used: Arc<AtomicUsize>,
}

// SAFETY: a page is written only through `HeadPage` by the threads of a step, which touch disjoint positions and heads, and
// only while one sequence owns it (`Cache::reserve`).
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn new(bytes: usize, used: &Arc<AtomicUsize>) -> Result<Self> {
        let mut bytes = Bytes::zeroed(bytes)?;
        used.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(Self {
            at: bytes.as_mut_ptr(),
            bytes,
            used: used.clone(),
        })
    }

    /// The same contents, owned alone.
    fn copy(&self) -> Result<Self> {
        let copy = Self::new(self.bytes.len(), &self.used)?;
        // SAFETY: both pages are `bytes.len()` long; nobody writes a shared page, and the copy is not shared yet.
        unsafe { std::ptr::copy_nonoverlapping(self.at, copy.at, self.bytes.len()) };
        Ok(copy)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// Cached tokens of one sequence.
#[derive(Clone)]
struct Sequence {
    len: usize,
    planned: usize,
    /// In order of positions.
    pages: Vec<Arc<Page>>,
}

/// All sequences of a runner.
pub(crate) struct Cache {
    /// Per layer: layout of a head, and where its heads begin in a page.
    layers: Vec<(HeadLayout, usize)>,
    page_bytes: usize,
    budget: usize,
    used: Arc<AtomicUsize>,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u64,
}

impl Cache {
    /// `budget` bytes, or half of what is free at the first step when 0.
    pub(crate) fn new(layers: &[CacheLayer], kind: CacheType, budget: usize) -> Self {
        let mut page_bytes = 0;
        let layer = |l: &CacheLayer| {
            let (head, at) = (HeadLayout::new(l.head_dim, kind), page_bytes);
            page_bytes += l.kv_heads * head.bytes;
            (head, at)
        };
        Self {
            layers: layers.iter().map(layer).collect(),
            page_bytes,
            budget,
            used: Arc::default(),
            sequences: BTreeMap::new(),
            next: 0,
        }
    }

    /// A new sequence.
    pub(crate) fn open(&mut self, planned: usize) -> SequenceId {
        self.insert(Sequence {
            len: 0,
            planned,
            pages: Vec::new(),
        })
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        id
    }

    pub(crate) fn close(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Tokens cached, None when the sequence is not open.
    pub(crate) fn len(&self, id: SequenceId) -> Option<usize> {
        self.sequences.get(&id).map(|s| s.len)
    }

    /// As given to [`Cache::open`].
    pub(crate) fn planned(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |s| s.planned)
    }

    /// Forgets positions from `len` on and the pages that held only them.
    pub(crate) fn truncate(&mut self, id: SequenceId, len: usize) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.len = s.len.min(len);
            s.pages.truncate(s.len.div_ceil(PAGE));
        }
    }

    /// A sequence with the same tokens, sharing pages. None when `id` is not open.
    pub(crate) fn fork(&mut self, id: SequenceId, planned: usize) -> Option<SequenceId> {
        let fork = Sequence {
            planned,
            ..self.sequences.get(&id)?.clone()
        };
        Some(self.insert(fork))
    }

    /// Makes room for `new` more tokens and makes the pages they go to this sequence's own.
    ///
    /// # Errors
    /// [`Error::Memory`] over the budget; what was reserved so far is kept until [`Cache::truncate`].
    pub(crate) fn reserve(&mut self, id: SequenceId, new: usize) -> Result<()> {
        if self.budget == 0 {
            self.budget = free_memory() / 2;
        }
        let Some(s) = self.sequences.get_mut(&id) else {
            return Ok(());
        };
        for at in s.len / PAGE..(s.len + new).div_ceil(PAGE) {
            if s.pages
                .get_mut(at)
                .is_some_and(|page| Arc::get_mut(page).is_some())
            {
                continue;
            }
            let wanted = self.used.load(Ordering::Relaxed) + self.page_bytes;
            if wanted > self.budget {
                let (len, new) = (s.len, s.len + new);
                let budget = self.budget;
                return Err(Error::Memory(format!(
                    "KV cache: {wanted} bytes or more to go from {len} to {new} tokens, allowed are {budget}"
                )));
            }
            let page = match s.pages.get(at) {
                Some(shared) => shared.copy()?,
                None => Page::new(self.page_bytes, &self.used)?,
            };
            s.pages.truncate(at);
            s.pages.push(Arc::new(page));
        }
        Ok(())
    }

    /// Counts `new` tokens as cached.
    pub(crate) fn advance(&mut self, id: SequenceId, new: usize) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.len += new;
        }
    }

    /// The pages, in order of positions, good until the next change of the sequence.
    pub(crate) fn pages(&self, id: SequenceId) -> Vec<*mut u8> {
        self.sequences
            .get(&id)
            .map_or_else(Vec::new, |s| s.pages.iter().map(|p| p.at).collect())
    }

    /// Per layer: layout of a head, and where its heads begin in a page.
    pub(crate) fn layers(&self) -> &[(HeadLayout, usize)] {
        &self.layers
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Bytes this machine (or this process's control group) has left; 8 GiB where nobody says.
fn free_memory() -> usize {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let number = |path: &str| read(path)?.trim().parse::<usize>().ok();
    let available = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<usize>()
            .ok()?
            .checked_mul(1024)
    });
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(max, current)| max.saturating_sub(current));
    available
        .unwrap_or(8 << 30)
        .min(group.unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers share pages, so that those of real models lie in huge pages of the system.
    #[test]
    fn pages_hold_all_layers() {
        let layer = CacheLayer {
            kv_heads: 8,
            q_heads: 32,
            head_dim: 64,
            window: None,
        };
        let mut cache = Cache::new(&vec![layer; 16], CacheType::F16, 1 << 30);
        let id = cache.open(0);
        cache.reserve(id, PAGE + 1).expect("room");
        let pages = &cache.sequences[&id].pages;
        assert_eq!(pages.len(), 2);
        assert_eq!(cache.bytes(), 2 * 16 * 8 * PAGE * 2 * 64 * 2);
        assert!(pages.iter().all(|page| page.bytes.is_paged()));
        let (head, at) = cache.layers()[15];
        assert_eq!(at + 8 * head.bytes, pages[0].bytes.len());
    }
}
