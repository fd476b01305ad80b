//! The engine: a runner, its step loop on a thread of its own, and the handles through which callers talk to it.
//!
//! Any number of threads may submit. Requests run together in one batch (a step takes the next token of every running
//! request and a chunk of a prompt) and give the same tokens as alone, because a device's results do not depend on the
//! batch. Nothing here outlives the [`Engine`] but handles: dropping it stops the loop and ends what was under way.
//!
//! After a `fork` the child has no loop thread: every call there answers with [`Error::Device`] instead of waiting.

mod step;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbit_tensor::program::{Program, Runner};
use kbit_tensor::{Error, Result};

use crate::sampler::Sampling;

/// A model on a device with its step loop.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    context: usize,
    vocab_size: usize,
    threads: usize,
}

/// What a prompt asks for.
#[derive(Clone, Debug)]
pub struct Generate {
    /// The prompt, at least one id.
    pub ids: Vec<u32>,
    /// Tokens after which it ends.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Ids that end it; the id is still handed out.
    pub eos: Vec<u32>,
    /// Log-probabilities of the chosen and of this many most likely tokens.
    pub logprobs: Option<usize>,
}

/// What one pass over ids asks for.
#[derive(Clone, Copy, Debug)]
pub enum PassKind {
    /// Logits, and on request hidden states and attention weights.
    Forward {
        /// Hidden states as [`Output::hidden`](kbit_tensor::program::Output::hidden).
        hidden: bool,
        /// Attention weights of every layer, (heads, tokens, tokens).
        attentions: bool,
    },
    /// Log-probabilities of the ids from `start` on.
    Score {
        /// At least 1.
        start: usize,
    },
}

/// Result of a pass.
#[derive(Clone, Debug, Default)]
pub struct PassOutput {
    /// Forward: (tokens, vocab).
    pub logits: Vec<f32>,
    /// Forward: (tokens, hidden) each.
    pub hidden: Vec<Vec<f32>>,
    /// Forward: (heads, tokens, tokens) of each layer.
    pub attentions: Vec<Vec<f32>>,
    /// Score: one per id from `start` on.
    pub logprobs: Vec<f32>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability before sampling changed the logits; None unless asked for.
    pub logprob: Option<f32>,
    /// The most likely ids and their log-probabilities, as many as asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An id of `eos`.
    Stop,
    /// `max_new_tokens`.
    Length,
    /// The end of the context.
    Context,
    /// Its caller cancelled it.
    Cancelled,
}

/// Counters since the engine was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Prompt tokens computed (again, where a request had to give up its cache).
    pub prompt_tokens: u64,
    /// Tokens handed out.
    pub generated_tokens: u64,
    /// Seconds in steps with prompt tokens.
    pub prefill_seconds: f64,
    /// Seconds in all other steps.
    pub decode_seconds: f64,
    /// Steps.
    pub steps: u64,
    /// Requests that gave up their cache to older ones.
    pub preemptions: u64,
    /// Bytes of cache after the last step.
    pub cache_bytes: usize,
    /// Requests and passes in the batch.
    pub running: usize,
    /// Requests and passes waiting for a place.
    pub waiting: usize,
}

struct Shared {
    inbox: Mutex<Inbox>,
    max_waiting: usize,
    wake: Condvar,
    /// Stops the step under way: something in it was cancelled.
    interrupt: AtomicBool,
    stats: Mutex<Stats>,
    /// The process that has the loop thread.
    process: u32,
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<step::Job>,
    passes: VecDeque<step::Job>,
    /// What the loop took from here and has given no place yet.
    taken: usize,
    /// Why there is no more loop.
    closed: Option<String>,
}

impl Inbox {
    /// Requests and passes without a place.
    fn waiting(&self) -> usize {
        self.taken + self.requests.len() + self.passes.len()
    }
}

/// The caller's and the loop's view of one request or pass.
#[derive(Default)]
struct Slot {
    progress: Mutex<Progress>,
    changed: Condvar,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct Progress {
    tokens: Vec<Token>,
    output: PassOutput,
    end: Option<Result<Finish>>,
    /// First step, first and last token.
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// A panic while a lock was held leaves plain data behind; the loop reports the panic itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same error once more, for another caller or another call.
fn again(error: &Error) -> Error {
    match error {
        Error::Format(m) => Error::Format(m.clone()),
        Error::Unsupported(m) => Error::Unsupported(m.clone()),
        Error::Argument(m) => Error::Argument(m.clone()),
        Error::ContextOverflow(m) => Error::ContextOverflow(m.clone()),
        Error::Memory(m) => Error::Memory(m.clone()),
        Error::Cancelled => Error::Cancelled,
        other => Error::Device(other.to_string()),
    }
}

impl Engine {
    /// Starts the loop. `max_batch`: requests that run at once; `max_waiting`: requests and passes that may wait for a
    /// place, beyond which [`Engine::submit`] and [`Engine::pass`] refuse.
    ///
    /// # Errors
    /// [`Error::Argument`] where one of them is 0, [`Error::Device`] when the system grants no thread.
    pub fn new(
        program: &Program,
        runner: Box<dyn Runner>,
        max_batch: usize,
        max_waiting: usize,
    ) -> Result<Self> {
        for (name, n) in [("max_batch", max_batch), ("max_waiting", max_waiting)] {
            if n == 0 {
                return Err(Error::Argument(format!("{name} must be at least 1, is 0")));
            }
        }
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            max_waiting,
            wake: Condvar::new(),
            interrupt: AtomicBool::new(false),
            stats: Mutex::default(),
            process: std::process::id(),
        });
        let threads = runner.threads();
        let (context, vocab_size) = (program.context, program.vocab_size);
        let work = step::Loop::new(shared.clone(), runner, context, vocab_size, max_batch);
        let thread = std::thread::Builder::new()
            .name("kbit-engine".into())
            .spawn(move || work.run());
        let thread = thread.map_err(|e| Error::Device(format!("no thread for the engine: {e}")))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
            context,
            vocab_size,
            threads,
        })
    }

    /// Positions a sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Rows of the head.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Threads of the device.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        let stats = *lock(&self.shared.stats);
        Stats {
            waiting: lock(&self.shared.inbox).waiting(),
            ..stats
        }
    }

    /// Queues a prompt.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt, ids outside the vocabulary or sampling values out of range,
    /// [`Error::ContextOverflow`] for a prompt that leaves no room, [`Error::Memory`] when as many wait as may,
    /// [`Error::Device`] after [`Engine::close`].
    pub fn submit(&self, generate: Generate) -> Result<Request> {
        generate.sampling.validate()?;
        self.validate(&generate.ids)?;
        let (tokens, context) = (generate.ids.len(), self.context);
        if tokens >= context {
            return Err(Error::ContextOverflow(format!(
                "a prompt of {tokens} tokens leaves no room in a context of {context}"
            )));
        }
        let slot = Arc::<Slot>::default();
        if generate.max_new_tokens == 0 {
            slot.end(Ok(Finish::Length));
        } else {
            let planned = tokens.saturating_add(generate.max_new_tokens).min(context);
            let work = step::Work::Generate {
                max_new_tokens: generate.max_new_tokens,
                sampling: generate.sampling,
                eos: generate.eos,
                logprobs: generate.logprobs.map(|n| n.min(self.vocab_size)),
                generated: 0,
            };
            self.send(step::Job {
                slot: slot.clone(),
                ids: generate.ids,
                planned,
                work,
            })?;
        }
        Ok(Request {
            slot,
            shared: self.shared.clone(),
        })
    }

    /// Queues one pass over fresh ids.
    ///
    /// # Errors
    /// As [`Engine::submit`]; [`Error::Argument`] for a `start` outside `1..ids.len()`.
    pub fn pass(&self, ids: Vec<u32>, kind: PassKind) -> Result<Pass> {
        self.validate(&ids)?;
        let (tokens, context) = (ids.len(), self.context);
        if tokens > context {
            return Err(Error::ContextOverflow(format!(
                "{tokens} tokens in a context of {context}"
            )));
        }
        if let PassKind::Score { start } = kind
            && !(1..tokens).contains(&start)
        {
            return Err(Error::Argument(format!(
                "start must be 1..{tokens} for {tokens} ids, is {start}"
            )));
        }
        let slot = Arc::<Slot>::default();
        let job = step::Job {
            slot: slot.clone(),
            ids,
            planned: tokens,
            work: step::Work::Pass { kind },
        };
        self.send(job)?;
        Ok(Pass {
            slot,
            shared: self.shared.clone(),
        })
    }

    /// Stops the loop and frees the cache; what is under way ends with [`Error::Device`]. Twice is fine.
    pub fn close(&self) {
        if self.shared.forked().is_err() {
            // The thread to be joined lives in another process.
            std::mem::forget(lock(&self.thread).take());
            return;
        }
        lock(&self.shared.inbox)
            .closed
            .get_or_insert_with(|| "the engine was closed".into());
        self.shared.interrupt.store(true, Ordering::Release);
        self.shared.wake.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            // The loop catches its panics; there is nothing to hear from it.
            let _ = thread.join();
        }
    }

    fn validate(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Argument(
                "a prompt needs at least one token, has 0".into(),
            ));
        }
        let vocab = self.vocab_size;
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(at) => Err(Error::Argument(format!(
                "token id {} at {at} is outside the vocabulary of {vocab}",
                ids[at]
            ))),
            None => Ok(()),
        }
    }

    fn send(&self, job: step::Job) -> Result<()> {
        self.shared.forked()?;
        let mut inbox = lock(&self.shared.inbox);
        if let Some(why) = &inbox.closed {
            return Err(Error::Device(why.clone()));
        }
        let (waiting, most) = (inbox.waiting(), self.shared.max_waiting);
        if waiting >= most {
            return Err(Error::Memory(format!(
                "{waiting} requests wait for a place and at most {most} may (max_waiting); try again when some have ended"
            )));
        }
        match job.work {
            step::Work::Pass { .. } => inbox.passes.push_back(job),
            step::Work::Generate { .. } => inbox.requests.push_back(job),
        }
        self.shared.wake.notify_all();
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn forked(&self) -> Result<()> {
        let (made, here) = (self.process, std::process::id());
        if made == here {
            return Ok(());
        }
        let why = format!(
            "this engine runs in process {made} and cannot be used in its fork {here}; make a new one there"
        );
        Err(Error::Device(why))
    }

    /// Ends a slot's work at the next operation.
    fn cancel(&self, slot: &Slot) {
        if lock(&slot.progress).end.is_none() {
            slot.cancelled.store(true, Ordering::Release);
            self.interrupt.store(true, Ordering::Release);
            self.wake.notify_all();
        }
    }
}

impl Slot {
    fn end(&self, end: Result<Finish>) {
        let mut progress = lock(&self.progress);
        if progress.end.is_none() {
            progress.end = Some(end);
        }
        self.changed.notify_all();
    }

    /// Waits until `ready` or the time is up.
    fn wait(
        &self,
        timeout: Duration,
        ready: impl Fn(&Progress) -> bool,
    ) -> MutexGuard<'_, Progress> {
        let progress = lock(&self.progress);
        let waited = self
            .changed
            .wait_timeout_while(progress, timeout, |p| !ready(p));
        waited.map_or_else(|e| e.into_inner().0, |(progress, _)| progress)
    }
}

/// A prompt under way. Dropping it cancels it.
pub struct Request {
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl Request {
    /// Tokens since the last call, waiting up to `timeout` for the first (and then none); None once everything was handed out.
    ///
    /// # Errors
    /// What ended the request, if it failed.
    pub fn wait(&self, timeout: Duration) -> Result<Option<Vec<Token>>> {
        self.shared.forked()?;
        let mut progress = self
            .slot
            .wait(timeout, |p| !p.tokens.is_empty() || p.end.is_some());
        let tokens = std::mem::take(&mut progress.tokens);
        match &progress.end {
            Some(Err(e)) if tokens.is_empty() => Err(again(e)),
            Some(Ok(_)) if tokens.is_empty() => Ok(None),
            _ => Ok(Some(tokens)),
        }
    }

    /// Why it ended; None while it runs and when it failed.
    pub fn finish(&self) -> Option<Finish> {
        lock(&self.slot.progress)
            .end
            .as_ref()
            .and_then(|e| e.as_ref().ok().copied())
    }

    /// Seconds from the start of prefill to the first token; 0 before it.
    pub fn prompt_seconds(&self) -> f64 {
        let progress = lock(&self.slot.progress);
        seconds(progress.started, progress.first)
    }

    /// Seconds from the first token to the last.
    pub fn decode_seconds(&self) -> f64 {
        let progress = lock(&self.slot.progress);
        seconds(progress.first, progress.last)
    }

    /// Ends the request at the next operation; its memory is freed then.
    pub fn cancel(&self) {
        self.shared.cancel(&self.slot);
    }
}

fn seconds(from: Option<Instant>, to: Option<Instant>) -> f64 {
    from.zip(to)
        .map_or(0.0, |(from, to)| to.duration_since(from).as_secs_f64())
}

impl Drop for Request {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A pass under way. Dropping it cancels it.
pub struct Pass {
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl Pass {
    /// The result, waiting up to `timeout` for it; None when it is not there yet.
    ///
    /// # Errors
    /// What ended the pass, if it failed.
    pub fn wait(&self, timeout: Duration) -> Result<Option<PassOutput>> {
        self.shared.forked()?;
        let mut progress = self.slot.wait(timeout, |p| p.end.is_some());
        match &progress.end {
            None => Ok(None),
            Some(Err(e)) => Err(again(e)),
            Some(Ok(Finish::Cancelled)) => Err(Error::Cancelled),
            Some(Ok(_)) => Ok(Some(std::mem::take(&mut progress.output))),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.shared.cancel(&self.slot);
    }
}
