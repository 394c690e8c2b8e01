//! A quantised matrix and its products, by the kernels of `csrc/cpu`.

use super::memory::Memory;
use super::panel::{BLOCK, PANEL, Sections, get_row, put_gguf, put_values};
use crate::checkpoint::gguf::Type;
use crate::ffi::{self, ActivationBlock};
use anyhow::{Result, bail};
use rayon::prelude::*;
use std::fmt;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// GGUF's Q4_0: `d (q - 8)`, a scale for 32 values; 4.5 bits a weight.
    Q4_0,
    /// GGUF's Q4_K: `d s q - m t`, 6-bit scale and minimum for 32 values; 4.5 bits.
    Q4K,
    /// GGUF's Q6_K: `d s (q - 32)`, an 8-bit scale for 16 values; 6.56 bits.
    Q6K,
    /// `scale q + min` with 4-bit q: 4 + 32 / group bits.
    Int4 {
        /// Values that share scale and minimum.
        group: usize,
    },
    /// `scale q` with 8-bit q: 8 + 16 / group bits. Groups of 32 are GGUF's Q8_0.
    Int8 {
        /// Values that share a scale.
        group: usize,
    },
}

impl Format {
    /// Number of values that a row must be a multiple of.
    pub fn multiple(self) -> usize {
        match self {
            Self::Q4_0 => BLOCK,
            Self::Q4K | Self::Q6K => 256,
            Self::Int4 { group } | Self::Int8 { group } => group,
        }
    }

    /// Values that share a scale.
    pub fn group(self) -> usize {
        self.raw().1 as usize
    }

    /// The number of `tl_quant_format`, and the group.
    fn raw(self) -> (i32, i32) {
        match self {
            Self::Q4_0 => (0, 32),
            Self::Q4K => (1, 32),
            Self::Q6K => (2, 16),
            Self::Int4 { group } => (3, group as i32),
            Self::Int8 { group } => (4, group as i32),
        }
    }
}

/// As the command line writes it: `int4:64`.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Q4_0 => f.write_str("Q4_0"),
            Self::Q4K => f.write_str("Q4_K"),
            Self::Q6K => f.write_str("Q6_K"),
            Self::Int4 { group } => write!(f, "int4:{group}"),
            Self::Int8 { group } => write!(f, "int8:{group}"),
        }
    }
}

/// Weights (N, K), N rows of K values.
#[derive(Debug)]
pub struct QuantMatrix {
    format: Format,
    rows: usize,
    columns: usize,
    /// Panels of 8 rows; missing rows of the last one are zeros.
    panels: Memory,
}

impl QuantMatrix {
    /// Rounds rows of `columns` values to [`Format::Int4`] or [`Format::Int8`].
    ///
    /// # Errors
    /// `columns` is no multiple of the group.
    pub fn pack(format: Format, values: &[f32], columns: usize) -> Result<Self> {
        let row = |row: usize| &values[row * columns..(row + 1) * columns];
        Self::build(format, values.len() / columns.max(1), columns, |at, r, panel| {
            put_values(format, r, row(at), panel);
        })
    }

    /// From GGUF's blocks, bit for bit; `None` for types without kernels.
    ///
    /// # Errors
    /// `columns` is no multiple of the block.
    pub fn from_gguf(kind: Type, columns: usize, bytes: &[u8]) -> Result<Option<Self>> {
        let (format, block) = match kind {
            Type::Q4_0 => (Format::Q4_0, 18),
            Type::Q4_1 => (Format::Int4 { group: 32 }, 20),
            Type::Q8_0 => (Format::Int8 { group: 32 }, 34),
            Type::Q4_K => (Format::Q4K, 144),
            Type::Q6_K => (Format::Q6K, 210),
            _ => return Ok(None),
        };
        let row = columns / format.multiple() * block;
        let rows = bytes.len() / row.max(1);
        let put = |at: usize, r: usize, panel: &mut [u8]| {
            put_gguf(format, r, columns, &bytes[at * row..(at + 1) * row], panel);
        };
        Self::build(format, rows, columns, put).map(Some)
    }

    /// `put(row, row of the panel, panel)` fills the panels, which are zeros.
    pub(super) fn build(
        format: Format,
        rows: usize,
        columns: usize,
        put: impl Fn(usize, usize, &mut [u8]) + Sync,
    ) -> Result<Self> {
        let multiple = format.multiple();
        if columns == 0 || !columns.is_multiple_of(multiple) {
            bail!("rows of {columns} values are no multiple of the {multiple} that share a scale");
        }
        let bytes = Sections::of(format, columns).bytes;
        let mut panels = Memory::zeros(rows.div_ceil(PANEL) * bytes)?;
        panels.par_chunks_mut(bytes).enumerate().for_each(|(i, panel)| {
            for r in 0..PANEL.min(rows - i * PANEL) {
                put(i * PANEL + r, r, panel);
            }
        });
        Ok(Self { format, rows, columns, panels })
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// In memory.
    pub fn bytes(&self) -> u64 {
        self.panels.len() as u64
    }

    /// The values of a row.
    ///
    /// # Shapes
    /// out (K,).
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        let (panel, row) = self.panel_of(row);
        get_row(self.format, row, panel, out);
    }

    /// The panel of a row, and which one it is there.
    pub(super) fn panel_of(&self, row: usize) -> (&[u8], usize) {
        let bytes = Sections::of(self.format, self.columns).bytes;
        (&self.panels[row / PANEL * bytes..][..bytes], row % PANEL)
    }

    /// `y[m * stride + n] = sum over k of x[m, k] w[n, k]`, on all threads.
    ///
    /// # Shapes
    /// x (M, K); y from the first value of the first row to the last of the last.
    ///
    /// # Panics
    /// Where sizes do not fit.
    pub fn multiply(&self, x: &Activations, y: &mut [f32], stride: usize) {
        assert_eq!(x.columns, self.columns, "K of the activations and of the matrix");
        assert!(y.len() >= (x.rows - 1) * stride + self.rows, "y is too short");
        let (format, group) = self.format.raw();
        let matrix = ffi::QuantPanels {
            panels: &self.panels,
            rows: self.rows,
            columns: self.columns,
            format,
            group,
        };
        ffi::quant_matmul(&matrix, &x.blocks, x.rows, y, stride);
    }
}

/// Activations in 8 bits, by blocks of 32.
#[derive(Debug, Default)]
pub struct Activations {
    blocks: Vec<ActivationBlock>,
    rows: usize,
    columns: usize,
}

impl Activations {
    /// Rounds x (M, K), K a multiple of 32.
    pub fn quantise(&mut self, x: &[f32], columns: usize) {
        self.quantise_strided(x, columns, columns);
    }

    /// The same of the first `columns` of every `stride` values.
    pub fn quantise_strided(&mut self, x: &[f32], columns: usize, stride: usize) {
        let rows = x.len() / stride;
        self.blocks.resize(rows * columns / BLOCK, ActivationBlock::default());
        (self.rows, self.columns) = (rows, columns);
        ffi::quantise_activations(x, columns, stride, &mut self.blocks);
    }
}
