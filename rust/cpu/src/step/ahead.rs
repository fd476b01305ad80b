//! What a thread will read next: while it waits at a barrier it asks for the first lines of its share of the next matrix, so
//! that memory is busy between matrices too.

use kbit_simd::{Isa, Simd, SimdOp, dispatch};

use super::Pass;
use crate::plan::Work;
use crate::pool::Team;

/// Bytes asked for at most: a part of the second cache, and more than memory gives while threads wait.
const MOST: usize = 128 << 10;
/// Lines asked for before the barrier is looked at again.
const LINES: usize = 4;
const LINE: usize = 64;

/// The lines still to ask for.
pub(super) struct Ahead<'a> {
    /// The step that reads them.
    step: usize,
    bytes: &'a [u8],
}

impl<'a> Ahead<'a> {
    /// Before the first barrier.
    pub(super) const NOTHING: Self = Self {
        step: 0,
        bytes: &[],
    };

    /// Turns to the first matrix at or after step `from`, if that is another than before.
    pub(super) fn aim(&mut self, pass: &Pass<'a>, from: usize, team: &Team<'_>) {
        if self.step >= from {
            return;
        }
        let reads = |work: &'a Work| match work {
            Work::Linear(op) => Some((&op.projection, pass.ids.len())),
            Work::Head(op) => Some((&op.head.projection, pass.rows.len())),
            _ => None,
        };
        let steps = pass.plan.steps[from..].iter();
        let next = steps
            .enumerate()
            .find_map(|(i, step)| Some((i, reads(&step.work)?)));
        let Some((i, (projection, tokens))) = next else {
            (self.step, self.bytes) = (usize::MAX, &[]);
            return;
        };
        let share = team.stream_share(team.index(), projection.items(tokens, team.threads()));
        let bytes = projection.stream(share.start, tokens, team.threads());
        self.step = from + i;
        self.bytes = if share.is_empty() {
            &[]
        } else {
            &bytes[..bytes.len().min(MOST)]
        };
    }

    /// Asks for a few more lines.
    pub(super) fn ask(&mut self, isa: Isa) {
        if self.bytes.is_empty() {
            return;
        }
        let (now, later) = self.bytes.split_at(self.bytes.len().min(LINES * LINE));
        self.bytes = later;
        dispatch(isa, Ask(now));
    }
}

struct Ask<'a>(&'a [u8]);

impl SimdOp for Ask<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for line in self.0.chunks(LINE) {
            s.prefetch_far(line.as_ptr());
        }
    }
}
