//! Which kernels ran: off by default, switched on by tests that must prove that a path was taken.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

static ON: AtomicBool = AtomicBool::new(false);
static SEEN: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// Switches tracing on or off and forgets what was seen.
pub fn enable(on: bool) {
    lock().clear();
    ON.store(on, Ordering::Relaxed);
}

/// Kernel names like `k4 ladder32 avx512vbmi m1` and how often each ran since [`enable`].
pub fn seen() -> BTreeMap<String, u64> {
    lock().clone()
}

/// Counts a kernel; `name` is only made when tracing is on.
pub(crate) fn count(name: impl FnOnce() -> String) {
    if ON.load(Ordering::Relaxed) {
        *lock().entry(name()).or_default() += 1;
    }
}

fn lock() -> std::sync::MutexGuard<'static, BTreeMap<String, u64>> {
    SEEN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
