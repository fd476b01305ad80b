//! The thread pool: one a process, shared by all runners.
//!
//! A step is one [`run`]: every thread executes the same function and meets the others at a few barriers. Inside, work is
//! split by [`Team::for_each`]: every thread starts with a contiguous range of the items (so that it reads memory as one
//! stream) and takes what is left of its neighbours' ranges when it is done, so that a core that somebody else uses costs
//! its own share only. Streams from memory ([`Team::for_runs`]) have ranges as long as the threads were fast. Waiting threads spin for some microseconds, then sleep, which gives their core to whoever needs it.
//!
//! A step that finds the pool busy waits its turn, in order of arrival; a step of one thread needs no pool. After `fork`
//! the child has none of the threads: it is told by the process id and builds a new pool.

use std::cell::{Cell, UnsafeCell};
use std::ops::{Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kbit_tensor::{Error, Result};

/// More threads than this are refused.
pub const MAX_THREADS: usize = 256;
/// Loops between two barriers.
pub(crate) const LOOPS: usize = 8;
/// A thread helps at most so many neighbours, so that the end of a loop stays cheap on large machines.
const REACH: usize = 16;
/// What the ends of shares of streams are parts of.
const WHOLE: u32 = 1 << 16;
/// Items a thread of streams in a job that tell how fast threads are.
const ENOUGH: usize = 64;
/// How long a waiting thread spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// The step ends here: it was cancelled or another thread panicked. [`run`] says which.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop;

type Job<'a> = dyn Fn(&Team<'_>) -> std::result::Result<(), Stop> + Sync + 'a;

/// Threads used when none are asked for: `KBIT_NUM_THREADS`, then what affinity and quota of this process allow.
///
/// # Errors
/// [`Error::Argument`] when `KBIT_NUM_THREADS` is set to something else than a number in 1..256, both included.
pub fn default_threads() -> Result<usize> {
    match std::env::var("KBIT_NUM_THREADS") {
        Ok(text) if !text.trim().is_empty() => match text.trim().parse() {
            Ok(n) if (1..=MAX_THREADS).contains(&n) => Ok(n),
            _ => Err(Error::Argument(format!(
                "KBIT_NUM_THREADS must be a number in 1..{MAX_THREADS}, is {text:?}"
            ))),
        },
        Err(std::env::VarError::NotUnicode(text)) => Err(Error::Argument(format!(
            "KBIT_NUM_THREADS must be a number in 1..{MAX_THREADS}, is {}",
            text.display()
        ))),
        _ => Ok(cores()),
    }
}

/// Threads of a pass that reads the weights once, where `threads` were not asked for. Such a pass is bound by memory, which fewer
/// threads saturate; a core left to the application keeps its threads from being waited for at every barrier.
pub(crate) fn reading_threads(threads: usize) -> usize {
    let asked = std::env::var("KBIT_NUM_THREADS").is_ok_and(|text| !text.trim().is_empty());
    if threads < 4 || asked {
        threads
    } else {
        threads - 1
    }
}

/// Cores this process may use (affinity mask and control group quota included).
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS))
}

/// Runs `job` on `threads` threads, the caller among them, and returns when all have finished.
///
/// # Errors
/// [`Error::Cancelled`] when `cancel` was seen, [`Error::Device`] when a thread panicked or could not be started.
pub(crate) fn run(threads: usize, cancel: &AtomicBool, job: &Job<'_>) -> Result<()> {
    if threads <= 1 || IN_JOB.get() {
        let stop = AtomicBool::new(false);
        let team = Team {
            index: 0,
            threads: 1,
            cancel,
            stop: &stop,
            pool: None,
            phase: Cell::new(0),
            loops: Cell::new(0),
        };
        return match catch_unwind(AssertUnwindSafe(|| job(&team))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Stop)) => Err(Error::Cancelled),
            Err(panic) => Err(panicked(&message(&*panic))),
        };
    }
    let pool = Pool::of_this_process();
    let _turn = Turn::wait(pool);
    pool.run(threads.min(MAX_THREADS), cancel, job)
}

fn panicked(message: &str) -> Error {
    Error::Device(format!("cpu: a thread panicked: {message}"))
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}

thread_local! {
    /// True on a thread that is inside a job: a job inside a job runs on that thread alone.
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

/// Keeps neighbours off the cache lines (two, for processors that fetch pairs).
#[repr(align(128))]
#[derive(Default)]
struct Padded<T>(T);

type Cursors = [[AtomicUsize; LOOPS]; 2];

struct Pool {
    /// The process that started the threads.
    process: u32,
    /// Started workers; worker i has index i + 1 in a team. Also what a starting job holds.
    workers: Mutex<usize>,
    turns: Mutex<Turns>,
    turn_over: Condvar,
    /// `job number << 16 | threads`: a worker learns from one load whether it takes part.
    epoch: Padded<AtomicU64>,
    begin: Event,
    job: UnsafeCell<Option<(&'static Job<'static>, &'static AtomicBool)>>,
    finished: Padded<AtomicUsize>,
    end: Event,
    arrived: Padded<AtomicUsize>,
    generation: Padded<AtomicU32>,
    barrier: Event,
    /// Some thread skipped work: everybody leaves at the next barrier.
    stop: AtomicBool,
    /// Decided by the last thread to arrive at a barrier; the same for all.
    leave: AtomicBool,
    panic: Mutex<Option<String>>,
    cursors: Vec<Padded<Cursors>>,
    /// Where the shares of streams end, in parts of `WHOLE`; and for how many threads.
    ends: Vec<AtomicU32>,
    ends_for: AtomicUsize,
    /// Items of streams that each thread did in this job.
    streamed: Vec<Padded<AtomicUsize>>,
}

#[derive(Default)]
struct Turns {
    next: u64,
    serving: u64,
}

// SAFETY: `job` is written only by the thread that holds the turn, before it publishes `epoch` (release), and read only by
// the workers that this epoch names (acquire), for all of which that thread waits before it gives up its turn.
#[allow(unsafe_code, reason = "one job slot, handed over by the epoch counter")]
unsafe impl Sync for Pool {}

/// The pool of the process that stored it. Pools live as long as their process: their threads never end.
static POOL: AtomicPtr<Pool> = AtomicPtr::new(null_mut());

impl Pool {
    fn of_this_process() -> &'static Self {
        let process = std::process::id();
        loop {
            let at = POOL.load(Acquire);
            // SAFETY: the pointer is null or came from Box::leak below and is never freed.
            #[allow(unsafe_code, reason = "a static that a forked child replaces")]
            if let Some(pool) = unsafe { at.as_ref() }
                && pool.process == process
            {
                return pool;
            }
            let fresh = Box::into_raw(Box::new(Self::new(process)));
            if POOL.compare_exchange(at, fresh, AcqRel, Acquire).is_err() {
                // SAFETY: made two lines above and not published.
                #[allow(unsafe_code, reason = "see above")]
                drop(unsafe { Box::from_raw(fresh) });
            }
        }
    }

    fn new(process: u32) -> Self {
        Self {
            process,
            workers: Mutex::new(0),
            turns: Mutex::default(),
            turn_over: Condvar::new(),
            epoch: Padded::default(),
            begin: Event::default(),
            job: UnsafeCell::new(None),
            finished: Padded::default(),
            end: Event::default(),
            arrived: Padded::default(),
            generation: Padded::default(),
            barrier: Event::default(),
            stop: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            panic: Mutex::new(None),
            cursors: (0..MAX_THREADS).map(|_| Padded::default()).collect(),
            ends: (0..MAX_THREADS).map(|_| AtomicU32::new(0)).collect(),
            ends_for: AtomicUsize::new(0),
            streamed: (0..MAX_THREADS).map(|_| Padded::default()).collect(),
        }
    }

    /// One job; the caller holds the turn.
    fn run(&'static self, threads: usize, cancel: &AtomicBool, job: &Job<'_>) -> Result<()> {
        self.start_workers(threads - 1)?;
        // SAFETY: the references outlive their use: this function returns only after every worker of this job has
        // counted itself in `finished`, and workers do not touch the job after that. The slot is ours (see `Sync`).
        #[allow(unsafe_code, reason = "scoped threads that persist")]
        unsafe {
            *self.job.get() = Some((
                std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job),
                std::mem::transmute::<&AtomicBool, &'static AtomicBool>(cancel),
            ));
        }
        self.share_streams(threads);
        for cursors in &self.cursors[..threads] {
            cursors.0.iter().flatten().for_each(|c| c.store(0, Relaxed));
        }
        self.arrived.0.store(0, Relaxed);
        self.finished.0.store(0, Relaxed);
        self.stop.store(false, Relaxed);
        self.leave.store(false, Relaxed);
        *lock(&self.panic) = None;
        let number = (self.epoch.0.load(Relaxed) >> 16) + 1;
        self.epoch.0.store(number << 16 | threads as u64, Release);
        self.begin.notify();
        IN_JOB.set(true);
        self.take_part(0, threads);
        IN_JOB.set(false);
        self.end
            .wait(threads, || self.finished.0.load(Acquire) == threads);
        if let Some(message) = lock(&self.panic).take() {
            return Err(panicked(&message));
        }
        if self.stop.load(Relaxed) {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Sets the shares of streams: equal ones at first, then half way from those of the last job to what each thread did in it. All were busy
    /// to the end, as whoever was done took from the others, so that is how fast each is, which depends on where its core is and who else uses it.
    fn share_streams(&self, threads: usize) {
        let done = self.streamed[..threads].iter();
        let done: Vec<usize> = done.map(|n| n.0.swap(0, Relaxed)).collect();
        let all: usize = done.iter().sum();
        let same = self.ends_for.swap(threads, Relaxed) == threads;
        if same && all < ENOUGH * threads {
            return;
        }
        let (mut last, mut end) = (0, 0.0);
        let mut shares: Vec<f64> = Vec::with_capacity(threads);
        for (i, n) in done.into_iter().enumerate() {
            let was = self.ends[i].load(Relaxed);
            let old = f64::from(was.wrapping_sub(last)) / f64::from(WHOLE);
            last = was;
            let equal = 1.0 / threads as f64;
            // A thread that got nothing done still begins somewhere.
            let new = old.midpoint(n as f64 / all.max(1) as f64);
            shares.push(if same { new.max(equal / 8.0) } else { equal });
        }
        let sum: f64 = shares.iter().sum();
        for (share, to) in shares.iter().zip(&self.ends) {
            end += share / sum;
            to.store((end * f64::from(WHOLE)).round() as u32, Relaxed);
        }
    }

    /// Starts workers up to `wanted`.
    fn start_workers(&'static self, wanted: usize) -> Result<()> {
        let mut started = lock(&self.workers);
        while *started < wanted {
            let (index, seen) = (*started + 1, self.epoch.0.load(Relaxed));
            std::thread::Builder::new()
                .name(format!("kbit-{index}"))
                .spawn(move || self.work(index, seen))
                .map_err(|e| {
                    Error::Device(format!("cpu: cannot start thread {index} of {wanted}: {e}"))
                })?;
            *started += 1;
        }
        Ok(())
    }

    /// The life of a worker.
    fn work(&self, index: usize, mut seen: u64) {
        IN_JOB.set(true);
        loop {
            self.begin.wait((seen & 0xffff) as usize, || {
                self.epoch.0.load(Acquire) != seen
            });
            seen = self.epoch.0.load(Acquire);
            let threads = (seen & 0xffff) as usize;
            if index < threads {
                self.take_part(index, threads);
            }
        }
    }

    /// One thread's part of a job; never unwinds.
    fn take_part(&self, index: usize, threads: usize) {
        // SAFETY: this thread takes part in the published job, see `Sync`.
        #[allow(unsafe_code, reason = "see Sync")]
        let slot = unsafe { *self.job.get() };
        if let Some((job, cancel)) = slot {
            let team = Team {
                index,
                threads,
                cancel,
                stop: &self.stop,
                pool: Some(self),
                phase: Cell::new(0),
                loops: Cell::new(0),
            };
            let result = catch_unwind(AssertUnwindSafe(|| job(&team)));
            if let Err(panic) = &result {
                lock(&self.panic).get_or_insert_with(|| message(&**panic));
            }
            if !matches!(result, Ok(Ok(()))) {
                self.stop.store(true, Relaxed);
                // Whoever waits for this thread at a barrier leaves: it will not come.
                self.leave.store(true, SeqCst);
                self.generation.0.fetch_add(1, SeqCst);
                self.barrier.notify();
            }
        }
        self.finished.0.fetch_add(1, AcqRel);
        self.end.notify();
    }
}

/// A lock that a panic elsewhere does not spoil.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to use the pool, first come first served.
struct Turn(&'static Pool);

impl Turn {
    fn wait(pool: &'static Pool) -> Self {
        let mut turns = lock(&pool.turns);
        let mine = turns.next;
        turns.next += 1;
        while turns.serving != mine {
            turns = pool
                .turn_over
                .wait(turns)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Self(pool)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.0.turns).serving += 1;
        self.0.turn_over.notify_all();
    }
}

/// Waiting for a condition that another thread makes true: spin, then sleep.
#[derive(Default)]
struct Event {
    sleepers: AtomicUsize,
    mutex: Mutex<()>,
    wake: Condvar,
}

impl Event {
    /// Waits until `ready`; whoever makes it true calls [`Event::notify`] afterwards.
    fn wait(&self, threads: usize, ready: impl Fn() -> bool) {
        self.wait_while(threads, ready, || {});
    }

    /// The same; while it spins it calls `idle`.
    fn wait_while(&self, threads: usize, ready: impl Fn() -> bool, mut idle: impl FnMut()) {
        if ready() {
            return;
        }
        // Spinning on more threads than cores would keep the one that is waited for from running.
        if threads <= cores_cached() {
            let start = Instant::now();
            loop {
                for _ in 0..16 {
                    idle();
                    std::hint::spin_loop();
                    if ready() {
                        return;
                    }
                }
                if start.elapsed() > SPIN {
                    break;
                }
            }
        }
        let mut guard = lock(&self.mutex);
        self.sleepers.fetch_add(1, SeqCst);
        fence(SeqCst);
        while !ready() {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    /// Wakes the sleepers. The fence orders the caller's store before the load: either the sleeper sees the new state, or
    /// it is seen here.
    fn notify(&self) {
        fence(SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            drop(lock(&self.mutex));
            self.wake.notify_all();
        }
    }
}

/// [`cores`], asked once a process: the answer takes system calls.
fn cores_cached() -> usize {
    static CORES: AtomicUsize = AtomicUsize::new(0);
    match CORES.load(Relaxed) {
        0 => {
            let n = cores();
            CORES.store(n, Relaxed);
            n
        }
        n => n,
    }
}

/// What a job sees of the threads that run it.
pub(crate) struct Team<'a> {
    index: usize,
    threads: usize,
    cancel: &'a AtomicBool,
    stop: &'a AtomicBool,
    /// None: one thread alone.
    pool: Option<&'a Pool>,
    /// Barriers passed, modulo 2.
    phase: Cell<usize>,
    /// Loops begun since the last barrier.
    loops: Cell<usize>,
}

impl Team<'_> {
    /// This thread, `0..threads`.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Threads of the team.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Waits for all threads; what they wrote before is seen after.
    ///
    /// # Errors
    /// [`Stop`] on every thread alike, when the step was cancelled or a thread panicked.
    pub(crate) fn barrier(&self) -> std::result::Result<(), Stop> {
        self.barrier_while(|| {})
    }

    /// [`Team::barrier`] that calls `idle` again and again while it spins.
    pub(crate) fn barrier_while(&self, idle: impl FnMut()) -> std::result::Result<(), Stop> {
        let Some(pool) = self.pool else {
            return if self.stop.load(Relaxed) || self.cancel.load(Relaxed) {
                Err(Stop)
            } else {
                Ok(())
            };
        };
        let next = self.phase.get() ^ 1;
        self.phase.set(next);
        self.loops.set(0);
        // The phase before this one used these; everybody left it at the last barrier.
        for cursor in &pool.cursors[self.index].0[next] {
            cursor.store(0, Relaxed);
        }
        let generation = pool.generation.0.load(Acquire);
        if pool.arrived.0.fetch_add(1, AcqRel) + 1 == self.threads {
            pool.arrived.0.store(0, Relaxed);
            if self.stopped() {
                pool.leave.store(true, Relaxed);
            }
            pool.generation.0.fetch_add(1, AcqRel);
            pool.barrier.notify();
        } else {
            let passed =
                || pool.generation.0.load(Acquire) != generation || pool.leave.load(Acquire);
            pool.barrier.wait_while(self.threads, passed, idle);
        }
        if pool.leave.load(Acquire) {
            Err(Stop)
        } else {
            Ok(())
        }
    }

    /// Calls `f` for items `0..items`, each on one thread of the team. All threads must come here, with the same number, at
    /// most [`LOOPS`] times between two barriers; nobody waits at the end. Items are skipped once the step is stopped.
    pub(crate) fn for_each(&self, items: usize, mut f: impl FnMut(usize)) {
        let equal = |i| items * i / self.threads..items * (i + 1) / self.threads;
        self.share_out(equal, 1..=1, |run| f(run.start));
    }

    /// [`Team::for_each`] for items of a stream from memory, which are cheaper together: `f` gets runs of neighbouring items, as many as the end of
    /// `sizes` says while there is much left of a range and fewer towards its end, where threads finish together only if they take little at a time.
    /// Ranges are as long as threads were fast.
    pub(crate) fn for_runs(
        &self,
        items: usize,
        sizes: RangeInclusive<usize>,
        mut f: impl FnMut(Range<usize>),
    ) {
        let mut done = 0;
        self.share_out(
            |i| self.stream_share(i, items),
            sizes,
            |run| {
                done += run.len();
                f(run);
            },
        );
        if let Some(pool) = self.pool {
            pool.streamed[self.index].0.fetch_add(done, Relaxed);
        }
    }

    /// The items of a stream with which a thread begins.
    pub(crate) fn stream_share(&self, index: usize, items: usize) -> Range<usize> {
        let Some(pool) = self.pool else {
            return 0..items;
        };
        let at = |end: u32| (items as u64 * u64::from(end) / u64::from(WHOLE)) as usize;
        let ends = |i: usize| pool.ends[i].load(Relaxed);
        index.checked_sub(1).map_or(0, |before| at(ends(before)))..at(ends(index))
    }

    /// Every range that `share` gives for a thread, in runs.
    fn share_out(
        &self,
        share: impl Fn(usize) -> Range<usize>,
        sizes: RangeInclusive<usize>,
        mut f: impl FnMut(Range<usize>),
    ) {
        /// A run takes at most this part of what is left.
        const PART: usize = 2;
        let run = |left: usize| (left / PART).clamp(*sizes.start(), *sizes.end()).min(left);
        let Some(pool) = self.pool else {
            let Range { mut start, end } = share(0);
            while start < end && !self.stopped() {
                let next = start + run(end - start);
                f(start..next);
                start = next;
            }
            return;
        };
        let slot = self.loops.get();
        self.loops.set(slot + 1);
        for step in 0..self.threads.min(REACH) {
            let owner = (self.index + step) % self.threads;
            let share = share(owner);
            let cursor = &pool.cursors[owner].0[self.phase.get()][slot];
            // Looking first keeps the lines of finished neighbours shared.
            let mut seen = cursor.load(Relaxed);
            while seen < share.len() {
                let end = seen + run(share.len() - seen);
                if let Err(now) = cursor.compare_exchange_weak(seen, end, Relaxed, Relaxed) {
                    seen = now;
                    continue;
                }
                if self.stopped() {
                    return;
                }
                f(share.start + seen..share.start + end);
                seen = cursor.load(Relaxed);
            }
        }
    }

    /// Whether the step is to end. Whoever skips work because of it has told the others.
    fn stopped(&self) -> bool {
        if self.cancel.load(Relaxed) {
            self.stop.store(true, Relaxed);
        }
        self.stop.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static NEVER: AtomicBool = AtomicBool::new(false);

    /// Every item of every loop is done once, and barriers order writes before reads.
    #[test]
    fn items_once_and_barriers() {
        for threads in [1, 2, 3, 4, 7] {
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..200 {
                run(threads, &NEVER, &|team| {
                    for phase in 0..5 {
                        for _ in 0..LOOPS {
                            team.for_each(round * 5, |i| _ = counts[i].fetch_add(1, Relaxed));
                        }
                        team.barrier()?;
                        for c in &counts[..round * 5] {
                            assert_eq!(c.load(Relaxed), LOOPS * (phase + 1));
                        }
                        team.barrier()?;
                    }
                    Ok(())
                })
                .expect("no panic");
                counts.iter().for_each(|c| c.store(0, Relaxed));
            }
        }
    }

    #[test]
    fn a_panic_becomes_an_error_and_the_pool_goes_on() {
        for threads in [1, 2, 4] {
            for guilty in 0..threads {
                let result = run(threads, &NEVER, &|team| {
                    team.barrier()?;
                    assert!(team.index() != guilty, "planted in {guilty}");
                    team.barrier()?;
                    team.barrier()
                });
                let message = result.expect_err("the panic is reported").to_string();
                assert!(
                    message.contains(&format!("planted in {guilty}")),
                    "{message}"
                );
                run(threads, &NEVER, &|team| team.barrier()).expect("the pool works after a panic");
            }
        }
    }

    /// Runs cover every item once, are as long as asked for, and end in short ones.
    #[test]
    fn runs_cover_every_item_once() {
        for (threads, items, least, most) in [
            (1, 100, 1, 7),
            (2, 33, 1, 1),
            (2, 80, 1, 100),
            (3, 1000, 4, 16),
            (4, 5, 1, 100),
            (4, 5, 100, 100),
        ] {
            let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            let (longest, short) = (AtomicUsize::new(0), AtomicUsize::new(0));
            run(threads, &NEVER, &|team| {
                team.for_runs(items, least..=most, |run| {
                    longest.fetch_max(run.len(), Relaxed);
                    short.fetch_add(usize::from(run.len() <= least), Relaxed);
                    counts[run].iter().for_each(|c| _ = c.fetch_add(1, Relaxed));
                });
                team.barrier()
            })
            .expect("no panic");
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            let longest = longest.load(Relaxed);
            assert!(longest <= most.max(least), "{items} items: {longest}");
            assert!(short.load(Relaxed) >= threads);
        }
    }

    /// A thread that is slow begins with less, and with more when it is fast again; items are all done once throughout.
    #[test]
    fn shares_follow_speed() {
        const ITEMS: usize = 1000;
        // A pool of its own: others do not change what is learned here.
        let pool: &'static Pool = Box::leak(Box::new(Pool::new(std::process::id())));
        let job = |slow: usize| {
            let (count, own) = (AtomicUsize::new(0), AtomicUsize::new(0));
            pool.run(3, &NEVER, &|team| {
                if team.index() == 0 {
                    own.store(team.stream_share(0, ITEMS).len(), Relaxed);
                }
                team.for_runs(ITEMS, 1..=4, |run| {
                    let turns = if team.index() == slow { 16 } else { 1 };
                    std::thread::sleep(Duration::from_micros(20 * turns * run.len() as u64));
                    count.fetch_add(run.len(), Relaxed);
                });
                team.barrier()
            })
            .expect("no panic");
            assert_eq!(count.load(Relaxed), ITEMS);
            own.load(Relaxed)
        };
        assert_eq!(job(0), ITEMS / 3);
        // On a busy machine any thread may be slow for a while, not for all of these.
        let mut often = 0..200;
        assert!(often.any(|_| job(0) < ITEMS / 5), "the slow thread");
        assert!(often.any(|_| job(1) > ITEMS * 2 / 5), "the fast thread");
    }

    #[test]
    fn one_thread_that_stops_ends_the_step() {
        for threads in [1, 2, 4] {
            let result = run(threads, &NEVER, &|team| {
                team.barrier()?;
                if team.index() == threads - 1 {
                    return Err(Stop);
                }
                team.barrier()?;
                team.barrier()
            });
            assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        }
    }

    #[test]
    fn cancelling_stops_all_threads() {
        for threads in [1, 3] {
            let (cancel, passed) = (AtomicBool::new(false), AtomicUsize::new(0));
            let result = run(threads, &cancel, &|team| {
                loop {
                    team.for_each(10, |i| {
                        if i == 3 && passed.fetch_add(1, Relaxed) == 50 {
                            cancel.store(true, Relaxed);
                        }
                    });
                    team.barrier()?;
                }
            });
            assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
            assert_eq!(passed.load(Relaxed), 51);
        }
    }

    /// Many callers take turns; a job inside a job runs alone.
    #[test]
    fn many_callers_and_nested_jobs() {
        std::thread::scope(|scope| {
            for caller in 0..6 {
                scope.spawn(move || {
                    for round in 0..100 {
                        let sum = AtomicUsize::new(0);
                        run(2 + caller % 3, &NEVER, &|team| {
                            team.for_each(100, |i| _ = sum.fetch_add(i, Relaxed));
                            team.barrier()?;
                            if team.index() == 1 {
                                run(4, &NEVER, &|inner| {
                                    assert_eq!(inner.threads, 1);
                                    inner.for_each(10, |i| _ = sum.fetch_add(i, Relaxed));
                                    inner.barrier()
                                })
                                .expect("no panic");
                            }
                            team.barrier()
                        })
                        .expect("no panic");
                        assert_eq!(sum.load(Relaxed), 4950 + 45, "round {round}");
                    }
                });
            }
        });
    }

    /// Pauses longer than the spinning: sleepers are woken.
    #[test]
    fn sleeping_threads_wake() {
        for _ in 0..20 {
            run(4, &NEVER, &|team| {
                if team.index() == 2 {
                    std::thread::sleep(SPIN * 10);
                }
                team.barrier()?;
                if team.index() == 0 {
                    std::thread::sleep(SPIN * 10);
                }
                team.barrier()
            })
            .expect("no panic");
            std::thread::sleep(SPIN * 10);
        }
    }

    /// The child of a fork has none of the threads, and works.
    #[cfg(unix)]
    #[test]
    #[allow(unsafe_code, reason = "fork, waitpid and _exit")]
    fn fork() {
        run(3, &NEVER, &|team| team.barrier()).expect("the parent's pool");
        // SAFETY: the child uses only this module, whose locks it does not inherit, and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let sum = AtomicUsize::new(0);
            let worked = run(3, &NEVER, &|team| {
                team.for_each(100, |i| _ = sum.fetch_add(i, Relaxed));
                team.barrier()
            });
            let code = i32::from(worked.is_err() || sum.load(Relaxed) != 4950);
            // SAFETY: ends the child without running the test harness.
            unsafe { libc::_exit(code) };
        }
        assert!(child > 0, "fork failed");
        let (start, mut status) = (Instant::now(), 0);
        // SAFETY: waits for the child made above.
        while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "the child hangs");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(status, 0, "the child failed");
        run(3, &NEVER, &|team| team.barrier()).expect("the parent still works");
    }
}
