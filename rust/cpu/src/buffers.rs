//! Memory that the threads of a step share: per-token rows and scratch.
//!
//! Threads write disjoint parts between two barriers and read what was written before the last one. The plan
//! ([`crate::plan`]) puts the barriers where an operation reads what another wrote; the `unsafe` methods here rely on it.

use kbit_tensor::{Bytes, Result};

/// (rows, width) f32 that all threads may read and write. Rows start on 64-byte boundaries.
pub(crate) struct Rows {
    bytes: Bytes,
    at: *mut f32,
    width: usize,
    stride: usize,
}

// SAFETY: the pointer belongs to `bytes`; access goes through unsafe methods whose callers rule out races.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Room for `rows` rows of `width`, zeroed.
    pub(crate) fn new(rows: usize, width: usize) -> Result<Self> {
        let mut rows_ = Self {
            bytes: Bytes::zeroed(0)?,
            at: std::ptr::null_mut(),
            width,
            stride: width.next_multiple_of(16),
        };
        rows_.reserve(rows)?;
        Ok(rows_)
    }

    /// Makes room for `rows` rows; the contents are lost when it grows.
    pub(crate) fn reserve(&mut self, rows: usize) -> Result<()> {
        let wanted = rows.saturating_mul(self.stride).saturating_mul(4);
        if self.bytes.len() < wanted {
            self.bytes = Bytes::zeroed(wanted)?;
        }
        self.at = self.bytes.as_mut_ptr().cast();
        Ok(())
    }

    /// The first element of row 0.
    pub(crate) fn base(&self) -> *mut f32 {
        self.at
    }

    /// Elements from row to row.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Elements of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Row `row`.
    ///
    /// # Safety
    /// No thread writes to the row while the slice lives.
    #[inline]
    pub(crate) unsafe fn row(&self, row: usize) -> &[f32] {
        debug_assert!((row + 1) * self.stride * 4 <= self.bytes.len());
        // SAFETY: inside `bytes` by the callers' row numbers (checked above in debug builds), no writer by contract.
        unsafe { std::slice::from_raw_parts(self.at.add(row * self.stride), self.width) }
    }

    /// Elements `from..from + len` of row `row`, to write.
    ///
    /// # Safety
    /// No other thread touches these elements while the slice lives.
    #[inline]
    #[allow(
        clippy::mut_from_ref,
        reason = "disjoint parts of shared memory, see the module"
    )]
    pub(crate) unsafe fn part_mut(&self, row: usize, from: usize, len: usize) -> &mut [f32] {
        debug_assert!(from + len <= self.width && (row + 1) * self.stride * 4 <= self.bytes.len());
        // SAFETY: inside the row, and ours alone by contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(row * self.stride + from), len) }
    }

    /// Row `row`, to write.
    ///
    /// # Safety
    /// As [`Rows::part_mut`].
    #[inline]
    #[allow(
        clippy::mut_from_ref,
        reason = "disjoint parts of shared memory, see the module"
    )]
    pub(crate) unsafe fn row_mut(&self, row: usize) -> &mut [f32] {
        // SAFETY: forwarded.
        unsafe { self.part_mut(row, 0, self.width) }
    }

    /// Fills everything with NaN, so that a test sees what was not written.
    #[cfg(test)]
    pub(crate) fn poison(&mut self) {
        self.bytes.fill(0xff);
    }
}

/// Values that threads share or own by turns, as the plan says.
pub(crate) struct Cells<T>(Vec<std::cell::UnsafeCell<T>>);

// SAFETY: access goes through unsafe methods whose callers rule out races.
unsafe impl<T: Send + Sync> Sync for Cells<T> {}

impl<T> Cells<T> {
    pub(crate) fn new(values: Vec<T>) -> Self {
        Self(values.into_iter().map(std::cell::UnsafeCell::new).collect())
    }

    /// Value `index`, to read.
    ///
    /// # Safety
    /// No thread changes it while the reference lives.
    pub(crate) unsafe fn get(&self, index: usize) -> &T {
        // SAFETY: no writer by contract.
        unsafe { &*self.0[index].get() }
    }

    /// Value `index`, to change.
    ///
    /// # Safety
    /// No other thread uses it while the reference lives, and this one has no other reference to it.
    #[allow(clippy::mut_from_ref, reason = "owned by turns, see the module")]
    pub(crate) unsafe fn get_mut(&self, index: usize) -> &mut T {
        // SAFETY: exclusive by contract.
        unsafe { &mut *self.0[index].get() }
    }

    /// Value `index`, outside of jobs.
    pub(crate) fn own(&mut self, index: usize) -> &mut T {
        self.0[index].get_mut()
    }
}
