//! lit-gpt's and litgpt's folders: a configuration (`model_config.yaml`, or `lit_config.json` of TinyLlama) beside
//! the weights under lit-gpt's names.
//!
//! Written: `model_config.yaml` and `lit_model.safetensors` with the names and packing of litgpt since December 2024;
//! in Python, `torch.save(load_file("lit_model.safetensors"), "lit_model.pth")` makes litgpt's own file of it.

use super::source::Parameters;
use super::tensors::{self, Entry};
use crate::error::WithHint;
use crate::model::{MlpClass, ModelConfig, NormClass, RopeScaling, RopeType};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Configurations that are looked for.
pub(super) const CONFIGS: [&str; 2] = ["model_config.yaml", "lit_config.json"];
/// The weights that are written.
const WEIGHTS: &str = "lit_model.safetensors";
/// litgpt's own.
const PICKLE: &str = "lit_model.pth";

/// The weights of a folder: safetensors, or a pickle of litgpt's with its configuration beside.
pub(super) fn weights_file(dir: &Path) -> Option<PathBuf> {
    let pickle = || CONFIGS.iter().any(|name| dir.join(name).is_file()).then(|| dir.join(PICKLE));
    Some(dir.join(WEIGHTS)).filter(|path| path.is_file()).or_else(pickle).filter(|p| p.is_file())
}

/// Reads `model_config.yaml` or `lit_config.json` in `dir`; `None` where there is neither.
///
/// # Errors
/// A damaged file; an architecture that is not supported.
pub(super) fn read_config(dir: &Path) -> Result<Option<ModelConfig>> {
    let Some(path) = CONFIGS.iter().map(|name| dir.join(name)).find(|path| path.is_file()) else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    // JSON is YAML.
    let parsed: Value = serde_saphyr::from_str(&text)
        .map_err(|e| anyhow!("{e}"))
        .with_context(|| format!("`{}` is no YAML", path.display()))?;
    from_litgpt(&parsed).with_context(|| format!("in `{}`", path.display())).map(Some)
}

/// litgpt's `Config` as ours.
fn from_litgpt(config: &Value) -> Result<ModelConfig> {
    let int = |key: &str| config.get(key).and_then(Value::as_i64);
    let float = |key: &str| config.get(key).and_then(Value::as_f64);
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    // lit-gpt wrote the classes' names with an underscore before.
    let text = |key: &str| {
        let old = match key {
            "norm_class_name" => "_norm_class",
            "mlp_class_name" => "_mlp_class",
            key => key,
        };
        config.get(key).or(config.get(old)).and_then(Value::as_str)
    };
    let need = |key: &str| int(key).with_context(|| format!("`{key}`: expected an integer"));
    for key in [
        "shared_attention_norm",
        "lm_head_bias",
        "scale_embeddings",
        "norm_qk",
        "post_mlp_norm",
        "post_attention_norm",
        "sliding_window_size",
        "sliding_window_indices",
        "attention_logit_softcapping",
        "final_logit_softcapping",
        "attention_scores_scalar",
        "rope_local_base_freq",
        "rope_indices",
        "n_expert",
    ] {
        let without = |v: &Value| v.is_null() || *v == Value::Bool(false) || *v == 0;
        if let Some(value) = config.get(key).filter(|value| !without(value)) {
            bail!(
                "`{key}`: {value} is not supported, expected a model of the Llama or the GPT-NeoX family"
            );
        }
    }
    if let Some(kind) = text("gelu_approximate").filter(|kind| *kind != "none") {
        bail!("`gelu_approximate`: expected none, got {kind}");
    }
    let norm_class = match text("norm_class_name").unwrap_or("LayerNorm") {
        "RMSNorm" | "FusedRMSNorm" => NormClass::RMSNorm,
        "LayerNorm" => NormClass::LayerNorm,
        other => bail!("`norm_class_name`: expected RMSNorm or LayerNorm, got {other}"),
    };
    let mlp_class = match text("mlp_class_name").unwrap_or("GptNeoxMLP") {
        "LLaMAMLP" => MlpClass::LLaMAMLP,
        "GptNeoxMLP" => MlpClass::GptNeoxMLP,
        other => bail!("`mlp_class_name`: expected LLaMAMLP or GptNeoxMLP, got {other}"),
    };
    let (n_embd, n_head) = (need("n_embd")?, need("n_head")?);
    let bias = flag("bias").unwrap_or(true);
    let vocab_size = need("vocab_size")?;
    let padded = int("padded_vocab_size").unwrap_or_else(|| {
        let multiple = int("padding_multiple").unwrap_or(512).max(1);
        (vocab_size + multiple - 1) / multiple * multiple
    });
    let config = ModelConfig {
        name: text("name").unwrap_or("imported").to_owned(),
        block_size: need("block_size")?,
        vocab_size,
        padded_vocab_size: padded,
        n_layer: need("n_layer")?,
        n_head,
        n_embd,
        n_query_groups: int("n_query_groups").unwrap_or(n_head),
        head_size: int("head_size").unwrap_or(n_embd / n_head.max(1)),
        intermediate_size: int("intermediate_size").unwrap_or(4 * n_embd),
        rotary_percentage: float("rotary_percentage").unwrap_or(0.25),
        rope_base: float("rope_base").unwrap_or(10_000.0),
        rope_scaling: rope_scaling(config)?,
        bias,
        attn_bias: flag("attn_bias").unwrap_or(false) || bias,
        parallel_residual: flag("parallel_residual").unwrap_or(true),
        norm_class,
        norm_eps: float("norm_eps").unwrap_or(1e-5),
        mlp_class,
        tie_embeddings: flag("tie_embeddings").unwrap_or(false),
    };
    let problems = config.validate();
    match problems.is_empty() {
        true => Ok(config),
        false => bail!("sizes that cannot work:\n  {}", problems.join("\n  ")),
    }
}

/// `rope_condense_ratio` (lit-gpt before: `condense_ratio`) or Llama 3's `rope_adjustments`.
fn rope_scaling(config: &Value) -> Result<Option<RopeScaling>> {
    let ratio = config.get("rope_condense_ratio").or(config.get("condense_ratio"));
    let ratio = ratio.and_then(Value::as_f64).unwrap_or(1.0);
    let Some(adjust) = config.get("rope_adjustments").filter(|a| !a.is_null()) else {
        return Ok((ratio != 1.0).then(|| RopeScaling::new(RopeType::Linear, ratio)));
    };
    let whole = |x: f64| match x.fract() == 0.0 {
        true => Ok(x as i64),
        false => {
            Err(anyhow!("`rope_adjustments.original_max_seq_len`: expected an integer, got {x}"))
        }
    };
    let float = |key: &str| {
        adjust[key].as_f64().with_context(|| format!("`rope_adjustments.{key}`: expected a number"))
    };
    Ok(Some(RopeScaling {
        low_freq_factor: Some(float("low_freq_factor")?),
        high_freq_factor: Some(float("high_freq_factor")?),
        original_max_position_embeddings: Some(whole(float("original_max_seq_len")?)?),
        ..RopeScaling::new(RopeType::Llama3, float("factor")?)
    }))
}

/// Writes `model_config.yaml` and `lit_model.safetensors`. A tied head is written, as litgpt has it.
///
/// # Errors
/// A rotary scaling that litgpt does not know; an I/O error.
pub(super) fn save(dir: &Path, config: &ModelConfig, parameters: &Parameters) -> Result<()> {
    let yaml = serde_saphyr::to_string(&to_litgpt(config)?).context("model_config.yaml")?;
    let path = dir.join(CONFIGS[0]);
    std::fs::write(&path, yaml).with_context(|| format!("cannot write `{}`", path.display()))?;
    let mut entries = parameters.entries.clone();
    if config.tie_embeddings {
        entries.push(Entry { name: "lm_head.weight".into(), ..entries[0].clone() });
    }
    let n = parameters.entries.len();
    tensors::write_lazily(&dir.join(WEIGHTS), &entries, |i| parameters.get(i % n))
}

fn to_litgpt(config: &ModelConfig) -> Result<Value> {
    let mut out = json!({
        "name": config.name,
        "hf_config": {},
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "padding_multiple": 1,
        "padded_vocab_size": config.padded_vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "head_size": config.head_size,
        "n_embd": config.n_embd,
        "rotary_percentage": config.rotary_percentage,
        "parallel_residual": config.parallel_residual,
        "bias": config.bias,
        "attn_bias": config.attn_bias,
        "lm_head_bias": false,
        "n_query_groups": config.n_query_groups,
        "shared_attention_norm": false,
        "norm_class_name": config.norm_class,
        "norm_eps": config.norm_eps,
        "mlp_class_name": config.mlp_class,
        "intermediate_size": config.intermediate_size,
        "rope_base": match config.rope_base.fract() == 0.0 {
            true => json!(config.rope_base as i64),
            false => json!(config.rope_base), // which litgpt takes, though it writes integers
        },
        "rope_condense_ratio": 1,
    });
    match &config.rope_scaling {
        None => {}
        Some(s) if s.rope_type == RopeType::Linear => {
            out["rope_condense_ratio"] = (s.factor as i64).into();
            if s.factor.fract() != 0.0 {
                bail!("litgpt's `rope_condense_ratio` is an integer, got {}", s.factor);
            }
        }
        Some(s) if s.rope_type == RopeType::Llama3 => {
            out["rope_adjustments"] = Value::Object(Map::from_iter([
                ("factor".to_owned(), json!(s.factor)),
                ("low_freq_factor".to_owned(), json!(s.low_freq_factor)),
                ("high_freq_factor".to_owned(), json!(s.high_freq_factor)),
                (
                    "original_max_seq_len".to_owned(),
                    json!(s.original_max_position_embeddings.unwrap_or(config.block_size)),
                ),
            ]));
        }
        Some(s) => {
            return Err(anyhow!(
                "litgpt has no place for `rope_scaling` of type {:?}",
                s.rope_type
            ))
            .hint("convert with `--to hf`, which every tool reads");
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_come_back_from_litgpts_configuration() {
        for name in ModelConfig::preset_names() {
            let config = ModelConfig::preset(&name).unwrap();
            let Ok(litgpt) = to_litgpt(&config) else { continue };
            let back = from_litgpt(&litgpt).unwrap();
            let tied = ModelConfig { tie_embeddings: false, ..config };
            assert_eq!(back, tied, "{name}");
        }
    }

    #[test]
    fn tinyllamas_own_configuration_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let json = r#"{"org": "StatNLP-research", "name": "tiny_LLaMA_1b", "block_size": 2048, "vocab_size": 32000,
            "padding_multiple": 64, "padded_vocab_size": 32000, "n_layer": 22, "n_head": 32, "n_embd": 2048,
            "rotary_percentage": 1.0, "parallel_residual": false, "bias": false, "n_query_groups": 4,
            "shared_attention_norm": false, "_norm_class": "FusedRMSNorm", "norm_eps": 1e-05, "_mlp_class": "LLaMAMLP",
            "intermediate_size": 5632, "condense_ratio": 1}"#;
        std::fs::write(dir.path().join("lit_config.json"), json).unwrap();
        let got = read_config(dir.path()).unwrap().unwrap();
        let want = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        assert_eq!(ModelConfig { name: want.name.clone(), ..got }, want);
        for (key, value) in [("sliding_window_size", "4096"), ("post_attention_norm", "true")] {
            let other = json.replacen('{', &format!("{{\"{key}\": {value}, "), 1);
            std::fs::write(dir.path().join("lit_config.json"), other).unwrap();
            let error = format!("{:#}", read_config(dir.path()).unwrap_err());
            assert!(error.contains(&format!("`{key}`: {value} is not supported")), "{error}");
        }
        let damaged = json.replace("LLaMAMLP", "GemmaMLP");
        std::fs::write(dir.path().join("lit_config.json"), damaged).unwrap();
        let error = format!("{:#}", read_config(dir.path()).unwrap_err());
        assert!(error.contains("expected LLaMAMLP or GptNeoxMLP, got GemmaMLP"), "{error}");
    }
}
