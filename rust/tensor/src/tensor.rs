//! Plain arrays: dtype, shape, shared bytes. Row-major, no strides.

use std::sync::Arc;

use crate::{Bytes, DType, Error, KTensor, Result};

/// A row-major array. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Arc<Bytes>,
    /// Where the array starts in `bytes`.
    offset: usize,
}

impl Tensor {
    /// An array over `bytes`.
    ///
    /// # Errors
    /// [`Error::Format`] when the shape and dtype want another number of bytes.
    pub fn new(dtype: DType, shape: &[usize], bytes: Arc<Bytes>) -> Result<Self> {
        let wanted = shape
            .iter()
            .try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        if wanted != Some(bytes.len()) {
            return Err(Error::Format(format!(
                "tensor: shape {shape:?} of {} wants {} bytes, has {}",
                dtype.name(),
                wanted.map_or("more than 2^64".into(), |n| n.to_string()),
                bytes.len()
            )));
        }
        Ok(Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
            offset: 0,
        })
    }

    /// An array over the part of `bytes` that starts at `offset`.
    ///
    /// # Errors
    /// [`Error::Format`] when fewer bytes follow than shape and dtype want.
    pub fn shared(dtype: DType, shape: &[usize], bytes: Arc<Bytes>, offset: usize) -> Result<Self> {
        let wanted = shape
            .iter()
            .try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        let there = bytes.len().saturating_sub(offset);
        if offset > bytes.len() || wanted.is_none_or(|n| n > there) {
            return Err(Error::Format(format!(
                "tensor: shape {shape:?} of {} at byte {offset} of {}",
                dtype.name(),
                bytes.len()
            )));
        }
        Ok(Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
            offset,
        })
    }

    /// An f32 array of the given values.
    ///
    /// # Errors
    /// [`Error::Format`] when the shape does not hold `values.len()` elements, [`Error::Memory`] without room.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<Self> {
        Self::new(
            DType::F32,
            shape,
            Arc::new(Bytes::copy_of(bytemuck::cast_slice(values))?),
        )
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as stored, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.offset..self.offset + self.len() * self.dtype.size()]
    }

    /// Rows `from..to` of the outermost dimension, sharing the bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] when the range is not inside the array.
    pub fn rows(&self, from: usize, to: usize) -> Result<Self> {
        let n = self.shape.first().copied().unwrap_or(0);
        if from > to || to > n {
            return Err(Error::Argument(format!(
                "rows: {from}..{to} asked of {n} rows"
            )));
        }
        let row_bytes = self.shape[1..].iter().product::<usize>() * self.dtype.size();
        let mut shape = self.shape.clone();
        shape[0] = to - from;
        Ok(Self {
            dtype: self.dtype,
            shape,
            bytes: self.bytes.clone(),
            offset: self.offset + from * row_bytes,
        })
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] when the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(self.len()) {
            return Err(Error::Argument(format!(
                "reshape: {:?} has {} elements, {shape:?} does not",
                self.shape,
                self.len()
            )));
        }
        Ok(Self {
            shape: shape.to_vec(),
            ..self.clone()
        })
    }

    /// Every element as f32, exactly for f32, f16, bf16, fp8 and integers up to 24 bits, rounded for f64 and larger integers.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.dtype.decode(self.bytes(), &mut out);
        out
    }
}

/// A weight as a device receives it: a plain array, or a k-bit one.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Kept in its own dtype (f32, f16, bf16), computed in f32.
    Dense(Tensor),
    /// (`out_features`, `in_features`) in kernel order.
    Quantised(KTensor),
}

impl Weight {
    /// Logical shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(t) => t.shape().to_vec(),
            Self::Quantised(k) => vec![k.rows(), k.inputs()],
        }
    }

    /// Bytes in memory, all constants counted.
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Dense(t) => t.bytes().len(),
            Self::Quantised(k) => k.nbytes(),
        }
    }
}
