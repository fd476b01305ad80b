//! Matrices of an operation, cut into work items.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use kbit_simd::Isa;
use kbit_tensor::ROWS;
use kbit_tensor::program::Epilogue;

use crate::activation::is_gated;
use crate::acts::Acts;
use crate::linear::Matrix;
use crate::linear::out::{Finish, Target};
use crate::plan::FEW;

/// Most bytes of weights that a thread of a pass with few tokens takes at a time: long, so that memory is read as one stream.
const MOST_BYTES: usize = 1 << 20;
/// The least, where threads are to finish together: a microsecond or two.
const LEAST_BYTES: usize = 32 << 10;
/// Panels that kernels for more tokens than [`FEW`] take side by side.
const PAIR: usize = 2;
/// Tokens from which a pair of panels is so much work that a thread takes few at a time.
const MANY: usize = 32;
/// Most of them, which share what the activations cost: with AMX, whose products take less than reading those, more.
const fn most_pairs(isa: Isa) -> usize {
    if matches!(isa, Isa::Amx) { 4 } else { 2 }
}

/// One matrix of a projection.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) matrix: Arc<Matrix>,
    /// (`out_features`,).
    pub(crate) bias: Option<Vec<f32>>,
    /// Which activations it reads.
    pub(crate) acts: usize,
    /// Bytes of a panel.
    pub(crate) panel_bytes: usize,
}

/// Matrices that share their input, and what happens to their outputs.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) parts: Vec<Part>,
    pub(crate) epilogue: Epilogue,
}

impl Projection {
    /// Panels of an item.
    fn group(tokens: usize) -> usize {
        if tokens <= FEW { 1 } else { PAIR }
    }

    /// Parts that give outputs side by side: a gate and its up matrix count as one.
    pub(crate) fn columns(&self) -> usize {
        if is_gated(self.epilogue) {
            1
        } else {
            self.parts.len()
        }
    }

    /// Number of work items.
    pub(crate) fn items(&self, tokens: usize) -> usize {
        let items = |p: usize| self.parts[p].matrix.panels().div_ceil(Self::group(tokens));
        (0..self.columns()).map(items).sum()
    }

    /// Items of so many output columns, a multiple of those of an item.
    pub(crate) fn items_of_columns(columns: usize, tokens: usize) -> usize {
        columns / ROWS / Self::group(tokens)
    }

    /// How many items a thread should take at a time, least and most.
    pub(crate) fn runs(&self, isa: Isa, tokens: usize) -> RangeInclusive<usize> {
        if tokens >= MANY {
            return 1..=most_pairs(isa);
        }
        let item = self.parts[0].panel_bytes * Self::group(tokens);
        (LEAST_BYTES / item).max(1)..=(MOST_BYTES / item).max(1)
    }

    /// What items are: panels of a part, and the output column at which the part begins.
    fn pieces(
        &self,
        items: Range<usize>,
        tokens: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
        let (mut first, mut column) = (0, 0);
        (0..self.columns()).filter_map(move |part| {
            let matrix = &self.parts[part].matrix;
            let (panels, group) = (matrix.panels(), Self::group(tokens));
            let (start, at) = (first, column);
            first += panels.div_ceil(group);
            column += matrix.rows();
            let here = items.start.max(start)..items.end.min(first);
            (!here.is_empty()).then(|| {
                let panels = (here.start - start) * group..panels.min((here.end - start) * group);
                (part, panels, at)
            })
        })
    }

    /// What a thread reads first of a range of items; nothing if that is empty.
    pub(crate) fn stream(&self, items: Range<usize>, tokens: usize) -> &[u8] {
        let mut pieces = self.pieces(items, tokens);
        let first = pieces.next();
        first.map_or(&[], |(part, panels, _)| {
            self.parts[part].matrix.stream(panels.start)
        })
    }

    /// Output columns of a run of items.
    pub(crate) fn span(&self, items: Range<usize>, tokens: usize) -> Range<usize> {
        self.pieces(items, tokens)
            .map(|(part, panels, column)| {
                let rows = self.parts[part].matrix.rows();
                column + panels.start * ROWS..column + rows.min(panels.end * ROWS)
            })
            .reduce(|a, b| a.start..b.end)
            .unwrap_or(0..0)
    }

    /// Computes a run of items for some tokens, whole tiles of the activations. A gate's outputs lie where those of both then do.
    ///
    /// # Safety
    /// `acts` gives filled activations of the same number of tokens; `to` has a row of all outputs for each, of which no
    /// other thread touches these items' columns of these tokens.
    pub(crate) unsafe fn items_of<'a>(
        &self,
        items: Range<usize>,
        tokens: Range<usize>,
        acts: impl Fn(usize) -> &'a Acts,
        to: Target,
    ) {
        let all = acts(self.parts[0].acts).tokens();
        for (part, panels, column) in self.pieces(items, all) {
            let tokens = tokens.clone();
            // SAFETY: as the caller says.
            unsafe { self.panels(part, panels, column, tokens, &acts, to) };
        }
    }

    /// Panels of part `first`, whose outputs start at `column`.
    ///
    /// # Safety
    /// As [`Projection::items_of`].
    unsafe fn panels<'a>(
        &self,
        first: usize,
        panels: Range<usize>,
        column: usize,
        tokens: Range<usize>,
        acts: &impl Fn(usize) -> &'a Acts,
        to: Target,
    ) {
        let to = Target {
            at: to.at.wrapping_add(column),
            stride: to.stride,
        };
        let compute = |part: usize, epilogue: Epilogue| {
            let part = &self.parts[part];
            let finish = Finish {
                epilogue,
                bias: part.bias.as_deref(),
            };
            let (tokens, panels) = (tokens.clone(), panels.clone());
            // SAFETY: as the caller says.
            unsafe {
                part.matrix
                    .run_into(acts(part.acts), tokens, panels, to, finish);
            };
        };
        let gated = is_gated(self.epilogue);
        if gated {
            compute(first, Epilogue::Store);
        }
        compute(first + usize::from(gated), self.epilogue);
    }
}
