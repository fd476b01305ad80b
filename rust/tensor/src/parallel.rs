//! Cold-path parallelism: threads that live for one call, so that nothing is left behind for a fork to trip over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::Result;

/// Threads to use when the caller asked for `threads` (0: as many as the process may use).
pub(crate) fn threads(threads: usize) -> usize {
    if threads > 0 {
        threads
    } else {
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}

/// Runs `work(i)` for `i` in `0..tasks` on at most `threads` threads, the caller's included. After an error no new
/// task starts; the error of the lowest failed task is returned.
pub(crate) fn for_each(
    threads: usize,
    tasks: usize,
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let first: Mutex<Option<(usize, crate::Error)>> = Mutex::new(None);
    let run = || {
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            if let Err(error) = work(i) {
                stop.store(true, Ordering::Relaxed);
                let mut first = first
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                if first.as_ref().is_none_or(|(at, _)| i < *at) {
                    *first = Some((i, error));
                }
            }
        }
    };
    let helpers = self::threads(threads).min(tasks).saturating_sub(1);
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Where a thread cannot be had, the ones that run do its share.
            if std::thread::Builder::new()
                .spawn_scoped(scope, run)
                .is_err()
            {
                break;
            }
        }
        run();
    });
    match first
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Splits `out` into pieces of `piece` elements and runs `work(index, piece)` on each in parallel.
pub(crate) fn for_each_piece<T: Send>(
    threads: usize,
    out: &mut [T],
    piece: usize,
    work: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let pieces: Vec<Mutex<&mut [T]>> = out.chunks_mut(piece.max(1)).map(Mutex::new).collect();
    for_each(threads, pieces.len(), |i| {
        // Each index is handed out once, so the lock is never waited for.
        let mut piece = pieces[i]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        work(i, &mut piece)
    })
}
