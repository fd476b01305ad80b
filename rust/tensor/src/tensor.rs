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
        let wanted = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        if wanted != Some(bytes.len()) {
            return Err(Error::Format(format!(
                "tensor: shape {shape:?} of {} wants {} bytes, has {}",
                dtype.name(),
                wanted.map_or("more than 2^64".into(), |n| n.to_string()),
                bytes.len()
            )));
        }
        Ok(Self { dtype, shape: shape.to_vec(), bytes, offset: 0 })
    }

    /// An f32 array of the given values.
    ///
    /// # Errors
    /// [`Error::Format`] when the shape does not hold `values.len()` elements, [`Error::Memory`] without room.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<Self> {
        Self::new(DType::F32, shape, Arc::new(Bytes::copy_of(bytemuck::cast_slice(values))?))
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
            return Err(Error::Argument(format!("rows: {from}..{to} asked of {n} rows")));
        }
        let row_bytes = self.shape[1..].iter().product::<usize>() * self.dtype.size();
        let mut shape = self.shape.clone();
        shape[0] = to - from;
        Ok(Self { dtype: self.dtype, shape, bytes: self.bytes.clone(), offset: self.offset + from * row_bytes })
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] when the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(self.len()) {
            return Err(Error::Argument(format!("reshape: {:?} has {} elements, {shape:?} does not", self.shape, self.len())));
        }
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// Every element as f32, exactly for f32, f16, bf16, fp8 and integers up to 24 bits, rounded for f64 and larger integers.
    pub fn to_f32(&self) -> Vec<f32> {
        let b = self.bytes();
        fn each<const N: usize>(b: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            b.chunks_exact(N).map(|c| f(c.try_into().expect("chunks_exact gives N bytes"))).collect()
        }
        match self.dtype {
            DType::F32 => each(b, f32::from_le_bytes),
            DType::F64 => each(b, |c| f64::from_le_bytes(c) as f32),
            DType::F16 => each(b, |c| half::f16::from_le_bytes(c).to_f32()),
            DType::BF16 => each(b, |c| half::bf16::from_le_bytes(c).to_f32()),
            DType::F8E4M3 => each(b, |[c]| f8_e4m3(c)),
            DType::F8E5M2 => each(b, |[c]| half::f16::from_bits(u16::from(c) << 8).to_f32()),
            DType::I8 => each(b, |c| i8::from_le_bytes(c) as f32),
            DType::U8 | DType::Bool => each(b, |[c]| c as f32),
            DType::I16 => each(b, |c| i16::from_le_bytes(c) as f32),
            DType::U16 => each(b, |c| u16::from_le_bytes(c) as f32),
            DType::I32 => each(b, |c| i32::from_le_bytes(c) as f32),
            DType::U32 => each(b, |c| u32::from_le_bytes(c) as f32),
            DType::I64 => each(b, |c| i64::from_le_bytes(c) as f32),
            DType::U64 => each(b, |c| u64::from_le_bytes(c) as f32),
        }
    }
}

/// FP8 E4M3 (OCP "FN"): no infinities, 0x7f and 0xff are NaN.
fn f8_e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * (2f32).powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * (2f32).powi(exponent - 7),
    }
}

/// A weight as a device receives it: a plain array, or a k-bit one.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Kept in its own dtype (f32, f16, bf16), computed in f32.
    Dense(Tensor),
    /// (out_features, in_features) in kernel order.
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
