//! K-quants: blocks of 256 values in sub-blocks, whose scales are themselves quantised with one
//! half `d` (and `m` for their minima) a block.
//!
//! q of 4 bits and more: byte j of the p-th 32 bytes holds value j of sub-block 2p in its low nibble,
//! of 2p + 1 in its high one. q of 2 bits: byte j of the h-th 32 bytes holds value j of groups
//! 4h to 4h + 3, lowest bits first.

use super::half_at;

/// 84 bytes, 16 bytes `s | t << 4`, 64 bytes q of 2 bits, d, m: `x = (d s) q - m t`, s and t of each
/// 16 values.
pub(super) fn read_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, m) = (half_at(block, 80), half_at(block, 82));
    for (i, x) in out.iter_mut().enumerate() {
        let scale = block[i / 16];
        let q = two_bits(&block[16..80], i);
        *x = d * f32::from(scale & 15) * f32::from(q) - m * f32::from(scale >> 4);
    }
}

/// 110 bytes, 32 bytes of third bits h (value j of group g at bit g of byte j), 64 bytes q of 2
/// bits, 12 bytes s, d: `x = d (s - 32) (q + 4 h - 4)`, s of each 16 values.
pub(super) fn read_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(block, 108);
    for (i, x) in out.iter_mut().enumerate() {
        let high = block[i % 32] >> (i / 32) & 1;
        let q = two_bits(&block[32..96], i) as i8 + 4 * high as i8 - 4;
        *x = d * f32::from(six_bits(&block[96..108], i / 16) as i8 - 32) * f32::from(q);
    }
}

/// Q3_K's scale i of 16, 6 bits: bytes 0 to 7 hold low nibbles of scales i and i + 8, bytes 8 to 11
/// the upper two bits of scales i, i + 4, i + 8, i + 12.
fn six_bits(packed: &[u8], i: usize) -> u8 {
    let low = packed[i % 8] >> (i / 8 * 4) & 15;
    let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
    low | high << 4
}

fn two_bits(packed: &[u8], i: usize) -> u8 {
    packed[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

/// Scale s and minimum t (6 bits each) of sub-block j of 8, of the 12 bytes of Q4_K and Q5_K. Bytes 0
/// to 3: s of 0 to 3; bytes 4 to 7: t of 0 to 3; bytes 8 to 11: low nibbles of s and t of 4 to 7, whose
/// upper two bits are those of bytes 0 to 3 and 4 to 7.
pub(super) fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    let (low, s_high, t_high) = (packed[j + 4], packed[j - 4] >> 6, packed[j] >> 6);
    (low & 15 | s_high << 4, low >> 4 | t_high << 4)
}

/// The inverse of [`scale_and_min`] for all sub-blocks.
pub(super) fn put_scales_and_mins(packed: &mut [u8], scales: &[u8; 8], mins: &[u8; 8]) {
    for j in 0..4 {
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
        packed[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        packed[j + 8] = scales[j + 4] & 15 | mins[j + 4] << 4;
    }
}

/// 144 bytes, d, m, 12 bytes s and t, 128 bytes q of 4 bits: `x = (d s) q - m t`, s and t of each 32
/// values.
pub(super) fn read_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, t) = scale_and_min(&block[4..16], j);
        let (d, m) = (d * f32::from(s), m * f32::from(t));
        let packed = &block[16 + j / 2 * 32..][..32];
        for (x, q) in out.iter_mut().zip(packed) {
            *x = d * f32::from(q >> (j % 2 * 4) & 15) - m;
        }
    }
}

/// 176 bytes, d, m, 12 bytes s and t, 32 bytes of fifth bits (value i of sub-block j at bit j of byte
/// i), 128 bytes of nibbles: `x = (d s) q - m t`, q of 5 bits.
pub(super) fn read_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, t) = scale_and_min(&block[4..16], j);
        let (d, m) = (d * f32::from(s), m * f32::from(t));
        let packed = &block[48 + j / 2 * 32..][..32];
        for (i, x) in out.iter_mut().enumerate() {
            let q = packed[i] >> (j % 2 * 4) & 15 | (block[16 + i] >> j & 1) << 4;
            *x = d * f32::from(q) - m;
        }
    }
}

/// 210 bytes, 128 bytes of nibbles, 64 bytes of upper two bits, 16 signed bytes s, d:
/// `x = (d s) (q - 32)`, q of 6 bits, s of each 16 values. Of half h of the block, byte `64 h + i` holds
/// the nibbles of its values i and i + 64, byte `32 h + i` of the upper bits those of its values i,
/// i + 32, i + 64, i + 96.
pub(super) fn read_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = d * f32::from(block[192 + g] as i8);
        for (i, x) in out.iter_mut().enumerate() {
            let (half, at) = (g / 8, g % 8 * 16 + i); // value `at` of 128 of this half
            let low = block[half * 64 + at % 64] >> (at / 64 * 4) & 15;
            let high = block[128 + half * 32 + at % 32] >> (at / 32 * 2) & 3;
            *x = d * f32::from((low | high << 4) as i8 - 32);
        }
    }
}

/// The inverse of Q6_K's layout of q (0 to 63): nibbles and upper bits.
pub(super) fn put_q6(block: &mut [u8; 210], q: &[u8; 256]) {
    block[..192].fill(0);
    for (i, q) in q.iter().enumerate() {
        let (half, at) = (i / 128, i % 128);
        block[half * 64 + at % 64] |= (q & 15) << (at / 64 * 4);
        block[128 + half * 32 + at % 32] |= (q >> 4) << (at / 32 * 2);
    }
}
