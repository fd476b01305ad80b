//! The order of work in a step, with a barrier only where an operation touches what others wrote or read since the last.
//!
//! There are two plans. With few tokens every thread norms and quantises all rows for itself (*own* steps: no barrier, no
//! traffic) and attention rotates and appends on the fly, which leaves five barriers a layer. With many tokens rows are
//! shared out.

use std::collections::BTreeSet;
use std::sync::Arc;

use kbit_tensor::program::Epilogue;

use crate::acts::{Form, Input};
use crate::op::{AddOp, AttentionOp, EmbedOp, ExpertsOp, HeadOp, HiddenOp, LinearOp, NormOp, Op};
use crate::prepare::Model;

/// Tokens of a pass up to which [`Plan::few`] is used.
pub(crate) const FEW: usize = 4;

/// A unit between barriers, with the operation that it is a part of; numbers of activations index
/// [`Model::acts`](crate::prepare::Model).
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Embed(Arc<EmbedOp>),
    Norm(Arc<NormOp>),
    /// Into this thread's own rows of the output buffer.
    OwnNorm(Arc<NormOp>),
    /// Names the layout of shared activations (of that number) anew, on one thread.
    Shape(usize),
    /// Fills shared activations (of that number), unless the operation before did that already.
    Fill {
        acts: usize,
        /// Whether that is a projection which may, where nothing else reads its outputs.
        made: bool,
    },
    /// Fills this thread's own activations (of that number) from its own rows or from shared ones.
    OwnFill {
        acts: usize,
        own: bool,
    },
    /// Into its buffer, or straight into shared activations (of that number).
    Linear(Arc<LinearOp>, Option<usize>),
    /// Rotates and appends.
    Rotate(Arc<AttentionOp>),
    Attend(Arc<AttentionOp>),
    Add(AddOp),
    Experts(ExpertsPart, Arc<ExpertsOp>),
    Hidden(HiddenOp),
    /// Rows of buffer `x` that want logits, side by side.
    Gather {
        x: usize,
    },
    /// The same into this thread's own rows, from its own rows or from shared ones.
    OwnGather {
        x: usize,
        own: bool,
    },
    Head(Arc<HeadOp>),
}

/// Units of a mixture, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertsPart {
    Router,
    /// Every thread for itself.
    Route,
    /// Activations of the experts with tokens, from rows of x.
    Fill,
    Up,
    /// The same from rows between up and down.
    FillInner,
    Down,
    Sum,
}

/// One unit and whether all threads must have finished what came before.
#[derive(Clone, Debug)]
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
    /// What the last projection may have filled.
    makes: Option<usize>,
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
            makes: None,
            own: vec![false; model.widths.len()],
            shaped: vec![None; model.memories],
        }
    }

    fn plan(mut self) -> Plan {
        for (at, op) in self.model.ops.iter().enumerate() {
            self.op(at, op);
        }
        Plan {
            steps: self.steps,
            few: self.few,
        }
    }

    fn op(&mut self, at: usize, op: &Op) {
        use Thing::{Buffer, Cache};
        let m = self.model;
        match op {
            Op::Embed(op) => self.push(Work::Embed(op.clone()), &[], &[Buffer(op.out)]),
            Op::Norm(op) => {
                let (x, out) = (Buffer(op.x), Buffer(op.out));
                let own = self.few && self.read_by_matrices(at, op.out).is_some();
                if own {
                    self.push(Work::OwnNorm(op.clone()), &[x], &[]);
                } else {
                    self.push(Work::Norm(op.clone()), &[x], &[out]);
                }
                self.changed(op.out);
                self.own[op.out] = own;
            }
            Op::Linear(op) => {
                let mut read = Vec::new();
                for part in &op.projection.parts {
                    read.extend(self.fill(part.acts, op.x));
                }
                self.changed(op.out);
                let makes = self.makes(at, op).filter(|_| !self.few);
                let mut written = vec![Buffer(op.out)];
                written.extend(makes.map(|acts| self.shape(acts)));
                self.push(Work::Linear(op.clone(), makes), &read, &written);
                self.makes = makes;
            }
            Op::Attention(op) => {
                let (qkv, out) = (Buffer(op.qkv), Buffer(op.out));
                if !self.few {
                    self.push(Work::Rotate(op.clone()), &[], &[qkv, Cache]);
                }
                self.push(Work::Attend(op.clone()), &[qkv], &[out, Cache]);
                self.changed(op.qkv);
                self.changed(op.out);
            }
            Op::Add(op) => {
                self.push(Work::Add(*op), &[Buffer(op.x)], &[Buffer(op.into)]);
                self.changed(op.into);
            }
            Op::Experts(op) => self.experts(op),
            Op::Hidden(op) => {
                // Only passes of the other plan hand out hidden states.
                if !self.few {
                    self.push(Work::Hidden(*op), &[Buffer(op.x)], &[]);
                }
            }
            Op::Head(op) => {
                let (x, from) = (op.x, Buffer(op.x));
                if self.few {
                    let own = self.own[x];
                    self.push(Work::OwnGather { x, own }, shared(&from, own), &[]);
                } else {
                    self.push(Work::Gather { x }, &[from], &[Buffer(m.head_rows)]);
                }
                self.changed(m.head_rows);
                self.own[m.head_rows] = self.few;
                let read = self.fill(op.head.projection.parts[0].acts, m.head_rows);
                self.push(Work::Head(op.clone()), &read, &[]);
            }
        }
    }

    fn experts(&mut self, op: &Arc<ExpertsOp>) {
        use Thing::{Buffer, ExpertActs};
        let m = self.model;
        let (router, inner, outer) = (Buffer(m.router), Buffer(m.inner), Buffer(m.outer));
        let (x, into) = (Buffer(op.x), Buffer(op.into));
        let read = self.fill(op.experts.router.parts[0].acts, op.x);
        let mut push = |part, reads: &[Thing], writes: &[Thing]| {
            self.push(Work::Experts(part, op.clone()), reads, writes);
        };
        push(ExpertsPart::Router, &read, &[router]);
        push(ExpertsPart::Route, &[router], &[]);
        push(ExpertsPart::Fill, &[x], &[ExpertActs]);
        push(ExpertsPart::Up, &[ExpertActs], &[inner]);
        push(ExpertsPart::FillInner, &[inner], &[ExpertActs]);
        push(ExpertsPart::Down, &[ExpertActs], &[outer]);
        push(ExpertsPart::Sum, &[outer], &[into]);
        self.changed(op.into);
    }

    /// Makes sure that activations are filled; what reading them reads.
    fn fill(&mut self, acts: usize, x: usize) -> Vec<Thing> {
        let memory = self.model.acts[acts].memory;
        if self.few {
            if !std::mem::replace(&mut self.filled[acts], true) {
                let (own, from) = (self.own[x], Thing::Buffer(x));
                self.push(Work::OwnFill { acts, own }, shared(&from, own), &[]);
                self.others_lost(acts);
            }
            return Vec::new();
        }
        if !std::mem::replace(&mut self.filled[acts], true) {
            let memory = self.shape(acts);
            let made = self.makes == Some(acts);
            self.push(Work::Fill { acts, made }, &[Thing::Buffer(x)], &[memory]);
            self.others_lost(acts);
        }
        vec![Thing::Acts(memory)]
    }

    /// Lays the memory of shared activations out for them.
    fn shape(&mut self, acts: usize) -> Thing {
        let memory = self.model.acts[acts].memory;
        // Before a pass the memory is laid out for the first that uses it.
        if self.shaped[memory].is_some_and(|shaped| shaped != acts) {
            self.push(Work::Shape(acts), &[], &[Thing::Acts(memory)]);
        }
        self.shaped[memory] = Some(acts);
        Thing::Acts(memory)
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

    /// Which activations matrices make of what operation `at` writes to `buffer`; nothing where something else reads that.
    fn read_by_matrices(&self, at: usize, buffer: usize) -> Option<BTreeSet<usize>> {
        let mut acts = BTreeSet::new();
        for op in &self.model.ops[at + 1..] {
            let (other_reads, writes) = match op {
                Op::Embed(op) => (false, op.out == buffer),
                Op::Norm(op) => (op.x == buffer, op.out == buffer),
                Op::Linear(op) => {
                    if op.x == buffer {
                        acts.extend(op.projection.parts.iter().map(|part| part.acts));
                    }
                    let adds = matches!(op.projection.epilogue, Epilogue::AddTo { .. });
                    (adds && op.out == buffer, op.out == buffer)
                }
                Op::Attention(op) => (op.qkv == buffer, op.out == buffer),
                Op::Add(op) => (op.x == buffer || op.into == buffer, false),
                // Experts gather rows of x from the shared buffer.
                Op::Experts(op) => (op.x == buffer || op.into == buffer, false),
                // With few tokens nobody wants hidden states, and the head takes a thread's own rows.
                Op::Hidden(op) => (op.x == buffer && !self.few, false),
                Op::Head(op) => (op.x == buffer && !self.few, false),
            };
            if other_reads {
                return None;
            }
            if writes {
                break;
            }
        }
        Some(acts)
    }

    /// The only form in which anything reads the outputs of projection `at`, if it can be made 256 outputs at a time.
    fn makes(&self, at: usize, op: &LinearOp) -> Option<usize> {
        let acts = self.read_by_matrices(at, op.out)?;
        let (Some(&only), 1) = (acts.first(), acts.len()) else {
            return None;
        };
        let Input {
            form, permutation, ..
        } = &self.model.acts[only].input;
        let int8 = matches!(form, Form::Int8 { .. });
        let adds = matches!(op.projection.epilogue, Epilogue::AddTo { .. });
        // Others still read activations of its input.
        let apart = op.x != op.out;
        let fits = int8 && permutation.is_none() && !adds && op.projection.columns() == 1;
        (apart && fits).then_some(only)
    }

    fn push(&mut self, work: Work, reads: &[Thing], writes: &[Thing]) {
        let conflict = reads.iter().any(|t| self.written.contains(t))
            || writes
                .iter()
                .any(|t| self.written.contains(t) || self.read.contains(t));
        // The last items of a matrix are a loop of their own.
        let loops = 1 + usize::from(matches!(work, Work::Linear(..)));
        let barrier = conflict || self.loops + loops > crate::pool::LOOPS;
        if barrier {
            self.read.clear();
            self.written.clear();
            self.loops = 0;
        }
        self.read.extend(reads);
        self.written.extend(writes);
        self.loops += loops;
        self.steps.push(Step { barrier, work });
    }
}

/// What a unit reads: nothing that threads share where every thread has its own rows.
fn shared(from: &Thing, own: bool) -> &[Thing] {
    if own { &[] } else { std::slice::from_ref(from) }
}

#[cfg(test)]
mod tests {
    use kbit_tensor::program::{
        Activations, Buffer, BufferId, CacheLayer, Linear, Norm, NormKind, Op, Program, WeightId,
    };
    use kbit_tensor::{QuantizeOptions, Tensor, Weight, quantize};

    use super::*;

    /// Both plans for a llama of `layers` layers.
    fn plans(layers: usize, weights: &[Weight]) -> (Plan, Plan) {
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
        let model = Model::new(&program, weights, Activations::Int8).expect("binds");
        (Plan::few(&model), Plan::many(&model))
    }

    const SHAPES: [[usize; 2]; 3] = [[16, 16], [48, 16], [16, 48]];

    /// Decoding meets where all read what each wrote a part of: the stream twice, qkv, heads and inner rows.
    #[test]
    fn few_barriers_a_layer() {
        let weights = SHAPES.map(|shape| {
            let zeros = Tensor::from_f32(&shape, &vec![0.0; shape[0] * shape[1]]);
            Weight::Dense(zeros.expect("room"))
        });
        let barriers = |layers| {
            let (few, many) = plans(layers, &weights);
            (few.barriers(), many.barriers())
        };
        let ((few, many), (few_more, many_more)) = (barriers(1), barriers(3));
        assert_eq!(few_more - few, 2 * 5);
        assert_eq!(many_more - many, 2 * 12);
    }

    /// Inner rows, which nothing but k-bit matrices reads, may become activations at once; attention and norms read the others.
    #[test]
    fn makes_activations_of_inner_rows() {
        let weights = SHAPES.map(|[rows, inputs]| {
            let (zeros, options) = (vec![0.0; rows * inputs], QuantizeOptions::new(4));
            Weight::Quantised(quantize(&zeros, rows, inputs, &options).expect("quantises"))
        });
        let (few, many) = plans(3, &weights);
        let made = |plan: &Plan| {
            let works = plan.steps.iter().map(|step| &step.work);
            let linear = works.clone().filter_map(|work| match work {
                Work::Linear(_, makes) => *makes,
                _ => None,
            });
            let fill = works.filter_map(|work| match work {
                Work::Fill { acts, made } => made.then_some(*acts),
                _ => None,
            });
            (linear.collect::<Vec<_>>(), fill.collect::<Vec<_>>())
        };
        let (linear, fill) = made(&many);
        assert_eq!((linear.len(), &linear), (3, &fill));
        assert_eq!(made(&few), (vec![], vec![]));
    }
}
