//! Hugging Face folders: `config.json`, `model.safetensors` (or shards and an index).

use super::hf_config::{self, Extras};
use super::names::{self, Layout, Part};
use super::source::Parameters;
use super::tensors::{self, Entry};
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Largest weights file, in bytes; above it the weights are sharded.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const PICKLE: &str = "pytorch_model.bin";
const PICKLE_INDEX: &str = "pytorch_model.bin.index.json";

/// Paths of the weights of a folder: one file, or all shards of the index; of safetensors, else of PyTorch files.
///
/// # Errors
/// None there; shards that are missing, all at once.
pub(super) fn weights_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let there = |name: &&str| dir.join(name).is_file();
    let known = [SINGLE, INDEX, PICKLE, PICKLE_INDEX];
    let Some(found) = known.into_iter().find(there) else {
        bail_hint!(
            "a checkpoint is a folder with `config.json` and `model.safetensors`";
            "no weights in `{}`: looked for {}", dir.display(), known.map(|n| format!("`{n}`")).join(", ")
        );
    };
    let index = dir.join(found);
    if matches!(found, SINGLE | PICKLE) {
        return Ok(vec![index]);
    }
    let text = std::fs::read_to_string(&index)
        .with_context(|| format!("cannot read `{}`", index.display()))?;
    let json: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", index.display()))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("`{}` has no `weight_map`", index.display()))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
        bail!("`{}` names `{name}`, which is no file of its folder", index.display());
    }
    let missing: Vec<&str> =
        names.iter().copied().filter(|name| !dir.join(name).is_file()).collect();
    if !missing.is_empty() {
        bail_hint!(
            format!("copy all {} shards that `{found}` names", names.len());
            "missing in `{}`: {}", dir.display(), missing.join(", ")
        );
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// A folder that [`super::load_model`] and transformers read: a model's weights in their dtype, without
/// tokenizer or train state.
pub fn save(dir: &Path, model: &GPT) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    save_model(dir, &model.config, &model.named_parameters(), None)
}

/// Writes `config.json`, `generation_config.json` and the weights (lit-gpt names in, Hugging Face's
/// out) in the dtype of the first parameter. The tokenizer's ids go into the configuration where it
/// is given.
pub fn save_model(
    dir: &Path,
    config: &ModelConfig,
    named: &[(String, Tensor)],
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    let kind = named.first().map_or(Kind::Float, |(_, t)| t.kind());
    save_parameters(dir, config, &Parameters::of(named, kind), tokenizer, MAX_SHARD_BYTES)
}

/// [`save_model`] of parameters that are made one at a time, each in its own dtype.
pub fn save_parameters(
    dir: &Path,
    config: &ModelConfig,
    parameters: &Parameters,
    tokenizer: Option<&Tokenizer>,
    max_shard_bytes: u64,
) -> Result<()> {
    let kind = parameters.entries.first().map_or(Kind::Float, |entry| entry.kind);
    let extras = Extras {
        dtype: match kind {
            Kind::Float => "float32",
            Kind::BFloat16 => "bfloat16",
            Kind::Half => "float16",
            other => {
                bail!("weights of {other:?} cannot be saved: expected Float, BFloat16 or Half")
            }
        },
        bos: tokenizer.and_then(Tokenizer::bos_id),
        eos: tokenizer.and_then(Tokenizer::eos_id),
    };
    write_json(&dir.join("config.json"), &hf_config::to_json(config, &extras))?;
    write_json(&dir.join("generation_config.json"), &hf_config::generation_json(&extras))?;
    save_shards(dir, config, parameters, max_shard_bytes)
}

/// Writes `model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor has its own)
/// with an index, converted to `kind`. Holds one tensor more than the model at a time.
///
/// # Errors
/// A configuration that Hugging Face has no place for; an I/O error.
///
/// # Sync
/// The CPU waits for each CUDA tensor.
pub fn save_weights(
    dir: &Path,
    config: &ModelConfig,
    named: &[(String, Tensor)],
    kind: Kind,
    max_shard_bytes: u64,
) -> Result<()> {
    save_shards(dir, config, &Parameters::of(named, kind), max_shard_bytes)
}

fn save_shards(
    dir: &Path,
    config: &ModelConfig,
    parameters: &Parameters,
    max_shard_bytes: u64,
) -> Result<()> {
    let problems = hf_config::unsupported(config);
    if !problems.is_empty() {
        let list = problems.join("\n  ");
        return Err(anyhow!("Hugging Face's layout has no place for this model:\n  {list}"))
            .hint("change these fields of `model_config`");
    }
    let shards = plan_shards(config, parameters, max_shard_bytes);
    let (mut weight_map, mut total, count) = (Map::new(), 0, shards.len());
    // The parts of one parameter come one after the other: it is made once.
    let last: RefCell<Option<(usize, Tensor)>> = RefCell::new(None);
    for (i, (entries, sources)) in shards.iter().enumerate() {
        let file = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        tensors::write_lazily(&dir.join(&file), entries, |i| {
            let (parameter, layout) = sources[i];
            let made = last.take().filter(|(before, _)| *before == parameter);
            let (_, ours) = match made {
                Some(made) => made,
                None => (parameter, parameters.get(parameter)?),
            };
            let theirs = names::to_disk(&ours, layout, config);
            last.replace(Some((parameter, ours)));
            Ok(theirs)
        })?;
        total += entries.iter().map(Entry::bytes).sum::<u64>();
        weight_map.extend(entries.iter().map(|e| (e.name.clone(), file.clone().into())));
    }
    // Whichever form an earlier save into this folder had, it must not be read instead.
    let stale = dir.join(if count == 1 { INDEX } else { SINGLE });
    if stale.exists() {
        std::fs::remove_file(&stale)
            .with_context(|| format!("cannot remove `{}`", stale.display()))?;
    }
    if count == 1 {
        return Ok(());
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&dir.join(INDEX), &index)
}

/// What one file will hold, and of which parameter and how each entry is made.
type Shard = (Vec<Entry>, Vec<(usize, Layout)>);

fn plan_shards(config: &ModelConfig, parameters: &Parameters, max_shard_bytes: u64) -> Vec<Shard> {
    let mut shards: Vec<Shard> = Vec::new();
    let mut in_shard = 0;
    for (i, ours) in parameters.entries.iter().enumerate() {
        for Part { name, layout } in names::parts(&ours.name, config) {
            let shape = names::disk_shape(&ours.shape, layout);
            let entry = Entry { name, kind: ours.kind, shape };
            if shards.is_empty() || (in_shard > 0 && in_shard + entry.bytes() > max_shard_bytes) {
                shards.push(Shard::default());
                in_shard = 0;
            }
            in_shard += entry.bytes();
            if let Some((entries, sources)) = shards.last_mut() {
                entries.push(entry);
                sources.push((i, layout));
            }
        }
    }
    shards
}

/// Pretty JSON with a final line break.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
