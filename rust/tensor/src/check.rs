//! Weights against a program: what every device asks before it prepares anything.

use crate::program::{BufferId, Expert, Linear, Norm, Op, Program, WeightId};
use crate::{DType, Error, Result, Weight};

impl Program {
    /// Whether `weights` (in the order of [`Program::weights`]) have the shapes and types that the operations want.
    ///
    /// # Errors
    /// [`Error::Format`] naming the tensor and both shapes.
    pub fn check(&self, weights: &[Weight]) -> Result<()> {
        if weights.len() != self.weights.len() {
            return Err(Error::Format(format!(
                "program: wants {} weights, has {}",
                self.weights.len(),
                weights.len()
            )));
        }
        let check = Check {
            program: self,
            weights,
        };
        self.ops.iter().try_for_each(|op| check.op(op))
    }
}

struct Check<'a> {
    program: &'a Program,
    weights: &'a [Weight],
}

impl Check<'_> {
    fn op(&self, op: &Op) -> Result<()> {
        match op {
            Op::Embed {
                table,
                positions,
                out,
                ..
            } => {
                let hidden = self.width(*out);
                self.matrix(*table, Some(self.program.vocab_size), hidden)?;
                if let Some((positions, offset)) = positions {
                    self.matrix(*positions, None, hidden)?;
                    let (has, wants) = (
                        self.weights[positions.0 as usize].shape()[0],
                        self.program.context.saturating_add(*offset),
                    );
                    if has < wants {
                        return Err(self.wrong(
                            *positions,
                            &format!("wants {wants} rows (context and offset), has {has}"),
                        ));
                    }
                }
                Ok(())
            }
            Op::Norm { x, norm, .. } => self.norm(norm, &[self.width(*x)]),
            Op::Linear {
                x,
                parts,
                epilogue,
                out,
            } => {
                let gated = matches!(
                    epilogue,
                    crate::program::Epilogue::Gated(_)
                        | crate::program::Epilogue::GatedClamped { .. }
                );
                let mut rows = 0;
                for part in parts {
                    rows += self.linear(part, gated.then(|| self.width(*out)), self.width(*x))?;
                }
                if !gated && rows != self.width(*out) {
                    let what = format!(
                        "its matrices give {rows} outputs, '{}' holds {}",
                        self.name(*out),
                        self.width(*out)
                    );
                    return Err(self.wrong(parts[0].weight, &what));
                }
                Ok(())
            }
            Op::RopeAppend {
                layer,
                q_norm,
                k_norm,
                ..
            } => {
                let l = &self.program.cache[*layer];
                for (norm, heads) in [(q_norm, l.q_heads), (k_norm, l.kv_heads)] {
                    if let Some(norm) = norm {
                        self.norm(norm, &[l.head_dim, heads * l.head_dim])?;
                    }
                }
                Ok(())
            }
            Op::Attention { layer, sinks, .. } => match sinks {
                Some(sinks) => self.vector(*sinks, &[self.program.cache[*layer].q_heads]),
                None => Ok(()),
            },
            Op::Experts {
                x,
                router,
                experts,
                into,
                ..
            } => {
                self.linear(router, Some(experts.len()), self.width(*x))?;
                experts
                    .iter()
                    .try_for_each(|e| self.expert(e, self.width(*x), self.width(*into)))
            }
            Op::Head { x, linear, .. } => self
                .linear(linear, Some(self.program.vocab_size), self.width(*x))
                .map(|_| ()),
            Op::Add { .. } | Op::Hidden { .. } => Ok(()),
        }
    }

    fn expert(&self, expert: &Expert, inputs: usize, outputs: usize) -> Result<()> {
        let width = self.linear(&expert.up, None, inputs)?;
        if let Some(gate) = &expert.gate {
            self.linear(gate, Some(width), inputs)?;
        }
        self.linear(&expert.down, Some(outputs), width).map(|_| ())
    }

    fn norm(&self, norm: &Norm, lengths: &[usize]) -> Result<()> {
        norm.weight
            .into_iter()
            .chain(norm.bias)
            .try_for_each(|id| self.vector(id, lengths))
    }

    /// Rows of the matrix.
    fn linear(&self, linear: &Linear, rows: Option<usize>, inputs: usize) -> Result<usize> {
        self.matrix(linear.weight, rows, inputs)?;
        let rows = self.weights[linear.weight.0 as usize].shape()[0];
        if let Some(bias) = linear.bias {
            self.vector(bias, &[rows])?;
        }
        Ok(rows)
    }

    fn matrix(&self, id: WeightId, rows: Option<usize>, inputs: usize) -> Result<()> {
        self.floats(id)?;
        let shape = self.weights[id.0 as usize].shape();
        if shape.len() == 2
            && shape[0] > 0
            && rows.is_none_or(|r| r == shape[0])
            && shape[1] == inputs
        {
            return Ok(());
        }
        let rows = rows.map_or("any".into(), |r| r.to_string());
        Err(self.wrong(
            id,
            &format!("wants shape ({rows}, {inputs}), has {shape:?}"),
        ))
    }

    fn vector(&self, id: WeightId, lengths: &[usize]) -> Result<()> {
        self.floats(id)?;
        let weight = &self.weights[id.0 as usize];
        let shape = weight.shape();
        if matches!(weight, Weight::Dense(_)) && lengths.iter().any(|&n| shape == [n]) {
            return Ok(());
        }
        let wants: Vec<String> = lengths.iter().map(|n| format!("({n},)")).collect();
        let kind = if matches!(weight, Weight::Dense(_)) {
            ""
        } else {
            " in k bits"
        };
        Err(self.wrong(
            id,
            &format!(
                "wants a dense vector {}, has {shape:?}{kind}",
                wants.join(" or ")
            ),
        ))
    }

    fn floats(&self, id: WeightId) -> Result<()> {
        match &self.weights[id.0 as usize] {
            Weight::Dense(t) if !matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16) => {
                Err(self.wrong(
                    id,
                    &format!("wants F32, F16 or BF16, is {}", t.dtype().name()),
                ))
            }
            _ => Ok(()),
        }
    }

    fn width(&self, id: BufferId) -> usize {
        self.program.buffers[id.0 as usize].width
    }

    fn name(&self, id: BufferId) -> &str {
        &self.program.buffers[id.0 as usize].name
    }

    fn wrong(&self, id: WeightId, what: &str) -> Error {
        Error::Format(format!("{}: {what}", self.program.weights[id.0 as usize]))
    }
}
