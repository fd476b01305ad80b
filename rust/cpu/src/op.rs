//! Operations with matrices, vectors and shapes resolved. Buffers are indices; those of the program come first, then the
//! device's own. The units of a plan hold the operation that they are a part of, so what has weights is shared.

use std::sync::Arc;

use crate::attention::{Attention, Rotation};
use crate::embed::Embed;
use crate::experts::Experts;
use crate::head::Head;
use crate::norm::Norm;
use crate::project::Projection;

/// An operation.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Embed(Arc<EmbedOp>),
    Norm(Arc<NormOp>),
    Linear(Arc<LinearOp>),
    Attention(Arc<AttentionOp>),
    Add(AddOp),
    Experts(Arc<ExpertsOp>),
    Hidden(HiddenOp),
    Head(Arc<HeadOp>),
}

/// Rows of the tokens' ids.
#[derive(Debug)]
pub(crate) struct EmbedOp {
    pub(crate) embed: Embed,
    pub(crate) out: usize,
}

#[derive(Debug)]
pub(crate) struct NormOp {
    pub(crate) x: usize,
    pub(crate) norm: Norm,
    pub(crate) out: usize,
}

#[derive(Debug)]
pub(crate) struct LinearOp {
    pub(crate) x: usize,
    pub(crate) projection: Projection,
    pub(crate) out: usize,
}

/// Rotation, appending and attention.
#[derive(Debug)]
pub(crate) struct AttentionOp {
    pub(crate) qkv: usize,
    pub(crate) rotation: Rotation,
    pub(crate) attention: Attention,
    pub(crate) out: usize,
}

/// `into += scale * x`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddOp {
    pub(crate) x: usize,
    pub(crate) scale: f32,
    pub(crate) into: usize,
}

/// `into += experts(x)`.
#[derive(Debug)]
pub(crate) struct ExpertsOp {
    pub(crate) x: usize,
    pub(crate) experts: Experts,
    pub(crate) into: usize,
}

/// Hidden states of number `index`, handed out on request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HiddenOp {
    pub(crate) x: usize,
    pub(crate) index: usize,
}

#[derive(Debug)]
pub(crate) struct HeadOp {
    pub(crate) x: usize,
    pub(crate) head: Head,
}
