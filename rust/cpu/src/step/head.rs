//! The units of the head: the rows that want logits are gathered, then their logits are made and compared.

use kbit_simd::dispatch;

use super::{Own, Pass};
use crate::head::{Head, Logits};
use crate::linear::out::Target;
use crate::pool::Team;

impl Pass<'_> {
    pub(super) fn gather(&self, x: usize, team: &Team<'_>) {
        let width = self.model.widths[x];
        team.for_each(self.rows.len(), |i| {
            // SAFETY: the plan.
            unsafe {
                self.buffer(self.model.head_rows)
                    .part_mut(i, 0, width)
                    .copy_from_slice(self.buffer(x).row(self.rows[i]));
            };
        });
    }

    pub(super) fn own_gather(&self, x: usize, from_own: bool, own: &mut Own) {
        let (width, stride) = (
            self.model.widths[x],
            self.buffer(self.model.head_rows).stride(),
        );
        let mut gathered = std::mem::take(&mut own.rows[self.model.head_rows]);
        gathered.resize(self.rows.len() * stride, 0.0);
        for (to, &token) in gathered.chunks_exact_mut(stride).zip(self.rows) {
            let shared = self.buffer(x);
            let from = if from_own {
                &own.rows[x][token * shared.stride()..][..width]
            } else {
                // SAFETY: the plan.
                unsafe { shared.row(token) }
            };
            to[..width].copy_from_slice(from);
        }
        own.rows[self.model.head_rows] = gathered;
    }

    pub(super) fn head(&self, head: &Head, team: &Team<'_>, own: &mut Own) {
        let n = self.rows.len();
        if n == 0 {
            return;
        }
        let part = &head.projection.parts[0];
        let vocab = part.matrix.rows();
        let Own { acts, best, .. } = own;
        let mut rows: Vec<f32> = Vec::new();
        let projection = &head.projection;
        let (items, sizes) = (projection.items(n), projection.runs(self.isa, n));
        team.for_runs(items, sizes, |run| {
            let ids = projection.span(run.clone(), n);
            rows.resize(n * ids.len(), 0.0);
            let to = Target {
                at: rows.as_mut_ptr().wrapping_sub(ids.start),
                stride: ids.len(),
            };
            // SAFETY: `rows` has a row of the run's columns for every token; the plan.
            unsafe {
                let acts = |a| self.acts(acts, a);
                projection.items_of(run, 0..n, acts, to);
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
                        least: best.value(),
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
}
