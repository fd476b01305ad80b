//! The step loop: which tokens go into the next step, and what becomes of its rows.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kbit_tensor::program::{Output, Part, Rows, Runner, SequenceId, Want};
use kbit_tensor::{Error, Result};

use super::{Finish, PassKind, PassOutput, Shared, Slot, Token, lock};
use crate::sampler::{LogProbs, Sampling};

/// Prompt tokens of a step while nobody waits for a next token.
const PROMPT_CHUNK: usize = 512;
/// Prompt tokens of a step that also decodes: small, so that running requests keep their pace.
const MIXED_CHUNK: usize = 128;
/// Logits of one step of a pass, at most.
const PASS_LOGITS: usize = 16 << 20;

/// Work that waits for a place, or has one.
pub(super) struct Job {
    pub(super) slot: Arc<Slot>,
    /// The prompt, then what was generated.
    pub(super) ids: Vec<u32>,
    pub(super) planned: usize,
    pub(super) work: Work,
}

pub(super) enum Work {
    Generate {
        max_new_tokens: usize,
        sampling: Sampling,
        eos: Vec<u32>,
        logprobs: Option<usize>,
        generated: usize,
    },
    Pass {
        kind: PassKind,
    },
}

/// A job with a sequence; `fed` of its ids are in the cache.
struct Active {
    job: Job,
    sequence: SequenceId,
    fed: usize,
}

impl Active {
    fn pending(&self) -> usize {
        self.job.ids.len() - self.fed
    }
}

pub(super) struct Loop {
    shared: Arc<Shared>,
    runner: Box<dyn Runner>,
    context: usize,
    vocab_size: usize,
    max_batch: usize,
    /// Oldest first.
    requests: VecDeque<Job>,
    passes: VecDeque<Job>,
    /// In order of admission.
    active: Vec<Active>,
    pass: Option<Active>,
    /// Whose turn it is when a pass and requests both have work.
    pass_turn: bool,
    /// The cache was full: nobody is admitted until somebody leaves.
    full: bool,
}

/// The part of one job in a step: its place in `active` (None: the pass) and how many ids.
type Plan = Vec<(Option<usize>, usize)>;

impl Loop {
    pub(super) fn new(
        shared: Arc<Shared>,
        runner: Box<dyn Runner>,
        context: usize,
        vocab_size: usize,
        max_batch: usize,
    ) -> Self {
        Self {
            shared,
            runner,
            context,
            vocab_size,
            max_batch,
            requests: VecDeque::new(),
            passes: VecDeque::new(),
            active: Vec::new(),
            pass: None,
            pass_turn: false,
            full: false,
        }
    }

    pub(super) fn run(mut self) {
        let why = match catch_unwind(AssertUnwindSafe(|| self.steps())) {
            Ok(why) => why,
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or(panic.downcast_ref::<&str>().copied());
                format!(
                    "the engine broke down: {}",
                    text.unwrap_or("a panic without a message")
                )
            }
        };
        let mut inbox = lock(&self.shared.inbox);
        inbox.closed = Some(why.clone());
        let waiting = std::mem::take(&mut inbox.requests)
            .into_iter()
            .chain(std::mem::take(&mut inbox.passes));
        let here = self.requests.drain(..).chain(self.passes.drain(..));
        let running = self.active.drain(..).chain(self.pass.take()).map(|a| a.job);
        for job in running.chain(here).chain(waiting) {
            job.slot.end(Err(Error::Device(why.clone())));
        }
        inbox.taken = 0;
        drop(inbox);
        let mut stats = lock(&self.shared.stats);
        (stats.running, stats.cache_bytes) = (0, 0);
    }

    /// Until the engine is closed; says why it was.
    fn steps(&mut self) -> String {
        loop {
            // Before looking for cancelled work: whoever cancels sets its own flag first.
            self.shared.interrupt.store(false, Ordering::Release);
            if let Some(why) = self.collect() {
                return why;
            }
            self.sweep();
            self.admit();
            self.publish();
            let plan = self.plan();
            if !plan.is_empty() {
                self.execute(&plan);
            }
            self.publish();
        }
    }

    fn publish(&self) {
        let mut stats = lock(&self.shared.stats);
        stats.cache_bytes = self.runner.cache_bytes();
        stats.running = self.active.len() + usize::from(self.pass.is_some());
        drop(stats);
        lock(&self.shared.inbox).taken = self.requests.len() + self.passes.len();
    }

    /// Takes what was submitted, waiting when there is nothing else to do.
    fn collect(&mut self) -> Option<String> {
        let idle = self.active.is_empty()
            && self.pass.is_none()
            && self.requests.is_empty()
            && self.passes.is_empty();
        let mut inbox = lock(&self.shared.inbox);
        while idle && inbox.closed.is_none() && inbox.requests.is_empty() && inbox.passes.is_empty()
        {
            inbox = self
                .shared
                .wake
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.requests.append(&mut inbox.requests);
        self.passes.append(&mut inbox.passes);
        inbox.taken = self.requests.len() + self.passes.len();
        inbox.closed.clone()
    }

    /// Ends cancelled work.
    fn sweep(&mut self) {
        let cancelled = |job: &Job| job.slot.cancelled.load(Ordering::Acquire);
        for queue in [&mut self.requests, &mut self.passes] {
            queue.retain(|job| {
                let gone = cancelled(job);
                if gone {
                    job.slot.end(Ok(Finish::Cancelled));
                }
                !gone
            });
        }
        for i in (0..self.active.len()).rev() {
            if cancelled(&self.active[i].job) {
                self.end(Some(i), Ok(Finish::Cancelled));
            }
        }
        if self.pass.as_ref().is_some_and(|a| cancelled(&a.job)) {
            self.end(None, Ok(Finish::Cancelled));
        }
    }

    /// Gives places to those who waited longest.
    fn admit(&mut self) {
        if self.full && (!self.active.is_empty() || self.pass.is_some()) {
            return;
        }
        self.full = false;
        while self.active.len() < self.max_batch
            && let Some(job) = self.requests.pop_front()
        {
            if let Some(active) = self.open(job) {
                self.active.push(active);
            }
        }
        while self.pass.is_none()
            && let Some(job) = self.passes.pop_front()
        {
            self.pass = self.open(job);
        }
    }

    fn open(&mut self, job: Job) -> Option<Active> {
        match self.runner.open(job.planned) {
            Ok(sequence) => Some(Active {
                job,
                sequence,
                fed: 0,
            }),
            Err(e) => {
                job.slot.end(Err(e));
                None
            }
        }
    }

    /// The next step: a chunk of the pass, or every request's next token and chunks of prompts.
    fn plan(&mut self) -> Plan {
        if let Some(pass) = &self.pass
            && (self.pass_turn || self.active.is_empty())
        {
            self.pass_turn = false;
            let chunk = (PASS_LOGITS / self.vocab_size).clamp(16, PROMPT_CHUNK);
            return vec![(None, pass.pending().min(chunk))];
        }
        self.pass_turn = true;
        let decoding = |a: &Active| a.pending() == 1;
        let mut plan: Plan = (0..self.active.len())
            .filter(|&i| decoding(&self.active[i]))
            .map(|i| (Some(i), 1))
            .collect();
        let mut budget = if plan.is_empty() {
            PROMPT_CHUNK
        } else {
            MIXED_CHUNK
        };
        // Equal shares of what is left, shortest first: a short prompt does not wait for a long one, a long one never starves.
        let mut prompts: Vec<usize> = (0..self.active.len())
            .filter(|&i| !decoding(&self.active[i]))
            .collect();
        prompts.sort_by_key(|&i| self.active[i].pending());
        for (done, &i) in prompts.iter().enumerate() {
            let n = self.active[i]
                .pending()
                .min(budget / (prompts.len() - done));
            if n > 0 {
                budget -= n;
                plan.push((Some(i), n));
            }
        }
        plan
    }

    fn get(&self, which: Option<usize>) -> Option<&Active> {
        which.map_or(self.pass.as_ref(), |i| self.active.get(i))
    }

    fn execute(&mut self, plan: &Plan) {
        let started = Instant::now();
        match self.step(plan) {
            Ok(output) => {
                self.account(plan, started);
                self.deliver(plan, output);
            }
            // Somebody in the step was cancelled; the next round ends that one and repeats the step for the others.
            Err(Error::Cancelled) => {}
            Err(Error::Memory(_)) if self.active.len() + usize::from(self.pass.is_some()) > 1 => {
                self.preempt();
            }
            Err(_) if plan.len() > 1 => {
                // Alone, the step fails only for whom the error belongs to. From the back: ending one moves those behind it.
                let mut alone = plan.clone();
                alone.sort_by_key(|p| std::cmp::Reverse(p.0));
                alone.into_iter().for_each(|part| self.execute(&vec![part]));
            }
            Err(e) => self.end(plan[0].0, Err(e)),
        }
    }

    fn step(&mut self, plan: &Plan) -> Result<Output> {
        let Self {
            active,
            pass,
            runner,
            shared,
            ..
        } = self;
        let mut parts = Vec::with_capacity(plan.len());
        let mut want = Want::default();
        for &(which, n) in plan {
            let Some(a) = which.map_or(pass.as_ref(), |i| active.get(i)) else {
                continue;
            };
            let (from, to) = (a.fed, a.fed + n);
            let rows = match &a.job.work {
                Work::Generate {
                    sampling, logprobs, ..
                } => {
                    let last = to == a.job.ids.len();
                    want.logits |= last && (!sampling.greedy() || logprobs.is_some());
                    if last { Rows::Last } else { Rows::None }
                }
                Work::Pass {
                    kind: PassKind::Forward { hidden, attentions },
                } => {
                    want = Want {
                        logits: true,
                        hidden: *hidden,
                        attentions: *attentions,
                    };
                    Rows::All
                }
                Work::Pass {
                    kind: PassKind::Score { start },
                } => {
                    want.logits = true;
                    if to >= *start { Rows::All } else { Rows::None }
                }
            };
            lock(&a.job.slot.progress)
                .started
                .get_or_insert_with(Instant::now);
            parts.push(Part {
                sequence: a.sequence,
                ids: &a.job.ids[from..to],
                rows,
            });
        }
        runner.run(&parts, want, &shared.interrupt)
    }

    fn account(&self, plan: &Plan, started: Instant) {
        let decodes = |a: &Active| matches!(a.job.work, Work::Generate { generated: 1.., .. });
        let prompt = |&(which, n): &(Option<usize>, usize)| {
            if n == 1 && self.get(which).is_some_and(decodes) {
                0
            } else {
                n
            }
        };
        let prompt: usize = plan.iter().map(prompt).sum();
        let mut stats = lock(&self.shared.stats);
        stats.steps += 1;
        stats.prompt_tokens += prompt as u64;
        let seconds = started.elapsed().as_secs_f64();
        *(if prompt > 0 {
            &mut stats.prefill_seconds
        } else {
            &mut stats.decode_seconds
        }) += seconds;
    }

    /// Hands out a step's rows.
    fn deliver(&mut self, plan: &Plan, mut output: Output) {
        let mut row = 0;
        let mut ended = Vec::new();
        for &(which, n) in plan {
            let Some(a) = which.map_or(self.pass.as_mut(), |i| self.active.get_mut(i)) else {
                continue;
            };
            a.fed += n;
            let end = match a.job.work {
                Work::Pass { kind } => deliver_pass(a, kind, n, &mut output, self.vocab_size),
                Work::Generate { .. } if a.pending() > 0 => Ok(None),
                Work::Generate { .. } => {
                    let logits = output.logits.chunks_exact_mut(self.vocab_size).nth(row);
                    let end = next_token(
                        &mut a.job,
                        output.argmax.get(row).copied(),
                        logits,
                        self.context,
                    );
                    row += 1;
                    lock(&self.shared.stats).generated_tokens += 1;
                    end
                }
            };
            match end {
                Ok(None) => {}
                Ok(Some(finish)) => ended.push((which, Ok(finish))),
                Err(e) => ended.push((which, Err(e))),
            }
        }
        // From the back: ending one moves those behind it.
        ended.sort_by_key(|e| std::cmp::Reverse(e.0));
        ended
            .into_iter()
            .for_each(|(which, end)| self.end(which, end));
    }

    fn end(&mut self, which: Option<usize>, end: Result<Finish>) {
        let active = match which {
            None => self.pass.take(),
            Some(i) => Some(self.active.remove(i)),
        };
        if let Some(active) = active {
            self.runner.close(active.sequence);
            self.full = false;
            // Whoever hears of the end shall not find the request counted.
            self.publish();
            active.job.slot.end(end);
        }
    }

    /// The cache is full: the youngest request gives up its place. It starts over with all its tokens as the prompt, and
    /// goes on to the same tokens, when somebody else has left.
    fn preempt(&mut self) {
        if let Some(active) = self.active.pop() {
            self.runner.close(active.sequence);
            self.requests.push_front(active.job);
            self.full = true;
            lock(&self.shared.stats).preemptions += 1;
        }
    }
}

/// Chooses and hands out the next token of a request; says whether that was the last.
fn next_token(
    job: &mut Job,
    argmax: Option<u32>,
    logits: Option<&mut [f32]>,
    context: usize,
) -> Result<Option<Finish>> {
    let Work::Generate {
        max_new_tokens,
        sampling,
        eos,
        logprobs,
        generated,
    } = &mut job.work
    else {
        return Ok(None);
    };
    let missing =
        || Error::Device("the device handed out no row for a request's last token".into());
    let token = match logits {
        // The arithmetic is the same with and without logits at hand, and so is the answer.
        None => {
            let id = argmax.ok_or_else(missing)?;
            if id == u32::MAX {
                return Err(Error::Device(
                    "a logit is not a number: the model's arithmetic broke down".into(),
                ));
            }
            Token {
                id,
                logprob: None,
                top: Vec::new(),
            }
        }
        Some(logits) => {
            // Sampling uses the row up.
            let raw = logprobs.map(|n| (n, logits.to_vec()));
            let id = sampling.sample(logits, job.ids.iter().copied(), *generated as u64)?;
            let log = raw.as_ref().map(|(n, raw)| (*n, LogProbs::new(raw)));
            Token {
                id,
                logprob: log.as_ref().map(|(_, l)| l.of(id)),
                top: log.map_or(Vec::new(), |(n, l)| l.top(n)),
            }
        }
    };
    job.ids.push(token.id);
    *generated += 1;
    let end = if eos.contains(&token.id) {
        Some(Finish::Stop)
    } else if generated >= max_new_tokens {
        Some(Finish::Length)
    } else if job.ids.len() >= context {
        Some(Finish::Context)
    } else {
        None
    };
    let mut progress = lock(&job.slot.progress);
    let now = Instant::now();
    progress.first.get_or_insert(now);
    progress.last = Some(now);
    progress.tokens.push(token);
    job.slot.changed.notify_all();
    Ok(end)
}

/// Keeps the rows of `n` more ids of a pass.
fn deliver_pass(
    a: &Active,
    kind: PassKind,
    n: usize,
    output: &mut Output,
    vocab: usize,
) -> Result<Option<Finish>> {
    let (ids, from) = (&a.job.ids, a.fed - n);
    let mut progress = lock(&a.job.slot.progress);
    let out = &mut progress.output;
    match kind {
        PassKind::Forward { .. } => {
            let wanted = ids.len() * vocab;
            let room = out.logits.try_reserve_exact(wanted - out.logits.len());
            room.map_err(|_| {
                Error::Memory(format!(
                    "no room for the {wanted} logits of {} tokens",
                    ids.len()
                ))
            })?;
            out.logits.append(&mut output.logits);
            out.hidden.resize_with(output.hidden.len(), Vec::new);
            out.hidden
                .iter_mut()
                .zip(&mut output.hidden)
                .for_each(|(all, new)| all.append(new));
            keep_attentions(out, output, ids.len(), from, n)?;
        }
        PassKind::Score { start } => {
            for (i, row) in output.logits.chunks_exact(vocab).enumerate() {
                // The row of position p tells the probability of the id at p + 1.
                let next = from + i + 1;
                if next >= start
                    && let Some(&id) = ids.get(next)
                {
                    out.logprobs.push(LogProbs::new(row).of(id));
                }
            }
        }
    }
    Ok((a.pending() == 0).then_some(Finish::Length))
}

/// Puts the weights of `n` tokens from `from` on, (heads, n, from + n), into (heads, tokens, tokens).
fn keep_attentions(
    out: &mut PassOutput,
    output: &Output,
    tokens: usize,
    from: usize,
    n: usize,
) -> Result<()> {
    for (layer, parts) in output.attentions.iter().enumerate() {
        let part = parts.first().map_or(&[][..], Vec::as_slice);
        let heads = part.len() / (n * (from + n));
        if layer == out.attentions.len() {
            let (mut all, wanted) = (Vec::new(), heads * tokens * tokens);
            let room = all.try_reserve_exact(wanted);
            room.map_err(|_| {
                Error::Memory(format!(
                    "no room for {wanted} attention weights of layer {layer}"
                ))
            })?;
            all.resize(wanted, 0.0);
            out.attentions.push(all);
        }
        for (i, row) in part.chunks_exact(from + n).enumerate() {
            let (head, token) = (i / n, from + i % n);
            out.attentions[layer][(head * tokens + token) * tokens..][..from + n]
                .copy_from_slice(row);
        }
    }
    Ok(())
}
