//! What loading does to a tensor between the file and the engine, without holding it: a [`View`] says which stored row
//! each row of the result is; rows are read when they are asked for.
//!
//! ```text
//! parts (stacked along rows) -> index: row of the result -> stored row -> affine: add, scale, in f32
//! ```
//!
//! A row is the innermost dimension (one element, for a vector), so that k-bit rows move without being decoded. Only
//! [`Transform::Transpose`] and reshapes that cut rows need the elements: they make a dense array of what there is.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::ops::Range;
use std::sync::Arc;

use crate::file::{Part, Stored, TensorFile, TensorInfo};
use crate::gguf::GgmlType;
use crate::{Bytes, DType, Error, Result, import, parallel};

/// One step. Shapes are row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Transform {
    /// Rows `from..to` of the outermost dimension.
    Rows(usize, usize),
    /// A matrix (a, b) becomes (b, a); in arrays of more dimensions the last two change places.
    Transpose,
    /// Adds a number to every element, in f32.
    Add(f32),
    /// Multiplies every element, in f32.
    Scale(f32),
    /// Rows of a rotary projection: within the first `rotary_dim` rows of each of `heads` heads, pairs that lie side by
    /// side (2j, 2j + 1) become halves (j, j + `rotary_dim` / 2).
    PermuteRope {
        /// Heads along the outermost dimension.
        heads: usize,
        /// Rotated rows of a head.
        rotary_dim: usize,
    },
    /// Entry `index` of dimension `axis`, which disappears. Not of the innermost dimension.
    Select {
        /// Which entry.
        index: usize,
        /// Of which dimension.
        axis: usize,
    },
    /// The same elements under another shape.
    Reshape(Vec<usize>),
}

/// Rows of the view as rows of the parts.
#[derive(Clone, Debug)]
enum Index {
    Range(Range<usize>),
    List(Arc<[u32]>),
}

impl Index {
    fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::List(list) => list.len(),
        }
    }

    fn get(&self, row: usize) -> Option<usize> {
        match self {
            Self::Range(range) => range.start.checked_add(row).filter(|at| *at < range.end),
            Self::List(list) => list.get(row).map(|&at| at as usize),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Affine {
    Add(f32),
    Scale(f32),
}

#[derive(Clone, Debug)]
enum Origin<'a> {
    File(&'a TensorFile, &'a TensorInfo),
    Memory(Part),
}

/// A tensor to be: parts of files, rearranged.
#[derive(Clone, Debug)]
pub struct View<'a> {
    origins: Vec<Origin<'a>>,
    /// Rows of all parts before each part, and of all at the end.
    starts: Vec<usize>,
    stored: Stored,
    shape: Vec<usize>,
    /// Elements of a row.
    columns: usize,
    row_bytes: usize,
    index: Index,
    affine: Vec<Affine>,
}

impl<'a> View<'a> {
    /// Tensors of files, stacked along their outermost dimension.
    ///
    /// # Errors
    /// [`Error::Argument`] without sources, for unknown names, or for sources that do not fit each other;
    /// [`Error::Unsupported`] for a type that is not read.
    pub fn new(sources: &[(&'a TensorFile, &str)]) -> Result<Self> {
        let mut origins = Vec::new();
        let mut starts = vec![0usize];
        let mut first: Option<&TensorInfo> = None;
        let mut outer = 0usize;
        for (file, name) in sources {
            let info = file.info(name)?;
            if let Stored::Other { .. } = info.stored {
                return Err(file.unread(info));
            }
            if let Stored::Ggml(kind) = info.stored
                && !kind.is_imported()
            {
                return Err(file.unread(info));
            }
            let tail = |shape: &[usize]| shape.get(1..).map(<[usize]>::to_vec);
            let model = *first.get_or_insert(info);
            if model.stored != info.stored || tail(&model.shape) != tail(&info.shape) {
                return Err(Error::Argument(format!(
                    "cannot stack {:?} of {} {:?} and {:?} of {} {:?}",
                    model.name,
                    model.stored.name(),
                    model.shape,
                    info.name,
                    info.stored.name(),
                    info.shape
                )));
            }
            let columns = info.shape.last().copied().unwrap_or(1);
            let rows = if info.shape.len() < 2 {
                columns
            } else {
                let mut rows = info.shape.iter().rev().skip(1);
                rows.try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(0)
            };
            let before = starts.last().copied().unwrap_or(0);
            let after = before
                .checked_add(rows)
                .filter(|n| u32::try_from(*n).is_ok());
            starts.push(after.ok_or_else(|| {
                Error::Argument(format!(
                    "{:?} and what is before it have more than 2^32 rows",
                    info.name
                ))
            })?);
            outer = outer.saturating_add(info.shape.first().copied().unwrap_or(1));
            origins.push(Origin::File(file, info));
        }
        let first =
            first.ok_or_else(|| Error::Argument("a weight wants at least one source".into()))?;
        if first.shape.is_empty() && sources.len() > 1 {
            return Err(Error::Argument(format!(
                "cannot stack {:?}, a single number",
                first.name
            )));
        }
        let mut shape = first.shape.clone();
        if let Some(n) = shape.first_mut() {
            *n = outer;
        }
        let rows = starts.last().copied().unwrap_or(0);
        let mut view = Self {
            origins,
            starts,
            stored: first.stored,
            columns: 1,
            row_bytes: 0,
            shape,
            index: Index::Range(0..rows),
            affine: Vec::new(),
        };
        if view.shape.len() > 1 {
            view.columns = view.shape.last().copied().unwrap_or(1);
        } else if let Stored::Ggml(_) = view.stored {
            // A vector of blocks: one row, since a block cannot be taken apart.
            if view.origins.len() > 1 {
                return Err(Error::Argument(format!(
                    "cannot stack {:?}, a vector of blocks",
                    first.name
                )));
            }
            view.columns = rows;
            view.index = Index::Range(0..1);
            view.starts = vec![0, 1];
        }
        view.row_bytes = row_bytes(view.stored, view.columns)?;
        Ok(view)
    }

    /// A dense array as a view.
    pub(crate) fn of_memory(
        dtype: DType,
        shape: Vec<usize>,
        bytes: Bytes,
    ) -> Result<View<'static>> {
        View::of_stored(Stored::Plain(dtype), shape, bytes)
    }

    /// A matrix of blocks as a view.
    pub(crate) fn of_blocks(
        kind: GgmlType,
        rows: usize,
        inputs: usize,
        bytes: Bytes,
    ) -> Result<View<'static>> {
        View::of_stored(Stored::Ggml(kind), vec![rows, inputs], bytes)
    }

    fn of_stored(stored: Stored, shape: Vec<usize>, bytes: Bytes) -> Result<View<'static>> {
        let columns = if shape.len() > 1 {
            shape.last().copied().unwrap_or(1)
        } else {
            1
        };
        let row_bytes = row_bytes(stored, columns)?;
        let rows = bytes.len().checked_div(row_bytes).unwrap_or(0);
        let part = Part {
            at: 0,
            len: bytes.len(),
            bytes: Arc::new(bytes),
        };
        Ok(View {
            origins: vec![Origin::Memory(part)],
            starts: vec![0, rows],
            stored,
            shape,
            columns,
            row_bytes,
            index: Index::Range(0..rows),
            affine: Vec::new(),
        })
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How the elements are stored.
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// Rows: the product of all sizes but the innermost; of a vector, its elements.
    pub fn rows(&self) -> usize {
        self.index.len()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of a stored row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Whether elements change their value on the way, so that they cannot stay as they are stored.
    pub fn is_computed(&self) -> bool {
        !self.affine.is_empty()
    }

    fn wrong(&self, what: &str) -> Error {
        let name = match self.origins.first() {
            Some(Origin::File(_, info)) => format!("{:?} ", info.name),
            _ => String::new(),
        };
        Error::Argument(format!("{what} asked of {name}{:?}", self.shape))
    }

    /// The view after one more step.
    ///
    /// # Errors
    /// [`Error::Argument`] when the step does not fit the shape.
    pub fn apply(self, step: &Transform) -> Result<Self> {
        match *step {
            Transform::Add(c) => Ok(self.then(Affine::Add(c))),
            Transform::Scale(c) => Ok(self.then(Affine::Scale(c))),
            Transform::Rows(from, to) => self.outer_rows(from, to),
            Transform::Select { index, axis } => self.select(index, axis),
            Transform::PermuteRope { heads, rotary_dim } => self.permute_rope(heads, rotary_dim),
            Transform::Reshape(ref shape) => self.reshape(shape),
            Transform::Transpose => self.transpose(),
        }
    }

    fn then(mut self, step: Affine) -> Self {
        self.affine.push(step);
        self
    }

    /// Stored rows of the entries `from..to` of the outermost dimension.
    fn outer_rows(mut self, from: usize, to: usize) -> Result<Self> {
        let n = self.shape.first().copied().unwrap_or(0);
        let whole_blocks = self.shape.len() > 1 || self.columns == 1;
        if from > to || to > n || !whole_blocks {
            return Err(self.wrong(&format!("rows {from}..{to}")));
        }
        let per = self.rows().checked_div(n).unwrap_or(0);
        let (first, last) = (from.saturating_mul(per), to.saturating_mul(per));
        self.index = match &self.index {
            Index::Range(range) => {
                Index::Range(range.start.saturating_add(first)..range.start.saturating_add(last))
            }
            Index::List(list) => Index::List(list.get(first..last).unwrap_or(&[]).into()),
        };
        if let Some(n) = self.shape.first_mut() {
            *n = to - from;
        }
        Ok(self)
    }

    fn select(self, index: usize, axis: usize) -> Result<Self> {
        let n = self.shape.get(axis).copied().unwrap_or(0);
        if index >= n || axis.saturating_add(1) >= self.shape.len() {
            return Err(self.wrong(&format!("entry {index} of dimension {axis}")));
        }
        let mut shape = self.shape.clone();
        shape.remove(axis);
        let mut out = if axis == 0 {
            self.outer_rows(index, index.saturating_add(1))?
        } else {
            let (_, inner) = self.shape.split_at(axis);
            let inner: usize = inner.iter().skip(1).rev().skip(1).product();
            let rows = self.rows();
            let period = n.saturating_mul(inner);
            let first = index.saturating_mul(inner);
            let take = (0..rows).filter(|row| {
                let at = row.checked_rem(period).unwrap_or(0);
                (first..first.saturating_add(inner)).contains(&at)
            });
            self.rearranged(take)?
        };
        out.shape = shape;
        Ok(out)
    }

    fn permute_rope(self, heads: usize, rotary_dim: usize) -> Result<Self> {
        let n = self.shape.first().copied().unwrap_or(0);
        let head_dim = n.checked_div(heads).unwrap_or(0);
        let whole = heads.checked_mul(head_dim) == Some(n) && self.shape.len() <= 2;
        if !whole || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) || self.rows() != n {
            return Err(self.wrong(&format!(
                "permute_rope of {heads} heads with {rotary_dim} rotated rows"
            )));
        }
        let half = rotary_dim / 2;
        self.rearranged((0..n).map(|row| {
            let j = row % head_dim;
            let from = match j {
                j if j < half => 2 * j,
                j if j < rotary_dim => 2 * (j - half) + 1,
                j => j,
            };
            row - j + from
        }))
    }

    /// The view whose rows are the given rows of this one.
    fn rearranged(mut self, rows: impl Iterator<Item = usize>) -> Result<Self> {
        if self.row_bytes == 0 {
            return Err(self.wrong("rearranged rows without elements"));
        }
        let list: Option<Arc<[u32]>> = rows
            .map(|row| self.index.get(row).and_then(|at| u32::try_from(at).ok()))
            .collect();
        self.index = Index::List(list.ok_or_else(|| self.wrong("rearranged rows"))?);
        Ok(self)
    }

    fn reshape(self, shape: &[usize]) -> Result<Self> {
        let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elements(shape) != elements(&self.shape) {
            return Err(self.wrong(&format!("reshape to {shape:?}")));
        }
        let columns = if shape.len() > 1 {
            shape.last().copied().unwrap_or(1)
        } else {
            1
        };
        let mut out = if columns == self.columns {
            self
        } else {
            self.recut(columns)?
        };
        out.shape = shape.to_vec();
        Ok(out)
    }

    /// Rows of another length. Where the stored rows are in order they are only counted anew.
    fn recut(self, columns: usize) -> Result<Self> {
        let in_order = matches!(&self.index, Index::Range(range) if range.start == 0
            && self.starts.last() == Some(&range.end));
        let fits = row_bytes(self.stored, columns);
        if let (true, Ok(row_bytes), [_]) = (in_order, &fits, self.origins.as_slice()) {
            let rows = self
                .rows()
                .checked_mul(self.columns)
                .and_then(|n| n.checked_div(columns));
            let rows = rows.filter(|n| u32::try_from(*n).is_ok());
            let rows = rows.ok_or_else(|| self.wrong(&format!("rows of {columns}")))?;
            return Ok(Self {
                starts: vec![0, rows],
                index: Index::Range(0..rows),
                columns,
                row_bytes: *row_bytes,
                ..self
            });
        }
        let dtype = self.dense_dtype();
        let bytes = self.read_dense(dtype, 0)?;
        let rows = self
            .rows()
            .saturating_mul(self.columns)
            .checked_div(columns)
            .unwrap_or(0);
        Self::of_memory(dtype, vec![rows, columns], bytes)
    }

    fn transpose(self) -> Result<Self> {
        let [outer @ .., a, b] = self.shape.as_slice() else {
            return Err(self.wrong("transpose"));
        };
        let (outer, a, b) = (outer.to_vec(), *a, *b);
        let dtype = self.dense_dtype();
        let from = self.read_dense(dtype, 0)?;
        let mut to = Bytes::zeroed(from.len())?;
        let size = dtype.size();
        let matrix = a.saturating_mul(b).saturating_mul(size);
        for (from, to) in from.chunks(matrix.max(1)).zip(to.chunks_mut(matrix.max(1))) {
            // Bands of output rows in parallel; within a band the input is read row by row.
            let band = a.saturating_mul(size).saturating_mul(16);
            parallel::for_each_piece(0, to, band, |i, to| {
                for (k, row) in from.chunks_exact(b.saturating_mul(size).max(1)).enumerate() {
                    let columns = row.chunks_exact(size).skip(i.saturating_mul(16));
                    for (line, element) in to
                        .chunks_exact_mut(a.saturating_mul(size).max(1))
                        .zip(columns)
                    {
                        if let Some(place) = line.chunks_exact_mut(size).nth(k) {
                            place.copy_from_slice(element);
                        }
                    }
                }
                Ok(())
            })?;
        }
        let mut shape = outer;
        shape.extend([b, a]);
        Self::of_memory(dtype, shape, to)
    }

    /// The plain type that holds the values exactly as far as one does: the stored one, bf16 for fp8, else f32.
    pub fn dense_dtype(&self) -> DType {
        match self.stored {
            _ if self.is_computed() => DType::F32,
            Stored::Plain(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => dtype,
            Stored::Plain(DType::F8E4M3 | DType::F8E5M2) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// Rows `first..` as stored, as many as fill `out`.
    pub(crate) fn read_rows(&self, first: usize, out: &mut [u8]) -> Result<()> {
        let count = out.len().checked_div(self.row_bytes).unwrap_or(0);
        let end = first.checked_add(count);
        if end.is_none_or(|end| end > self.rows()) {
            return Err(self.wrong(&format!("rows {first}..{}", first.saturating_add(count))));
        }
        match &self.index {
            Index::Range(range) => self.read_stored(range.start.saturating_add(first), out),
            Index::List(list) => {
                let rows = list.get(first..first.saturating_add(count)).unwrap_or(&[]);
                let (low, high) = (rows.iter().min(), rows.iter().max());
                let (Some(&low), Some(&high)) = (low, high) else {
                    return Ok(());
                };
                let span = ((high - low) as usize).saturating_add(1);
                if span <= count.saturating_mul(2) {
                    // One read of the rows and those between them.
                    let mut held = Vec::new();
                    let size = span.saturating_mul(self.row_bytes);
                    held.try_reserve_exact(size)
                        .map_err(|_| Error::Memory(format!("cannot allocate {size} bytes")))?;
                    held.resize(size, 0);
                    self.read_stored(low as usize, &mut held)?;
                    for (out, &row) in out.chunks_exact_mut(self.row_bytes).zip(rows) {
                        let at = ((row - low) as usize).saturating_mul(self.row_bytes);
                        let found = held.get(at..).and_then(|h| h.get(..self.row_bytes));
                        out.copy_from_slice(found.ok_or_else(|| self.wrong("rows"))?);
                    }
                    return Ok(());
                }
                // Runs of consecutive rows.
                let mut rest = out;
                let mut from = 0;
                while let Some(&row) = rows.get(from) {
                    let run = rows
                        .iter()
                        .skip(from)
                        .zip(row..)
                        .take_while(|(a, b)| **a == *b)
                        .count();
                    let (part, after) =
                        rest.split_at_mut(run.saturating_mul(self.row_bytes).min(rest.len()));
                    self.read_stored(row as usize, part)?;
                    (rest, from) = (after, from.saturating_add(run));
                }
                Ok(())
            }
        }
    }

    /// Stored rows `first..`, in the order of the parts.
    fn read_stored(&self, mut first: usize, mut out: &mut [u8]) -> Result<()> {
        let ranges = self.starts.iter().zip(self.starts.iter().skip(1));
        for (origin, (&start, &end)) in self.origins.iter().zip(ranges) {
            if out.is_empty() {
                break;
            }
            if first >= end {
                continue;
            }
            let bytes = (end - first).saturating_mul(self.row_bytes).min(out.len());
            let (here, rest) = out.split_at_mut(bytes);
            let at = (first - start).saturating_mul(self.row_bytes);
            match origin {
                Origin::File(file, info) => file.read_into(info, at as u64, here)?,
                Origin::Memory(part) => {
                    let found = part.as_slice().get(at..).and_then(|b| b.get(..bytes));
                    here.copy_from_slice(found.ok_or_else(|| self.wrong("rows"))?);
                }
            }
            (out, first) = (rest, end);
        }
        Ok(())
    }

    /// Rows `first..` in f32, as many as fill `out`.
    ///
    /// # Errors
    /// [`Error::Argument`] for rows that are not there, [`Error::Io`].
    pub fn read_f32(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let rows = out.len().checked_div(self.columns).unwrap_or(0);
        let mut raw = vec![0; rows.saturating_mul(self.row_bytes)];
        self.read_rows(first, &mut raw)?;
        match self.stored {
            Stored::Plain(dtype) => dtype.decode(&raw, out),
            Stored::Ggml(kind) => import::ggml::decode_rows(kind, self.columns, &raw, out)?,
            Stored::Other { .. } => return Err(self.wrong("elements")),
        }
        for step in &self.affine {
            match *step {
                Affine::Add(c) => out.iter_mut().for_each(|v| *v += c),
                Affine::Scale(c) => out.iter_mut().for_each(|v| *v *= c),
            }
        }
        Ok(())
    }

    /// Everything as a dense array of f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Io`], [`Error::Argument`] for another type.
    pub fn read_dense(&self, dtype: DType, threads: usize) -> Result<Bytes> {
        let row = self.columns.saturating_mul(dtype.size());
        let mut out = Bytes::zeroed(
            row.checked_mul(self.rows())
                .ok_or_else(|| self.wrong("a dense array"))?,
        )?;
        // About a megabyte at a time.
        let rows = (1usize << 20).checked_div(row).unwrap_or(1).max(1);
        let as_stored = self.stored == Stored::Plain(dtype) && !self.is_computed();
        parallel::for_each_piece(threads, &mut out, rows.saturating_mul(row), |i, piece| {
            let first = i.saturating_mul(rows);
            if as_stored {
                return self.read_rows(first, piece);
            }
            let mut values = vec![0.0; piece.len().checked_div(dtype.size()).unwrap_or(0)];
            self.read_f32(first, &mut values)?;
            dtype.encode(&values, piece)
        })?;
        Ok(out)
    }
}

fn row_bytes(stored: Stored, columns: usize) -> Result<usize> {
    let (elements, bytes) = stored.unit()?;
    if columns.checked_rem(elements) != Some(0) {
        return Err(Error::Argument(format!(
            "rows of {columns} elements of {}, which come in blocks of {elements}",
            stored.name()
        )));
    }
    columns
        .checked_div(elements)
        .and_then(|n| n.checked_mul(bytes))
        .ok_or_else(|| Error::Argument(format!("rows of {columns} elements")))
}
