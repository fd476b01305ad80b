//! The order of work in a step, with a barrier only where an operation touches what others wrote or read since the last.
//!
//! There are two plans. With few tokens every thread norms and quantises all rows for itself (*own* steps: no barrier, no
//! traffic) and attention rotates and appends on the fly, which leaves five barriers a layer. With many tokens rows are
//! shared out.

use std::collections::BTreeSet;

use crate::prepare::{Model, Op};

/// Tokens of a pass up to which [`Plan::few`] is used.
pub(crate) const FEW: usize = 4;

/// A unit between barriers; numbers are indices of operations unless they say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Embed(usize),
    Norm(usize),
    /// Into this thread's own rows of the output buffer.
    OwnNorm(usize),
    /// Names the layout of shared activations (of that number) anew, on one thread.
    Shape(usize),
    /// Fills shared activations (of that number).
    Fill(usize),
    /// Fills this thread's own activations (of that number) from its own rows or from shared ones.
    OwnFill {
        acts: usize,
        own: bool,
    },
    Linear(usize),
    /// Rotates and appends.
    Rotate(usize),
    Attend(usize),
    Add(usize),
    Router(usize),
    /// Every thread for itself.
    Route(usize),
    /// Activations of experts, and so on.
    ExpertsFill(usize),
    ExpertsUp(usize),
    ExpertsFillInner(usize),
    ExpertsDown(usize),
    ExpertsSum(usize),
    Hidden(usize),
    /// Rows that want logits, side by side.
    Gather(usize),
    OwnGather {
        at: usize,
        own: bool,
    },
    Head(usize),
}

/// One unit and whether all threads must have finished what came before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) barrier: bool,
    pub(crate) work: Work,
}

/// A sequence of steps.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Whether this is the plan for few tokens.
    pub(crate) few: bool,
}

impl Plan {
    pub(crate) fn few(model: &Model) -> Self {
        Planner::new(model, true).plan()
    }

    pub(crate) fn many(model: &Model) -> Self {
        Planner::new(model, false).plan()
    }

    /// Barriers of a pass.
    #[cfg(test)]
    pub(crate) fn barriers(&self) -> usize {
        self.steps.iter().filter(|s| s.barrier).count()
    }
}

/// Something that threads share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    Buffer(usize),
    /// Memory of shared activations.
    Acts(usize),
    /// Activations of experts.
    ExpertActs,
    /// The cache of all layers and partial results.
    Cache,
}

struct Planner<'a> {
    model: &'a Model,
    few: bool,
    steps: Vec<Step>,
    /// Since the last barrier.
    read: BTreeSet<Thing>,
    written: BTreeSet<Thing>,
    loops: usize,
    /// Activations (own or shared) that hold the present rows of their buffer.
    filled: Vec<bool>,
    /// Buffers whose present rows every thread has made for itself.
    own: Vec<bool>,
    /// Which activations a memory is laid out for.
    shaped: Vec<Option<usize>>,
}

impl<'a> Planner<'a> {
    fn new(model: &'a Model, few: bool) -> Self {
        Self {
            model,
            few,
            steps: Vec::new(),
            read: BTreeSet::new(),
            written: BTreeSet::new(),
            loops: 0,
            filled: vec![false; model.acts.len()],
            own: vec![false; model.widths.len()],
            shaped: vec![None; model.memories],
        }
    }

    fn plan(mut self) -> Plan {
        for at in 0..self.model.ops.len() {
            self.op(at);
        }
        Plan {
            steps: self.steps,
            few: self.few,
        }
    }

    fn op(&mut self, at: usize) {
        use Thing::{Buffer, Cache, ExpertActs};
        let m = self.model;
        match &m.ops[at] {
            Op::Embed { out, .. } => self.push(Work::Embed(at), &[], &[Buffer(*out)]),
            Op::Norm { x, out, .. } => {
                if self.few && self.read_by_matrices_only(at, *out) {
                    self.push(Work::OwnNorm(at), &[Buffer(*x)], &[]);
                    self.changed(*out);
                    self.own[*out] = true;
                } else {
                    self.push(Work::Norm(at), &[Buffer(*x)], &[Buffer(*out)]);
                    self.changed(*out);
                }
            }
            Op::Linear { x, projection, out } => {
                let mut read = Vec::new();
                for part in &projection.parts {
                    read.extend(self.fill(part.acts, *x));
                }
                self.push(Work::Linear(at), &read, &[Buffer(*out)]);
                self.changed(*out);
            }
            Op::Attention { qkv, out, .. } => {
                if !self.few {
                    self.push(Work::Rotate(at), &[], &[Buffer(*qkv), Cache]);
                }
                self.push(Work::Attend(at), &[Buffer(*qkv)], &[Buffer(*out), Cache]);
                self.changed(*qkv);
                self.changed(*out);
            }
            Op::Add { x, into, .. } => {
                self.push(Work::Add(at), &[Buffer(*x)], &[Buffer(*into)]);
                self.changed(*into);
            }
            Op::Experts { x, experts, into } => {
                let read = self.fill(experts.router.parts[0].acts, *x);
                self.push(Work::Router(at), &read, &[Buffer(m.router)]);
                self.push(Work::Route(at), &[Buffer(m.router)], &[]);
                self.push(Work::ExpertsFill(at), &[Buffer(*x)], &[ExpertActs]);
                self.push(Work::ExpertsUp(at), &[ExpertActs], &[Buffer(m.inner)]);
                self.push(
                    Work::ExpertsFillInner(at),
                    &[Buffer(m.inner)],
                    &[ExpertActs],
                );
                self.push(Work::ExpertsDown(at), &[ExpertActs], &[Buffer(m.outer)]);
                self.push(Work::ExpertsSum(at), &[Buffer(m.outer)], &[Buffer(*into)]);
                self.changed(*into);
            }
            Op::Hidden { x, .. } => {
                // Only passes of the other plan hand out hidden states.
                if !self.few {
                    self.push(Work::Hidden(at), &[Buffer(*x)], &[]);
                }
            }
            Op::Head { x, head } => {
                let from = Buffer(*x);
                if self.few {
                    let own = self.own[*x];
                    self.push(
                        Work::OwnGather { at, own },
                        if own {
                            &[]
                        } else {
                            std::slice::from_ref(&from)
                        },
                        &[],
                    );
                } else {
                    self.push(Work::Gather(at), &[from], &[Buffer(m.head_rows)]);
                }
                self.changed(m.head_rows);
                self.own[m.head_rows] = self.few;
                let read = self.fill(head.projection.parts[0].acts, m.head_rows);
                self.push(Work::Head(at), &read, &[]);
            }
        }
    }

    /// Makes sure that activations are filled; what reading them reads.
    fn fill(&mut self, acts: usize, x: usize) -> Vec<Thing> {
        let memory = self.model.acts[acts].memory;
        if self.few {
            if !std::mem::replace(&mut self.filled[acts], true) {
                let (own, from) = (self.own[x], Thing::Buffer(x));
                self.push(
                    Work::OwnFill { acts, own },
                    if own {
                        &[]
                    } else {
                        std::slice::from_ref(&from)
                    },
                    &[],
                );
                self.others_lost(acts);
            }
            return Vec::new();
        }
        if !std::mem::replace(&mut self.filled[acts], true) {
            // Before a pass the memory is laid out for the first that uses it.
            if self.shaped[memory].is_some_and(|shaped| shaped != acts) {
                self.push(Work::Shape(acts), &[], &[Thing::Acts(memory)]);
            }
            self.shaped[memory] = Some(acts);
            self.push(
                Work::Fill(acts),
                &[Thing::Buffer(x)],
                &[Thing::Acts(memory)],
            );
            self.others_lost(acts);
        }
        vec![Thing::Acts(memory)]
    }

    /// Activations that shared their memory with `acts` are overwritten.
    fn others_lost(&mut self, acts: usize) {
        let memory = self.model.acts[acts].memory;
        for (i, spec) in self.model.acts.iter().enumerate() {
            if i != acts && spec.memory == memory {
                self.filled[i] = false;
            }
        }
    }

    /// A buffer has new rows.
    fn changed(&mut self, buffer: usize) {
        self.own[buffer] = false;
        for (filled, spec) in self.filled.iter_mut().zip(&self.model.acts) {
            *filled &= spec.buffer != buffer;
        }
    }

    /// Whether nothing but matrices reads what operation `at` writes to `buffer`.
    fn read_by_matrices_only(&self, at: usize, buffer: usize) -> bool {
        for op in &self.model.ops[at + 1..] {
            let (other_reads, writes) = match op {
                Op::Embed { out, .. } => (false, *out == buffer),
                Op::Norm { x, out, .. } => (*x == buffer, *out == buffer),
                Op::Linear {
                    projection, out, ..
                } => {
                    let adds = matches!(
                        projection.epilogue,
                        kbit_tensor::program::Epilogue::AddTo { .. }
                    );
                    (adds && *out == buffer, *out == buffer)
                }
                Op::Attention { qkv, out, .. } => (*qkv == buffer, *out == buffer),
                // Experts gather rows of x from the shared buffer.
                Op::Add { x, into, .. } | Op::Experts { x, into, .. } => {
                    (*x == buffer || *into == buffer, false)
                }
                Op::Hidden { .. } | Op::Head { .. } => (false, false),
            };
            if other_reads {
                return false;
            }
            if writes {
                return true;
            }
        }
        true
    }

    fn push(&mut self, work: Work, reads: &[Thing], writes: &[Thing]) {
        let conflict = reads.iter().any(|t| self.written.contains(t))
            || writes
                .iter()
                .any(|t| self.written.contains(t) || self.read.contains(t));
        let barrier = conflict || self.loops == crate::pool::LOOPS;
        if barrier {
            self.read.clear();
            self.written.clear();
            self.loops = 0;
        }
        self.read.extend(reads);
        self.written.extend(writes);
        self.loops += 1;
        self.steps.push(Step { barrier, work });
    }
}

#[cfg(test)]
mod tests {
    use kbit_tensor::program::{
        Activations, Buffer, BufferId, CacheLayer, Epilogue, Linear, Norm, NormKind, Op, Program,
        WeightId,
    };
    use kbit_tensor::{Tensor, Weight};

    use super::*;

    /// Barriers of both plans for a llama of `layers` layers.
    fn barriers(layers: usize) -> (usize, usize) {
        let buffer = |width: usize| Buffer {
            name: String::new(),
            width,
        };
        let [h, x, qkv, heads, inner] = [0, 1, 2, 3, 4].map(BufferId);
        let norm = Norm {
            kind: NormKind::Rms,
            eps: 1e-5,
            weight: None,
            bias: None,
        };
        let linear = |rows: u32| Linear {
            weight: WeightId(rows),
            bias: None,
        };
        let mut program = Program {
            weights: vec!["square".into(), "wide".into(), "down".into()],
            buffers: [16, 16, 48, 16, 48].map(buffer).to_vec(),
            vocab_size: 16,
            context: 8,
            ..Program::default()
        };
        let table = WeightId(0);
        let (scale, epilogue) = (1.0, Epilogue::AddTo { scale: 1.0 });
        let store = Epilogue::Store;
        program.ops.push(Op::Embed {
            table,
            scale,
            positions: None,
            out: h,
        });
        for layer in 0..layers {
            program.cache.push(CacheLayer {
                kv_heads: 1,
                q_heads: 1,
                head_dim: 16,
                window: None,
            });
            program.ops.extend([
                Op::Norm { x: h, norm, out: x },
                Op::Linear {
                    x,
                    parts: vec![linear(1)],
                    epilogue: store,
                    out: qkv,
                },
                Op::RopeAppend {
                    qkv,
                    layer,
                    rope: None,
                    q_norm: None,
                    k_norm: None,
                    clip: None,
                },
                Op::Attention {
                    qkv,
                    layer,
                    scale,
                    window: None,
                    softcap: None,
                    alibi: None,
                    sinks: None,
                    out: heads,
                },
                Op::Linear {
                    x: heads,
                    parts: vec![linear(0)],
                    epilogue,
                    out: h,
                },
                Op::Norm { x: h, norm, out: x },
                Op::Linear {
                    x,
                    parts: vec![linear(1)],
                    epilogue: store,
                    out: inner,
                },
                Op::Linear {
                    x: inner,
                    parts: vec![linear(2)],
                    epilogue,
                    out: h,
                },
            ]);
        }
        let weights = [[16, 16], [48, 16], [16, 48]].map(|shape| {
            let zeros = Tensor::from_f32(&shape, &vec![0.0; shape[0] * shape[1]]);
            Weight::Dense(zeros.expect("room"))
        });
        let model = Model::new(&program, &weights, Activations::Int8).expect("binds");
        (Plan::few(&model).barriers(), Plan::many(&model).barriers())
    }

    /// Decoding meets where all read what each wrote a part of: the stream twice, qkv, heads and inner rows.
    #[test]
    fn few_barriers_a_layer() {
        let ((few, many), (few_more, many_more)) = (barriers(1), barriers(3));
        assert_eq!(few_more - few, 2 * 5);
        assert_eq!(many_more - many, 2 * 12);
    }
}
