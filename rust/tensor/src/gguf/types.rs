//! ggml's tensor types: every one by name and size, so that a refusal can name what it refuses.

use crate::DType;

macro_rules! types {
    ($($name:ident = $id:literal: $block:literal elements in $bytes:literal;)*) => {
        /// A tensor type of GGUF.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types, reason = "the names of the format")]
        pub enum GgmlType {
            $($name,)*
        }

        impl GgmlType {
            /// All types, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number in a file.
            pub const fn id(self) -> u32 {
                match self { $(Self::$name => $id,)* }
            }

            /// `"Q4_K"`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Elements of a block.
            pub const fn block(self) -> usize {
                match self { $(Self::$name => $block,)* }
            }

            /// Bytes of a block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$name => $bytes,)* }
            }
        }
    };
}

types! {
    F32 = 0: 1 elements in 4;
    F16 = 1: 1 elements in 2;
    Q4_0 = 2: 32 elements in 18;
    Q4_1 = 3: 32 elements in 20;
    Q5_0 = 6: 32 elements in 22;
    Q5_1 = 7: 32 elements in 24;
    Q8_0 = 8: 32 elements in 34;
    Q8_1 = 9: 32 elements in 40;
    Q2_K = 10: 256 elements in 84;
    Q3_K = 11: 256 elements in 110;
    Q4_K = 12: 256 elements in 144;
    Q5_K = 13: 256 elements in 176;
    Q6_K = 14: 256 elements in 210;
    Q8_K = 15: 256 elements in 292;
    IQ2_XXS = 16: 256 elements in 66;
    IQ2_XS = 17: 256 elements in 74;
    IQ3_XXS = 18: 256 elements in 98;
    IQ1_S = 19: 256 elements in 50;
    IQ4_NL = 20: 32 elements in 18;
    IQ3_S = 21: 256 elements in 110;
    IQ2_S = 22: 256 elements in 82;
    IQ4_XS = 23: 256 elements in 136;
    I8 = 24: 1 elements in 1;
    I16 = 25: 1 elements in 2;
    I32 = 26: 1 elements in 4;
    I64 = 27: 1 elements in 8;
    F64 = 28: 1 elements in 8;
    IQ1_M = 29: 256 elements in 56;
    BF16 = 30: 1 elements in 2;
    TQ1_0 = 34: 256 elements in 54;
    TQ2_0 = 35: 256 elements in 66;
    MXFP4 = 39: 32 elements in 17;
    NVFP4 = 40: 64 elements in 36;
    Q1_0 = 41: 128 elements in 18;
}

impl GgmlType {
    /// The inverse of [`GgmlType::id`].
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.id() == id)
    }

    /// The inverse of [`GgmlType::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.name() == name)
    }

    /// The plain type it is, if its elements stand one by one.
    pub const fn plain(self) -> Option<DType> {
        Some(match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F64 => DType::F64,
            Self::I8 => DType::I8,
            Self::I16 => DType::I16,
            Self::I32 => DType::I32,
            Self::I64 => DType::I64,
            _ => return None,
        })
    }

    /// The names of the block types that are read, for messages.
    pub(crate) fn imported_names() -> String {
        let names = Self::ALL.iter().filter(|t| t.is_imported());
        names.map(|t| t.name()).collect::<Vec<_>>().join(", ")
    }

    /// Whether blocks of this type are read.
    pub const fn is_imported(self) -> bool {
        matches!(
            self,
            Self::Q4_0
                | Self::Q4_1
                | Self::Q5_0
                | Self::Q5_1
                | Self::Q8_0
                | Self::Q2_K
                | Self::Q3_K
                | Self::Q4_K
                | Self::Q5_K
                | Self::Q6_K
                | Self::IQ4_NL
                | Self::IQ4_XS
                | Self::MXFP4
        )
    }

    /// The name of a number that ggml once used or reserved for repacked copies: such files are no longer made.
    pub(crate) fn retired(id: u32) -> Option<&'static str> {
        Some(match id {
            4 => "Q4_2",
            5 => "Q4_3",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            _ => return None,
        })
    }
}
