//! A program bound to its weights: operations with matrices, vectors and shapes resolved.

use std::collections::HashMap;
use std::sync::Arc;

use kbit_tensor::program::{self, Activations, Epilogue, Linear, Program, WeightId};
use kbit_tensor::{Error, Result, Weight};

use crate::activation::is_gated;
use crate::acts::Input;
use crate::attention::chunk::Scoring;
use crate::attention::{Attention, Rotation};
use crate::embed::Embed;
use crate::experts::{Expert, Experts};
use crate::head::Head;
use crate::linear::Matrix;
use crate::norm::Norm;
use crate::op::{AddOp, AttentionOp, EmbedOp, ExpertsOp, HeadOp, HiddenOp, LinearOp, NormOp, Op};
use crate::project::{Part, Projection};

/// Input rows in the form that some matrices want.
#[derive(Debug)]
pub(crate) struct ActsSpec {
    /// The rows.
    pub(crate) buffer: usize,
    pub(crate) input: Input,
    /// Which memory holds them: forms that differ in the permutation only take turns in one.
    pub(crate) memory: usize,
}

/// A program with its weights.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) ops: Vec<Op>,
    /// Width of every buffer.
    pub(crate) widths: Vec<usize>,
    /// The device's own buffers: rows of the head, router logits, inner and outer rows of experts.
    pub(crate) head_rows: usize,
    pub(crate) router: usize,
    pub(crate) inner: usize,
    pub(crate) outer: usize,
    pub(crate) acts: Vec<ActsSpec>,
    /// Number of distinct [`ActsSpec::memory`].
    pub(crate) memories: usize,
    /// Most experts of a mixture and most experts per token.
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) hidden: usize,
}

impl Model {
    /// Binds `weights`, which [`Program::check`] has seen.
    pub(crate) fn new(
        program: &Program,
        weights: &[Weight],
        activations: Activations,
    ) -> Result<Self> {
        let own = program.buffers.len();
        let widest = program.buffers.iter().map(|b| b.width).max().unwrap_or(0);
        let mut widths: Vec<usize> = program.buffers.iter().map(|b| b.width).collect();
        widths.extend([widest, 0, 0, 0]);
        let model = Self {
            ops: Vec::new(),
            widths,
            head_rows: own,
            router: own + 1,
            inner: own + 2,
            outer: own + 3,
            acts: Vec::new(),
            memories: 0,
            experts: 0,
            top_k: 0,
            hidden: 0,
        };
        let mut binder = Binder {
            program,
            weights,
            activations,
            matrices: HashMap::new(),
            model,
        };
        let mut ops = program.ops.iter();
        while let Some(op) = ops.next() {
            let bound = binder.op(op, &mut ops)?;
            binder.model.ops.push(bound);
        }
        Ok(binder.model)
    }
}

struct Binder<'a> {
    program: &'a Program,
    weights: &'a [Weight],
    activations: Activations,
    matrices: HashMap<WeightId, Arc<Matrix>>,
    model: Model,
}

impl Binder<'_> {
    /// `rest` gives the operations that follow; rotation takes its attention from it.
    fn op<'o>(
        &mut self,
        op: &program::Op,
        rest: &mut impl Iterator<Item = &'o program::Op>,
    ) -> Result<Op> {
        let id = |b: program::BufferId| b.0 as usize;
        Ok(match op {
            program::Op::Embed {
                table,
                scale,
                positions,
                out,
            } => {
                let positions =
                    positions.map(|(table, offset)| (self.weight(table).clone(), offset));
                Op::Embed(Arc::new(EmbedOp {
                    embed: Embed {
                        table: self.weight(*table).clone(),
                        scale: *scale,
                        positions,
                    },
                    out: id(*out),
                }))
            }
            program::Op::Norm { x, norm, out } => Op::Norm(Arc::new(NormOp {
                x: id(*x),
                norm: self.norm(norm),
                out: id(*out),
            })),
            program::Op::Linear {
                x,
                parts,
                epilogue,
                out,
            } => Op::Linear(Arc::new(LinearOp {
                x: id(*x),
                projection: self.projection(id(*x), parts, *epilogue)?,
                out: id(*out),
            })),
            program::Op::RopeAppend {
                qkv,
                layer,
                rope,
                q_norm,
                k_norm,
                clip,
            } => match rest.next() {
                Some(program::Op::Attention {
                    qkv: same,
                    layer: also,
                    scale,
                    window,
                    softcap,
                    alibi,
                    sinks,
                    out,
                }) if same == qkv && also == layer => {
                    if clip.is_some_and(|c| c.is_nan() || c < 0.0) {
                        return Err(Error::Format(format!(
                            "layer {layer}: q, k and v are clamped to {clip:?}, wanted 0 or more"
                        )));
                    }
                    let l = &self.program.cache[*layer];
                    let attention = Attention {
                        layer: *layer,
                        q_heads: l.q_heads,
                        kv_heads: l.kv_heads,
                        head_dim: l.head_dim,
                        scoring: Scoring {
                            scale: *scale,
                            softcap: *softcap,
                            alibi: alibi.is_some(),
                        },
                        window: *window,
                        slopes: alibi.clone(),
                        sinks: sinks.map(|s| self.vector(s)),
                    };
                    let rotation = Rotation {
                        rope: *rope,
                        q_norm: q_norm.as_ref().map(|n| self.norm(n)),
                        k_norm: k_norm.as_ref().map(|n| self.norm(n)),
                        clip: *clip,
                    };
                    Op::Attention(Arc::new(AttentionOp {
                        qkv: id(*qkv),
                        rotation,
                        attention,
                        out: id(*out),
                    }))
                }
                _ => {
                    return Err(Error::Unsupported(format!(
                        "cpu: rotation of layer {layer} without its attention next to it"
                    )));
                }
            },
            program::Op::Attention { layer, .. } => {
                return Err(Error::Unsupported(format!(
                    "cpu: attention of layer {layer} without rotation before it"
                )));
            }
            program::Op::Add { x, scale, into } => Op::Add(AddOp {
                x: id(*x),
                scale: *scale,
                into: id(*into),
            }),
            program::Op::Experts {
                x,
                router,
                experts,
                top_k,
                routing,
                epilogue,
                scale,
                into,
            } => {
                let expert = |e: &program::Expert| -> Result<Expert> {
                    let up: Vec<Linear> = e.gate.iter().chain([&e.up]).copied().collect();
                    Ok(Expert {
                        up: self.bind(&up, *epilogue, |part| part)?,
                        down: self.bind(&[e.down], Epilogue::Store, |_| up.len())?,
                    })
                };
                let experts: Vec<Expert> = experts.iter().map(expert).collect::<Result<_>>()?;
                let m = &mut self.model;
                m.experts = m.experts.max(experts.len());
                m.top_k = m.top_k.max(*top_k);
                m.widths[m.router] = m.widths[m.router].max(experts.len());
                for e in &experts {
                    m.widths[m.inner] = m.widths[m.inner].max(e.down.parts[0].matrix.inputs());
                    m.widths[m.outer] = m.widths[m.outer].max(e.down.parts[0].matrix.rows());
                }
                let router = self.projection(id(*x), &[*router], Epilogue::Store)?;
                let experts = Experts {
                    router,
                    members: experts,
                    top_k: *top_k,
                    routing: *routing,
                    scale: *scale,
                };
                Op::Experts(Arc::new(ExpertsOp {
                    x: id(*x),
                    experts,
                    into: id(*into),
                }))
            }
            program::Op::Hidden { x } => {
                self.model.hidden += 1;
                Op::Hidden(HiddenOp {
                    x: id(*x),
                    index: self.model.hidden - 1,
                })
            }
            program::Op::Head {
                x,
                linear,
                scale,
                softcap,
            } => {
                let projection =
                    self.projection(self.model.head_rows, &[*linear], Epilogue::Store)?;
                Op::Head(Arc::new(HeadOp {
                    x: id(*x),
                    head: Head {
                        projection,
                        scale: *scale,
                        softcap: *softcap,
                    },
                }))
            }
        })
    }

    fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }

    fn vector(&self, id: WeightId) -> Vec<f32> {
        match self.weight(id) {
            Weight::Dense(t) => t.to_f32(),
            Weight::Quantised(k) => k.dequantize(),
        }
    }

    fn norm(&self, norm: &program::Norm) -> Norm {
        let vector = |id: Option<WeightId>| id.map(|id| self.vector(id));
        Norm {
            kind: norm.kind,
            eps: norm.eps,
            weight: vector(norm.weight),
            bias: vector(norm.bias),
        }
    }

    /// Matrices that read buffer `x`.
    fn projection(&mut self, x: usize, parts: &[Linear], epilogue: Epilogue) -> Result<Projection> {
        let mut projection = self.bind(parts, epilogue, |_| 0)?;
        for part in &mut projection.parts {
            part.acts = self.acts(x, part.matrix.input());
        }
        Ok(projection)
    }

    fn bind(
        &mut self,
        parts: &[Linear],
        epilogue: Epilogue,
        acts: impl Fn(usize) -> usize,
    ) -> Result<Projection> {
        if is_gated(epilogue) && parts.len() != 2 {
            return Err(Error::Format(format!(
                "cpu: a gated epilogue wants 2 matrices, has {}",
                parts.len()
            )));
        }
        let part = |(i, linear): (usize, &Linear)| -> Result<Part> {
            let matrix = if let Some(matrix) = self.matrices.get(&linear.weight) {
                matrix.clone()
            } else {
                let matrix = Arc::new(Matrix::prepare(
                    self.weight(linear.weight),
                    self.activations,
                )?);
                self.matrices.insert(linear.weight, matrix.clone());
                matrix
            };
            Ok(Part {
                panel_bytes: (matrix.nbytes() / matrix.panels()).max(1),
                matrix,
                bias: linear.bias.map(|b| self.vector(b)),
                acts: acts(i),
            })
        };
        let parts = parts.iter().enumerate().map(part).collect::<Result<_>>()?;
        Ok(Projection { parts, epilogue })
    }

    /// The number of the activations of buffer `x` in the form of `input`.
    fn acts(&mut self, x: usize, input: &Input) -> usize {
        let m = &mut self.model;
        if let Some(found) = m
            .acts
            .iter()
            .position(|a| a.buffer == x && a.input == *input)
        {
            return found;
        }
        let turns = m
            .acts
            .iter()
            .find(|a| a.buffer == x && a.input.form == input.form);
        let memory = turns.map_or(m.memories, |a| a.memory);
        m.memories = m.memories.max(memory + 1);
        m.acts.push(ActsSpec {
            buffer: x,
            input: input.clone(),
            memory,
        });
        m.acts.len() - 1
    }
}
