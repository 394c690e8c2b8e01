//! `config.json` of Hugging Face <-> [`ModelConfig`].

use crate::error::WithHint;
use crate::model::{MlpClass, ModelConfig, NormClass, RopeScaling};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Reads `dir/config.json`.
///
/// # Errors
/// An architecture, activation or RoPE type that is not supported, by its name; missing keys.
pub fn read(dir: &Path) -> Result<ModelConfig> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))
        .hint("a checkpoint is a folder with `config.json` and `model.safetensors`")?;
    let json: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))?;
    from_json(&json).with_context(|| format!("in `{}`", path.display()))
}

/// A parsed `config.json` as our configuration.
pub fn from_json(json: &Value) -> Result<ModelConfig> {
    let architecture = json.pointer("/architectures/0").and_then(Value::as_str).unwrap_or("");
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("");
    match (architecture, model_type) {
        ("LlamaForCausalLM", _) | ("", "llama") => llama(json),
        ("GPTNeoXForCausalLM", _) | ("", "gpt_neox") => neox(json),
        (name, kind) => Err(anyhow!("architecture `{name}` (`model_type` `{kind}`)"))
            .hint("supported are `LlamaForCausalLM` and `GPTNeoXForCausalLM`"),
    }
}

/// Typed access to the keys of one object.
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn int(&self, key: &str) -> Result<i64> {
        self.0.get(key).and_then(Value::as_i64).with_context(|| format!("`{key}` is missing"))
    }

    fn int_or(&self, key: &str, default: i64) -> i64 {
        self.0.get(key).and_then(Value::as_i64).unwrap_or(default)
    }

    fn float_or(&self, key: &str, default: f64) -> f64 {
        self.0.get(key).and_then(Value::as_f64).unwrap_or(default)
    }

    fn bool_or(&self, key: &str, default: bool) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn text_or<'a>(&'a self, key: &str, default: &'a str) -> &'a str {
        self.0.get(key).and_then(Value::as_str).unwrap_or(default)
    }
}

fn llama(json: &Value) -> Result<ModelConfig> {
    let keys = Keys(json);
    let activation = keys.text_or("hidden_act", "silu");
    if activation != "silu" {
        bail!("`hidden_act` `{activation}`: the Llama family here has `silu`");
    }
    let (n_embd, n_head) = (keys.int("hidden_size")?, keys.int("num_attention_heads")?);
    let attn_bias = keys.bool_or("attention_bias", false);
    let bias = keys.bool_or("mlp_bias", false);
    if attn_bias != bias {
        bail!("`attention_bias` {attn_bias} with `mlp_bias` {bias} is not supported");
    }
    let (rope_base, rope_scaling) = rope(json, "rope_theta")?;
    let vocab = keys.int("vocab_size")?;
    Ok(ModelConfig {
        name: name(json),
        block_size: keys.int("max_position_embeddings")?,
        vocab_size: vocab,
        padded_vocab_size: vocab,
        n_layer: keys.int("num_hidden_layers")?,
        n_head,
        n_embd,
        n_query_groups: keys.int_or("num_key_value_heads", n_head),
        head_size: keys.int_or("head_dim", n_embd / n_head.max(1)),
        intermediate_size: keys.int("intermediate_size")?,
        rotary_percentage: 1.0,
        rope_base,
        rope_scaling,
        bias,
        attn_bias,
        parallel_residual: false,
        norm_class: NormClass::RMSNorm,
        norm_eps: keys.float_or("rms_norm_eps", 1e-6),
        mlp_class: MlpClass::LLaMAMLP,
        tie_embeddings: keys.bool_or("tie_word_embeddings", false),
    })
}

fn neox(json: &Value) -> Result<ModelConfig> {
    let keys = Keys(json);
    let activation = keys.text_or("hidden_act", "gelu");
    if activation != "gelu" {
        bail!("`hidden_act` `{activation}`: the GPT-NeoX family here has the exact `gelu`");
    }
    if !keys.bool_or("attention_bias", true) {
        bail!("`attention_bias` false is not supported for GPT-NeoX");
    }
    let (n_embd, n_head) = (keys.int("hidden_size")?, keys.int("num_attention_heads")?);
    let (rope_base, rope_scaling) = rope(json, "rotary_emb_base")?;
    let partial = json.pointer("/rope_parameters/partial_rotary_factor").and_then(Value::as_f64);
    let vocab = keys.int("vocab_size")?;
    Ok(ModelConfig {
        name: name(json),
        block_size: keys.int("max_position_embeddings")?,
        vocab_size: vocab,
        padded_vocab_size: vocab,
        n_layer: keys.int("num_hidden_layers")?,
        n_head,
        n_embd,
        n_query_groups: n_head,
        head_size: n_embd / n_head.max(1),
        intermediate_size: keys.int("intermediate_size")?,
        rotary_percentage: partial.unwrap_or(keys.float_or("rotary_pct", 0.25)),
        rope_base,
        rope_scaling,
        bias: true,
        attn_bias: true,
        parallel_residual: keys.bool_or("use_parallel_residual", true),
        norm_class: NormClass::LayerNorm,
        norm_eps: keys.float_or("layer_norm_eps", 1e-5),
        mlp_class: MlpClass::GptNeoxMLP,
        tie_embeddings: keys.bool_or("tie_word_embeddings", false),
    })
}

fn name(json: &Value) -> String {
    let path = json.get("_name_or_path").and_then(Value::as_str).unwrap_or("");
    path.rsplit('/').next().filter(|s| !s.is_empty()).unwrap_or("imported").to_owned()
}

/// Base and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`.
fn rope(json: &Value, base_key: &str) -> Result<(f64, Option<RopeScaling>)> {
    let object = |key: &str| json.get(key).and_then(Value::as_object);
    let found = object("rope_parameters").or(object("rope_scaling"));
    let inner = found.and_then(|o| o.get("rope_theta")).and_then(Value::as_f64);
    let outer = [base_key, "rope_theta"].iter().find_map(|k| json.get(*k).and_then(Value::as_f64));
    let base = inner.or(outer).unwrap_or(10_000.0);

    let Some(mut scaling) = found.cloned() else { return Ok((base, None)) };
    let kind = ["rope_type", "type"].iter().find_map(|k| scaling.get(*k)).and_then(Value::as_str);
    if matches!(kind, None | Some("default")) {
        return Ok((base, None));
    }
    for key in ["rope_theta", "partial_rotary_factor"] {
        scaling.shift_remove(key);
    }
    if scaling.contains_key("rope_type") {
        scaling.shift_remove("type");
    }
    scaling.retain(|_, v| !v.is_null());
    let scaling = serde_json::from_value(Value::Object(scaling)).context("`rope_scaling`")?;
    Ok((base, Some(scaling)))
}

/// Ids and dtype that `config.json` carries beside the architecture.
#[derive(Clone, Debug)]
pub struct Extras {
    /// `float32` or `bfloat16`.
    pub dtype: &'static str,
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
}

/// A complete `config.json`, for current and older transformers.
pub fn to_json(config: &ModelConfig, extras: &Extras) -> Value {
    let mut out = match config.mlp_class {
        MlpClass::LLaMAMLP => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "head_dim": config.head_size,
            "num_key_value_heads": config.n_query_groups,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base,
            "attention_bias": config.attn_bias,
            "mlp_bias": config.bias,
            "pretraining_tp": 1,
        }),
        MlpClass::GptNeoxMLP => json!({
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "rotary_pct": config.rotary_percentage,
            "rotary_emb_base": config.rope_base,
            "rope_theta": config.rope_base,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": true,
        }),
    };
    let common = json!({
        "_name_or_path": config.name,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_scaling": config.rope_scaling,
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": extras.dtype,
        "bos_token_id": extras.bos,
        "eos_token_id": extras.eos,
    });
    if let (Some(out), Value::Object(common)) = (out.as_object_mut(), common) {
        out.extend(common);
    }
    out
}

/// `generation_config.json`.
pub fn generation_json(extras: &Extras) -> Value {
    let mut out = Map::new();
    out.insert("_from_model_config".into(), true.into());
    for (key, id) in [("bos_token_id", extras.bos), ("eos_token_id", extras.eos)] {
        if let Some(id) = id {
            out.insert(key.into(), id.into());
        }
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_survives_a_round_trip_through_config_json() {
        for name in ModelConfig::preset_names() {
            let config = ModelConfig::preset(&name).unwrap();
            let extras = Extras { dtype: "float32", bos: Some(1), eos: Some(2) };
            let back = from_json(&to_json(&config, &extras)).unwrap();
            // The file has one vocabulary, the padded one.
            assert_eq!(back, ModelConfig { vocab_size: config.padded_vocab_size, ..config });
        }
    }

    #[test]
    fn old_and_new_forms_of_rope_scaling_mean_the_same() {
        let base = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
            "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64,
            "vocab_size": 9, "max_position_embeddings": 32});
        let with = |extra: Value| {
            let mut json = base.clone();
            json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let c = from_json(&json).unwrap();
            (c.rope_base, c.rope_scaling)
        };
        let old =
            with(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}));
        let new = with(json!({"rope_parameters":
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}));
        assert_eq!(old, new);
        assert_eq!(old.0, 5e5);
        assert_eq!(
            with(json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})).1,
            None
        );
    }

    #[test]
    fn an_unknown_architecture_is_refused_by_name() {
        let error = from_json(&json!({"architectures": ["MambaForCausalLM"]})).unwrap_err();
        assert!(error.to_string().contains("MambaForCausalLM"));
    }
}
