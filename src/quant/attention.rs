//! Attention over a paged cache on the CPU: by the kernels of `csrc/cpu/decode.h`, and in plain Rust for head sizes that
//! they do not have.

use crate::ffi::{AttentionSpan, KeysAndValues, LARGEST_HEAD, PagedMemory};
use crate::model::paged_cache::{BLOCK, Batch, PagedCache, slot};
use rayon::prelude::*;

/// Keeps the new tokens' keys and values, then attends: each token to those of its sequence up to itself.
///
/// # Shapes
/// qkv (N, (H+2G)*D), turned -> y (N, H*D).
pub fn append_and_attend(
    qkv: &[f32],
    cache: &mut PagedCache,
    layer: usize,
    batch: &Batch,
    (h, g, d): (usize, usize, usize),
    y: &mut [f32],
) {
    if !d.is_multiple_of(8) || d > LARGEST_HEAD {
        return plain(qkv, cache, layer, batch, (h, g, d), y);
    }
    let width = (h + 2 * g) * d;
    let (k, v) = cache.floats_mut(layer); // (slots, G, D) x2
    let mut memory = PagedMemory::new(KeysAndValues::F32 { k, v }, BLOCK, g, d);
    let (mut spans, mut row) = (Vec::new(), 0);
    for sequence in &batch.host {
        let (table, past, tokens) = (&sequence.table[..], sequence.past, sequence.tokens.len());
        spans.push(AttentionSpan { table, past, tokens, row });
        let positions = past..past + tokens;
        for (p, qkv) in positions.zip(qkv[row * width..].chunks(width)) {
            let (k, v) = qkv[h * d..].split_at(g * d);
            memory.store(slot(table, p) as usize, k, v);
        }
        row += tokens;
    }
    memory.attend(&spans, qkv, width, h, 1.0 / (d as f32).sqrt(), y);
}

/// The same without kernels: their reference.
fn plain(
    qkv: &[f32],
    cache: &mut PagedCache,
    layer: usize,
    batch: &Batch,
    (h, g, d): (usize, usize, usize),
    y: &mut [f32],
) {
    let (width, kv) = ((h + 2 * g) * d, g * d);
    let (keys, values) = cache.floats_mut(layer); // (slots, G, D) x2
    // What each token is: its sequence, and where in it.
    let mut tokens = Vec::new();
    for sequence in &batch.host {
        let new = sequence.tokens.len();
        tokens.extend((sequence.past..sequence.past + new).map(|p| (&sequence.table, p)));
    }
    for (row, (table, p)) in qkv.chunks(width).zip(&tokens) {
        let at = slot(table, *p) as usize * kv;
        keys[at..at + kv].copy_from_slice(&row[h * d..(h + g) * d]);
        values[at..at + kv].copy_from_slice(&row[(h + g) * d..]);
    }
    let (keys, values): (&[f32], &[f32]) = (keys, values);
    let per_group = h / g;
    let scale = 1.0 / (d as f32).sqrt();
    // A group's heads of a token together, since they read the same keys and values.
    y.par_chunks_mut(per_group * d).enumerate().for_each(|(i, y)| {
        let (token, group) = (i / g, i % g);
        let (table, position) = tokens[token];
        let q = &qkv[token * width + group * per_group * d..][..per_group * d];
        let row = |p: usize| slot(table, p) as usize * kv + group * d;
        let mut scores = vec![0.0; per_group * (position + 1)]; // (H/G, S)
        for p in 0..=position {
            let k = &keys[row(p)..][..d];
            for (head, q) in q.chunks(d).enumerate() {
                scores[head * (position + 1) + p] = dot(q, k) * scale;
            }
        }
        scores.chunks_mut(position + 1).for_each(softmax);
        y.fill(0.0);
        for p in 0..=position {
            let v = &values[row(p)..][..d];
            for (head, y) in y.chunks_mut(d).enumerate() {
                let weight = scores[head * (position + 1) + p];
                y.iter_mut().zip(v).for_each(|(y, v)| *y += weight * v);
            }
        }
    });
}

/// In 16 sums, which fill vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    let rest = a.len() / 16 * 16;
    let rest: f32 = a[rest..].iter().zip(&b[rest..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
}
