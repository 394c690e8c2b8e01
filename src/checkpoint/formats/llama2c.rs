//! llama2.c's `.bin`: a header of sizes, then fp32 weights one behind the other, Meta's names and rotary pairs.
//!
//! Version 0 has seven i32 (`dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len`), where a
//! `vocab_size` below zero says that the head is a tensor of its own; then embedding, norms and matrices kind by kind.
//! Version 1 begins with the number `ak42` and the version, has a byte for a shared head behind the sizes, and the
//! weights, norms first, from byte 256 on. Version 2, of 8-bit weights, is refused.

use super::Opened;
use crate::bail_hint;
use crate::checkpoint::hf_config;
use crate::checkpoint::names::Naming;
use crate::checkpoint::weights::{Store, Weights};
use crate::ffi::{self, TensorView};
use anyhow::{Context, Result};
use memmap2::Mmap;
use serde_json::json;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use tch::Kind;

const MAGIC: &[u8] = b"24ka";
const HEADER_1: u64 = 256;

/// Sizes of the model, and where its weights begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    version: u32,
    sizes: [u64; 7],
    shared: bool,
    data: u64,
}

impl Header {
    /// Of a file's first bytes (256 are enough), if its length is the one that its sizes ask for.
    pub fn of(first: &[u8], length: u64) -> Option<Self> {
        let number = |at: usize| first.get(at..at + 4)?.try_into().ok().map(i32::from_le_bytes);
        let (version, at) = match first.starts_with(MAGIC) {
            true => (u32::try_from(number(4)?).ok()?, 8),
            false => (0, 0),
        };
        let mut sizes = [0; 7];
        for (i, size) in sizes.iter_mut().enumerate() {
            *size = u64::from(number(at + 4 * i)?.unsigned_abs());
        }
        let header = match version {
            0 if at == 0 => Self { version, sizes, shared: number(20)? > 0, data: 28 },
            1 => Self { version, sizes, shared: *first.get(36)? != 0, data: HEADER_1 },
            other => Self { version: other, sizes, shared: true, data: HEADER_1 },
        };
        (header.version > 1 || header.length() == Some(length)).then_some(header)
    }

    /// Bytes of the whole file.
    fn length(&self) -> Option<u64> {
        let tensors = self.tensors()?;
        let values = |shape: &[u64]| shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let sum = |sum: u64, (_, n, shape): &(_, u64, Vec<u64>)| {
            values(shape)?.checked_mul(*n)?.checked_mul(4)?.checked_add(sum)
        };
        tensors.iter().try_fold(self.data, sum)
    }

    /// Kinds of tensors in the order of the file: name (`{}`: the layer), how many, shape.
    fn tensors(&self) -> Option<Vec<(&'static str, u64, Vec<u64>)>> {
        let [dim, hidden, layers, heads, kv_heads, vocab, length] = self.sizes;
        let whole = dim.checked_rem(heads)? == 0 && heads.checked_rem(kv_heads)? == 0;
        if !whole || [hidden, layers, vocab, length].contains(&0) {
            return None;
        }
        let (head, kv) = (dim / heads, dim / heads * kv_heads);
        let embedding = ("tok_embeddings", 1, vec![vocab, dim]);
        let attention_norm = ("layers.{}.attention_norm", layers, vec![dim]);
        let ffn_norm = ("layers.{}.ffn_norm", layers, vec![dim]);
        let norm = ("norm", 1, vec![dim]);
        let attention = [
            ("layers.{}.attention.wq", layers, vec![dim, dim]),
            ("layers.{}.attention.wk", layers, vec![kv, dim]),
            ("layers.{}.attention.wv", layers, vec![kv, dim]),
            ("layers.{}.attention.wo", layers, vec![dim, dim]),
        ];
        let mlp = [
            ("layers.{}.feed_forward.w1", layers, vec![hidden, dim]),
            ("layers.{}.feed_forward.w2", layers, vec![dim, hidden]),
            ("layers.{}.feed_forward.w3", layers, vec![hidden, dim]),
        ];
        let mut all = Vec::new();
        match self.version {
            0 => {
                all.extend([embedding, attention_norm]);
                all.extend(attention);
                all.push(ffn_norm);
                all.extend(mlp);
                all.push(norm);
                // Tables of cosine and sine, which are made anew here.
                all.extend([("", 1, vec![length, head / 2]), ("", 1, vec![length, head / 2])]);
            }
            _ => {
                all.extend([attention_norm, ffn_norm, norm, embedding]);
                all.extend(attention);
                all.extend(mlp);
            }
        }
        if !self.shared {
            all.push(("output", 1, vec![vocab, dim]));
        }
        Some(all)
    }
}

pub(super) fn open(path: &Path) -> Result<Opened> {
    let told = || format!("cannot read `{}`", path.display());
    let file = File::open(path).with_context(told)?;
    let map = ffi::map_file(&file).with_context(told)?;
    let header = Header::of(&map, map.len() as u64).with_context(told)?;
    if header.version > 1 {
        bail_hint!(
            "export the model in version 0 or 1, whose weights are fp32";
            "`{}` is a llama2.c file of version {}, expected 0 or 1", path.display(), header.version
        );
    }
    let [dim, hidden, layers, heads, kv_heads, vocab, length] = header.sizes;
    let config = hf_config::from_json(&json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": header.shared,
    }))
    .with_context(|| format!("in `{}`", path.display()))?;
    let mut weights = Weights::default();
    weights.add(Box::new(Llama2c::of(map, &header)), |name| Some(name.to_owned()))?;
    Ok(Opened::new("llama2.c", config, Naming::Meta, weights))
}

/// Tensors by their place in the file.
struct Llama2c {
    map: Mmap,
    /// First byte and shape.
    places: HashMap<String, (usize, Vec<i64>)>,
}

impl Llama2c {
    fn of(map: Mmap, header: &Header) -> Self {
        let (mut places, mut at) = (HashMap::new(), header.data as usize);
        for (kind, count, shape) in header.tensors().unwrap_or_default() {
            let bytes = 4 * shape.iter().product::<u64>() as usize;
            let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
            for layer in 0..count {
                if !kind.is_empty() {
                    let name = format!("{}.weight", kind.replace("{}", &layer.to_string()));
                    places.insert(name, (at, shape.clone()));
                }
                at += bytes;
            }
        }
        Self { map, places }
    }
}

impl Store for Llama2c {
    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.places.get(name).map(|(_, shape)| shape.clone())
    }

    fn kind(&self, _: &str) -> Result<Kind> {
        Ok(Kind::Float)
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let (at, shape) = self.places.get(name).with_context(|| format!("no tensor `{name}`"))?;
        let row = 4 * shape[1..].iter().product::<i64>() as usize;
        let mut shape = shape.clone();
        shape[0] = rows.end - rows.start;
        let bytes = &self.map[at + rows.start as usize * row..at + rows.end as usize * row];
        Ok(TensorView::over(bytes, &shape, Kind::Float))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_taken_only_with_the_length_that_it_asks_for() {
        let sizes = [64, 172, 5, 8, 4, 512, 512]; // stories260K
        let bytes = |sizes: [i32; 7]| sizes.map(i32::to_le_bytes).concat();
        let weights = 512 * 64 + 5 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64) + 64;
        let length = 28 + 4 * (weights + 2 * 512 * 4);
        let header = Header::of(&bytes(sizes), length).unwrap();
        assert!(header.shared && header.version == 0);
        assert_eq!(Header::of(&bytes(sizes), length - 4), None);
        let own = [64, 172, 5, 8, 4, -512, 512];
        assert!(!Header::of(&bytes(own), length + 4 * 512 * 64).unwrap().shared);
        for bad in [[0; 7], [i32::MIN; 7], [i32::MAX; 7], [64, 172, 5, 0, 4, 512, 512]] {
            assert_eq!(Header::of(&bytes(bad), length), None, "{bad:?}");
        }
    }
}
