//! What a model is: litgpt's `Config`, with a preset for each published model.
//!
//! A new Llama needs no code: take the nearest preset and override fields in the YAML's `model_config`.

use super::presets;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Architecture of a decoder-only transformer of the Llama or the GPT-NeoX family.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the preset it started from.
    pub name: String,
    /// Longest sequence, in tokens (`max_position_embeddings`).
    pub block_size: i64,
    /// Ids that the tokenizer knows.
    pub vocab_size: i64,
    /// Rows of embedding and head: V. At least `vocab_size`, padded for fast matrix products.
    pub padded_vocab_size: i64,
    /// Blocks: L.
    pub n_layer: i64,
    /// Query heads: H.
    pub n_head: i64,
    /// Width of the residual stream: C.
    pub n_embd: i64,
    /// Key/value heads: G. `n_head` is plain attention, 1 is multi-query, between is grouped-query.
    pub n_query_groups: i64,
    /// Width of a head: D. Usually `n_embd / n_head`.
    pub head_size: i64,
    /// Width of the MLP: F.
    pub intermediate_size: i64,
    /// Share of each head that is rotated.
    pub rotary_percentage: f64,
    /// Base of the rotary angles (`rope_theta`).
    pub rope_base: f64,
    /// Length extrapolation, with Hugging Face's meaning of the keys; `null`: none.
    pub rope_scaling: Option<RopeScaling>,
    /// Biases in the linear layers of attention output and MLP.
    pub bias: bool,
    /// Biases in the QKV projection.
    pub attn_bias: bool,
    /// `x + attn(norm_1(x)) + mlp(norm_2(x))` instead of one after the other.
    pub parallel_residual: bool,
    /// `RMSNorm` or `LayerNorm`.
    pub norm_class: NormClass,
    /// Added to the variance inside the norms.
    pub norm_eps: f64,
    /// `LLaMAMLP` (SwiGLU) or `GptNeoxMLP` (GELU).
    pub mlp_class: MlpClass,
    /// One matrix for input embedding and head.
    pub tie_embeddings: bool,
}

/// Normalisation layer.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[allow(clippy::upper_case_acronyms)]
pub enum NormClass {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    RMSNorm,
    /// `(x - mean) / sqrt(var + eps) * weight + bias`.
    LayerNorm,
}

/// Feed-forward layer.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[allow(clippy::upper_case_acronyms)]
pub enum MlpClass {
    /// `proj(silu(fc_1(x)) * fc_2(x))`.
    LLaMAMLP,
    /// `proj(gelu(fc(x)))`, exact GELU.
    GptNeoxMLP,
}

/// Kind of length extrapolation.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum RopeType {
    /// Positions divided by `factor` (lit-gpt's condense ratio).
    Linear,
    /// NTK base change that grows with the sequence beyond `block_size`.
    Dynamic,
    /// YaRN: interpolates low frequencies, keeps high ones, scales attention.
    Yarn,
    /// Llama 3.1's smoothed interpolation.
    Llama3,
}

/// Hugging Face's `rope_scaling`; keys that a type does not use must be absent.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// `linear`, `dynamic`, `yarn` or `llama3`.
    #[serde(alias = "type")]
    pub rope_type: RopeType,
    /// Ratio of the new to the original context.
    pub factor: f64,
    /// Context of pretraining (`dynamic`, `yarn`, `llama3`); default: `block_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<i64>,
    /// `yarn`: multiplies cos and sin; default `0.1 ln(factor) + 1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// `yarn`: rotations above which a frequency is kept; default 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    /// `yarn`: rotations below which a frequency is interpolated; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    /// `yarn`: with `mscale_all_dim`, another default of `attention_factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// See `mscale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// `yarn`: round the borders of the ramp to whole dimensions; default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    /// `llama3`: wavelengths longer than original/this are interpolated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// `llama3`: wavelengths shorter than original/this are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
}

impl RopeScaling {
    /// A scaling of the given type with every other key absent.
    pub fn new(rope_type: RopeType, factor: f64) -> Self {
        Self {
            rope_type,
            factor,
            original_max_position_embeddings: None,
            attention_factor: None,
            beta_fast: None,
            beta_slow: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: None,
            low_freq_factor: None,
            high_freq_factor: None,
        }
    }
}

impl ModelConfig {
    /// A published model by name, letter case ignored; see [`ModelConfig::preset_names`].
    pub fn preset(name: &str) -> Option<Self> {
        presets::all().into_iter().find(|c| c.name.eq_ignore_ascii_case(name))
    }

    /// Names of all presets, in the order of the table.
    pub fn preset_names() -> Vec<String> {
        presets::all().into_iter().map(|c| c.name).collect()
    }

    /// Dimensions of a head that are rotated.
    pub fn rope_n_elem(&self) -> i64 {
        (self.rotary_percentage * self.head_size as f64) as i64
    }

    /// Rows of the packed QKV projection: (H + 2 G) D.
    pub fn qkv_rows(&self) -> i64 {
        (self.n_head + 2 * self.n_query_groups) * self.head_size
    }

    /// Longest sequence that the positions are defined for; `dynamic` scaling reaches beyond `block_size`.
    pub fn max_length(&self) -> i64 {
        match &self.rope_scaling {
            Some(s) if s.rope_type == RopeType::Dynamic => {
                (self.block_size as f64 * s.factor) as i64
            }
            _ => self.block_size,
        }
    }

    /// Number of parameters; a tied head is counted once.
    pub fn n_params(&self) -> u64 {
        let c = self.n_embd;
        let embeddings = self.padded_vocab_size * c * if self.tie_embeddings { 1 } else { 2 };
        let norm = c * if self.norm_class == NormClass::LayerNorm { 2 } else { 1 };
        let biases = if self.bias { c + self.mlp_inputs() * self.intermediate_size + c } else { 0 }
            + if self.attn_bias { self.qkv_rows() } else { 0 };
        let block = self.block_matmul_params() as i64 + 2 * norm + biases;
        (embeddings + self.n_layer * block + norm) as u64
    }

    /// Parameters that take part in a matrix product for each token: all but input embedding, norms and
    /// biases. The N_matmul of the FLOP formulas; a tied head counts.
    pub fn n_matmul_params(&self) -> u64 {
        (self.padded_vocab_size * self.n_embd) as u64
            + self.n_layer as u64 * self.block_matmul_params()
    }

    /// Matrices that read the MLP's input: gate and up, or one.
    fn mlp_inputs(&self) -> i64 {
        if self.mlp_class == MlpClass::LLaMAMLP { 2 } else { 1 }
    }

    fn block_matmul_params(&self) -> u64 {
        let c = self.n_embd;
        let attention = self.qkv_rows() * c + self.n_head * self.head_size * c;
        (attention + (self.mlp_inputs() + 1) * c * self.intermediate_size) as u64
    }

    /// Everything about these fields that cannot work; empty where all is well.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, message: String| {
            if !ok {
                problems.push(message);
            }
        };
        let sizes = [
            ("block_size", self.block_size),
            ("vocab_size", self.vocab_size),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("n_embd", self.n_embd),
            ("n_query_groups", self.n_query_groups),
            ("head_size", self.head_size),
            ("intermediate_size", self.intermediate_size),
        ];
        for (key, value) in sizes {
            // Parameters are counted in 64 bits.
            let most = if key == "n_layer" { 100_000 } else { 1 << 26 };
            check(
                (1..=most).contains(&value),
                match value {
                    ..1 => format!("`{key}`: must be at least 1, got {value}"),
                    _ => format!("`{key}`: must be at most {most}, got {value}"),
                },
            );
        }
        let (h, g) = (self.n_head, self.n_query_groups.max(1));
        check(h % g == 0, format!("`n_query_groups`: must divide `n_head` = {h}, got {g}"));
        check(
            self.padded_vocab_size >= self.vocab_size,
            format!(
                "`padded_vocab_size`: must be at least `vocab_size` = {}, got {}",
                self.vocab_size, self.padded_vocab_size
            ),
        );
        let n_elem = self.rope_n_elem();
        check(
            n_elem % 2 == 0 && (0..=self.head_size).contains(&n_elem),
            format!(
                "`rotary_percentage`: must rotate an even number of the head's {} dimensions, got {n_elem}",
                self.head_size
            ),
        );
        check(self.norm_eps > 0.0, format!("`norm_eps`: must be above 0, got {}", self.norm_eps));
        check(
            self.rope_base > 1.0,
            format!("`rope_base`: must be above 1, got {}", self.rope_base),
        );
        if let Some(s) = &self.rope_scaling {
            check(
                s.factor >= 1.0,
                format!("`rope_scaling.factor`: must be at least 1, got {}", s.factor),
            );
            check(
                s.rope_type != RopeType::Llama3
                    || (s.low_freq_factor.is_some() && s.high_freq_factor.is_some()),
                "`rope_scaling`: `llama3` needs `low_freq_factor` and `high_freq_factor`".into(),
            );
        }
        problems
    }
}
