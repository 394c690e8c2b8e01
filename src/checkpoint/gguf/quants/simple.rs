//! Plain floats, and blocks of 32 values with one scale `d` (and for `_1` types one minimum `m`).
//!
//! Low nibbles hold values 0 to 15 of a block, high nibbles values 16 to 31; `qh` of the 5-bit types
//! holds the fifth bit of value j at bit j. `d` and `m` are halves. Quantisers round as ggml's
//! reference does: the scale is used before it is rounded to a half.

use super::{half_at, put_half, to_bf16};
use half::{bf16, f16};

/// Values of a block.
const N: usize = 32;

/// 4 bytes: the value.
pub(super) fn read_f32(block: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*block);
}

/// The inverse of [`read_f32`].
pub(super) fn write_f32(x: &[f32; 1], block: &mut [u8; 4]) {
    *block = x[0].to_le_bytes();
}

/// 2 bytes: a half.
pub(super) fn read_f16(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f16::from_le_bytes(*block).to_f32();
}

/// The nearest half, ties to even; beyond 65504 infinity.
pub(super) fn write_f16(x: &[f32; 1], block: &mut [u8; 2]) {
    *block = f16::from_f32(x[0]).to_le_bytes();
}

/// 2 bytes: the upper half of an f32.
pub(super) fn read_bf16(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f32::from_bits(u32::from(bf16::from_le_bytes(*block).to_bits()) << 16);
}

/// The nearest bf16, ties to even.
pub(super) fn write_bf16(x: &[f32; 1], block: &mut [u8; 2]) {
    *block = to_bf16(x[0]).to_le_bytes();
}

/// 34 bytes, d and 32 signed bytes q: `x = q d`.
pub(super) fn read_q8_0(block: &[u8; 34], out: &mut [f32; N]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = f32::from(q as i8) * d;
    }
}

/// `d = max |x| / 127`, `q = round(x / d)`, halves away from zero.
pub(super) fn write_q8_0(x: &[f32; N], block: &mut [u8; 34]) {
    let d = x.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
    let inverse = inverse(d);
    put_half(block, 0, d);
    for (q, x) in block[2..].iter_mut().zip(x) {
        *q = (x * inverse).round() as i8 as u8;
    }
}

/// 18 bytes, d and 16 bytes of nibbles q: `x = d (q - 8)`.
pub(super) fn read_q4_0(block: &[u8; 18], out: &mut [f32; N]) {
    let d = half_at(block, 0);
    for (j, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(nibble(&block[2..], j) as i8 - 8);
    }
}

/// `d = (x of the largest |x|) / -8`, `q = trunc(x / d + 8.5)`.
pub(super) fn write_q4_0(x: &[f32; N], block: &mut [u8; 18]) {
    let d = largest(x) / -8.0;
    let inverse = inverse(d);
    put_half(block, 0, d);
    put_nibbles(&mut block[2..], |j| ((x[j] * inverse + 8.5) as u8).min(15));
}

/// 20 bytes, d, m and 16 bytes of nibbles q: `x = d q + m`.
pub(super) fn read_q4_1(block: &[u8; 20], out: &mut [f32; N]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(nibble(&block[4..], j)) + m;
    }
}

/// `m = min x`, `d = (max x - m) / 15`, `q = trunc((x - m) / d + 0.5)`.
pub(super) fn write_q4_1(x: &[f32; N], block: &mut [u8; 20]) {
    let (least, most) = ends(x);
    let d = (most - least) / 15.0;
    let inverse = inverse(d);
    put_half(block, 0, d);
    put_half(block, 2, least);
    put_nibbles(&mut block[4..], |j| (((x[j] - least) * inverse + 0.5) as u8).min(15));
}

/// 22 bytes, d, 4 bytes qh and 16 bytes of nibbles: `x = d (q - 16)`, q of 5 bits.
pub(super) fn read_q5_0(block: &[u8; 22], out: &mut [f32; N]) {
    let d = half_at(block, 0);
    for (j, x) in out.iter_mut().enumerate() {
        let q = nibble(&block[6..], j) | bit(&block[2..], j) << 4;
        *x = d * f32::from(q as i8 - 16);
    }
}

/// `d = (x of the largest |x|) / -16`, `q = trunc(x / d + 16.5)`.
pub(super) fn write_q5_0(x: &[f32; N], block: &mut [u8; 22]) {
    let d = largest(x) / -16.0;
    let inverse = inverse(d);
    put_half(block, 0, d);
    put_fives(&mut block[2..], |j| ((x[j] * inverse + 16.5) as u8).min(31));
}

/// 24 bytes, d, m, 4 bytes qh and 16 bytes of nibbles: `x = d q + m`, q of 5 bits.
pub(super) fn read_q5_1(block: &[u8; 24], out: &mut [f32; N]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, x) in out.iter_mut().enumerate() {
        let q = nibble(&block[8..], j) | bit(&block[4..], j) << 4;
        *x = d * f32::from(q) + m;
    }
}

/// `m = min x`, `d = (max x - m) / 31`, `q = trunc((x - m) / d + 0.5)`.
pub(super) fn write_q5_1(x: &[f32; N], block: &mut [u8; 24]) {
    let (least, most) = ends(x);
    let d = (most - least) / 31.0;
    let inverse = inverse(d);
    put_half(block, 0, d);
    put_half(block, 2, least);
    put_fives(&mut block[4..], |j| (((x[j] - least) * inverse + 0.5) as u8).min(31));
}

/// Four bits of value j.
fn nibble(packed: &[u8], j: usize) -> u8 {
    packed[j % 16] >> (j / 16 * 4) & 15
}

/// Bit j.
fn bit(bits: &[u8], j: usize) -> u8 {
    bits[j / 8] >> (j % 8) & 1
}

fn put_nibbles(packed: &mut [u8], q: impl Fn(usize) -> u8) {
    for (j, byte) in packed.iter_mut().enumerate() {
        *byte = q(j) & 15 | q(j + 16) << 4;
    }
}

/// Four bytes of fifth bits, then the nibbles.
fn put_fives(packed: &mut [u8], q: impl Fn(usize) -> u8) {
    let high = (0..N).fold(0u32, |high, j| high | u32::from(q(j) >> 4) << j);
    packed[..4].copy_from_slice(&high.to_le_bytes());
    put_nibbles(&mut packed[4..], q);
}

/// The value whose magnitude is largest, the first of equals, with its sign.
fn largest(x: &[f32; N]) -> f32 {
    x.iter().fold(0.0f32, |most, &x| if x.abs() > most.abs() { x } else { most })
}

fn ends(x: &[f32; N]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)))
}

/// 1 / d, or 0 for 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
