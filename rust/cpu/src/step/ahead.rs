//! What a thread will read next: while it waits at a barrier it asks for the first lines of its share of the next matrix, so
//! that memory is busy between matrices too.

use kbit_simd::Isa;

use super::Pass;
use crate::ask::ask;
use crate::plan::Work;
use crate::pool::Team;

/// Bytes asked for at most: a part of the second cache, and more than memory gives while threads wait.
const MOST: usize = 128 << 10;
/// Bytes asked for before the barrier is looked at again.
const STEP: usize = 256;

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
        let steps = pass.plan.steps[from..].iter();
        let next = steps.enumerate().find_map(|(i, step)| {
            let reads = match &step.work {
                Work::Linear(op, _) => Some((&op.projection, pass.ids.len())),
                Work::Head(op) => Some((&op.head.projection, pass.rows.len())),
                // Which experts is not known before; what comes after them would be out of the cache again by then.
                Work::Experts(..) => None,
                _ => return None,
            };
            Some((from + i, reads))
        });
        let (step, reads) = next.unwrap_or((usize::MAX, None));
        let bytes = reads.map_or(&[][..], |(projection, tokens)| {
            let share = team.stream_share(team.index(), projection.items(tokens));
            projection.stream(share, tokens)
        });
        (self.step, self.bytes) = (step, &bytes[..bytes.len().min(MOST)]);
    }

    /// Asks for a few more lines.
    pub(super) fn ask(&mut self, isa: Isa) {
        if self.bytes.is_empty() {
            return;
        }
        let (now, later) = self.bytes.split_at(self.bytes.len().min(STEP));
        self.bytes = later;
        ask(isa, now.as_ptr(), now.len());
    }
}
