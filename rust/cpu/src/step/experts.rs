//! The units of a mixture of experts.

use kbit_simd::dispatch;
use kbit_tensor::Result;

use super::{Own, Pass};
use crate::experts::{AddScaled, Expert, Experts};
use crate::linear::out::Target;
use crate::op::ExpertsOp;
use crate::plan::ExpertsPart;
use crate::pool::Team;
use crate::project::Projection;

impl Pass<'_> {
    pub(super) fn experts(
        &self,
        part: ExpertsPart,
        op: &ExpertsOp,
        team: &Team<'_>,
        own: &mut Own,
    ) -> Result<()> {
        let (m, mixture) = (self.model, &op.experts);
        match part {
            ExpertsPart::Router => self.project(&mixture.router, m.router, team, &own.acts),
            ExpertsPart::Route => {
                // SAFETY: the plan.
                own.routes
                    .route(self.isa, mixture, self.ids.len(), |t| unsafe {
                        &self.buffer(m.router).row(t)[..mixture.members.len()]
                    });
            }
            ExpertsPart::Fill => return self.experts_fill(op, team, own),
            ExpertsPart::Up => self.experts_project(mixture, |e| &e.up, m.inner, team, own),
            ExpertsPart::FillInner => return self.experts_fill_inner(mixture, team, own),
            ExpertsPart::Down => self.experts_project(mixture, |e| &e.down, m.outer, team, own),
            ExpertsPart::Sum => self.experts_sum(op, team, own),
        }
        Ok(())
    }

    /// Gathers the rows of each expert with tokens into its activations.
    fn experts_fill(&self, op: &ExpertsOp, team: &Team<'_>, own: &mut Own) -> Result<()> {
        let rows = self.buffer(op.x);
        let Own {
            routes, scratch, ..
        } = own;
        let mut result = Ok(());
        team.for_each(routes.active().len(), |i| {
            let (e, slots) = routes.slots(i);
            scratch.clear();
            for slot in slots.clone() {
                // SAFETY: the plan.
                scratch.extend_from_slice(unsafe { rows.row(routes.tokens[slot]) });
            }
            for part in &op.experts.members[e].up.parts {
                // SAFETY: the plan; an expert is one item.
                let acts = unsafe { self.memory.expert_acts.get_mut(3 * e + part.acts) };
                match acts.reserve(self.isa, part.matrix.input(), slots.len()) {
                    Ok(()) => acts.fill_all(scratch, rows.width()),
                    Err(error) => result = Err(error),
                }
            }
        });
        result
    }

    /// The same for what goes down, whose rows lie together.
    fn experts_fill_inner(&self, mixture: &Experts, team: &Team<'_>, own: &Own) -> Result<()> {
        let rows = self.buffer(self.model.inner);
        let routes = &own.routes;
        let mut result = Ok(());
        team.for_each(routes.active().len(), |i| {
            let (e, slots) = routes.slots(i);
            let part = &mixture.members[e].down.parts[0];
            // SAFETY: the plan; an expert is one item.
            let acts = unsafe { self.memory.expert_acts.get_mut(3 * e + part.acts) };
            match acts.reserve(self.isa, part.matrix.input(), slots.len()) {
                // SAFETY: the plan; the slots are rows of the buffer.
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

    /// One of the projections of every expert with tokens, for all its slots, into their rows of buffer `out`.
    fn experts_project(
        &self,
        mixture: &Experts,
        projection: impl Fn(&Expert) -> &Projection,
        out: usize,
        team: &Team<'_>,
        own: &mut Own,
    ) {
        let out = self.buffer(out);
        let routes = &own.routes;
        let active = || {
            routes.active().map(|(e, slots)| {
                let projection = projection(&mixture.members[e]);
                let items = projection.items(slots.len());
                (e, projection, slots, items)
            })
        };
        let (items, sizes) = active()
            .map(|(_, projection, slots, items)| (items, projection.runs(self.isa, slots.len())))
            .reduce(|(n, a), (m, b)| {
                let least = (*a.start()).min(*b.start());
                (n + m, least..=(*a.end()).max(*b.end()))
            })
            .unwrap_or((0, 1..=1));
        // Runs mostly come in order; one that comes before the last, of a neighbour's range, is looked for from the start.
        let (mut experts, mut first, mut last) = (active().peekable(), 0, 0);
        team.for_runs(items, sizes, |run| {
            if run.start < last {
                (experts, first) = (active().peekable(), 0);
            }
            last = run.start;
            while let Some((e, projection, slots, items)) = experts.peek() {
                let here = run.start.max(first)..run.end.min(first + items);
                if !here.is_empty() {
                    let to = Target {
                        at: out.base().wrapping_add(slots.start * out.stride()),
                        stride: out.stride(),
                    };
                    // SAFETY: the plan; slots of an expert are its own rows.
                    let acts = |a: usize| unsafe { self.memory.expert_acts.get(3 * e + a) };
                    let items = here.start - first..here.end - first;
                    // SAFETY: as above.
                    unsafe {
                        projection.items_of(items, 0..slots.len(), acts, to);
                    };
                }
                if run.end < first + items {
                    return;
                }
                first += items;
                experts.next();
            }
        });
    }

    /// Adds what a token's experts made of it, best expert first.
    fn experts_sum(&self, op: &ExpertsOp, team: &Team<'_>, own: &mut Own) {
        let (outer, mixture) = (self.buffer(self.model.outer), &op.experts);
        let Own {
            routes, scratch, ..
        } = own;
        team.for_each(self.ids.len(), |t| {
            // SAFETY: the plan.
            let into = unsafe { self.buffer(op.into).row_mut(t) };
            scratch.clear();
            scratch.resize(into.len(), 0.0);
            for &(slot, weight) in &routes.chosen[t * mixture.top_k..(t + 1) * mixture.top_k] {
                // SAFETY: the plan.
                let y = unsafe { &outer.row(slot)[..into.len()] };
                let sum = &mut *scratch;
                dispatch(self.isa, AddScaled { sum, weight, y });
            }
            let (sum, weight, y) = (into, mixture.scale, &*scratch);
            dispatch(self.isa, AddScaled { sum, weight, y });
        });
    }
}
