//! `config.json` of Hugging Face <-> [`ModelConfig`].
//!
//! Read first: [`to_json`], which has every key once; the readers mirror it and also take other
//! spellings.

use super::quantised;
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::{MlpClass, ModelConfig, NormClass, RopeScaling, RopeType};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::io::ErrorKind;
use std::path::Path;

/// How a text is made, beside the model: the ids that begin and end it.
pub(super) const GENERATION: &str = "generation_config.json";

/// Reads `dir/config.json`.
///
/// # Errors
/// An architecture, activation or RoPE type that is not supported, by its name; missing keys.
pub fn read(dir: &Path) -> Result<ModelConfig> {
    let json = read_json(dir)?;
    from_json(&json).with_context(|| format!("in `{}`", dir.join("config.json").display()))
}

/// `dir/config.json`.
///
/// # Errors
/// There is none, or it is no JSON.
pub fn read_json(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))
        .hint("a checkpoint is a folder with `config.json` and `model.safetensors`")?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))
}

/// A parsed `config.json` as our configuration.
///
/// # Errors
/// As [`read`]; and sizes that cannot work.
pub fn from_json(json: &Value) -> Result<ModelConfig> {
    let architecture = json.pointer("/architectures/0").and_then(Value::as_str).unwrap_or("");
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("");
    quantised::is_one(json)?;
    let config = match (architecture, model_type) {
        ("LlamaForCausalLM", _) | ("", "llama") => llama(json)?,
        ("GPTNeoXForCausalLM", _) | ("", "gpt_neox") => neox(json)?,
        (name, kind) => bail_hint!(
            "take a checkpoint of one of the supported architectures";
            "architecture `{name}` (`model_type` `{kind}`) is not supported: expected \
             `LlamaForCausalLM` or `GPTNeoXForCausalLM`"
        ),
    };
    let problems = config.validate();
    if !problems.is_empty() {
        bail!("sizes that cannot work:\n  {}", problems.join("\n  "));
    }
    Ok(config)
}

/// Typed access to the keys of one object: absent and `null` are the same, a wrong type is an
/// error.
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn get<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => bail!("`{key}`: expected {wanted}, got {value}"),
            },
        }
    }

    fn int(&self, key: &str) -> Result<i64> {
        self.get(key, "an integer", Value::as_i64)?.with_context(|| format!("`{key}` is missing"))
    }

    fn int_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.get(key, "an integer", Value::as_i64)?.unwrap_or(default))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "a string", Value::as_str)
    }
}

fn llama(json: &Value) -> Result<ModelConfig> {
    let keys = Keys(json);
    refuse_activation(&keys, "silu", "the SwiGLU of the Llama family")?;
    let attn_bias = keys.bool_or("attention_bias", false)?;
    let bias = keys.bool_or("mlp_bias", false)?;
    if attn_bias != bias {
        bail!(
            "`attention_bias` {attn_bias} with `mlp_bias` {bias} is not supported: \
             here the attention's output and the MLP have biases together"
        );
    }
    let rope = rope(json, "rope_theta")?;
    let rotary_percentage = rope.partial.or(keys.float("partial_rotary_factor")?).unwrap_or(1.0);
    if rotary_percentage != 1.0 {
        bail!("`partial_rotary_factor` {rotary_percentage}: the Llama family rotates whole heads");
    }
    let common = common(&keys, rope)?;
    Ok(ModelConfig {
        n_query_groups: keys.int_or("num_key_value_heads", common.n_head)?,
        head_size: keys.int_or("head_dim", common.head_size)?,
        bias,
        attn_bias,
        norm_eps: keys.float("rms_norm_eps")?.unwrap_or(1e-6),
        ..common
    })
}

/// What both families spell alike; the rest as a Llama has it.
fn common(keys: &Keys, rope: RopeKeys) -> Result<ModelConfig> {
    let (n_embd, n_head) = (keys.int("hidden_size")?, keys.int("num_attention_heads")?);
    let vocab = keys.int("vocab_size")?;
    Ok(ModelConfig {
        name: name(keys)?,
        block_size: keys.int_or("max_position_embeddings", 2048)?,
        vocab_size: vocab,
        padded_vocab_size: vocab,
        n_layer: keys.int("num_hidden_layers")?,
        n_head,
        n_embd,
        n_query_groups: n_head,
        head_size: n_embd / n_head.max(1),
        intermediate_size: keys.int("intermediate_size")?,
        rotary_percentage: 1.0,
        rope_base: rope.base,
        rope_scaling: rope.scaling,
        bias: false,
        attn_bias: false,
        parallel_residual: false,
        norm_class: NormClass::RMSNorm,
        norm_eps: 1e-6,
        mlp_class: MlpClass::LLaMAMLP,
        tie_embeddings: keys.bool_or("tie_word_embeddings", false)?,
    })
}

fn neox(json: &Value) -> Result<ModelConfig> {
    let keys = Keys(json);
    refuse_activation(&keys, "gelu", "the exact GELU of the GPT-NeoX family")?;
    if !keys.bool_or("attention_bias", true)? {
        bail!("`attention_bias` false is not supported: GPT-NeoX has biases everywhere here");
    }
    let rope = rope(json, "rotary_emb_base")?;
    Ok(ModelConfig {
        rotary_percentage: rope.partial.or(keys.float("rotary_pct")?).unwrap_or(0.25),
        bias: true,
        attn_bias: true,
        parallel_residual: keys.bool_or("use_parallel_residual", true)?,
        norm_class: NormClass::LayerNorm,
        norm_eps: keys.float("layer_norm_eps")?.unwrap_or(1e-5),
        mlp_class: MlpClass::GptNeoxMLP,
        ..common(&keys, rope)?
    })
}

fn refuse_activation(keys: &Keys, supported: &str, what: &str) -> Result<()> {
    match keys.text("hidden_act")? {
        Some(other) if other != supported => {
            bail!("`hidden_act` `{other}` is not supported: expected `{supported}`, {what}")
        }
        _ => Ok(()),
    }
}

fn name(keys: &Keys) -> Result<String> {
    let path = keys.text("_name_or_path")?.unwrap_or("");
    let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or("");
    Ok(if last.is_empty() { "imported" } else { last }.to_owned())
}

/// Rotary settings, from either form of `config.json`.
struct RopeKeys {
    base: f64,
    partial: Option<f64>,
    scaling: Option<RopeScaling>,
}

/// `rope_theta` (or `base_key`) beside `rope_scaling`; or all of it in the newer `rope_parameters`.
/// As in transformers, `rope_scaling` wins where a file has both.
fn rope(json: &Value, base_key: &str) -> Result<RopeKeys> {
    let outer = Keys(json);
    let object = |key: &str| outer.get(key, "an object", Value::as_object);
    let found = object("rope_scaling")?.filter(|o| !o.is_empty()).or(object("rope_parameters")?);
    let found = Value::Object(found.cloned().unwrap_or_default());
    let inner = Keys(&found);
    let base = inner.float("rope_theta")?.or(outer.float(base_key)?).or(outer.float("rope_theta")?);
    Ok(RopeKeys {
        base: base.unwrap_or(10_000.0),
        partial: inner.float("partial_rotary_factor")?,
        scaling: scaling(&found, &outer)?,
    })
}

/// The scaling in `rope_scaling` or `rope_parameters`; type `default` is none.
fn scaling(found: &Value, outer: &Keys) -> Result<Option<RopeScaling>> {
    let keys = Keys(found);
    let rope_type = keys.text("rope_type")?.or(keys.text("type")?).unwrap_or("default");
    if rope_type == "default" {
        return Ok(None);
    }
    let mut map = found.as_object().cloned().unwrap_or_default();
    map.retain(|_, value| !value.is_null());
    for key in ["type", "rope_theta", "partial_rotary_factor"] {
        map.shift_remove(key);
    }
    map.insert("rope_type".into(), rope_type.into());
    // A few files keep the trained length beside the object; transformers lets that one win.
    let trained = "original_max_position_embeddings";
    match rope_type {
        "yarn" | "llama3" => {
            if let Some(length) = outer.get(trained, "an integer", Value::as_i64)? {
                map.insert(trained.into(), length.into());
            }
        }
        // transformers reads `max_position_embeddings` instead.
        _ => _ = map.shift_remove(trained),
    }
    if rope_type == "yarn" && !map.contains_key("factor") {
        let trained =
            map.get(trained).and_then(Value::as_f64).context("`rope_scaling.factor` is missing")?;
        map.insert(
            "factor".into(),
            (outer.int("max_position_embeddings")? as f64 / trained).into(),
        );
    }
    serde_json::from_value(Value::Object(map)).context("in `rope_scaling`").map(Some)
}

/// Why a configuration cannot be written as a Hugging Face folder; empty where it can. Every other
/// reader of the weights would compute something else, so a run must not begin with such a
/// configuration.
pub fn unsupported(config: &ModelConfig) -> Vec<String> {
    let c = config;
    let mut problems = Vec::new();
    let mut need = |ok: bool, message: &str| {
        if !ok {
            problems.push(message.to_owned());
        }
    };
    match c.mlp_class {
        MlpClass::LLaMAMLP => {
            need(c.norm_class == NormClass::RMSNorm, "`norm_class`: a Llama has `RMSNorm`");
            need(!c.parallel_residual, "`parallel_residual`: a Llama has none");
            need(
                c.rotary_percentage == 1.0,
                "`rotary_percentage`: a Llama rotates whole heads, 1.0",
            );
            need(c.bias == c.attn_bias, "`bias` and `attn_bias`: must be equal in a Llama");
        }
        MlpClass::GptNeoxMLP => {
            need(c.norm_class == NormClass::LayerNorm, "`norm_class`: a GPT-NeoX has `LayerNorm`");
            need(c.bias && c.attn_bias, "`bias` and `attn_bias`: must be true in a GPT-NeoX");
            need(c.n_query_groups == c.n_head, "`n_query_groups`: must be `n_head` in a GPT-NeoX");
            let whole = c.head_size * c.n_head == c.n_embd;
            need(whole, "`head_size`: must be `n_embd` / `n_head` in a GPT-NeoX");
        }
    }
    if let Some(s) = &c.rope_scaling {
        let trained = s.original_max_position_embeddings.unwrap_or(c.block_size);
        need(
            s.rope_type != RopeType::Dynamic || trained == c.block_size,
            "`rope_scaling.original_max_position_embeddings`: must be `block_size` with `dynamic`",
        );
    }
    problems
}

/// Ids and dtype that `config.json` carries beside the architecture.
#[derive(Clone, Debug)]
pub struct Extras {
    /// Of the weights on disk: `float32`, `bfloat16` or `float16`.
    pub dtype: &'static str,
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
}

/// A complete `config.json`, in the form that old and new transformers read (tried: 4.38, 4.46,
/// 5.0, 5.23): `rope_theta` and `rope_scaling`, from which version 5 makes its `rope_parameters`.
///
/// What an old version lacks no file can give it: `llama3`, `yarn`, `head_dim` and `mlp_bias` came
/// after 4.38, and 4.46 takes `max_position_embeddings` for yarn's
/// `original_max_position_embeddings`.
pub fn to_json(config: &ModelConfig, extras: &Extras) -> Value {
    let family = match config.mlp_class {
        MlpClass::LLaMAMLP => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "_name_or_path": config.name,
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
            "_name_or_path": config.name,
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "rotary_pct": config.rotary_percentage,
            "rotary_emb_base": config.rope_base,
            "rope_theta": config.rope_base,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": config.attn_bias,
            "hidden_dropout": 0.0,
        }),
    };
    let common = json!({
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_scaling": config.rope_scaling.as_ref().map(|s| scaling_json(s, config.block_size)),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": extras.dtype,
        "bos_token_id": extras.bos,
        "eos_token_id": extras.eos,
    });
    let mut out = family;
    if let (Some(out), Value::Object(common)) = (out.as_object_mut(), common) {
        out.extend(common);
    }
    out
}

/// `linear` and `dynamic` with exactly the two keys that transformers before 4.43 takes; the others
/// came later, with `rope_type`, and `llama3` must say its trained length.
fn scaling_json(s: &RopeScaling, block_size: i64) -> Value {
    let mut out = json!(s);
    match s.rope_type {
        RopeType::Linear | RopeType::Dynamic => {
            json!({"type": out["rope_type"], "factor": s.factor})
        }
        RopeType::Llama3 => {
            out["original_max_position_embeddings"] =
                s.original_max_position_embeddings.unwrap_or(block_size).into();
            out
        }
        RopeType::Yarn => out,
    }
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

/// `dir/generation_config.json`, if it is there.
///
/// # Errors
/// It cannot be read, or is no JSON object.
pub(super) fn read_generation(dir: &Path) -> Result<Option<Map<String, Value>>> {
    object(&dir.join(GENERATION))
}

/// The ids that end a text by `dir/generation_config.json`, else by `dir/config.json`; none where both are silent.
///
/// # Errors
/// As [`read_generation`].
pub(super) fn end_ids(dir: &Path) -> Result<Vec<u32>> {
    let ids = read_generation(dir)?.map(|json| eos_ids(&json)).unwrap_or_default();
    if !ids.is_empty() {
        return Ok(ids);
    }
    let config = object(&dir.join("config.json"))?;
    Ok(config.map(|json| eos_ids(&json)).unwrap_or_default())
}

/// `eos_token_id`, which is a number or a list.
pub(super) fn eos_ids(json: &Map<String, Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match json.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        one => one.and_then(id).into_iter().collect(),
    }
}

/// A `generation_config.json` with these ends of a text, a number where there is one and a list where there are
/// several, and with this beginning unless it names one.
pub(super) fn with_ends(mut json: Map<String, Value>, bos: Option<u32>, ends: &[u32]) -> Value {
    if let Some(bos) = bos.filter(|_| json.get("bos_token_id").is_none_or(Value::is_null)) {
        json.insert("bos_token_id".into(), bos.into());
    }
    match ends {
        [] => {}
        [one] => _ = json.insert("eos_token_id".into(), (*one).into()),
        several => _ = json.insert("eos_token_id".into(), several.into()),
    }
    // Otherwise transformers may make it anew from `config.json`.
    json.shift_remove("_from_model_config");
    Value::Object(json)
}

fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read `{}`", path.display()));
        }
    };
    let json = serde_json::from_str(&text);
    json.map(Some)
        .with_context(|| format!("`{}` is no JSON object", path.display()))
        .hint("copy the file again")
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

    /// A small Llama with other keys on top.
    fn llama_with(extra: Value) -> Result<ModelConfig> {
        let mut json = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
            "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64,
            "vocab_size": 9, "max_position_embeddings": 32});
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        from_json(&json)
    }

    fn told(extra: Value) -> String {
        format!("{:#}", llama_with(extra).unwrap_err())
    }

    #[test]
    fn old_and_new_forms_of_rope_scaling_mean_the_same() {
        let with = |extra| llama_with(extra).map(|c| (c.rope_base, c.rope_scaling)).unwrap();
        let old =
            with(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}));
        let both = with(json!({"rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}));
        let new = with(json!({"rope_parameters":
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}));
        assert_eq!((&old, &old), (&new, &both));
        assert_eq!(old, (5e5, Some(RopeScaling::new(RopeType::Linear, 2.0))));
        let none = json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
        assert_eq!(with(none), (1e6, None));
        assert_eq!(with(json!({"rope_scaling": null})), (1e4, None));
    }

    #[test]
    fn a_scaling_takes_its_trained_length_from_where_transformers_does() {
        let scaling = |extra| llama_with(extra).unwrap().rope_scaling.unwrap();
        // yarn without a factor: the ratio of the lengths.
        let yarn =
            json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 8});
        assert_eq!(scaling(json!({"rope_scaling": yarn})).factor, 4.0);
        // Beside the object, it wins.
        let yarn =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8});
        let beside = json!({"rope_scaling": yarn, "original_max_position_embeddings": 16});
        assert_eq!(scaling(beside).original_max_position_embeddings, Some(16));
        // `dynamic` has none.
        let dynamic =
            json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8});
        assert_eq!(
            scaling(json!({"rope_scaling": dynamic})),
            RopeScaling::new(RopeType::Dynamic, 2.0)
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let mamba = told(json!({"architectures": ["MambaForCausalLM"]}));
        assert!(mamba.contains("`MambaForCausalLM`"), "{mamba}");
        assert!(mamba.contains("`LlamaForCausalLM` or `GPTNeoXForCausalLM`"), "{mamba}");
        let neox = json!({"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu_new"});
        assert!(told(neox).contains("`gelu_new` is not supported: expected `gelu`"));
        assert!(told(json!({"hidden_act": "relu"})).contains("`relu`"));
        assert!(told(json!({"attention_bias": true})).contains("`mlp_bias` false"));
        assert!(
            told(json!({"partial_rotary_factor": 0.5})).contains("`partial_rotary_factor` 0.5")
        );
        let longrope = json!({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}});
        assert!(told(longrope).contains("`longrope`"));
        let quantized = json!({"quantization_config": {"quant_method": "gptq"}});
        let text = told(quantized);
        assert!(
            text.contains("quant_method`: expected `tinyllama`") && text.contains("`gptq`"),
            "{text}"
        );
        let newer = json!({"quantization_config": {"quant_method": "tinyllama", "version": 2}});
        assert!(told(newer).contains("version`: expected 1, got 2"));
    }

    #[test]
    fn end_ids_come_from_the_generation_config_first() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert!(end_ids(dir.path()).unwrap().is_empty());
        write("config.json", r#"{"eos_token_id": [2, 5]}"#);
        assert_eq!(end_ids(dir.path()).unwrap(), [2, 5]);
        write("generation_config.json", r#"{"eos_token_id": [7, 9]}"#);
        assert_eq!(end_ids(dir.path()).unwrap(), [7, 9]);
        write("generation_config.json", r#"{"bos_token_id": 1, "eos_token_id": null}"#);
        assert_eq!(end_ids(dir.path()).unwrap(), [2, 5]);
        write("generation_config.json", "{");
        let error = format!("{:#}", end_ids(dir.path()).unwrap_err());
        assert!(error.contains("generation_config.json` is no JSON object"), "{error}");
    }

    #[test]
    fn ends_go_into_a_generation_config_beside_what_it_has() {
        let of =
            |json: Value, ends: &[u32]| with_ends(json.as_object().unwrap().clone(), Some(1), ends);
        let json = json!({"_from_model_config": true, "top_p": 0.9, "eos_token_id": 2});
        let want = json!({"top_p": 0.9, "eos_token_id": [2, 7], "bos_token_id": 1});
        assert_eq!(of(json, &[2, 7]), want);
        let want = json!({"bos_token_id": 0, "eos_token_id": 2});
        assert_eq!(of(json!({"bos_token_id": 0}), &[2]), want);
    }

    #[test]
    fn a_missing_or_mistyped_key_or_an_impossible_size_is_told() {
        assert!(told(json!({"hidden_size": null})).contains("`hidden_size` is missing"));
        let text = told(json!({"num_key_value_heads": "4"}));
        assert!(text.contains("`num_key_value_heads`: expected an integer, got \"4\""), "{text}");
        assert!(told(json!({"num_key_value_heads": 3})).contains("must divide `n_head`"));
        assert!(told(json!({"num_attention_heads": 0})).contains("`n_head`"));
    }
}
