//! Scales of K-quants, found by a search.
//!
//! For a candidate scale every value is rounded to its q; for these q the best scale (and minimum) in
//! the weighted least squares sense has a closed form. Candidates around the obvious scale are
//! tried, and the one with the least error wins. Large values weigh more, as they matter more for
//! the layer's output. Then the sub-blocks' scales are quantised, and q is rounded once more.
//!
//! # Source
//! The idea is llama.cpp's. tests/suite/gguf.rs bounds the error of Gaussian values.

use super::k::{put_q6, put_scales_and_mins};
use super::put_half;

/// Below this a block is zero.
const TINY: f32 = 1e-15;

/// The nearest integer, ties to even, for `|x| < 2^22`: adding 1.5 * 2^23 leaves no bit for a fraction.
/// `f32::round_ties_even` is a call on processors of 2004, for which Rust builds.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    x + SHIFT - SHIFT
}

/// The nearest integer within `0..=most`; NaN is 0.
fn level(x: f32, most: f32) -> f32 {
    nearest(x.max(0.0).min(most))
}

/// Q4_K: `x = (d s) q - m t`, s and t (6 bits) of each 32 values.
pub(super) fn write_q4_k(x: &[f32; 256], block: &mut [u8; 144]) {
    let parts = x.as_chunks::<32>().0;
    let (mut scales, mut mins) = ([0.0f32; 8], [0.0f32; 8]);
    for (j, part) in parts.iter().enumerate() {
        (scales[j], mins[j]) = affine::<15>(part);
    }
    let most = |values: &[f32; 8]| values.iter().fold(0.0f32, |a, &b| a.max(b));
    let (most_scale, most_min) = (most(&scales), most(&mins));
    let six_bits = |value: f32, most: f32| {
        if most > 0.0 { level(63.0 / most * value, 63.0) as u8 } else { 0 }
    };
    let s = scales.map(|scale| six_bits(scale, most_scale));
    let t = mins.map(|min| six_bits(min, most_min));
    let d = put_half(block, 0, most_scale / 63.0);
    let m = put_half(block, 2, most_min / 63.0);
    put_scales_and_mins(&mut block[4..16], &s, &t);
    let mut q = [0u8; 256];
    for (j, part) in parts.iter().enumerate() {
        let (scale, min) = (d * f32::from(s[j]), m * f32::from(t[j]));
        if scale != 0.0 {
            let q = &mut q[j * 32..][..32];
            q.iter_mut().zip(part).for_each(|(q, x)| *q = level((x + min) / scale, 15.0) as u8);
        }
    }
    for (i, byte) in block[16..].iter_mut().enumerate() {
        let at = i / 32 * 64 + i % 32;
        *byte = q[at] | q[at + 32] << 4;
    }
}

/// Scale a and offset b >= 0 with least `sum w (a q - b - x)^2` for q in `0..=MOST` over candidates of
/// the scale; `w = sqrt(mean x^2) + |x|`.
fn affine<const MOST: u8>(x: &[f32; 32]) -> (f32, f32) {
    let most = f32::from(MOST);
    let spread = (x.iter().map(|x| x * x).sum::<f32>() / 32.0).sqrt();
    let weights = x.map(|x| spread + x.abs());
    let low = x.iter().fold(0.0f32, |a, &b| a.min(b)); // 0 must be within reach
    let high = x.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    if high.partial_cmp(&low) != Some(std::cmp::Ordering::Greater) {
        return (0.0, -low);
    }
    let round = |inverse: f32| x.map(|x| level(inverse * (x - low), most));
    let error = |q: &[f32; 32], scale: f32, min: f32| {
        let terms = q.iter().zip(x).zip(&weights);
        terms.map(|((q, x), w)| w * (scale * q + min - x).powi(2)).sum::<f32>()
    };
    let first = (high - low) / most;
    let mut best = (error(&round(most / (high - low)), first, low), first, low);
    for step in 0..=20 {
        let q = round((most - 1.0 + 0.1 * step as f32) / (high - low));
        let Some((scale, min)) = fit(x, &weights, &q) else { continue };
        let error = error(&q, scale, min);
        if error < best.0 {
            best = (error, scale, min);
        }
    }
    (best.1, -best.2)
}

/// Weighted least squares of `x = scale q + min`, `min <= 0`; `None` where q is constant.
fn fit(x: &[f32; 32], weights: &[f32; 32], q: &[f32; 32]) -> Option<(f32, f32)> {
    let (mut w, mut wx, mut wq, mut wqq, mut wqx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for ((x, q), weight) in x.iter().zip(q).zip(weights) {
        w += weight;
        wx += weight * x;
        wq += weight * q;
        wqq += weight * q * q;
        wqx += weight * q * x;
    }
    let determinant = w * wqq - wq * wq;
    if determinant.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
        return None;
    }
    let min = (wqq * wx - wq * wqx) / determinant;
    if min > 0.0 {
        return Some((wqx / wqq, 0.0));
    }
    Some(((w * wqx - wx * wq) / determinant, min))
}

/// Q6_K: `x = (d s) (q - 32)`, s (8 bits, signed) of each 16 values.
pub(super) fn write_q6_k(x: &[f32; 256], block: &mut [u8; 210]) {
    let parts = x.as_chunks::<16>().0;
    let mut scales = [0.0f32; 16];
    scales.iter_mut().zip(parts).for_each(|(scale, part)| *scale = symmetric(part));
    let largest = scales.iter().fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    if largest.abs() < TINY {
        block.fill(0);
        return;
    }
    // The largest scale becomes -128, which reaches one further than 127.
    let inverse = -128.0 / largest;
    let d = put_half(block, 208, 1.0 / inverse);
    let mut q = [32u8; 256];
    for (j, part) in parts.iter().enumerate() {
        let s = nearest((inverse * scales[j]).min(127.0)) as i8;
        block[192 + j] = s as u8;
        let scale = d * f32::from(s);
        if scale != 0.0 {
            let q = &mut q[j * 16..][..16];
            q.iter_mut().zip(part).for_each(|(q, x)| *q = level(x / scale + 32.0, 63.0) as u8);
        }
    }
    put_q6(block, &q);
}

/// Scale a with least `sum w (a q - x)^2` for q in -32 to 31 over candidates; `w = x^2`.
fn symmetric(x: &[f32; 16]) -> f32 {
    let largest = x.iter().fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    if largest.abs() < TINY {
        return 0.0;
    }
    // For the best a of given q, the error is `sum w x^2 - (sum w q x)^2 / sum w q^2`.
    let sums = |reach: f32| {
        let inverse = -reach / largest;
        x.iter().fold((0.0f32, 0.0f32), |(wqx, wqq), x| {
            let (q, w) = (nearest((inverse * x).clamp(-32.0, 31.0)), x * x);
            (wqx + w * q * x, wqq + w * q * q)
        })
    };
    let (wqx, wqq) = sums(32.0);
    let mut scale = if wqq > 0.0 { wqx / wqq } else { 0.0 };
    let mut best = scale * wqx;
    for step in (-9..=9).filter(|&step| step != 0) {
        let (wqx, wqq) = sums(32.0 + 0.1 * step as f32);
        if wqq > 0.0 && wqx * wqx > best * wqq {
            scale = wqx / wqq;
            best = scale * wqx;
        }
    }
    scale
}
