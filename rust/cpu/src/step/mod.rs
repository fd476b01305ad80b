//! Executing a plan: what every thread of the team does for each unit of work. The units of a mixture of experts and of
//! the head have files of their own.
//!
//! Safety of all of it: the plan has put a barrier before each unit that reads what another wrote or writes what another
//! used, so shared rows and activations are only read where nobody writes, and `for_each` gives every item, hence every
//! part of an output, to one thread. Comments below call this *the plan*.

mod ahead;
mod experts;
mod head;

use std::ops::{Range, RangeInclusive};
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use ahead::Ahead;
use kbit_simd::{Isa, dispatch};
use kbit_tensor::program::CacheType;
use kbit_tensor::{Error, Result, SUPER};

use crate::acts::{Acts, WHOLE_TILES};
use crate::attention::{self, Shared, View};
use crate::buffers::{Cells, Rows};
use crate::cache::HeadLayout;
use crate::experts::{AddScaled, Routes};
use crate::head::Best;
use crate::linear::out::Target;
use crate::norm::{norm, norm_in_place};
use crate::op::{AddOp, AttentionOp, EmbedOp, HiddenOp, NormOp};
use crate::plan::{Plan, Work};
use crate::pool::{Stop, Team};
use crate::prepare::Model;
use crate::project::Projection;
use crate::rope::Tables;

/// Tokens of a long prompt that the last items of a matrix are cut into, so that threads finish together. Decoding weights again for each
/// costs less.
const CUT: usize = 2 * WHOLE_TILES;

/// Memory of one thread.
pub(crate) struct Own {
    /// Rows of a buffer that this thread normed for itself, by buffer; rows are padded like shared ones.
    rows: Vec<Vec<f32>>,
    acts: Vec<Acts>,
    scratch: Vec<f32>,
    /// Outputs of a super-block that become activations at once.
    outputs: Vec<f32>,
    attention: attention::Scratch,
    routes: Routes,
    /// Best logit of each row so far.
    pub(crate) best: Vec<Best>,
}

impl Own {
    pub(crate) fn new(model: &Model) -> Result<Self> {
        Ok(Self {
            rows: vec![Vec::new(); model.widths.len()],
            acts: (0..model.memories)
                .map(|_| Acts::new())
                .collect::<Result<_>>()?,
            scratch: Vec::new(),
            outputs: Vec::new(),
            attention: attention::Scratch::default(),
            routes: Routes::default(),
            best: Vec::new(),
        })
    }
}

/// Memory that threads share.
pub(crate) struct Memory {
    pub(crate) buffers: Vec<Rows>,
    /// By [`ActsSpec::memory`](crate::prepare::ActsSpec).
    pub(crate) acts: Cells<Acts>,
    /// Of each expert: gate, up, down.
    pub(crate) expert_acts: Cells<Acts>,
    pub(crate) partials: Vec<Rows>,
    pub(crate) finished: Vec<AtomicU32>,
    pub(crate) own: Cells<Own>,
}

impl Memory {
    /// Nothing yet; a pass makes the room it needs.
    pub(crate) fn new(model: &Model, threads: usize) -> Result<Self> {
        let acts = |n: usize| (0..n).map(|_| Acts::new()).collect::<Result<_>>();
        let rows = model.widths.iter().map(|&width| Rows::new(0, width));
        Ok(Self {
            buffers: rows.collect::<Result<_>>()?,
            acts: Cells::new(acts(model.memories)?),
            expert_acts: Cells::new(acts(3 * model.experts)?),
            partials: Vec::new(),
            finished: Vec::new(),
            own: Cells::new(
                (0..threads)
                    .map(|_| Own::new(model))
                    .collect::<Result<_>>()?,
            ),
        })
    }
}

/// One pass over the model: some tokens of some sequences.
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a Model,
    pub(crate) plan: &'a Plan,
    pub(crate) memory: &'a Memory,
    pub(crate) tables: &'a [Tables],
    pub(crate) isa: Isa,
    pub(crate) kind: CacheType,
    /// Per cache layer: layout of a head, and where its heads begin in a page.
    pub(crate) layers: &'a [(HeadLayout, usize)],
    /// Ids and positions of the tokens.
    pub(crate) ids: &'a [u32],
    pub(crate) positions: &'a [usize],
    pub(crate) views: &'a [View],
    /// Whether attention rotates and appends what it reads, instead of a unit of its own: where a sequence has few tokens.
    pub(crate) on_the_fly: bool,
    /// Per cache layer: its items, and which of `memory.partials` they use.
    pub(crate) work: &'a [(&'a attention::Work, usize)],
    /// Tokens that want logits.
    pub(crate) rows: &'a [usize],
    /// (rows, vocab), if wanted.
    pub(crate) logits: Option<Target>,
    /// Per [`HiddenOp`]: (tokens, width), if wanted.
    pub(crate) hidden: &'a [Target],
    /// The first error of a thread.
    pub(crate) error: &'a Mutex<Option<Error>>,
}

// SAFETY: the targets are outputs that live as long as the pass; threads write disjoint parts of them.
unsafe impl Sync for Pass<'_> {}

impl Pass<'_> {
    /// One thread's part.
    pub(crate) fn run(&self, team: &Team<'_>) -> std::result::Result<(), Stop> {
        // SAFETY: every thread has its own.
        let own = unsafe { self.memory.own.get_mut(team.index()) };
        own.best.clear();
        own.best.resize(self.rows.len(), Best::NONE);
        let mut ahead = Ahead::NOTHING;
        for (number, step) in self.plan.steps.iter().enumerate() {
            match step.work {
                // Attention does it, behind a barrier of its own.
                Work::Rotate(_) if self.on_the_fly => continue,
                // The projection before did it; who reads it waits at a barrier of its own.
                Work::Fill { acts, made: true } if self.makes(acts, team) => continue,
                _ => {}
            }
            if step.barrier {
                ahead.aim(self, number, team);
                team.barrier_while(|| ahead.ask(self.isa))?;
            }
            if let Err(error) = self.work(&step.work, team, own) {
                self.error
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .get_or_insert(error);
                return Err(Stop);
            }
        }
        Ok(())
    }

    fn work(&self, work: &Work, team: &Team<'_>, own: &mut Own) -> Result<()> {
        match work {
            Work::Embed(op) => self.embed(op, team, &mut own.scratch),
            Work::Norm(op) => self.norm(op, team),
            Work::OwnNorm(op) => self.own_norm(op, own),
            Work::Shape(acts) => return self.shape(*acts, team),
            Work::Fill { acts, .. } => self.fill(*acts, team),
            Work::OwnFill {
                acts,
                own: from_own,
            } => return self.own_fill(*acts, *from_own, own),
            Work::Linear(op, Some(acts)) if self.makes(*acts, team) => {
                self.project_and_fill(&op.projection, *acts, team, own);
            }
            Work::Linear(op, _) => self.project(&op.projection, op.out, team, &own.acts),
            Work::Rotate(op) => self.rotate(op, team),
            Work::Attend(op) => return self.attend(op, team, &mut own.attention),
            Work::Add(op) => self.add(*op, team),
            Work::Experts(part, op) => return self.experts(*part, op, team, own),
            Work::Hidden(op) => self.hidden(*op, team),
            Work::Gather { x } => self.gather(*x, team),
            Work::OwnGather { x, own: from_own } => self.own_gather(*x, *from_own, own),
            Work::Head(op) => self.head(&op.head, team, own),
        }
        Ok(())
    }

    fn buffer(&self, buffer: usize) -> &Rows {
        &self.memory.buffers[buffer]
    }

    /// Rows that a buffer has in this pass.
    fn rows_of(&self, buffer: usize) -> usize {
        if buffer == self.model.head_rows {
            self.rows.len()
        } else {
            self.ids.len()
        }
    }

    /// Activations of number `acts`: this thread's own or the shared ones, as the plan says.
    fn acts<'b>(&'b self, own: &'b [Acts], acts: usize) -> &'b Acts {
        let memory = self.model.acts[acts].memory;
        if self.plan.few {
            return &own[memory];
        }
        // SAFETY: the plan.
        unsafe { self.memory.acts.get(memory) }
    }

    fn embed(&self, op: &EmbedOp, team: &Team<'_>, scratch: &mut Vec<f32>) {
        team.for_each(self.ids.len(), |t| {
            // SAFETY: the plan.
            let row = unsafe { self.buffer(op.out).row_mut(t) };
            op.embed.row(self.ids[t], self.positions[t], row, scratch);
        });
    }

    fn norm(&self, op: &NormOp, team: &Team<'_>) {
        team.for_each(self.ids.len(), |t| {
            // SAFETY: the plan.
            let out = unsafe { self.buffer(op.out).row_mut(t) };
            if op.x == op.out {
                let each = out.len();
                norm_in_place(self.isa, &op.norm, out, each);
            } else {
                // SAFETY: the plan.
                let x = unsafe { self.buffer(op.x).row(t) };
                norm(self.isa, &op.norm, x, out);
            }
        });
    }

    fn own_norm(&self, op: &NormOp, own: &mut Own) {
        let (width, stride) = (self.model.widths[op.out], self.buffer(op.out).stride());
        let rows = &mut own.rows[op.out];
        rows.resize(self.ids.len() * stride, 0.0);
        for (t, to) in rows.chunks_exact_mut(stride).enumerate() {
            // SAFETY: the plan.
            let x = unsafe { self.buffer(op.x).row(t) };
            norm(self.isa, &op.norm, x, &mut to[..width]);
        }
    }

    fn shape(&self, acts: usize, team: &Team<'_>) -> Result<()> {
        if team.index() != 0 {
            return Ok(());
        }
        let spec = &self.model.acts[acts];
        // SAFETY: the plan; the other threads wait at the next barrier.
        let memory = unsafe { self.memory.acts.get_mut(spec.memory) };
        memory.reserve(self.isa, &spec.input, self.rows_of(spec.buffer))
    }

    fn fill(&self, acts: usize, team: &Team<'_>) {
        let spec = &self.model.acts[acts];
        let rows = self.buffer(spec.buffer);
        // SAFETY: the plan.
        let memory = unsafe { self.memory.acts.get(spec.memory) };
        // SAFETY: the plan.
        team.for_each(memory.pieces(), |piece| unsafe {
            memory.fill_piece(rows.base(), rows.stride(), piece);
        });
    }

    fn own_fill(&self, acts: usize, from_own: bool, own: &mut Own) -> Result<()> {
        let spec = &self.model.acts[acts];
        let rows = self.buffer(spec.buffer);
        let memory = &mut own.acts[spec.memory];
        memory.reserve(self.isa, &spec.input, self.rows_of(spec.buffer))?;
        let from = if from_own {
            own.rows[spec.buffer].as_ptr()
        } else {
            rows.base().cast_const()
        };
        // SAFETY: the plan; own rows lie like shared ones.
        unsafe { memory.fill(from, rows.stride(), 0..memory.tiles()) };
        Ok(())
    }

    /// A projection of shared rows or of rows that every thread has for itself.
    fn project(&self, projection: &Projection, out: usize, team: &Team<'_>, own: &[Acts]) {
        let to = target(self.buffer(out));
        let tokens = self.ids.len();
        let (items, runs) = (projection.items(tokens), projection.runs(self.isa, tokens));
        shared_out(team, items, runs, tokens, |items, tokens| {
            let acts = |a| self.acts(own, a);
            // SAFETY: the plan.
            unsafe { projection.items_of(items, tokens, acts, to) };
        });
    }

    /// Whether projections make activations `acts` here instead of rows: where 256 outputs at a time are still enough items for threads to finish
    /// together.
    fn makes(&self, acts: usize, team: &Team<'_>) -> bool {
        let supers = self.model.acts[acts].input.supers();
        let cuts = self.ids.len().div_ceil(CUT);
        cuts > 1 && supers * cuts >= 4 * team.threads()
    }

    /// A projection whose outputs become activations 256 at a time, while they are in the cache, and are not kept.
    fn project_and_fill(
        &self,
        projection: &Projection,
        fill: usize,
        team: &Team<'_>,
        own: &mut Own,
    ) {
        let Own { acts, outputs, .. } = own;
        let all = self.ids.len();
        // SAFETY: the plan.
        let filled = unsafe { self.memory.acts.get(self.model.acts[fill].memory) };
        let (items, runs) = (projection.items(all), projection.runs(self.isa, all));
        let each = Projection::items_of_columns(SUPER, all);
        shared_out(team, filled.supers(), 1..=1, all, |supers, tokens| {
            outputs.resize(outputs.len().max(tokens.len() * SUPER), 0.0);
            for sup in supers {
                let to = Target {
                    at: outputs
                        .as_mut_ptr()
                        .wrapping_sub((tokens.start + sup) * SUPER),
                    stride: SUPER,
                };
                let here = sup * each..items.min((sup + 1) * each);
                for first in here.clone().step_by(*runs.end()) {
                    let run = first..here.end.min(first + runs.end());
                    let acts = |a| self.acts(acts, a);
                    // SAFETY: the plan; the outputs are of this super-block and these tokens.
                    unsafe { projection.items_of(run, tokens.clone(), acts, to) };
                }
                // SAFETY: the plan; these outputs were just written.
                unsafe { filled.fill_super(to.at, SUPER, sup, tokens.clone()) };
            }
        });
    }

    fn rotate(&self, op: &AttentionOp, team: &Team<'_>) {
        let shared = self.shared(op);
        team.for_each(self.ids.len(), |t| {
            let view = &self.views[self.views.partition_point(|v| v.row <= t) - 1];
            // SAFETY: the plan.
            unsafe {
                op.attention
                    .rotate_and_append(&shared, &op.rotation, view, t - view.row);
            };
        });
    }

    fn attend(
        &self,
        op: &AttentionOp,
        team: &Team<'_>,
        scratch: &mut attention::Scratch,
    ) -> Result<()> {
        let shared = self.shared(op);
        let rotation = self.on_the_fly.then_some(&op.rotation);
        let items = &self.work[op.attention.layer].0.items;
        let mut result = Ok(());
        team.for_each(items.len(), |i| {
            if result.is_ok() {
                // SAFETY: the plan.
                result = unsafe { op.attention.item(&shared, rotation, &items[i..], scratch) };
            }
        });
        result
    }

    fn shared(&self, op: &AttentionOp) -> Shared<'_> {
        let layer = op.attention.layer;
        let (head, heads_at) = self.layers[layer];
        Shared {
            isa: self.isa,
            kind: self.kind,
            head,
            heads_at,
            views: self.views,
            tables: self.tables,
            qkv: self.buffer(op.qkv),
            out: self.buffer(op.out),
            partials: &self.memory.partials[self.work[layer].1],
            finished: &self.memory.finished,
        }
    }

    fn add(&self, op: AddOp, team: &Team<'_>) {
        team.for_each(self.ids.len(), |t| {
            // SAFETY: the plan.
            let (y, sum) = unsafe { (self.buffer(op.x).row(t), self.buffer(op.into).row_mut(t)) };
            let weight = op.scale;
            dispatch(self.isa, AddScaled { sum, weight, y });
        });
    }

    fn hidden(&self, op: HiddenOp, team: &Team<'_>) {
        let Some(to) = self.hidden.get(op.index) else {
            // Nobody asked for hidden states.
            return;
        };
        let width = self.model.widths[op.x];
        team.for_each(self.ids.len(), |t| {
            // SAFETY: the plan; the output has a row for every token.
            let to = unsafe { std::slice::from_raw_parts_mut(to.at.add(t * to.stride), width) };
            // SAFETY: the plan.
            to.copy_from_slice(unsafe { self.buffer(op.x).row(t) });
        });
    }
}

/// Shares the items of a matrix, in runs of so many, among the threads; the last ones are cut into parts of the tokens.
fn shared_out(
    team: &Team<'_>,
    items: usize,
    runs: RangeInclusive<usize>,
    tokens: usize,
    mut compute: impl FnMut(Range<usize>, Range<usize>),
) {
    let cuts = tokens.div_ceil(CUT);
    let last = if cuts > 1 {
        items.min(team.threads())
    } else {
        0
    };
    team.for_runs(items - last, runs, |run| compute(run, 0..tokens));
    team.for_each(last * cuts, |i| {
        let (item, from) = (items - last + i / cuts, i % cuts * CUT);
        compute(item..item + 1, from..tokens.min(from + CUT));
    });
}

fn target(rows: &Rows) -> Target {
    Target {
        at: rows.base(),
        stride: rows.stride(),
    }
}
