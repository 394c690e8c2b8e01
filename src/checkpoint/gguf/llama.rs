//! Architecture `llama`: names, settings and the order of query and key rows, there and here.
//!
//! Hugging Face rotates a head's first half against its second; llama.cpp rotates neighbours. So
//! the rows of `attn_q` and `attn_k` are interleaved in a file: row `2 i + j` of a head is row
//! `j D/2 + i` of Hugging Face's.

use super::{GgufError, Metadata, TensorInfo};
use serde_json::{Value as Json, json};
use std::f64::consts::TAU;

/// (GGUF, Hugging Face) outside of layers, without `.weight`.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// (GGUF, Hugging Face) within `blk.N.` and `model.layers.N.`.
const INSIDE: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Factors by which llama.cpp divides the rotary frequencies: Llama 3's scaling.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Hugging Face's name of a tensor; `None` for [`ROPE_FACTORS`] and what a Llama does not have.
pub fn hf_name(gguf: &str) -> Option<String> {
    renamed(gguf, "blk.", "model.layers.", |(gguf, hf)| (gguf, hf))
}

/// The inverse of [`hf_name`].
pub fn gguf_name(hf: &str) -> Option<String> {
    renamed(hf, "model.layers.", "blk.", |(gguf, hf)| (hf, gguf))
}

type Pair = (&'static str, &'static str);

/// `from` prefixes a layer's number, `to` replaces it; `order` puts a table's row into (old, new).
fn renamed(name: &str, from: &str, to: &str, order: fn(Pair) -> Pair) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    let look = |table: &[Pair], old: &str| {
        table.iter().map(|&pair| order(pair)).find(|(o, _)| *o == old).map(|(_, new)| new)
    };
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    if let Some(new) = look(&OUTSIDE, module) {
        return Some(format!("{new}.{kind}"));
    }
    let (layer, leaf) = module.strip_prefix(from)?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    Some(format!("{to}{layer}.{}.{kind}", look(&INSIDE, leaf)?))
}

/// Whether rows of the tensor with this GGUF name are interleaved: weight and bias of q and k.
pub fn is_interleaved(gguf: &str) -> bool {
    let leaf = gguf.splitn(3, '.').nth(2).and_then(|leaf| leaf.rsplit_once('.'));
    gguf.starts_with("blk.") && leaf.is_some_and(|(leaf, _)| leaf == "attn_q" || leaf == "attn_k")
}

/// Row of a file that holds this row of Hugging Face's; `head_dim` is even.
pub fn gguf_row(hf_row: usize, head_dim: usize) -> usize {
    let (head, row) = (hf_row / head_dim, hf_row % head_dim);
    head * head_dim + row % (head_dim / 2) * 2 + row / (head_dim / 2)
}

/// The inverse of [`gguf_row`].
pub fn hf_row(gguf_row: usize, head_dim: usize) -> usize {
    let (head, row) = (gguf_row / head_dim, gguf_row % head_dim);
    head * head_dim + row % 2 * (head_dim / 2) + row / 2
}

/// Rows of Hugging Face's q or k as a file has them; `row` values each (1 for a bias). Values or
/// bytes, as no block spans two rows.
pub fn interleave<T: Copy>(values: &[T], row: usize, head_dim: usize) -> Vec<T> {
    reordered(values, row, |to| hf_row(to, head_dim))
}

/// The inverse of [`interleave`].
pub fn split_halves<T: Copy>(values: &[T], row: usize, head_dim: usize) -> Vec<T> {
    reordered(values, row, |to| gguf_row(to, head_dim))
}

fn reordered<T: Copy>(values: &[T], row: usize, source: impl Fn(usize) -> usize) -> Vec<T> {
    let rows = values.len().checked_div(row).unwrap_or(0);
    (0..rows).flat_map(|to| &values[source(to) * row..][..row]).copied().collect()
}

/// `config.json` of a file. `rope_factors` are the values of [`ROPE_FACTORS`], if it is there.
///
/// # Errors
/// Another architecture, experts, missing keys, a scaling that `config.json` cannot say.
pub fn config_json(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    rope_factors: Option<&[f32]>,
) -> Result<Json, GgufError> {
    let m = metadata;
    let architecture = m.str("general.architecture")?;
    if architecture != "llama" {
        return Err(GgufError::key("general.architecture", "`llama`", architecture));
    }
    if m.find_u64("llama.expert_count")?.is_some_and(|n| n > 0) {
        return Err(GgufError::key("llama.expert_count", "0: a model without experts", "more"));
    }
    let has = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
    let (width, heads) = (m.u64("llama.embedding_length")?, m.u64("llama.attention.head_count")?);
    let head_dim = match m.find_u64("llama.attention.key_length")? {
        Some(length) => length,
        None => width.checked_div(heads).unwrap_or(0),
    };
    if let Some(rotary) = m.find_u64("llama.rope.dimension_count")?.filter(|&n| n != head_dim) {
        let expected = format!("{head_dim}, whole heads");
        return Err(GgufError::key("llama.rope.dimension_count", expected, rotary));
    }
    // The embedding's rows are what counts; the key is not in every file.
    let rows = has("token_embd.weight").and_then(|tensor| tensor.shape.first().copied());
    let vocab = match rows {
        Some(rows) => rows,
        None => m.u64("llama.vocab_size")?,
    };
    let base = m.find_f64("llama.rope.freq_base")?.map_or(10_000.0, shortest);
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "_name_or_path": m.find_str("general.name")?.unwrap_or("imported"),
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": m.u64("llama.feed_forward_length")?,
        "num_hidden_layers": m.u64("llama.block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": m.find_u64("llama.attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": m.u64("llama.context_length")?,
        "rms_norm_eps": shortest(m.f64("llama.attention.layer_norm_rms_epsilon")?),
        "rope_theta": base,
        "rope_scaling": rope_scaling(m, base, head_dim, rope_factors)?,
        "vocab_size": vocab,
        "tie_word_embeddings": has("output.weight").is_none(),
        "attention_bias": has("blk.0.attn_q.bias").is_some(),
        "mlp_bias": has("blk.0.ffn_gate.bias").is_some(),
        "bos_token_id": m.find_u64("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": m.find_u64("tokenizer.ggml.eos_token_id")?,
    }))
}

/// The decimal that a 32-bit float was written for: 1e-5, not 9.999999747378752e-6.
fn shortest(x: f64) -> f64 {
    let narrow = x as f32;
    if f64::from(narrow) == x { narrow.to_string().parse().unwrap_or(x) } else { x }
}

fn rope_scaling(
    m: &Metadata,
    base: f64,
    head_dim: u64,
    factors: Option<&[f32]>,
) -> Result<Json, GgufError> {
    let number = |key: &str| Ok(m.find_f64(&format!("llama.rope.scaling.{key}"))?.map(shortest));
    if let Some(factors) = factors {
        return llama3_scaling(factors, base, head_dim);
    }
    let factor = match number("factor")? {
        Some(factor) => Some(factor),
        None => m.find_f64("llama.rope.scale_linear")?.map(shortest), // of old files
    };
    let kind = m.find_str("llama.rope.scaling.type")?;
    match (kind, factor) {
        (Some("none"), _) | (None, None) => Ok(Json::Null),
        (Some("linear") | None, Some(factor)) => {
            Ok(json!({"rope_type": "linear", "factor": factor}))
        }
        (Some("yarn"), Some(factor)) => {
            for (key, neutral) in NEUTRAL {
                if let Some(other) = number(key)?.filter(|n| !neutral.contains(n)) {
                    let key = format!("llama.rope.scaling.{key}");
                    return Err(GgufError::key(&key, neutral[0], other));
                }
            }
            let mut out = json!({"rope_type": "yarn", "factor": factor});
            for (ours, theirs) in YARN {
                match number(theirs)? {
                    // transformers wants an integer here
                    Some(n) if ours.ends_with("embeddings") => out[ours] = json!(n as u64),
                    Some(n) => out[ours] = json!(n),
                    None => {}
                }
            }
            Ok(out)
        }
        (Some(kind), _) => {
            let expected = "`none`, `linear` or `yarn` with a factor";
            Err(GgufError::key("llama.rope.scaling.type", expected, kind))
        }
    }
}

/// (`rope_scaling`, `llama.rope.scaling.`) of yarn.
const YARN: [(&str, &str); 3] = [
    ("original_max_position_embeddings", "original_context_length"),
    ("beta_fast", "yarn_beta_fast"),
    ("beta_slow", "yarn_beta_slow"),
];

/// Keys under `llama.rope.scaling.` that `rope_scaling` has no place for, and what changes nothing.
const NEUTRAL: [(&str, [f64; 2]); 4] = [
    ("attn_factor", [1.0; 2]),
    ("yarn_attn_factor", [1.0; 2]),
    ("yarn_ext_factor", [1.0, -1.0]), // -1: yarn's own
    ("yarn_log_multiplier", [0.0; 2]),
];

/// `factor, low_freq_factor, high_freq_factor, original length` of Llama 3's scaling.
#[derive(Clone, Copy, Debug)]
pub struct Llama3Rope {
    /// Divides low frequencies.
    pub factor: f64,
    /// Waves longer than `length / low` are divided in full.
    pub low: f64,
    /// Waves shorter than `length / high` are kept.
    pub high: f64,
    /// Length that the model was first trained on.
    pub length: f64,
}

impl Llama3Rope {
    /// Values of [`ROPE_FACTORS`], `head_dim / 2` of them: for wavelength `w = 2 pi base^(2i/D)` 1
    /// where `w < length / high`, `factor` where `w > length / low`, else
    /// `1 / ((1 - s) / factor + s)` with `s = (length / w - low) / (high - low)`.
    pub fn factors(&self, base: f64, head_dim: u64) -> Vec<f32> {
        let of_pair = |i: u64| {
            let wave = TAU * base.powf(2.0 * i as f64 / head_dim as f64);
            if wave < self.length / self.high {
                return 1.0;
            }
            if wave > self.length / self.low {
                return self.factor as f32;
            }
            let smooth = (self.length / wave - self.low) / (self.high - self.low);
            (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
        };
        (0..head_dim / 2).map(of_pair).collect()
    }

    /// Of a `config.json`, if its scaling is Llama 3's.
    pub fn of_config(config: &Json) -> Option<Self> {
        let scaling = scaling_of(config)?;
        let number = |key: &str| scaling.get(key).and_then(Json::as_f64);
        (rope_type(scaling) == "llama3").then_some(())?;
        Some(Self {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            length: number("original_max_position_embeddings")?,
        })
    }
}

/// A file has only the factors; these are compared with those of the published settings (low 1, high
/// 4, trained on 8192).
fn llama3_scaling(factors: &[f32], base: f64, head_dim: u64) -> Result<Json, GgufError> {
    let factor = factors.iter().fold(1.0f32, |a, &b| a.max(b));
    let known = Llama3Rope { factor: factor.into(), low: 1.0, high: 4.0, length: 8192.0 };
    let want = known.factors(base, head_dim);
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * b.abs();
    if factors.len() != want.len() || !factors.iter().zip(&want).all(near) {
        let expected = "the factors of Llama 3 (low 1, high 4, length 8192)";
        return Err(GgufError::tensor(ROPE_FACTORS, expected, format!("up to {factor}")));
    }
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }))
}

fn scaling_of(config: &Json) -> Option<&Json> {
    let object = |key: &str| config.get(key).filter(|value| value.is_object());
    object("rope_scaling").or(object("rope_parameters"))
}

fn rope_type(scaling: &Json) -> &str {
    let text = |key: &str| scaling.get(key).and_then(Json::as_str);
    text("rope_type").or(text("type")).unwrap_or("default")
}

/// Metadata of a `config.json` of a Llama: `general.*` and `llama.*`. With [`Llama3Rope::of_config`]
/// the file needs the tensor [`ROPE_FACTORS`] too.
///
/// # Errors
/// Another architecture, missing keys, a scaling that a file cannot say (`dynamic`, or a yarn whose attention factor
/// or ramp is not the usual one).
pub fn metadata(config: &Json, name: &str) -> Result<Metadata, GgufError> {
    let kind = config.get("model_type").and_then(Json::as_str).unwrap_or("");
    if kind != "llama" {
        return Err(GgufError::key("model_type", "`llama`", kind));
    }
    let find = |key: &str| config.get(key).filter(|value| !value.is_null());
    let need = |key: &str| find(key).ok_or_else(|| GgufError::key(key, "a value", "no such key"));
    let small = |key: &str, value: &Json| {
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
        number.ok_or_else(|| GgufError::key(key, "an integer below 2^32", value))
    };
    let int = |key: &str| small(key, need(key)?);
    let (width, heads) = (int("hidden_size")?, int("num_attention_heads")?);
    let groups =
        find("num_key_value_heads").map_or(Ok(heads), |n| small("num_key_value_heads", n))?;
    let whole = width.checked_div(heads).unwrap_or(0);
    let head_dim = find("head_dim").map_or(Ok(whole), |n| small("head_dim", n))?;
    let base = [find("rope_theta"), scaling_of(config).and_then(|s| s.get("rope_theta"))];
    let base = base.into_iter().flatten().find_map(Json::as_f64).unwrap_or(10_000.0);
    let eps = find("rms_norm_eps").and_then(Json::as_f64).unwrap_or(1e-6);

    let mut m = Metadata::default();
    m.set("general.architecture", "llama");
    m.set("general.name", name);
    m.set("llama.vocab_size", int("vocab_size")?);
    m.set("llama.context_length", int("max_position_embeddings")?);
    m.set("llama.embedding_length", width);
    m.set("llama.block_count", int("num_hidden_layers")?);
    m.set("llama.feed_forward_length", int("intermediate_size")?);
    m.set("llama.attention.head_count", heads);
    m.set("llama.attention.head_count_kv", groups);
    m.set("llama.attention.layer_norm_rms_epsilon", eps as f32);
    m.set("llama.attention.key_length", head_dim);
    m.set("llama.attention.value_length", head_dim);
    m.set("llama.rope.dimension_count", head_dim);
    m.set("llama.rope.freq_base", base as f32);
    if let Some(scaling) = scaling_of(config) {
        set_scaling(&mut m, scaling)?;
    }
    Ok(m)
}

fn set_scaling(m: &mut Metadata, scaling: &Json) -> Result<(), GgufError> {
    let number = |key: &str| scaling.get(key).and_then(Json::as_f64);
    let kind = rope_type(scaling);
    match kind {
        "default" | "llama3" => return Ok(()), // the latter is a tensor
        "linear" | "yarn" => {}
        other => {
            let expected = "`linear`, `yarn` or `llama3`, which llama.cpp knows";
            return Err(GgufError::key("rope_scaling.rope_type", expected, other));
        }
    }
    let missing = || GgufError::key("rope_scaling.factor", "a number", "no such key");
    let factor = number("factor").ok_or_else(missing)?;
    if kind == "yarn" {
        refuse_unusual(scaling, factor)?;
    }
    m.set("llama.rope.scaling.type", kind);
    m.set("llama.rope.scaling.factor", factor as f32);
    for (ours, theirs) in YARN.iter().filter(|_| kind == "yarn") {
        let key = format!("llama.rope.scaling.{theirs}");
        match number(ours) {
            Some(n) if ours.ends_with("embeddings") => m.set(key, n as u32),
            Some(n) => m.set(key, n as f32),
            None => {}
        }
    }
    Ok(())
}

/// Refuses a yarn with another attention factor than `0.1 ln(factor) + 1`, or with a ramp between fractions of
/// dimensions: llama.cpp computes these two itself.
fn refuse_unusual(scaling: &Json, factor: f64) -> Result<(), GgufError> {
    let number = |key: &str| scaling.get(key).and_then(Json::as_f64);
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let both = number("mscale").zip(number("mscale_all_dim")).filter(|(m, all)| m * all != 0.0);
    let (key, attention) = match (number("attention_factor"), both) {
        (Some(given), _) => ("rope_scaling.attention_factor", given),
        (None, Some((m, all))) => ("rope_scaling.mscale", scale(m) / scale(all)),
        (None, None) => ("", scale(1.0)),
    };
    if (attention - scale(1.0)).abs() > 1e-6 {
        let expected = format!("an attention factor of {:.6}, which llama.cpp takes", scale(1.0));
        return Err(GgufError::key(key, expected, attention));
    }
    if scaling.get("truncate") == Some(&Json::Bool(false)) {
        let expected = "true, as llama.cpp computes it";
        return Err(GgufError::key("rope_scaling.truncate", expected, false));
    }
    Ok(())
}
