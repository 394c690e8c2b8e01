//! Attention over a paged cache on the CPU: by the kernels of `csrc/cpu/decode.h`, and in plain Rust for head sizes that
//! they do not have.

use crate::ffi::{AttentionSpan, KeysAndValues, LARGEST_HEAD, PagedMemory};
use crate::model::paged_cache::{BLOCK, Batch, PagedCache, slot};
use half::{bf16, f16};
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
    let mut memory = PagedMemory::new(cache.memory_mut(layer), BLOCK, g, d);
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
    let width = (h + 2 * g) * d;
    let mut memory = cache.memory_mut(layer); // (slots, G, D) x2
    // What each token is: its sequence, and where in it.
    let mut tokens = Vec::new();
    for sequence in &batch.host {
        let new = sequence.tokens.len();
        tokens.extend((sequence.past..sequence.past + new).map(|p| (&sequence.table, p)));
    }
    for (row, (table, p)) in qkv.chunks(width).zip(&tokens) {
        let (k, v) = row[h * d..].split_at(g * d);
        for (group, (k, v)) in k.chunks(d).zip(v.chunks(d)).enumerate() {
            put(&mut memory, slot(table, *p) as usize * g + group, k, v);
        }
    }
    let memory = &memory;
    let per_group = h / g;
    let scale = 1.0 / (d as f32).sqrt();
    // A group's heads of a token together, since they read the same keys and values.
    y.par_chunks_mut(per_group * d).enumerate().for_each(|(i, y)| {
        let (token, group) = (i / g, i % g);
        let (table, position) = tokens[token];
        let q = &qkv[token * width + group * per_group * d..][..per_group * d];
        let row = |p: usize| slot(table, p) as usize * g + group;
        let mut scores = vec![0.0; per_group * (position + 1)]; // (H/G, S)
        let mut x = vec![0.0; d]; // a key, then a value
        for p in 0..=position {
            get(memory, false, row(p), &mut x);
            for (head, q) in q.chunks(d).enumerate() {
                scores[head * (position + 1) + p] = dot(q, &x) * scale;
            }
        }
        scores.chunks_mut(position + 1).for_each(softmax);
        y.fill(0.0);
        for p in 0..=position {
            get(memory, true, row(p), &mut x);
            for (head, y) in y.chunks_mut(d).enumerate() {
                let weight = scores[head * (position + 1) + p];
                y.iter_mut().zip(&x).for_each(|(y, v)| *y += weight * v);
            }
        }
    });
}

/// Keeps the key and the value (D,) of one group in row `slot * G + group`.
fn put(memory: &mut KeysAndValues, row: usize, k: &[f32], v: &[f32]) {
    let place = row * k.len()..(row + 1) * k.len();
    let halves = |to: &mut [u16], x: &[f32], half: fn(f32) -> u16| {
        to.iter_mut().zip(x).for_each(|(to, &x)| *to = half(x));
    };
    let bytes = |to: &mut [i8], scale: &mut f32, x: &[f32]| {
        let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        *scale = most / 127.0;
        to.iter_mut().zip(x).for_each(|(to, x)| *to = (x * inverse).round_ties_even() as i8);
    };
    match memory {
        KeysAndValues::F32 { k: keys, v: values } => {
            keys[place.clone()].copy_from_slice(k);
            values[place].copy_from_slice(v);
        }
        KeysAndValues::Bf16 { k: keys, v: values } => {
            halves(&mut keys[place.clone()], k, |x| bf16::from_f32(x).to_bits());
            halves(&mut values[place], v, |x| bf16::from_f32(x).to_bits());
        }
        KeysAndValues::F16 { k: keys, v: values } => {
            halves(&mut keys[place.clone()], k, |x| f16::from_f32(x).to_bits());
            halves(&mut values[place], v, |x| f16::from_f32(x).to_bits());
        }
        KeysAndValues::Int8 { k: keys, v: values, k_scale, v_scale } => {
            bytes(&mut keys[place.clone()], &mut k_scale[row], k);
            bytes(&mut values[place], &mut v_scale[row], v);
        }
    }
}

/// The key, or the value, of that row.
fn get(memory: &KeysAndValues, value: bool, row: usize, out: &mut [f32]) {
    let place = row * out.len()..(row + 1) * out.len();
    let halves = |from: &[u16], out: &mut [f32], whole: fn(u16) -> f32| {
        out.iter_mut().zip(from).for_each(|(out, &x)| *out = whole(x));
    };
    match memory {
        KeysAndValues::F32 { k, v } => out.copy_from_slice(&if value { v } else { k }[place]),
        KeysAndValues::Bf16 { k, v } => {
            let from = &if value { v } else { k }[place];
            halves(from, out, |x| bf16::from_bits(x).to_f32());
        }
        KeysAndValues::F16 { k, v } => {
            let from = &if value { v } else { k }[place];
            halves(from, out, |x| f16::from_bits(x).to_f32());
        }
        KeysAndValues::Int8 { k, v, k_scale, v_scale } => {
            let (from, scale) = if value { (v, v_scale[row]) } else { (k, k_scale[row]) };
            out.iter_mut().zip(&from[place]).for_each(|(out, &x)| *out = scale * x as f32);
        }
    }
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
