//! Shared memory on a 64-byte boundary: what tensors are made of and what kernels read.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::{Error, Result};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Owned bytes, 64-byte aligned, in huge pages where large enough and granted. `Arc<Bytes>` is what tensors share.
pub struct Bytes {
    at: NonNull<u8>,
    len: usize,
    owner: Owner,
}

enum Owner {
    Allocated(Layout),
    /// Pages, of a file or nobody else's; unmapped when dropped.
    Mapped(#[allow(dead_code, reason = "held for its Drop")] memmap2::MmapMut),
}

#[allow(
    unsafe_code,
    reason = "the one allocation of the crate: aligned and fallible"
)]
impl Bytes {
    /// Zeroed bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] with the size asked for; never aborts the process.
    pub fn zeroed(len: usize) -> Result<Self> {
        let refuse = || Error::Memory(format!("cannot allocate {len} bytes"));
        if len >= 2 * HUGE {
            return Self::pages(len).ok_or_else(refuse);
        }
        let layout = Layout::from_size_align(len.max(1), 64).map_err(|_| refuse())?;
        // SAFETY: the layout has a size of at least 1.
        let at = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(refuse)?;
        Ok(Self {
            at,
            len,
            owner: Owner::Allocated(layout),
        })
    }

    /// Zeroed bytes in pages of their own: they are not touched here, so that whoever fills them pays for a page once.
    fn pages(len: usize) -> Option<Self> {
        let mut map = memmap2::MmapMut::map_anon(len.checked_add(HUGE)?).ok()?;
        // A system without huge pages says no, and gives small ones.
        #[cfg(target_os = "linux")]
        map.advise(memmap2::Advice::HugePage).ok();
        let start = map.as_ptr().align_offset(HUGE);
        let at = NonNull::new(map.get_mut(start..)?.get_mut(..len)?.as_mut_ptr())?;
        Some(Self {
            at,
            len,
            owner: Owner::Mapped(map),
        })
    }

    /// The pages of a file, shared with other processes until written to (writes stay private).
    ///
    /// # Errors
    /// What the system says when it cannot map the file.
    pub fn map(file: &std::fs::File) -> std::io::Result<Self> {
        // SAFETY: a private copy-on-write mapping. That the file may shrink under it, which ends the process, is what
        // `TensorFile::open_mapped` tells its callers; the default is to copy.
        let mut map = unsafe { memmap2::MmapOptions::new().map_copy(file)? };
        // An empty map dangles, but is never read.
        let at = NonNull::new(map.as_mut_ptr()).ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(Self {
            at,
            len: map.len(),
            owner: Owner::Mapped(map),
        })
    }

    /// Whether these are pages of their own: huge ones, where granted, or those of a file.
    pub fn is_paged(&self) -> bool {
        matches!(self.owner, Owner::Mapped(_))
    }

    /// A copy of `data`.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is no room.
    pub fn copy_of(data: &[u8]) -> Result<Self> {
        let mut bytes = Self::zeroed(data.len())?;
        bytes.copy_from_slice(data);
        Ok(bytes)
    }
}

#[allow(unsafe_code, reason = "see Bytes::zeroed")]
impl Drop for Bytes {
    fn drop(&mut self) {
        if let Owner::Allocated(layout) = self.owner {
            // SAFETY: `at` was allocated with exactly this layout and is freed once.
            unsafe { std::alloc::dealloc(self.at.as_ptr(), layout) }
        }
    }
}

// SAFETY: Bytes owns its memory alone, like Box<[u8]>.
#[allow(unsafe_code, reason = "owned memory")]
unsafe impl Send for Bytes {}
// SAFETY: shared access is read-only, like Box<[u8]>.
#[allow(unsafe_code, reason = "owned memory")]
unsafe impl Sync for Bytes {}

#[allow(unsafe_code, reason = "see Bytes::zeroed")]
impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes belong to self.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

#[allow(unsafe_code, reason = "see Bytes::zeroed")]
impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len)
    }
}
