//! Weights in panels of 8 rows, as `csrc/cpu/quant_matmul.h` wants them: bytes in another order, and no others.

use super::groups::GroupsRow;
use super::matrix::Format;
use half::f16;

/// Rows of a panel.
pub const PANEL: usize = 8;
/// Values that share a block of activations.
pub const BLOCK: usize = 32;

/// Sections of a panel, in bytes from its begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    /// High bits of Q6_K.
    pub high: usize,
    /// Scales.
    pub scales: usize,
    /// Factors of Q6_K's scales.
    pub factors: usize,
    /// End.
    pub bytes: usize,
}

impl Sections {
    /// Of rows of k values.
    pub fn of(format: Format, k: usize) -> Self {
        let blocks = k / BLOCK;
        let codes = PANEL * if matches!(format, Format::Int8 { .. }) { k } else { k / 2 };
        let high = if format == Format::Q6K { blocks * 64 } else { 0 };
        let scales = match format {
            Format::Q4_0 => blocks * 16,
            Format::Q4K => blocks / 8 * 128,
            Format::Q6K => blocks * 16,
            Format::Int4 { group } => k / group * 32,
            Format::Int8 { group } => k / group * 16,
        };
        let factors = if format == Format::Q6K { blocks / 8 * 16 } else { 0 };
        let at = codes + high;
        Self { high: codes, scales: at, factors: at + scales, bytes: at + scales + factors }
    }
}

/// Where the 4-bit code of value `v` of a block lies: byte in the panel's codes, and the shift in it.
pub fn code4(block: usize, row: usize, v: usize) -> (usize, u32) {
    let (half, v) = (v / 16, v % 16);
    (block * 128 + v / 4 * 32 + row * 4 + v % 4, 4 * half as u32)
}

/// Where the 8-bit code of value `v` of a block lies.
pub fn code8(block: usize, row: usize, v: usize) -> usize {
    block * 256 + v / 4 * 32 + row * 4 + v % 4
}

/// Where the two high bits of value `v` lie, from the section's begin, and the shift.
pub fn high2(block: usize, row: usize, v: usize) -> (usize, u32) {
    let (quad, i) = (v / 4, v % 4);
    (block * 64 + quad / 4 * 32 + row * 4 + i, 2 * (quad % 4) as u32)
}

/// Adds row `row` of a panel from GGUF's blocks.
///
/// # Panics
/// Where `bytes` are not the row's.
pub fn put_gguf(format: Format, row: usize, k: usize, bytes: &[u8], panel: &mut [u8]) {
    let at = Sections::of(format, k);
    match format {
        Format::Q4_0 => {
            for (b, block) in bytes.chunks_exact(18).enumerate() {
                half_at(panel, at.scales + b * 16 + row * 2, &block[..2]);
                for (v, &code) in block[2..].iter().enumerate() {
                    panel[code4(b, row, v).0] = code; // low: value v, high: value 16 + v, there as here
                }
            }
        }
        Format::Q4K => {
            for (s, block) in bytes.chunks_exact(144).enumerate() {
                let scales = at.scales + s * 128;
                half_at(panel, scales + row * 2, &block[..2]);
                half_at(panel, scales + 16 + row * 2, &block[2..4]);
                for (third, four) in block[4..16].chunks_exact(4).enumerate() {
                    panel[scales + 32 + third * 32 + row * 4..][..4].copy_from_slice(four);
                }
                for v in 0..256 {
                    let (chunk, l) = (v / 64, v % 64);
                    let code = block[16 + chunk * 32 + l % 32] >> (l / 32 * 4) & 15;
                    put4(panel, s * 8 + v / BLOCK, row, v % BLOCK, code);
                }
            }
        }
        Format::Q6K => {
            for (s, block) in bytes.chunks_exact(210).enumerate() {
                half_at(panel, at.factors + s * 16 + row * 2, &block[208..]);
                for (i, &scale) in block[192..208].iter().enumerate() {
                    panel[at.scales + (s * 8 + i / 2) * 16 + row * 2 + i % 2] = scale;
                }
                for v in 0..256 {
                    let (half, quarter, l) = (v / 128, v % 128 / 32, v % 32);
                    let low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
                    let high = block[128 + half * 32 + l] >> (quarter * 2) & 3;
                    let (b, v) = (s * 8 + v / BLOCK, v % BLOCK);
                    put4(panel, b, row, v, low);
                    let (byte, shift) = high2(b, row, v);
                    panel[at.high + byte] |= high << shift;
                }
            }
        }
        Format::Int8 { .. } => {
            for (b, block) in bytes.chunks_exact(34).enumerate() {
                half_at(panel, at.scales + b * 16 + row * 2, &block[..2]);
                for (v, &code) in block[2..].iter().enumerate() {
                    panel[code8(b, row, v)] = code;
                }
            }
        }
        // Q4_1: w = d q + m
        Format::Int4 { .. } => {
            for (b, block) in bytes.chunks_exact(20).enumerate() {
                half_at(panel, at.scales + b * 32 + row * 2, &block[..2]);
                half_at(panel, at.scales + b * 32 + 16 + row * 2, &block[2..4]);
                for (v, &code) in block[4..].iter().enumerate() {
                    panel[code4(b, row, v).0] = code;
                }
            }
        }
    }
}

/// Adds row `row` of a panel from values, rounded to [`Format::Int4`] or [`Format::Int8`].
pub fn put_values(format: Format, row: usize, values: &[f32], panel: &mut [u8]) {
    let at = Sections::of(format, values.len());
    let put = |panel: &mut [u8], place: usize, x: f32| {
        let x = f16::from_f32(x);
        panel[place..place + 2].copy_from_slice(&x.to_le_bytes());
        x.to_f32()
    };
    match format {
        Format::Int4 { group } => {
            for (g, values) in values.chunks_exact(group).enumerate() {
                let (scale, min) = super::round::best(values);
                let scale = put(panel, at.scales + g * 32 + row * 2, scale);
                let min = put(panel, at.scales + g * 32 + 16 + row * 2, min);
                for (i, &x) in values.iter().enumerate() {
                    let v = g * group + i;
                    put4(panel, v / BLOCK, row, v % BLOCK, super::round::code(x, scale, min));
                }
            }
        }
        Format::Int8 { group } => {
            for (g, values) in values.chunks_exact(group).enumerate() {
                let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let scale = put(panel, at.scales + g * 16 + row * 2, largest / 127.0);
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                for (i, &x) in values.iter().enumerate() {
                    let v = g * group + i;
                    let code = (x * inverse).round().clamp(-127.0, 127.0) as i8;
                    panel[code8(v / BLOCK, row, v % BLOCK)] = code as u8;
                }
            }
        }
        Format::Q4_0 | Format::Q4K | Format::Q6K => unreachable!("these come from GGUF's blocks"),
    }
}

/// Adds row `row` of a panel of [`Format::Int4`] or [`Format::Int8`] from a row in groups.
pub(super) fn put_grouped(
    format: Format,
    row: usize,
    k: usize,
    groups: &GroupsRow,
    panel: &mut [u8],
) {
    let at = Sections::of(format, k);
    let is_int4 = matches!(format, Format::Int4 { .. });
    let stride = if is_int4 { 32 } else { 16 };
    for (g, scale) in groups.scales.chunks_exact(2).enumerate() {
        half_at(panel, at.scales + g * stride + row * 2, scale);
    }
    for (g, minimum) in groups.minimums.chunks_exact(2).enumerate() {
        half_at(panel, at.scales + g * stride + 16 + row * 2, minimum);
    }
    if !is_int4 {
        for (i, &code) in groups.codes.iter().enumerate() {
            panel[code8(i / BLOCK, row, i % BLOCK)] = code;
        }
        return;
    }
    for (i, &byte) in groups.codes.iter().enumerate() {
        let (block, v) = (2 * i / BLOCK, 2 * i % BLOCK);
        put4(panel, block, row, v, byte & 15);
        put4(panel, block, row, v + 1, byte >> 4);
    }
}

/// The values of row `row` of a panel.
pub fn get_row(format: Format, row: usize, panel: &[u8], out: &mut [f32]) {
    let at = Sections::of(format, out.len());
    let half = |place: usize| f16::from_le_bytes([panel[place], panel[place + 1]]).to_f32();
    let q4 = |b: usize, v: usize| {
        let (byte, shift) = code4(b, row, v);
        (panel[byte] >> shift & 15) as f32
    };
    for (i, out) in out.iter_mut().enumerate() {
        let (b, v) = (i / BLOCK, i % BLOCK);
        *out = match format {
            Format::Q4_0 => half(at.scales + b * 16 + row * 2) * (q4(b, v) - 8.0),
            Format::Q4K => {
                let scales = at.scales + b / 8 * 128;
                let byte = |i: usize| panel[scales + 32 + i / 4 * 32 + row * 4 + i % 4];
                let (scale, min) = scale_and_min(b % 8, byte);
                let (d, m) = (half(scales + row * 2), half(scales + 16 + row * 2));
                d * scale as f32 * q4(b, v) - m * min as f32
            }
            Format::Q6K => {
                let (byte, shift) = high2(b, row, v);
                let q = q4(b, v) + 16.0 * (panel[at.high + byte] >> shift & 3) as f32;
                let scale = panel[at.scales + b * 16 + row * 2 + v / 16] as i8;
                half(at.factors + b / 8 * 16 + row * 2) * scale as f32 * (q - 32.0)
            }
            Format::Int4 { group } => {
                let scales = at.scales + i / group * 32 + row * 2;
                half(scales) * q4(b, v) + half(scales + 16)
            }
            Format::Int8 { group } => {
                half(at.scales + i / group * 16 + row * 2) * (panel[code8(b, row, v)] as i8) as f32
            }
        };
    }
}

/// Row `row` of a panel as codes (K,) and a scale and a minimum a group, `x = scale code + minimum`: see
/// [`super::QuantMatrix::grouped_row`].
///
/// # Panics
/// For Q6_K, whose groups of 16 no kernel has.
pub fn get_grouped(
    format: Format,
    row: usize,
    panel: &[u8],
    codes: &mut [u8],
    scales: &mut [f16],
    minimums: &mut [f16],
) {
    let at = Sections::of(format, codes.len());
    let half = |place: usize| f16::from_le_bytes([panel[place], panel[place + 1]]);
    let is_int8 = matches!(format, Format::Int8 { .. });
    for (i, code) in codes.iter_mut().enumerate() {
        let (block, v) = (i / BLOCK, i % BLOCK);
        *code = if is_int8 {
            panel[code8(block, row, v)]
        } else {
            let (byte, shift) = code4(block, row, v);
            panel[byte] >> shift & 15
        };
    }
    for (i, (scale, minimum)) in scales.iter_mut().zip(minimums).enumerate() {
        (*scale, *minimum) = match format {
            Format::Q4_0 => {
                let scale = half(at.scales + i * 16 + row * 2);
                (scale, f16::from_f32(-8.0 * scale.to_f32()))
            }
            Format::Q4K => {
                let scales = at.scales + i / 8 * 128;
                let byte = |i: usize| panel[scales + 32 + i / 4 * 32 + row * 4 + i % 4];
                let (scale, minimum) = scale_and_min(i % 8, byte);
                let (d, m) =
                    (half(scales + row * 2).to_f32(), half(scales + 16 + row * 2).to_f32());
                (f16::from_f32(d * scale as f32), f16::from_f32(-m * minimum as f32))
            }
            Format::Int4 { .. } => {
                let place = at.scales + i * 32 + row * 2;
                (half(place), half(place + 16))
            }
            Format::Int8 { .. } => (half(at.scales + i * 16 + row * 2), f16::ZERO),
            Format::Q6K => panic!("Q6_K has no groups of 32 or more"),
        };
    }
}

/// The 6-bit scale and minimum of block j of 8, out of GGUF's 12 bytes.
fn scale_and_min(j: usize, byte: impl Fn(usize) -> u8) -> (u8, u8) {
    if j < 4 {
        return (byte(j) & 63, byte(j + 4) & 63);
    }
    let low = byte(j + 4);
    (low & 15 | byte(j - 4) >> 6 << 4, low >> 4 | byte(j) >> 6 << 4)
}

fn put4(panel: &mut [u8], block: usize, row: usize, v: usize, code: u8) {
    let (byte, shift) = code4(block, row, v);
    panel[byte] |= code << shift;
}

fn half_at(panel: &mut [u8], place: usize, half: &[u8]) {
    panel[place..place + 2].copy_from_slice(&half[..2]);
}
