//! The runner: checks a batch, cuts it into passes of bounded size, and runs them on the pool.

use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, PoisonError};

use kbit_simd::Isa;
use kbit_tensor::program::{
    Options, Output, Part, Program, Rows as Wanted, Runner, SequenceId, Want,
};
use kbit_tensor::{Error, Result, Weight};

use crate::attention::{Attention, View, WeightsOut, Work, is_split};
use crate::buffers::Rows;
use crate::cache::Cache;
use crate::head::Best;
use crate::linear::out::Target;
use crate::op::Op;
use crate::plan::{FEW, Plan};
use crate::pool;
use crate::prepare::Model;
use crate::rope::Tables;
use crate::step::{Memory, Pass};

/// Tokens of a pass. More tokens read weights less often; fewer keep buffers small and cancelling quick.
const TOKENS: usize = 512;

/// A program on the CPU.
pub struct CpuRunner {
    program: Arc<Program>,
    model: Model,
    few: Plan,
    many: Plan,
    isa: Isa,
    threads: usize,
    /// Threads of a pass of few tokens.
    reading_threads: usize,
    options: Options,
    cache: Cache,
    tables: Vec<Tables>,
    memory: Memory,
    /// Passes of few tokens since the last of more.
    few_passes: usize,
}

/// Passes of few tokens after which the rows of larger ones are given back: tens of megabytes that only prompts use.
const KEPT: usize = 32;

/// Tokens `from..to` of a part.
struct Piece {
    part: usize,
    from: usize,
    to: usize,
}

/// Outputs of a step while passes fill them.
struct Outputs {
    result: Output,
    /// Rows of logits and tokens that are done.
    rows: usize,
    tokens: usize,
}

impl CpuRunner {
    /// Binds `weights` to `program` for kernels of `isa`.
    ///
    /// # Errors
    /// As [`Device::prepare`](kbit_tensor::program::Device::prepare).
    pub fn new(
        program: Arc<Program>,
        weights: &[Weight],
        options: Options,
        isa: Isa,
    ) -> Result<Self> {
        program.check(weights)?;
        let threads = match options.threads {
            0 => pool::default_threads()?,
            n if n <= pool::MAX_THREADS => n,
            n => {
                return Err(Error::Argument(format!(
                    "threads must be at most {}, is {n}",
                    pool::MAX_THREADS
                )));
            }
        };
        let reading_threads = match options.threads {
            0 => pool::reading_threads(threads),
            _ => threads,
        };
        let model = Model::new(&program, weights, options.activations)?;
        let cache = Cache::new(&program.cache, options.cache, options.cache_bytes);
        let memory = Memory::new(&model, threads)?;
        Ok(Self {
            few: Plan::few(&model),
            many: Plan::many(&model),
            tables: program.ropes.iter().map(Tables::new).collect(),
            program,
            model,
            isa,
            threads,
            reading_threads,
            options,
            cache,
            memory,
            few_passes: 0,
        })
    }

    /// Everything that can be wrong with a batch, before anything is computed.
    fn validate(&self, batch: &[Part<'_>]) -> Result<()> {
        for (i, part) in batch.iter().enumerate() {
            let id = part.sequence;
            let Some(len) = self.cache.len(id) else {
                return Err(Error::Argument(format!("sequence {} is not open", id.0)));
            };
            if batch[..i].iter().any(|p| p.sequence == id) {
                return Err(Error::Argument(format!(
                    "sequence {} is twice in the batch",
                    id.0
                )));
            }
            if part.ids.is_empty() {
                return Err(Error::Argument(format!(
                    "sequence {} has no new tokens",
                    id.0
                )));
            }
            let vocab = self.program.vocab_size;
            if let Some(token) = part.ids.iter().find(|&&t| t as usize >= vocab) {
                return Err(Error::Argument(format!(
                    "token id {token} is outside the vocabulary of {vocab}"
                )));
            }
            let (wanted, context) = (len.saturating_add(part.ids.len()), self.program.context);
            if wanted > context {
                return Err(Error::ContextOverflow(format!(
                    "{wanted} tokens in a context of {context}"
                )));
            }
        }
        Ok(())
    }

    /// The batch in pieces, a pass each: in order, every pass as full as it can be.
    fn passes(batch: &[Part<'_>]) -> Vec<Vec<Piece>> {
        let (mut passes, mut room) = (vec![Vec::new()], TOKENS);
        for (part, p) in batch.iter().enumerate() {
            let mut from = 0;
            while from < p.ids.len() {
                if room == 0 {
                    passes.push(Vec::new());
                    room = TOKENS;
                }
                let to = p.ids.len().min(from + room);
                if let Some(pass) = passes.last_mut() {
                    pass.push(Piece { part, from, to });
                }
                (room, from) = (room - (to - from), to);
            }
        }
        passes
    }

    /// Reserves memory and computes all passes. Lengths are as before when it returns.
    fn compute(&mut self, batch: &[Part<'_>], want: Want, cancel: &AtomicBool) -> Result<Output> {
        for part in batch {
            self.cache.reserve(part.sequence, part.ids.len())?;
        }
        let mut outputs = self.outputs(batch, want)?;
        for pass in Self::passes(batch) {
            self.pass(batch, &pass, want, cancel, &mut outputs)?;
        }
        Ok(outputs.result)
    }

    /// Room for what is wanted.
    fn outputs(&self, batch: &[Part<'_>], want: Want) -> Result<Outputs> {
        let rows = |p: &Part<'_>| match p.rows {
            Wanted::None => 0,
            Wanted::Last => 1,
            Wanted::All => p.ids.len(),
        };
        let (rows, tokens): (usize, usize) = (
            batch.iter().map(rows).sum(),
            batch.iter().map(|p| p.ids.len()).sum(),
        );
        let mut result = Output::default();
        if want.logits && self.has_head() {
            result.logits = zeros(&[rows, self.program.vocab_size])?;
        }
        if want.hidden {
            for width in self.hidden_widths() {
                result.hidden.push(zeros(&[tokens, width])?);
            }
        }
        if want.attentions {
            for layer in &self.program.cache {
                let part = |p: &Part<'_>| {
                    let positions = self.cache.len(p.sequence).unwrap_or(0) + p.ids.len();
                    zeros(&[layer.q_heads, p.ids.len(), positions])
                };
                result
                    .attentions
                    .push(batch.iter().map(part).collect::<Result<_>>()?);
            }
        }
        Ok(Outputs {
            result,
            rows: 0,
            tokens: 0,
        })
    }

    fn pass(
        &mut self,
        batch: &[Part<'_>],
        pieces: &[Piece],
        want: Want,
        cancel: &AtomicBool,
        out: &mut Outputs,
    ) -> Result<()> {
        let (mut ids, mut positions, mut views, mut rows) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            let part = &batch[piece.part];
            let (len, planned) = (
                self.cache.len(part.sequence).unwrap_or(0),
                self.cache.planned(part.sequence),
            );
            let (row, start) = (ids.len(), len + piece.from);
            ids.extend_from_slice(&part.ids[piece.from..piece.to]);
            positions.extend(start..len + piece.to);
            rows.extend((row..ids.len()).filter(|r| match part.rows {
                Wanted::None => false,
                Wanted::Last => piece.from + r - row + 1 == part.ids.len(),
                Wanted::All => true,
            }));
            let weights = out.result.attentions.iter_mut().map(|layer| WeightsOut {
                at: layer[piece.part].as_mut_ptr(),
                tokens: part.ids.len(),
                skip: piece.from,
                positions: len + part.ids.len(),
            });
            let weights = weights.collect();
            views.push(View {
                row,
                tokens: piece.to - piece.from,
                start,
                planned,
                pages: self.cache.pages(part.sequence),
                weights,
            });
            self.tables
                .iter_mut()
                .for_each(|t| t.reach(planned, len + piece.to));
        }
        let few = ids.len() <= FEW && !want.hidden && !want.attentions;
        let work = self.attention_work(&views, want.attentions);
        self.few_passes = if few { self.few_passes + 1 } else { 0 };
        if self.few_passes == KEPT
            && let Ok(fresh) = Memory::new(&self.model, self.threads)
        {
            self.memory = fresh;
        }
        self.reserve(ids.len(), rows.len(), few, &work)?;
        let (vocab, first) = (self.program.vocab_size, out.rows * self.program.vocab_size);
        let logits =
            (!out.result.logits.is_empty()).then(|| out.result.logits[first..].as_mut_ptr());
        let hidden: Vec<Target> = self
            .hidden_widths()
            .zip(&mut out.result.hidden)
            .map(|(stride, rows)| Target {
                at: rows[out.tokens * stride..].as_mut_ptr(),
                stride,
            })
            .collect();
        let error = Mutex::new(None);
        let pass = Pass {
            model: &self.model,
            plan: if few { &self.few } else { &self.many },
            memory: &self.memory,
            tables: &self.tables,
            isa: self.isa,
            kind: self.options.cache,
            layers: self.cache.layers(),
            ids: &ids,
            positions: &positions,
            views: &views,
            on_the_fly: views.iter().all(|v| is_split(v.tokens, want.attentions)),
            work: &work
                .layers
                .iter()
                .map(|&kind| (&work.kinds[kind].1, kind))
                .collect::<Vec<_>>(),
            rows: &rows,
            logits: logits.map(|at| Target { at, stride: vocab }),
            hidden: &hidden,
            error: &error,
        };
        let threads = if few {
            self.reading_threads
        } else {
            self.threads
        };
        let result = pool::run(threads, cancel, &|team| pass.run(team));
        if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        result?;
        if self.has_head() {
            for row in 0..rows.len() {
                let best =
                    (0..threads).filter_map(|t| self.memory.own.own(t).best.get(row).copied());
                out.result
                    .argmax
                    .push(best.fold(Best::NONE, Best::merge).id());
            }
        }
        out.rows += rows.len();
        out.tokens += ids.len();
        Ok(())
    }

    fn has_head(&self) -> bool {
        self.model.ops.iter().any(|op| matches!(op, Op::Head(_)))
    }

    fn hidden_widths(&self) -> impl Iterator<Item = usize> {
        self.model.ops.iter().filter_map(|op| {
            if let Op::Hidden(hidden) = op {
                Some(self.model.widths[hidden.x])
            } else {
                None
            }
        })
    }

    /// Items of every layer; layers of the same shape share them.
    fn attention_work(&self, views: &[View], whole: bool) -> AttentionWork {
        let mut work = AttentionWork {
            kinds: Vec::new(),
            layers: vec![0; self.program.cache.len()],
        };
        for op in &self.model.ops {
            let Op::Attention(op) = op else {
                continue;
            };
            let attention = &op.attention;
            let shape = (
                attention.q_heads,
                attention.kv_heads,
                attention.window,
                self.cache.layers()[attention.layer].0.value_stride,
            );
            let known = work.kinds.iter().position(|(s, _)| *s == shape);
            work.layers[attention.layer] = known.unwrap_or_else(|| {
                work.kinds
                    .push((shape, Attention::work(attention, views, whole)));
                work.kinds.len() - 1
            });
        }
        work
    }

    /// Makes all shared memory large enough for a pass.
    fn reserve(
        &mut self,
        tokens: usize,
        rows: usize,
        few: bool,
        work: &AttentionWork,
    ) -> Result<()> {
        let m = &self.model;
        for (b, buffer) in self.memory.buffers.iter_mut().enumerate() {
            buffer.reserve(match b {
                b if b == m.head_rows => rows,
                b if b == m.inner || b == m.outer => tokens * m.top_k,
                _ => tokens,
            })?;
        }
        if !few {
            let mut seen = vec![false; m.memories];
            for spec in &m.acts {
                if !std::mem::replace(&mut seen[spec.memory], true) {
                    let rows = if spec.buffer == m.head_rows {
                        rows
                    } else {
                        tokens
                    };
                    self.memory
                        .acts
                        .own(spec.memory)
                        .reserve(self.isa, &spec.input, rows)?;
                }
            }
        }
        for (i, (shape, work)) in work.kinds.iter().enumerate() {
            let width = shape.3 + 2;
            if self
                .memory
                .partials
                .get(i)
                .is_none_or(|p| p.width() != width)
            {
                self.memory.partials.truncate(i);
                self.memory.partials.push(Rows::new(work.partials, width)?);
            }
            self.memory.partials[i].reserve(work.partials)?;
            if self.memory.finished.len() < work.groups {
                self.memory
                    .finished
                    .resize_with(work.groups, || AtomicU32::new(0));
            }
        }
        Ok(())
    }
}

/// Query heads, KV heads, window and value stride of a layer.
type Shape = (usize, usize, Option<usize>, usize);

/// Attention items of a pass.
struct AttentionWork {
    kinds: Vec<(Shape, Work)>,
    /// Which of them each cache layer uses.
    layers: Vec<usize>,
}

/// Zeros, or an error instead of an abort where there is no room.
fn zeros(shape: &[usize]) -> Result<Vec<f32>> {
    let refuse = || Error::Memory(format!("cannot allocate an output of shape {shape:?}"));
    let n = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(refuse)?;
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| refuse())?;
    v.resize(n, 0.0);
    Ok(v)
}

impl Runner for CpuRunner {
    fn open(&mut self, planned: usize) -> Result<SequenceId> {
        self.check_planned(planned)?;
        Ok(self.cache.open(planned))
    }

    fn close(&mut self, sequence: SequenceId) {
        self.cache.close(sequence);
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.cache.len(sequence).unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, len: usize) {
        self.cache.truncate(sequence, len);
    }

    fn fork(&mut self, sequence: SequenceId, planned: usize) -> Result<SequenceId> {
        self.check_planned(planned)?;
        self.cache
            .fork(sequence, planned)
            .ok_or_else(|| Error::Argument(format!("sequence {} is not open", sequence.0)))
    }

    fn run(&mut self, batch: &[Part<'_>], want: Want, cancel: &AtomicBool) -> Result<Output> {
        self.validate(batch)?;
        let result = self.compute(batch, want, cancel);
        for part in batch {
            match &result {
                Ok(_) => self.cache.advance(part.sequence, part.ids.len()),
                // Gives back the pages that were reserved.
                Err(_) => self.cache.truncate(part.sequence, usize::MAX),
            }
        }
        // A step that ended early may have left counts.
        if result.is_err() {
            self.memory
                .finished
                .iter_mut()
                .for_each(|f| *f.get_mut() = 0);
        }
        result
    }

    fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    fn threads(&self) -> usize {
        self.threads
    }
}

impl CpuRunner {
    fn check_planned(&self, planned: usize) -> Result<()> {
        let context = self.program.context;
        if planned > context {
            return Err(Error::ContextOverflow(format!(
                "{planned} tokens planned, the context holds {context}"
            )));
        }
        Ok(())
    }
}
