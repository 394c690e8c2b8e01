//! Quantised rows outside of panels: as our files have them, and for whoever packs them for other hardware.

use super::matrix::{Format, QuantMatrix};
use super::panel::{BLOCK, get_grouped, put_grouped};
use anyhow::Result;
use half::f16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::fmt;

/// Rows (N, K) in groups of values that share a scale, and with 4 bits a minimum: `x = scale code + minimum`.
#[derive(Clone, PartialEq, Eq)]
pub struct Groups<'a> {
    /// [`Format::Int4`] or [`Format::Int8`].
    pub format: Format,
    /// K.
    pub columns: usize,
    /// (N, K/2), value 2 j in the low half of byte j and value 2 j + 1 in the high one; or (N, K) of i8.
    pub codes: Cow<'a, [u8]>,
    /// (N, K/group) of fp16, little-endian.
    pub scales: Cow<'a, [u8]>,
    /// The same; empty for 8 bits.
    pub minimums: Cow<'a, [u8]>,
}

/// A row of [`Groups`].
pub(super) struct GroupsRow<'a> {
    pub codes: &'a [u8],
    pub scales: &'a [u8],
    pub minimums: &'a [u8],
}

impl Groups<'_> {
    /// Bytes of a row: of its codes, its scales, its minimums.
    pub fn row_bytes(format: Format, columns: usize) -> (usize, usize, usize) {
        let halves = columns / format.group() * 2;
        match format {
            Format::Int8 { .. } => (columns, halves, 0),
            _ => (columns / 2, halves, halves),
        }
    }

    /// With memory of its own.
    pub fn into_owned(self) -> Groups<'static> {
        Groups {
            format: self.format,
            columns: self.columns,
            codes: Cow::Owned(self.codes.into_owned()),
            scales: Cow::Owned(self.scales.into_owned()),
            minimums: Cow::Owned(self.minimums.into_owned()),
        }
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.codes.len() / Self::row_bytes(self.format, self.columns).0.max(1)
    }

    fn row(&self, row: usize) -> GroupsRow<'_> {
        let (codes, scales, minimums) = Self::row_bytes(self.format, self.columns);
        let part = |bytes| row * bytes..(row + 1) * bytes;
        GroupsRow {
            codes: &self.codes[part(codes)],
            scales: &self.scales[part(scales)],
            minimums: &self.minimums[part(minimums)],
        }
    }

    /// All values: the bits of [`QuantMatrix::dequantise_row`].
    ///
    /// # Shapes
    /// out (N, K).
    pub fn dequantise(&self, out: &mut [f32]) {
        let (group, is_int4) = (self.format.group(), matches!(self.format, Format::Int4 { .. }));
        out.par_chunks_mut(self.columns).enumerate().for_each(|(n, out)| {
            let row = self.row(n);
            for (g, out) in out.chunks_mut(group).enumerate() {
                let scale = half_at(row.scales, g);
                match is_int4 {
                    true => {
                        let minimum = half_at(row.minimums, g);
                        let codes = &row.codes[g * group / 2..];
                        for (out, &byte) in out.chunks_exact_mut(2).zip(codes) {
                            out[0] = scale * (byte & 15) as f32 + minimum;
                            out[1] = scale * (byte >> 4) as f32 + minimum;
                        }
                    }
                    false => {
                        for (out, &code) in out.iter_mut().zip(&row.codes[g * group..]) {
                            *out = scale * (code as i8) as f32;
                        }
                    }
                }
            }
        });
    }
}

impl fmt::Debug for Groups<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Groups({}, {} x {})", self.format, self.rows(), self.columns)
    }
}

impl QuantMatrix {
    /// From rows in groups, bit for bit.
    ///
    /// # Errors
    /// K is no multiple of the group.
    pub fn from_groups(groups: &Groups) -> Result<Self> {
        let format = groups.format;
        Self::build(format, groups.rows(), groups.columns, |at, r, panel| {
            put_grouped(format, r, groups.columns, &groups.row(at), panel);
        })
    }

    /// The format of [`QuantMatrix::grouped_row`], [`Format::Int4`] or [`Format::Int8`]; `None` for Q6_K, which has none.
    pub fn grouped_format(&self) -> Option<Format> {
        match self.format() {
            Format::Q4_0 | Format::Q4K => Some(Format::Int4 { group: BLOCK }),
            Format::Q6K => None,
            format => Some(format),
        }
    }

    /// A row as codes with a scale and a minimum a group: `x[k] = scale[k / group] code[k] + minimum[k / group]`.
    ///
    /// # Shapes
    /// codes (K,), from 0 to 15, with 8 bits those of an i8; scales, minimums (K/group,), the latter zeros with 8 bits.
    ///
    /// # Numerics
    /// Exact, but for Q4_K, whose products `d s` and `m t` are rounded to fp16, and for scales of Q4_0 above 8,188.
    ///
    /// # Panics
    /// Where sizes do not fit; for Q6_K.
    pub fn grouped_row(
        &self,
        row: usize,
        codes: &mut [u8],
        scales: &mut [f16],
        minimums: &mut [f16],
    ) {
        let groups = self.columns() / self.format().group();
        let sizes = (codes.len(), scales.len(), minimums.len());
        assert_eq!(sizes, (self.columns(), groups, groups), "sizes of a row in groups");
        let (panel, row) = self.panel_of(row);
        get_grouped(self.format(), row, panel, codes, scales, minimums);
    }

    /// All rows as files have them; `None` for Q6_K.
    pub fn groups(&self) -> Option<Groups<'static>> {
        let format = self.grouped_format()?;
        let (n, k) = (self.rows(), self.columns());
        let (row_codes, row_scales, row_minimums) = Groups::row_bytes(format, k);
        let mut all_codes = vec![0; n * row_codes];
        let mut all_scales = vec![0; n * row_scales];
        let mut all_minimums = vec![0; n * row_minimums];
        let (mut codes, mut scales) = (vec![0; k], vec![f16::ZERO; row_scales / 2]);
        let mut minimums = scales.clone();
        for row in 0..n {
            self.grouped_row(row, &mut codes, &mut scales, &mut minimums);
            let to = &mut all_codes[row * row_codes..][..row_codes];
            match row_codes == k {
                true => to.copy_from_slice(&codes),
                false => {
                    for (pair, byte) in codes.chunks_exact(2).zip(to) {
                        *byte = pair[0] | pair[1] << 4;
                    }
                }
            }
            put_halves(&scales, &mut all_scales[row * row_scales..][..row_scales]);
            put_halves(&minimums, &mut all_minimums[row * row_minimums..][..row_minimums]);
        }
        Some(Groups {
            format,
            columns: k,
            codes: all_codes.into(),
            scales: all_scales.into(),
            minimums: all_minimums.into(),
        })
    }
}

/// As many of them as there is room for.
fn put_halves(halves: &[f16], bytes: &mut [u8]) {
    for (half, bytes) in halves.iter().zip(bytes.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&half.to_le_bytes());
    }
}

fn half_at(halves: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([halves[2 * i], halves[2 * i + 1]]).to_f32()
}
