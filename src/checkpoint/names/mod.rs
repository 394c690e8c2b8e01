//! Names and layouts: lit-gpt's in memory; on disk Hugging Face's, and what other formats have ([`Naming`]).
//!
//! | lit-gpt               | Llama on disk                | GPT-NeoX on disk              |
//! |-----------------------|------------------------------|-------------------------------|
//! | `transformer.wte`     | `model.embed_tokens`         | `gpt_neox.embed_in`           |
//! | `transformer.h.{i}.*` | `model.layers.{i}.*`         | `gpt_neox.layers.{i}.*`       |
//! | `  norm_1`            | `  input_layernorm`          | `  input_layernorm`           |
//! | `  attn.qkv`          | `  self_attn.{q,k,v}_proj`   | `  attention.query_key_value` |
//! | `  attn.proj`         | `  self_attn.o_proj`         | `  attention.dense`           |
//! | `  norm_2`            | `  post_attention_layernorm` | `  post_attention_layernorm`  |
//! | `  mlp.fc_1`          | `  mlp.gate_proj`            |                               |
//! | `  mlp.fc_2`          | `  mlp.up_proj`              |                               |
//! | `  mlp.fc`            |                              | `  mlp.dense_h_to_4h`         |
//! | `  mlp.proj`          | `  mlp.down_proj`            | `  mlp.dense_4h_to_h`         |
//! | `transformer.ln_f`    | `model.norm`                 | `gpt_neox.final_layer_norm`   |
//! | `lm_head`             | `lm_head`                    | `embed_out`                   |
//!
//! Llama splits our `[Q; K; V]` rows into three tensors; GPT-NeoX interleaves them a head:
//! `[q_0; k_0; v_0; q_1; ...]`, each of `head_size` rows. No row is permuted for the rotary layout.

mod gguf;
mod litgpt;
mod meta;

pub use litgpt::LitGpt;

use super::outline::outline;
use crate::model::{MlpClass, ModelConfig};
use tch::Tensor;

/// Whose names and layouts the tensors of a checkpoint have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// transformers.
    HuggingFace,
    /// lit-gpt, litgpt and TinyLlama.
    LitGpt(LitGpt),
    /// Meta's `consolidated.*.pth`, and llama2.c.
    Meta,
    /// llama.cpp's files of a Llama.
    Gguf,
}

impl Naming {
    /// The tensors on disk that make up the parameter with this lit-gpt name.
    pub fn parts(self, name: &str, config: &ModelConfig) -> Vec<Part> {
        match self {
            Self::HuggingFace => parts(name, config),
            Self::LitGpt(variant) => litgpt::parts(name, variant),
            Self::Meta => meta::parts(name, config),
            Self::Gguf => gguf::parts(name, config),
        }
    }
}

/// Presets whose tensors on disk would have these shapes, those of equal sizes and settings once.
pub fn presets_that_fit(
    naming: Naming,
    shape: impl Fn(&str) -> Option<Vec<i64>>,
) -> Vec<ModelConfig> {
    let presets = ModelConfig::preset_names();
    let presets = presets.iter().filter_map(|name| ModelConfig::preset(name));
    let fits = |config: &ModelConfig| {
        outline(config).into_iter().all(|(name, ours)| {
            let mut parts = naming.parts(&name, config).into_iter();
            parts.all(|part| shape(&part.name) == Some(disk_shape(&ours, part.layout)))
        })
    };
    // A model with fewer layers fits as well: its tensors are among these.
    let mut found: Vec<ModelConfig> = presets.filter(fits).collect();
    let layers = found.iter().map(|config| config.n_layer).max();
    found.retain(|config| Some(config.n_layer) == layers);
    found
}

/// How the rows of a tensor on disk relate to ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The same tensor.
    Same,
    /// Rows `start .. start + len` of ours.
    Rows {
        /// First row.
        start: i64,
        /// Number of rows.
        len: i64,
    },
    /// Such rows of whole heads, which are rotated in pairs of neighbours there, as Meta's are: of the D rows of a head
    /// theirs are `0, D/2, 1, D/2 + 1, ..` of ours.
    RotaryPairs {
        /// First row.
        start: i64,
        /// Number of rows.
        len: i64,
    },
    /// Ours is `[Q; K; V]`, theirs for each group the H/G heads of its queries, its key and its value: lit-gpt's
    /// packing before December 2024, and GPT-NeoX's, where each head is a group.
    GroupInterleaved,
}

/// One tensor on disk that holds all or a part of one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Hugging Face name.
    pub name: String,
    /// Relation of the rows.
    pub layout: Layout,
}

/// The tensors on disk that make up the parameter with this lit-gpt name.
pub fn parts(name: &str, config: &ModelConfig) -> Vec<Part> {
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
    let neox = config.mlp_class == MlpClass::GptNeoxMLP;
    let one = |module: &str| vec![Part { name: format!("{module}.{kind}"), layout: Layout::Same }];
    match (module, neox) {
        ("transformer.wte", false) => return one("model.embed_tokens"),
        ("transformer.wte", true) => return one("gpt_neox.embed_in"),
        ("transformer.ln_f", false) => return one("model.norm"),
        ("transformer.ln_f", true) => return one("gpt_neox.final_layer_norm"),
        ("lm_head", false) => return one("lm_head"),
        ("lm_head", true) => return one("embed_out"),
        _ => {}
    }
    let rest = module.strip_prefix("transformer.h.").and_then(|rest| rest.split_once('.'));
    let Some((layer, leaf)) = rest else {
        return one(module);
    };
    let prefix = if neox { "gpt_neox.layers" } else { "model.layers" };
    let in_layer = |leaf: &str| one(&format!("{prefix}.{layer}.{leaf}"));
    match (leaf, neox) {
        ("norm_1", _) => in_layer("input_layernorm"),
        ("norm_2", _) => in_layer("post_attention_layernorm"),
        ("attn.qkv", false) => split_qkv(&format!("{prefix}.{layer}.self_attn"), kind, config),
        ("attn.qkv", true) => in_layer("attention.query_key_value")
            .into_iter()
            .map(|part| Part { layout: Layout::GroupInterleaved, ..part })
            .collect(),
        ("attn.proj", false) => in_layer("self_attn.o_proj"),
        ("attn.proj", true) => in_layer("attention.dense"),
        ("mlp.fc_1", _) => in_layer("mlp.gate_proj"),
        ("mlp.fc_2", _) => in_layer("mlp.up_proj"),
        ("mlp.fc", _) => in_layer("mlp.dense_h_to_4h"),
        ("mlp.proj", false) => in_layer("mlp.down_proj"),
        ("mlp.proj", true) => in_layer("mlp.dense_4h_to_h"),
        (other, _) => in_layer(other),
    }
}

fn split_qkv(prefix: &str, kind: &str, config: &ModelConfig) -> Vec<Part> {
    let (q, kv) = (config.n_head * config.head_size, config.n_query_groups * config.head_size);
    let part = |letter, start, len| Part {
        name: format!("{prefix}.{letter}_proj.{kind}"),
        layout: Layout::Rows { start, len },
    };
    vec![part("q", 0, q), part("k", q, kv), part("v", q + kv, kv)]
}

/// Name of the head on disk.
pub fn head_name(config: &ModelConfig) -> &'static str {
    if config.mlp_class == MlpClass::GptNeoxMLP { "embed_out.weight" } else { "lm_head.weight" }
}

/// Tensors that old exports carry and nobody needs.
pub fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || name.ends_with("attention.bias")
        || name.ends_with("attention.masked_bias")
}

/// Shape on disk of our tensor (or its part).
pub fn disk_shape(ours: &[i64], layout: Layout) -> Vec<i64> {
    let mut shape = ours.to_vec();
    if let (Layout::Rows { len, .. } | Layout::RotaryPairs { len, .. }, Some(rows)) =
        (layout, shape.first_mut())
    {
        *rows = len;
    }
    shape
}

/// Our tensor (or its part) as it lies on disk; a view, but a copy where rows are in another order.
pub fn to_disk(ours: &Tensor, layout: Layout, config: &ModelConfig) -> Tensor {
    match layout {
        Layout::Same => ours.shallow_clone(),
        Layout::Rows { start, len } => ours.narrow(0, start, len),
        Layout::RotaryPairs { start, len } => {
            let d = config.head_size;
            transpose_rows(&ours.narrow(0, start, len), [len / d, 2, d / 2, 1])
        }
        Layout::GroupInterleaved => {
            let [q, k, v] = query_key_value(ours, config).map(|part| by_group(&part, config));
            Tensor::cat(&[q, k, v], 1).reshape(ours.size())
        }
    }
}

/// Writes a tensor from disk into ours (or its part) in place, converting the dtype.
pub fn from_disk(ours: &Tensor, theirs: &Tensor, layout: Layout, config: &ModelConfig) {
    match layout {
        Layout::Same => ours.shallow_clone().copy_(theirs),
        Layout::Rows { start, len } => ours.narrow(0, start, len).copy_(theirs),
        Layout::RotaryPairs { start, len } => {
            let d = config.head_size;
            let theirs = transpose_rows(theirs, [len / d, d / 2, 2, 1]);
            ours.narrow(0, start, len).copy_(&theirs);
        }
        Layout::GroupInterleaved => {
            let (g, d) = (config.n_query_groups, config.head_size);
            let heads = config.n_head / g * d;
            let theirs = by_group(theirs, config).split_with_sizes([heads, d, d], 1); // (G, rows, ..) x3
            for (mut ours, theirs) in query_key_value(ours, config).into_iter().zip(theirs) {
                ours.copy_(&theirs.reshape(ours.size()));
            }
        }
    }
}

/// Views of the rows `[Q; K; V]`.
fn query_key_value(ours: &Tensor, config: &ModelConfig) -> [Tensor; 3] {
    let (q, kv) = (config.n_head * config.head_size, config.n_query_groups * config.head_size);
    [ours.narrow(0, 0, q), ours.narrow(0, q, kv), ours.narrow(0, q + kv, kv)]
}

/// (G n, ..) -> (G, n, ..)
fn by_group(x: &Tensor, config: &ModelConfig) -> Tensor {
    let mut shape = vec![config.n_query_groups, x.size()[0] / config.n_query_groups];
    shape.extend(&x.size()[1..]);
    x.reshape(shape)
}

/// Rows in the order (a, b, c, n) -> (a, c, b, n), as many as before.
fn transpose_rows(x: &Tensor, rows: [i64; 4]) -> Tensor {
    let mut shape = rows.to_vec();
    shape.extend(&x.size()[1..]);
    x.reshape(shape).transpose(1, 2).reshape(x.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_heads_and_back_is_the_identity() {
        let config = ModelConfig::preset("pythia-14m").unwrap();
        let rows = 3 * config.n_head * config.head_size;
        let ours = Tensor::arange(rows * 2, tch::kind::FLOAT_CPU).view([rows, 2]);
        let disk = to_disk(&ours, Layout::GroupInterleaved, &config);
        // Row 0 of head 0's key follows the D rows of head 0's query.
        let key_row = config.n_head * config.head_size;
        assert_eq!(disk.double_value(&[config.head_size, 0]), (2 * key_row) as f64);
        let back = ours.zeros_like();
        from_disk(&back, &disk, Layout::GroupInterleaved, &config);
        assert!(back.equal(&ours));
    }

    #[test]
    fn a_llama_layer_has_the_names_of_hugging_face() {
        let config = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let names = |name| parts(name, &config).into_iter().map(|p| p.name).collect::<Vec<_>>();
        assert_eq!(
            names("transformer.h.3.mlp.proj.weight"),
            ["model.layers.3.mlp.down_proj.weight"]
        );
        assert_eq!(
            parts("transformer.h.21.attn.qkv.weight", &config)[1],
            Part {
                name: "model.layers.21.self_attn.k_proj.weight".into(),
                layout: Layout::Rows { start: 2048, len: 256 }
            }
        );
    }
}
