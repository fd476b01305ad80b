//! Executing a plan: what every thread of the team does for each unit of work.

use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use kbit_simd::{Isa, dispatch};
use kbit_tensor::program::CacheType;
use kbit_tensor::{Error, Result};

use crate::acts::Acts;
use crate::attention::{self, Attention, Rotation, Shared, View};
use crate::buffers::{Cells, Rows};
use crate::cache::HeadLayout;
use crate::embed::Embed;
use crate::experts::{AddScaled, Experts, Routes};
use crate::head::{Best, Head, Logits};
use crate::norm::norm;
use crate::plan::{Plan, Work};
use crate::pool::{Stop, Team};
use crate::prepare::{Model, Op};
use crate::project::Target;
use crate::rope::Tables;

/// Memory of one thread.
pub(crate) struct Own {
    /// Rows of a buffer that this thread normed for itself, by buffer; rows are padded like shared ones.
    rows: Vec<Vec<f32>>,
    acts: Vec<Acts>,
    scratch: Vec<f32>,
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

/// One pass over the model: some tokens of some sequences.
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a Model,
    pub(crate) plan: &'a Plan,
    pub(crate) memory: &'a Memory,
    pub(crate) tables: &'a [Tables],
    pub(crate) isa: Isa,
    pub(crate) kind: CacheType,
    /// Per cache layer: layout of a head, bytes from head to head.
    pub(crate) heads: &'a [(HeadLayout, usize)],
    /// Ids and positions of the tokens.
    pub(crate) ids: &'a [u32],
    pub(crate) positions: &'a [usize],
    pub(crate) views: &'a [View],
    /// Per cache layer: its items, and which of `memory.partials` they use.
    pub(crate) work: &'a [(&'a attention::Work, usize)],
    /// Tokens that want logits.
    pub(crate) rows: &'a [usize],
    /// (rows, vocab), if wanted.
    pub(crate) logits: Option<Target>,
    /// Per [`Op::Hidden`]: (tokens, width), if wanted.
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
        for step in &self.plan.steps {
            if step.barrier {
                team.barrier()?;
            }
            if let Err(error) = self.work(step.work, team, own) {
                self.error
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .get_or_insert(error);
                return Err(Stop);
            }
        }
        Ok(())
    }

    /// SAFETY of everything below: the plan has put a barrier before each unit that reads what another wrote or writes what
    /// another used, so shared rows and activations are only read where nobody writes, and `for_each` gives every item,
    /// hence every part of an output, to one thread.
    fn work(&self, work: Work, team: &Team<'_>, own: &mut Own) -> Result<()> {
        let (m, tokens) = (self.model, self.ids.len());
        let buffer = |b: usize| &self.memory.buffers[b];
        match work {
            Work::Embed(at) => {
                let Op::Embed { embed, out } = &m.ops[at] else {
                    return Ok(());
                };
                team.for_each(tokens, |t| self.embed(embed, *out, t, &mut own.scratch));
            }
            Work::Norm(at) => {
                let Op::Norm { x, norm: n, out } = &m.ops[at] else {
                    return Ok(());
                };
                team.for_each(tokens, |t| {
                    // SAFETY: see above; the row of x may be the row of out, so it is copied.
                    let out = unsafe {
                        own.scratch.clear();
                        own.scratch.extend_from_slice(buffer(*x).row(t));
                        buffer(*out).row_mut(t)
                    };
                    norm(self.isa, n, &own.scratch, out);
                });
            }
            Work::OwnNorm(at) => {
                let Op::Norm { x, norm: n, out } = &m.ops[at] else {
                    return Ok(());
                };
                let stride = buffer(*out).stride();
                own.rows[*out].resize(tokens * stride, 0.0);
                for (t, to) in own.rows[*out].chunks_exact_mut(stride).enumerate() {
                    // SAFETY: see above.
                    norm(
                        self.isa,
                        n,
                        unsafe { buffer(*x).row(t) },
                        &mut to[..m.widths[*out]],
                    );
                }
            }
            Work::Shape(acts) => {
                if team.index() == 0 {
                    // SAFETY: see above; the other threads wait at the next barrier.
                    let memory = unsafe { self.memory.acts.get_mut(m.acts[acts].memory) };
                    memory.reserve(
                        self.isa,
                        &m.acts[acts].input,
                        self.rows_of(m.acts[acts].buffer),
                    )?;
                }
            }
            Work::Fill(acts) => {
                let rows = buffer(m.acts[acts].buffer);
                // SAFETY: see above.
                let memory = unsafe { self.memory.acts.get(m.acts[acts].memory) };
                // SAFETY: see above.
                team.for_each(memory.pieces(), |piece| unsafe {
                    memory.fill_pieces(rows.base(), rows.stride(), piece..piece + 1);
                });
            }
            Work::OwnFill {
                acts,
                own: from_own,
            } => self.own_fill(acts, from_own, own)?,
            Work::Linear(at) => {
                let Op::Linear {
                    projection, out, ..
                } = &m.ops[at]
                else {
                    return Ok(());
                };
                let to = target(buffer(*out));
                let Own { acts, scratch, .. } = own;
                team.for_each(projection.items(tokens, team.threads()), |item| {
                    // SAFETY: see above.
                    unsafe {
                        projection.item(
                            self.isa,
                            item,
                            team.threads(),
                            |a| self.acts(acts, a),
                            to,
                            scratch,
                        );
                    };
                });
            }
            Work::Rotate(at) => {
                let Op::Attention {
                    qkv,
                    rotation,
                    attention,
                    out,
                } = &m.ops[at]
                else {
                    return Ok(());
                };
                let shared = self.attention(attention, *qkv, *out);
                team.for_each(tokens, |t| {
                    let view = &self.views[self.views.partition_point(|v| v.row <= t) - 1];
                    // SAFETY: see above.
                    unsafe { attention.rotate_and_append(&shared, rotation, view, t - view.row) };
                });
            }
            Work::Attend(at) => {
                let Op::Attention {
                    qkv,
                    rotation,
                    attention,
                    out,
                } = &m.ops[at]
                else {
                    return Ok(());
                };
                let shared = self.attention(attention, *qkv, *out);
                self.attend(
                    team,
                    attention,
                    self.plan.few.then_some(rotation),
                    &shared,
                    &mut own.attention,
                )?;
            }
            Work::Add(at) => {
                let Op::Add { x, scale, into } = &m.ops[at] else {
                    return Ok(());
                };
                team.for_each(tokens, |t| {
                    // SAFETY: see above.
                    let (y, sum) = unsafe { (buffer(*x).row(t), buffer(*into).row_mut(t)) };
                    dispatch(
                        self.isa,
                        AddScaled {
                            sum,
                            weight: *scale,
                            y,
                        },
                    );
                });
            }
            Work::Hidden(at) => {
                let Op::Hidden { x, index } = &m.ops[at] else {
                    return Ok(());
                };
                let Some(to) = self.hidden.get(*index) else {
                    return Ok(());
                };
                team.for_each(tokens, |t| {
                    // SAFETY: see above; the output has a row for every token.
                    let to = unsafe {
                        std::slice::from_raw_parts_mut(to.at.add(t * to.stride), m.widths[*x])
                    };
                    // SAFETY: see above.
                    to.copy_from_slice(unsafe { buffer(*x).row(t) });
                });
            }
            Work::Gather(at) => {
                let Op::Head { x, .. } = &m.ops[at] else {
                    return Ok(());
                };
                team.for_each(self.rows.len(), |i| {
                    // SAFETY: see above.
                    unsafe {
                        buffer(m.head_rows)
                            .part_mut(i, 0, m.widths[*x])
                            .copy_from_slice(buffer(*x).row(self.rows[i]));
                    };
                });
            }
            Work::OwnGather { at, own: from_own } => {
                let Op::Head { x, .. } = &m.ops[at] else {
                    return Ok(());
                };
                self.own_gather(*x, from_own, own);
            }
            Work::Head(at) => {
                let Op::Head { head, .. } = &m.ops[at] else {
                    return Ok(());
                };
                self.head(team, head, own);
            }
            Work::Router(_)
            | Work::Route(_)
            | Work::ExpertsFill(_)
            | Work::ExpertsUp(_)
            | Work::ExpertsFillInner(_)
            | Work::ExpertsDown(_)
            | Work::ExpertsSum(_) => self.experts(work, team, own)?,
        }
        Ok(())
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
        // SAFETY: see `work`.
        unsafe { self.memory.acts.get(memory) }
    }

    fn embed(&self, embed: &Embed, out: usize, token: usize, scratch: &mut Vec<f32>) {
        // SAFETY: see `work`.
        let row = unsafe { self.memory.buffers[out].row_mut(token) };
        embed.row(self.ids[token], self.positions[token], row, scratch);
    }

    fn own_fill(&self, acts: usize, from_own: bool, own: &mut Own) -> Result<()> {
        let spec = &self.model.acts[acts];
        let rows = &self.memory.buffers[spec.buffer];
        let memory = &mut own.acts[spec.memory];
        memory.reserve(self.isa, &spec.input, self.rows_of(spec.buffer))?;
        let from = if from_own {
            own.rows[spec.buffer].as_ptr()
        } else {
            rows.base().cast_const()
        };
        // SAFETY: see `work`; own rows lie like shared ones.
        unsafe { memory.fill(from, rows.stride(), 0..memory.tiles()) };
        Ok(())
    }

    fn own_gather(&self, x: usize, from_own: bool, own: &mut Own) {
        let (width, stride) = (
            self.model.widths[x],
            self.memory.buffers[self.model.head_rows].stride(),
        );
        let mut gathered = std::mem::take(&mut own.rows[self.model.head_rows]);
        gathered.resize(self.rows.len() * stride, 0.0);
        for (to, &token) in gathered.chunks_exact_mut(stride).zip(self.rows) {
            let shared = &self.memory.buffers[x];
            let from = if from_own {
                &own.rows[x][token * shared.stride()..][..width]
            } else {
                // SAFETY: see `work`.
                unsafe { shared.row(token) }
            };
            to[..width].copy_from_slice(from);
        }
        own.rows[self.model.head_rows] = gathered;
    }

    fn attention<'b>(&'b self, attention: &Attention, qkv: usize, out: usize) -> Shared<'b> {
        let (head, head_bytes) = self.heads[attention.layer];
        Shared {
            isa: self.isa,
            kind: self.kind,
            head,
            head_bytes,
            views: self.views,
            tables: self.tables,
            qkv: &self.memory.buffers[qkv],
            out: &self.memory.buffers[out],
            partials: &self.memory.partials[self.work[attention.layer].1],
            finished: &self.memory.finished,
        }
    }

    fn attend(
        &self,
        team: &Team<'_>,
        attention: &Attention,
        rotation: Option<&Rotation>,
        shared: &Shared<'_>,
        scratch: &mut attention::Scratch,
    ) -> Result<()> {
        let items = &self.work[attention.layer].0.items;
        let mut result = Ok(());
        team.for_each(items.len(), |i| {
            if result.is_ok() {
                // SAFETY: see `work`.
                result = unsafe { attention.item(shared, rotation, &items[i], scratch) };
            }
        });
        result
    }

    fn head(&self, team: &Team<'_>, head: &Head, own: &mut Own) {
        let n = self.rows.len();
        if n == 0 {
            team.for_each(0, |_| ());
            return;
        }
        let part = &head.projection.parts[0];
        let vocab = part.matrix.rows();
        let Own {
            acts,
            scratch,
            best,
            ..
        } = own;
        let mut rows: Vec<f32> = Vec::new();
        team.for_each(head.projection.items(n, team.threads()), |item| {
            let ids = head.projection.span(item, n, team.threads());
            rows.resize(n * ids.len(), 0.0);
            let to = Target {
                at: rows.as_mut_ptr().wrapping_sub(ids.start),
                stride: ids.len(),
            };
            // SAFETY: `rows` has a row of the item's columns for every token; see `work`.
            unsafe {
                head.projection.item(
                    self.isa,
                    item,
                    team.threads(),
                    |a| self.acts(acts, a),
                    to,
                    scratch,
                );
            };
            for (r, (logits, best)) in rows
                .chunks_exact_mut(ids.len())
                .zip(best.iter_mut())
                .enumerate()
            {
                *best = best.merge(dispatch(
                    self.isa,
                    Logits {
                        head,
                        values: logits,
                        first: ids.start as u32,
                    },
                ));
                if let Some(to) = self.logits {
                    debug_assert!(ids.end <= vocab);
                    // SAFETY: the output has `vocab` logits for every row; this thread has these.
                    let to = unsafe {
                        std::slice::from_raw_parts_mut(
                            to.at.add(r * to.stride + ids.start),
                            ids.len(),
                        )
                    };
                    to.copy_from_slice(logits);
                }
            }
        });
    }

    fn experts(&self, work: Work, team: &Team<'_>, own: &mut Own) -> Result<()> {
        let (Work::Router(at)
        | Work::Route(at)
        | Work::ExpertsFill(at)
        | Work::ExpertsUp(at)
        | Work::ExpertsFillInner(at)
        | Work::ExpertsDown(at)
        | Work::ExpertsSum(at)) = work
        else {
            return Ok(());
        };
        let m = self.model;
        let Op::Experts {
            x,
            experts: mixture,
            into,
        } = &m.ops[at]
        else {
            return Ok(());
        };
        let (tokens, threads) = (self.ids.len(), team.threads());
        let buffer = |b: usize| &self.memory.buffers[b];
        let Own {
            acts,
            scratch,
            routes,
            ..
        } = own;
        match work {
            Work::Router(_) => team.for_each(mixture.router.items(tokens, threads), |item| {
                // SAFETY: see `work`.
                unsafe {
                    mixture.router.item(
                        self.isa,
                        item,
                        threads,
                        |a| self.acts(acts, a),
                        target(buffer(m.router)),
                        scratch,
                    );
                };
            }),
            Work::Route(_) => {
                // SAFETY: see `work`.
                routes.route(self.isa, mixture, tokens, |t| unsafe {
                    &buffer(m.router).row(t)[..mixture.members.len()]
                });
            }
            Work::ExpertsFill(_) => return self.experts_fill(team, mixture, routes, scratch, *x),
            Work::ExpertsFillInner(_) => return self.experts_fill_inner(team, mixture, routes),
            Work::ExpertsUp(_) | Work::ExpertsDown(_) => {
                let up = matches!(work, Work::ExpertsUp(_));
                let out = buffer(if up { m.inner } else { m.outer });
                let projection = |e: usize| {
                    if up {
                        &mixture.members[e].up
                    } else {
                        &mixture.members[e].down
                    }
                };
                let items = routes
                    .active()
                    .map(|(e, slots)| projection(e).items(slots.len(), threads))
                    .sum();
                let (mut active, mut before) = (routes.active().peekable(), 0);
                let mut last = 0;
                team.for_each(items, |item| {
                    if item < last {
                        (active, before) = (routes.active().peekable(), 0);
                    }
                    last = item;
                    while let Some((e, slots)) = active.peek() {
                        let n = projection(*e).items(slots.len(), threads);
                        if item < before + n {
                            let to = Target {
                                at: out.base().wrapping_add(slots.start * out.stride()),
                                stride: out.stride(),
                            };
                            // SAFETY: see `work`; slots of an expert are its own rows.
                            let acts = |a: usize| unsafe { self.memory.expert_acts.get(3 * e + a) };
                            // SAFETY: as above.
                            unsafe {
                                projection(*e).item(
                                    self.isa,
                                    item - before,
                                    threads,
                                    acts,
                                    to,
                                    scratch,
                                );
                            };
                            return;
                        }
                        before += n;
                        active.next();
                    }
                });
            }
            _ => team.for_each(tokens, |t| {
                // SAFETY: see `work`.
                let into = unsafe { buffer(*into).row_mut(t) };
                scratch.clear();
                scratch.resize(into.len(), 0.0);
                for &(slot, weight) in &routes.chosen[t * mixture.top_k..(t + 1) * mixture.top_k] {
                    // SAFETY: see `work`.
                    let y = unsafe { &buffer(m.outer).row(slot)[..into.len()] };
                    dispatch(
                        self.isa,
                        AddScaled {
                            sum: scratch,
                            weight,
                            y,
                        },
                    );
                }
                dispatch(
                    self.isa,
                    AddScaled {
                        sum: into,
                        weight: mixture.scale,
                        y: scratch,
                    },
                );
            }),
        }
        Ok(())
    }

    /// Gathers the rows of each expert with tokens into its activations.
    fn experts_fill(
        &self,
        team: &Team<'_>,
        mixture: &Experts,
        routes: &Routes,
        scratch: &mut Vec<f32>,
        x: usize,
    ) -> Result<()> {
        let rows = &self.memory.buffers[x];
        let mut result = Ok(());
        team.for_each(routes.active.len() - 1, |i| {
            let (e, slots) = (
                routes.active[i].0,
                routes.active[i].1..routes.active[i + 1].1,
            );
            scratch.clear();
            for slot in slots.clone() {
                // SAFETY: see `work`.
                scratch.extend_from_slice(unsafe { rows.row(routes.tokens[slot]) });
            }
            for part in &mixture.members[e].up.parts {
                // SAFETY: see `work`; an expert is one item.
                let acts = unsafe { self.memory.expert_acts.get_mut(3 * e + part.acts) };
                match acts.reserve(self.isa, part.matrix.input(), slots.len()) {
                    Ok(()) => acts.fill_all(scratch, rows.width()),
                    Err(error) => result = Err(error),
                }
            }
        });
        result
    }

    /// The same for what goes down.
    fn experts_fill_inner(
        &self,
        team: &Team<'_>,
        mixture: &Experts,
        routes: &Routes,
    ) -> Result<()> {
        let rows = &self.memory.buffers[self.model.inner];
        let mut result = Ok(());
        team.for_each(routes.active.len() - 1, |i| {
            let (e, slots) = (
                routes.active[i].0,
                routes.active[i].1..routes.active[i + 1].1,
            );
            let part = &mixture.members[e].down.parts[0];
            // SAFETY: see `work`; an expert is one item.
            let acts = unsafe { self.memory.expert_acts.get_mut(3 * e + part.acts) };
            match acts.reserve(self.isa, part.matrix.input(), slots.len()) {
                // SAFETY: see `work`; the slots are rows of the buffer.
                Ok(()) => unsafe {
                    acts.fill(
                        rows.base().wrapping_add(slots.start * rows.stride()),
                        rows.stride(),
                        0..acts.tiles(),
                    );
                },
                Err(error) => result = Err(error),
            }
        });
        result
    }
}

fn target(rows: &Rows) -> Target {
    Target {
        at: rows.base(),
        stride: rows.stride(),
    }
}
