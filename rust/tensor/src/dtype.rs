//! Element types of plain arrays.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Element type of a [`Tensor`](crate::Tensor). Little-endian everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the definitions")]
pub enum DType {
    F32,
    F16,
    BF16,
    F64,
    F8E4M3,
    F8E5M2,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    Bool,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F64 => "F64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::Bool => "BOOL",
        }
    }

    /// The inverse of [`DType::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        use DType::{
            BF16, Bool, F8E4M3, F8E5M2, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64,
        };
        [
            F32, F16, BF16, F64, F8E4M3, F8E5M2, I8, U8, I16, U16, I32, U32, I64, U64, Bool,
        ]
        .into_iter()
        .find(|d| d.name() == name)
    }

    /// Elements as f32: exact for f32, f16, bf16, fp8 and integers up to 24 bits, rounded for f64 and larger integers.
    /// Stops at the end of the shorter one.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
            for (value, element) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *value = f(*element);
            }
        }
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F64 => each(bytes, out, |c| f64::from_le_bytes(c) as f32),
            Self::F16 => each(bytes, out, |c| half::f16::from_le_bytes(c).to_f32()),
            // Not `half`'s, which changes signalling NaNs.
            Self::BF16 => each(bytes, out, |c| {
                f32::from_bits(u32::from(u16::from_le_bytes(c)) << 16)
            }),
            Self::F8E4M3 => each(bytes, out, |[c]| f8_e4m3(c)),
            Self::F8E5M2 => each(bytes, out, |[c]| {
                half::f16::from_bits(u16::from(c) << 8).to_f32()
            }),
            Self::I8 => each(bytes, out, |c| i8::from_le_bytes(c) as f32),
            Self::U8 | Self::Bool => each(bytes, out, |[c]| c as f32),
            Self::I16 => each(bytes, out, |c| i16::from_le_bytes(c) as f32),
            Self::U16 => each(bytes, out, |c| u16::from_le_bytes(c) as f32),
            Self::I32 => each(bytes, out, |c| i32::from_le_bytes(c) as f32),
            Self::U32 => each(bytes, out, |c| u32::from_le_bytes(c) as f32),
            Self::I64 => each(bytes, out, |c| i64::from_le_bytes(c) as f32),
            Self::U64 => each(bytes, out, |c| u64::from_le_bytes(c) as f32),
        }
    }

    /// Rounds `values` to f32, f16 or bf16 (to nearest even). Stops at the end of the shorter one.
    ///
    /// # Errors
    /// [`Error::Argument`] for any other type.
    pub fn encode(self, values: &[f32], out: &mut [u8]) -> Result<()> {
        fn each<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
            for (element, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
                *element = f(*value);
            }
        }
        match self {
            Self::F32 => each(values, out, f32::to_le_bytes),
            Self::F16 => each(values, out, |v| half::f16::from_f32(v).to_le_bytes()),
            Self::BF16 => each(values, out, |v| half::bf16::from_f32(v).to_le_bytes()),
            _ => {
                return Err(Error::Argument(format!(
                    "dense weights are F32, F16 or BF16, not {}",
                    self.name()
                )));
            }
        }
        Ok(())
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
