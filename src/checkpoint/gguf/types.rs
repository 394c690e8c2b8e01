//! Types of tensors: number in the file, values a block, bytes a block.

use super::GgufError;
use std::fmt;

macro_rules! types {
    ($($name:ident $id:literal $block:literal $bytes:literal;)*) => {
        /// Type of a tensor, by ggml's name.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Type { $($name = $id),* }

        impl Type {
            /// Every type that a file may name.
            pub const ALL: &[Type] = &[$(Type::$name),*];

            /// (values, bytes) of one block.
            pub fn block(self) -> (u64, u64) {
                match self { $(Type::$name => ($block, $bytes)),* }
            }
        }
    };
}

// Name, number, values a block, bytes a block. Some are only known by size: such a file opens, and
// reading such a tensor is refused.
types! {
    F32 0 1 4; F16 1 1 2; BF16 30 1 2; F64 28 1 8;
    I8 24 1 1; I16 25 1 2; I32 26 1 4; I64 27 1 8;
    Q4_0 2 32 18; Q4_1 3 32 20; Q5_0 6 32 22; Q5_1 7 32 24; Q8_0 8 32 34; Q8_1 9 32 40;
    Q2_K 10 256 84; Q3_K 11 256 110; Q4_K 12 256 144; Q5_K 13 256 176; Q6_K 14 256 210;
    Q8_K 15 256 292;
    IQ2_XXS 16 256 66; IQ2_XS 17 256 74; IQ3_XXS 18 256 98; IQ1_S 19 256 50; IQ4_NL 20 32 18;
    IQ3_S 21 256 110; IQ2_S 22 256 82; IQ4_XS 23 256 136; IQ1_M 29 256 56;
    TQ1_0 34 256 54; TQ2_0 35 256 66; MXFP4 39 32 17;
}

impl Type {
    /// The type with this number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|&kind| kind as u32 == id)
    }

    /// The type with this name: `Q4_K`, `BF16`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.to_string() == name)
    }

    /// Bytes of `values` values; `None` where they are no whole blocks, or too many.
    pub fn bytes(self, values: u64) -> Option<u64> {
        let (block, bytes) = self.block();
        values.is_multiple_of(block).then(|| (values / block).checked_mul(bytes)).flatten()
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A tensor: name, type, shape, place.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Type.
    pub kind: Type,
    /// Shape with the row last, as PyTorch has it (a file has it reversed); at most 4 sizes.
    pub shape: Vec<u64>,
    /// Where its bytes begin, from the first tensor's place. A writer sets it.
    pub offset: u64,
}

impl TensorInfo {
    /// A tensor that will be written.
    pub fn new(name: impl Into<String>, kind: Type, shape: &[u64]) -> Self {
        Self { name: name.into(), kind, shape: shape.to_vec(), offset: 0 }
    }

    /// Length of a row: the last size, 1 for a scalar.
    pub fn row(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of values.
    ///
    /// # Errors
    /// More than fit 63 bits.
    pub fn values(&self) -> Result<u64, GgufError> {
        let product = self.shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size));
        product.filter(|&n| n <= i64::MAX as u64).ok_or_else(|| {
            GgufError::tensor(&self.name, "fewer than 2^63 values", format!("{:?}", self.shape))
        })
    }

    /// Number of bytes.
    ///
    /// # Errors
    /// As [`Self::values`]; rows that are no whole blocks.
    pub fn bytes(&self) -> Result<u64, GgufError> {
        let (values, (block, _)) = (self.values()?, self.kind.block());
        if !self.row().is_multiple_of(block) {
            let expected = format!("rows of a multiple of {block} values ({})", self.kind);
            return Err(GgufError::tensor(&self.name, expected, self.row()));
        }
        self.kind.bytes(values).ok_or_else(|| {
            GgufError::tensor(&self.name, "fewer than 2^64 bytes", format!("{:?}", self.shape))
        })
    }
}
