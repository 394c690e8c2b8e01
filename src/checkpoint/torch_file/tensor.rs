//! Tensors of a PyTorch file: dtype, shape, and where their elements lie.

use std::borrow::Cow;
use std::ops::Range;

/// Most dimensions a tensor may have, as in PyTorch.
const MAX_DIMS: usize = 64;

/// Element types that PyTorch saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Dtype {
    Float64,
    Float32,
    Float16,
    BFloat16,
    Float8E4M3,
    Float8E5M2,
    Int64,
    Int32,
    Int16,
    Int8,
    Uint64,
    Uint32,
    Uint16,
    Uint8,
    Bool,
    Complex64,
    Complex128,
}

/// dtype, its name in `torch`, the prefix of its `torch.*Storage` (empty: none), bytes of an element.
const DTYPES: [(Dtype, &str, &str, u64); 17] = [
    (Dtype::Float64, "float64", "Double", 8),
    (Dtype::Float32, "float32", "Float", 4),
    (Dtype::Float16, "float16", "Half", 2),
    (Dtype::BFloat16, "bfloat16", "BFloat16", 2),
    (Dtype::Float8E4M3, "float8_e4m3fn", "", 1),
    (Dtype::Float8E5M2, "float8_e5m2", "", 1),
    (Dtype::Int64, "int64", "Long", 8),
    (Dtype::Int32, "int32", "Int", 4),
    (Dtype::Int16, "int16", "Short", 2),
    (Dtype::Int8, "int8", "Char", 1),
    (Dtype::Uint64, "uint64", "", 8),
    (Dtype::Uint32, "uint32", "", 4),
    (Dtype::Uint16, "uint16", "", 2),
    (Dtype::Uint8, "uint8", "Byte", 1),
    (Dtype::Bool, "bool", "Bool", 1),
    (Dtype::Complex64, "complex64", "ComplexFloat", 8),
    (Dtype::Complex128, "complex128", "ComplexDouble", 16),
];

impl Dtype {
    fn row(self) -> &'static (Dtype, &'static str, &'static str, u64) {
        DTYPES.iter().find(|row| row.0 == self).unwrap_or(&DTYPES[0]) // every dtype has a row
    }

    /// Its name in `torch`, as `float32`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes of an element.
    pub fn size(self) -> u64 {
        self.row().3
    }

    /// By its name in `torch`.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        DTYPES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// By the name of its storage, as `FloatStorage`.
    pub(super) fn from_storage(name: &str) -> Option<Self> {
        let prefix = name.strip_suffix("Storage").filter(|prefix| !prefix.is_empty())?;
        DTYPES.iter().find(|row| row.2 == prefix).map(|row| row.0)
    }
}

/// A part of a saved storage, as the pickle names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Which storage, counted in the order of the pickle.
    pub storage: u32,
    /// First byte within it.
    pub start: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Its elements.
    pub dtype: Dtype,
}

/// A tensor: what it is, and where its elements lie in the file.
#[derive(Clone, Debug)]
pub struct TorchTensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Steps in elements, one a dimension.
    pub(super) strides: Vec<u64>,
    /// First element within the part.
    pub(super) offset: u64,
    pub(super) part: Part,
    /// The first element to the last one, as bytes of the file; set by [`TorchTensor::place`].
    span: Range<usize>,
}

impl TorchTensor {
    pub(super) fn new(
        dtype: Dtype,
        shape: Vec<u64>,
        strides: Vec<u64>,
        offset: u64,
        part: Part,
    ) -> Self {
        Self { dtype, shape, strides, offset, part, span: 0..0 }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes of the dimensions; empty for a scalar.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Number of elements, for a tensor of an open file.
    pub fn numel(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes when contiguous, for a tensor of an open file.
    pub fn byte_len(&self) -> u64 {
        self.numel() * self.dtype.size()
    }

    /// Checks sizes, steps and offset against the part, whose storage is `storage` in the file, and
    /// remembers the place.
    pub(super) fn place(&mut self, storage: &Range<usize>) -> Result<(), String> {
        let (shape, strides, size) = (&self.shape, &self.strides, self.dtype.size());
        if shape.len() != strides.len() || shape.len() > MAX_DIMS {
            let (dims, steps) = (shape.len(), strides.len());
            return Err(format!("{dims} dimensions with {steps} strides (at most {MAX_DIMS})"));
        }
        // The product without zeros too, so that nobody's arithmetic on a shape can overflow.
        let product = |n: u64, d: &u64| n.checked_mul((*d).max(1));
        let bytes = shape.iter().try_fold(size, product).filter(|&n| n <= i64::MAX as u64);
        bytes.ok_or_else(|| format!("shape {shape:?} has more than 2^63 bytes"))?;
        if shape.contains(&0) {
            self.span = storage.start..storage.start;
            return Ok(());
        }
        let reach = |sum: u64, (d, s): (&u64, &u64)| (d - 1).checked_mul(*s)?.checked_add(sum);
        let last = shape.iter().zip(strides).try_fold(self.offset, reach);
        let end = last.and_then(|last| last.checked_add(1)?.checked_mul(size));
        let end = end.filter(|&end| end <= self.part.bytes).ok_or_else(|| {
            format!(
                "shape {shape:?}, strides {strides:?} and offset {} reach beyond a storage of {} bytes",
                self.offset, self.part.bytes
            )
        })?;
        let whole = self.part.start.checked_add(self.part.bytes);
        if whole.is_none_or(|whole| whole > storage.len() as u64) {
            return Err(format!("a part of {} bytes beyond its storage", self.part.bytes));
        }
        let base = storage.start + self.part.start as usize; // both within the file
        self.span = base + (self.offset * size) as usize..base + end as usize;
        Ok(())
    }

    /// Whether it shows elements more than once (`expand`, `unfold`), so that its bytes exceed
    /// those of its storage.
    pub(super) fn is_expanded(&self) -> bool {
        self.byte_len() > self.part.bytes
    }

    /// Whether the elements lie in the order of the shape.
    fn is_contiguous(&self) -> bool {
        self.run_dims() == 0
    }

    /// Dimensions in front of the longest contiguous run of elements.
    fn run_dims(&self) -> usize {
        let mut step = 1;
        for (dim, (&d, &s)) in self.shape.iter().zip(&self.strides).enumerate().rev() {
            if d != 1 && s != step {
                return dim + 1;
            }
            step *= d;
        }
        0
    }

    /// The elements as contiguous little-endian bytes: borrowed from the file where they are so.
    /// `None`: the tensor is of another file.
    pub(super) fn bytes<'a>(&self, file: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let elements = file.get(self.span.clone())?;
        if self.shape.contains(&0) || self.is_contiguous() {
            return Some(Cow::Borrowed(elements));
        }
        Some(Cow::Owned(self.gather(elements)))
    }

    /// Copies run after run, the last dimension fastest.
    fn gather(&self, elements: &[u8]) -> Vec<u8> {
        let (size, outer) = (self.dtype.size() as usize, self.run_dims());
        let run = self.shape[outer..].iter().product::<u64>() as usize * size;
        let sizes: Vec<usize> = self.shape[..outer].iter().map(|&d| d as usize).collect();
        let step = |(&d, &s): (&u64, &u64)| if d > 1 { s as usize * size } else { 0 }; // one: any
        let steps: Vec<usize> =
            self.shape.iter().zip(&self.strides).take(outer).map(step).collect();
        let mut out = Vec::with_capacity(self.byte_len() as usize);
        let (mut index, mut at) = (vec![0; outer], 0);
        loop {
            out.extend_from_slice(&elements[at..at + run]);
            let mut dim = outer;
            loop {
                if dim == 0 {
                    return out;
                }
                dim -= 1;
                index[dim] += 1;
                if index[dim] < sizes[dim] {
                    at += steps[dim];
                    break;
                }
                at -= steps[dim] * (index[dim] - 1); // back to this dimension's first element
                index[dim] = 0;
            }
        }
    }
}
