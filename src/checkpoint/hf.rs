//! Hugging Face folders: `config.json`, `model.safetensors` (or shards and an index).

use super::hf_config::{self, Extras};
use super::names::{self, Part};
use super::tensors::{self, TensorFile};
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Largest weights file; above it the weights are sharded.
const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// The architecture of the checkpoint in `dir`.
pub fn load_config(dir: &Path) -> Result<ModelConfig> {
    hf_config::read(dir)
}

/// Builds the model of a checkpoint folder in the given dtype.
pub fn load_model(dir: &Path, kind: Kind, device: Device) -> Result<GPT> {
    let mut model = GPT::empty(&load_config(dir)?, device);
    load_weights(&model, dir)?;
    model.to_kind(kind);
    Ok(model)
}

/// Copies the weights in `dir` into a model, converting to its dtype.
///
/// # Errors
/// Another architecture (its differing fields are named); missing, unknown or mis-shaped tensors, all at
/// once; a damaged file.
pub fn load_weights(model: &GPT, dir: &Path) -> Result<()> {
    check_architecture(&model.config, dir)?;
    copy_weights(model, dir)
}

/// [`load_weights`] for continued pretraining: context length and RoPE may differ from the checkpoint's,
/// since no tensor depends on them. What differs is said on stderr.
pub fn load_initial_weights(model: &GPT, dir: &Path) -> Result<()> {
    let theirs = load_config(dir)?;
    let ours = &model.config;
    let positions = ModelConfig {
        block_size: ours.block_size,
        rope_base: ours.rope_base,
        rope_scaling: ours.rope_scaling.clone(),
        ..theirs.clone()
    };
    compare(ours, &positions, dir)?;
    for change in differences(&theirs, &positions) {
        eprintln!("positions   {change}");
    }
    copy_weights(model, dir)
}

fn copy_weights(model: &GPT, dir: &Path) -> Result<()> {
    let files = Files::open(dir)?;
    let mut problems = Vec::new();
    let mut wanted = HashMap::new();
    let _guard = tch::no_grad_guard();
    for (name, ours) in model.named_parameters() {
        for part in names::parts(&name, &model.config) {
            if let Err(problem) = load_part(&ours, &part, &files, &model.config) {
                problems.push(format!("`{}`: {problem:#}", part.name));
            }
            wanted.insert(part.name, ());
        }
    }
    let tied = |name: &str| model.config.tie_embeddings && name.ends_with("lm_head.weight");
    let unknown =
        |name: &&String| !wanted.contains_key(*name) && !names::is_buffer(name) && !tied(name);
    problems
        .extend(files.names().filter(unknown).map(|name| format!("`{name}`: not in this model")));
    if problems.is_empty() {
        return Ok(());
    }
    let (count, shown) = (problems.len(), problems.iter().take(12).cloned().collect::<Vec<_>>());
    Err(anyhow!("{count} tensor(s) of `{}` do not fit:\n  {}", dir.display(), shown.join("\n  ")))
        .hint("the weights and `config.json` of a folder must belong together")
}

fn load_part(ours: &Tensor, part: &Part, files: &Files, config: &ModelConfig) -> Result<()> {
    let theirs = files.tensor(&part.name)?;
    let want = names::to_disk(ours, part.layout, config).size();
    if theirs.size() != want {
        return Err(anyhow!("expected shape {want:?}, got {:?}", theirs.size()));
    }
    names::from_disk(ours, &theirs, part.layout, config);
    Ok(())
}

/// One clear message where the folder holds another model than the run's configuration says.
fn check_architecture(ours: &ModelConfig, dir: &Path) -> Result<()> {
    compare(ours, &load_config(dir)?, dir)
}

fn compare(ours: &ModelConfig, theirs: &ModelConfig, dir: &Path) -> Result<()> {
    // Name and the split of the vocabulary are not part of the architecture on disk.
    let same =
        ModelConfig { name: ours.name.clone(), vocab_size: ours.vocab_size, ..theirs.clone() };
    if same == *ours {
        return Ok(());
    }
    let differing = differences(ours, &same).join("\n  ");
    Err(anyhow!("`{}` holds another architecture:\n  {differing}", dir.display()))
        .hint("choose the preset or `model_config` of the checkpoint, or another checkpoint")
}

/// Fields that differ, as `key: expected a, got b`.
fn differences(expected: &ModelConfig, got: &ModelConfig) -> Vec<String> {
    let tree = |c: &ModelConfig| serde_json::to_value(c).unwrap_or(Value::Null);
    let (a, b) = (tree(expected), tree(got));
    let mut out = Vec::new();
    for (key, value) in a.as_object().into_iter().flatten() {
        if b.get(key) != Some(value) {
            let got = b.get(key).unwrap_or(&Value::Null);
            out.push(format!("`{key}`: expected {value}, got {got}"));
        }
    }
    out
}

/// The weights files of a folder and which tensor lies where.
struct Files {
    files: Vec<TensorFile>,
    index: BTreeMap<String, usize>,
}

impl Files {
    fn open(dir: &Path) -> Result<Self> {
        let mut this = Self { files: Vec::new(), index: BTreeMap::new() };
        for path in weights_files(dir)? {
            let file = TensorFile::open(&path)?;
            for name in file.names()? {
                this.index.insert(name, this.files.len());
            }
            this.files.push(file);
        }
        Ok(this)
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        self.index.keys()
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let at = self.index.get(name).context("missing in the checkpoint")?;
        self.files[*at].tensor(name)
    }
}

fn weights_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index)
        .with_context(|| format!("no `model.safetensors` and no index in `{}`", dir.display()))
        .hint("a checkpoint is a folder with `config.json` and `model.safetensors`")?;
    let json: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", index.display()))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("`{}` has no `weight_map`", index.display()))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    let paths: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    if let Some(missing) = paths.iter().find(|p| !p.is_file()) {
        return Err(anyhow!("shard `{}` is missing", missing.display()))
            .hint("copy all shards that `model.safetensors.index.json` names");
    }
    Ok(paths)
}

/// Writes `config.json`, `generation_config.json` and the weights (lit-gpt names in, Hugging Face's out).
/// The tokenizer's ids go into the configuration where `tokenizer` is given.
pub fn save_model(
    dir: &Path,
    config: &ModelConfig,
    parameters: &[(String, Tensor)],
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    let kind = parameters.first().map_or(Kind::Float, |(_, t)| t.kind());
    let extras = Extras {
        dtype: if kind == Kind::BFloat16 { "bfloat16" } else { "float32" },
        bos: tokenizer.and_then(Tokenizer::bos_id),
        eos: tokenizer.and_then(Tokenizer::eos_id),
    };
    write_json(&dir.join("config.json"), &hf_config::to_json(config, &extras))?;
    write_json(&dir.join("generation_config.json"), &hf_config::generation_json(&extras))?;
    save_weights(dir, config, parameters, MAX_SHARD_BYTES)
}

/// A folder that `load_model` reads: a model's weights in their dtype, without tokenizer or train state.
pub fn save(dir: &Path, model: &GPT) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    save_model(dir, &model.config, &model.named_parameters(), None)
}

/// Writes `model.safetensors`, or shards of at most `max_shard_bytes` with an index.
pub fn save_weights(
    dir: &Path,
    config: &ModelConfig,
    parameters: &[(String, Tensor)],
    max_shard_bytes: usize,
) -> Result<()> {
    let mut shards: Vec<Vec<(String, Tensor)>> = vec![Vec::new()];
    let (mut in_shard, mut total) = (0, 0);
    for (name, ours) in parameters {
        for part in names::parts(name, config) {
            let tensor = names::to_disk(&ours.detach(), part.layout, config);
            let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
            if in_shard > 0 && in_shard + bytes > max_shard_bytes {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            total += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push((part.name, tensor));
            }
        }
    }
    if let [only] = shards.as_slice() {
        return tensors::write(&dir.join("model.safetensors"), only);
    }
    let mut weight_map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        tensors::write(&dir.join(&file), shard)?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&dir.join("model.safetensors.index.json"), &index)
}

/// Pretty JSON with a final line break.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
