//! Hugging Face folders: `config.json`, `model.safetensors` (or shards and an index).

use super::hf_config::{self, Extras};
use super::names::{self, Layout, Part};
use super::tensors::{self, Entry, TensorFile};
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig, RopeScaling, RopeType};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Largest weights file, in bytes; above it the weights are sharded.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The architecture of the checkpoint in `dir`.
pub fn load_config(dir: &Path) -> Result<ModelConfig> {
    hf_config::read(dir)
}

/// Builds the model of a checkpoint folder in the given dtype.
pub fn load_model(dir: &Path, kind: Kind, device: Device) -> Result<GPT> {
    let mut model = GPT::empty(&load_config(dir)?, device);
    model.reallocate(kind);
    load_weights(&model, dir)?;
    Ok(model)
}

/// Copies the weights in `dir` into a model in place, converting to its dtype. Everything is
/// checked before anything is copied.
///
/// # Errors
/// Another architecture (its differing fields are named); missing, unknown or mis-shaped tensors,
/// all at once; a damaged file; a missing shard.
pub fn load_weights(model: &GPT, dir: &Path) -> Result<()> {
    refuse_architecture(differences(&model.config, &load_config(dir)?), dir)?;
    copy_weights(model, dir)
}

/// [`load_weights`] for continued pretraining: context length and RoPE may differ from the
/// checkpoint's, since no tensor depends on them. What differs is said on stderr.
pub fn load_initial_weights(model: &GPT, dir: &Path) -> Result<()> {
    let of_positions = |d: &Difference| POSITIONS.contains(&d.key.as_str());
    let (positions, other) = differences(&model.config, &load_config(dir)?)
        .into_iter()
        .partition::<Vec<_>, _>(of_positions);
    refuse_architecture(other, dir)?;
    for Difference { key, ours, theirs } in positions {
        eprintln!("positions   `{key}`: expected {theirs}, got {ours}");
    }
    copy_weights(model, dir)
}

/// Fields that no tensor depends on.
const POSITIONS: [&str; 3] = ["block_size", "rope_base", "rope_scaling"];

/// A field in which two configurations differ.
struct Difference {
    key: String,
    ours: Value,
    theirs: Value,
}

/// The name and the split of the vocabulary into real and padding ids are no part of it.
fn differences(ours: &ModelConfig, theirs: &ModelConfig) -> Vec<Difference> {
    let fields = |config: &ModelConfig| {
        let mut config = config.clone();
        (config.name, config.vocab_size) = (String::new(), 0);
        // As `config.json` says it: some keys spelled out, those that a type does not use dropped.
        if let Some(s) = &mut config.rope_scaling {
            match s.rope_type {
                RopeType::Linear | RopeType::Dynamic => {
                    *s = RopeScaling::new(s.rope_type, s.factor)
                }
                RopeType::Yarn | RopeType::Llama3 => {
                    s.original_max_position_embeddings.get_or_insert(config.block_size);
                }
            }
        }
        json!(config).as_object().cloned().unwrap_or_default()
    };
    let (ours, mut theirs) = (fields(ours), fields(theirs));
    let pairs = ours.into_iter().map(|(key, ours)| {
        let theirs = theirs.remove(&key).unwrap_or_default();
        Difference { key, ours, theirs }
    });
    pairs.filter(|d| d.ours != d.theirs).collect()
}

/// One clear message where the folder holds another model than the run's configuration says.
fn refuse_architecture(differing: Vec<Difference>, dir: &Path) -> Result<()> {
    if differing.is_empty() {
        return Ok(());
    }
    let line = |d: Difference| format!("`{}`: expected {}, got {}", d.key, d.ours, d.theirs);
    let lines: Vec<String> = differing.into_iter().map(line).collect();
    bail_hint!(
        "choose the preset or `model_config` of the checkpoint, or another checkpoint";
        "`{}` holds another architecture than the configuration:\n  {}",
        dir.display(), lines.join("\n  ")
    )
}

fn copy_weights(model: &GPT, dir: &Path) -> Result<()> {
    let config = &model.config;
    let weights = Weights::open(dir)?;
    let (mut plan, mut known, mut problems) = (Vec::new(), HashSet::new(), Vec::new());
    for (name, ours) in model.named_parameters() {
        for mut part in names::parts(&name, config) {
            // Tied weights may have been saved under the head's name alone.
            let head = names::head_name(config);
            if name == "transformer.wte.weight" && config.tie_embeddings && !weights.has(&part.name)
            {
                part.name = if weights.has(head) { head.into() } else { part.name };
            }
            problems.extend(weights.problem(&part, &names::disk_shape(&ours, part.layout)));
            known.insert(part.name.clone());
            plan.push((ours.shallow_clone(), part));
        }
    }
    let tied = |name: &str| config.tie_embeddings && name == names::head_name(config);
    for name in weights.place.keys() {
        if !known.contains(name) && !names::is_buffer(name) && !tied(name) {
            problems.push(format!("`{name}`: not expected in this model"));
        }
    }
    refuse_tensors(&problems, dir)?;

    let _guard = tch::no_grad_guard();
    for (ours, part) in plan {
        names::from_disk(&ours, &weights.tensor(&part.name)?, part.layout, config);
    }
    Ok(())
}

/// One message for all tensors that do not fit.
fn refuse_tensors(problems: &[String], dir: &Path) -> Result<()> {
    const SHOWN: usize = 20;
    if problems.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<&str> = problems.iter().take(SHOWN).map(String::as_str).collect();
    let rest = format!("... and {} more", problems.len().saturating_sub(SHOWN));
    if problems.len() > SHOWN {
        lines.push(&rest);
    }
    bail_hint!(
        "the weights and the `config.json` of a folder must belong together; copy the folder again";
        "{} tensor(s) of `{}` do not fit its `config.json`:\n  {}",
        problems.len(), dir.display(), lines.join("\n  ")
    )
}

/// The open weights files of a folder and which tensor lies where.
struct Weights {
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
}

impl Weights {
    fn open(dir: &Path) -> Result<Self> {
        let mut this = Self { files: Vec::new(), place: BTreeMap::new() };
        for path in weights_files(dir)? {
            let file =
                TensorFile::open(&path).hint("copy the file again, or use another checkpoint")?;
            this.place.extend(file.names().into_iter().map(|name| (name, this.files.len())));
            this.files.push(file);
        }
        Ok(this)
    }

    fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    fn file(&self, name: &str) -> Result<&TensorFile> {
        let at = self.place.get(name).with_context(|| format!("`{name}`: missing"))?;
        Ok(&self.files[*at])
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.file(name)?.tensor(name)
    }

    /// What is wrong with one tensor, by the header alone.
    fn problem(&self, part: &Part, expected: &[i64]) -> Option<String> {
        let name = &part.name;
        let Ok(file) = self.file(name) else {
            return Some(format!("`{name}`: missing, expected shape {expected:?}"));
        };
        let got = file.shape(name).unwrap_or_default();
        if got != expected {
            return Some(format!("`{name}`: expected shape {expected:?}, got {got:?}"));
        }
        match file.kind(name) {
            Ok(Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double) => None,
            Ok(other) => Some(format!("`{name}`: expected a float dtype, got {other:?}")),
            Err(error) => Some(format!("{error:#}")),
        }
    }
}

/// Paths of the weights of a folder: one file, or all shards of the index.
///
/// # Errors
/// None there; shards that are missing, all at once.
pub(super) fn weights_files(dir: &Path) -> Result<Vec<PathBuf>> {
    if dir.join(SINGLE).is_file() {
        return Ok(vec![dir.join(SINGLE)]);
    }
    let index = dir.join(INDEX);
    if !index.is_file() {
        let pickled =
            dir.join("pytorch_model.bin").is_file() || dir.join("lit_model.pth").is_file();
        let hint = match pickled {
            true => "pickled weights (`.bin`, `.pth`) must first be saved as safetensors",
            false => "a checkpoint is a folder with `config.json` and `model.safetensors`",
        };
        bail_hint!(hint; "no weights in `{}`: looked for `{SINGLE}` and `{INDEX}`", dir.display());
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
            format!("copy all {} shards that `{INDEX}` names", names.len());
            "missing in `{}`: {}", dir.display(), missing.join(", ")
        );
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// A folder that [`load_model`] and transformers read: a model's weights in their dtype, without
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
    save_weights(dir, config, named, kind, MAX_SHARD_BYTES)
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
    let problems = hf_config::unsupported(config);
    if !problems.is_empty() {
        let list = problems.join("\n  ");
        return Err(anyhow!("Hugging Face's layout has no place for this model:\n  {list}"))
            .hint("change these fields of `model_config`");
    }
    let shards = plan_shards(config, named, kind, max_shard_bytes);
    let (mut weight_map, mut total, count) = (Map::new(), 0, shards.len());
    for (i, (entries, sources)) in shards.iter().enumerate() {
        let file = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        tensors::write_lazily(&dir.join(&file), entries, |i| {
            let (ours, layout) = &sources[i];
            Ok(names::to_disk(&ours.detach(), *layout, config))
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

/// What one file will hold, and where each entry comes from.
type Shard<'a> = (Vec<Entry>, Vec<(&'a Tensor, Layout)>);

fn plan_shards<'a>(
    config: &ModelConfig,
    named: &'a [(String, Tensor)],
    kind: Kind,
    max_shard_bytes: u64,
) -> Vec<Shard<'a>> {
    let mut shards: Vec<Shard> = Vec::new();
    let mut in_shard = 0;
    for (name, ours) in named {
        for part in names::parts(name, config) {
            let entry =
                Entry { name: part.name, kind, shape: names::disk_shape(ours, part.layout) };
            if shards.is_empty() || (in_shard > 0 && in_shard + entry.bytes() > max_shard_bytes) {
                shards.push(Shard::default());
                in_shard = 0;
            }
            in_shard += entry.bytes();
            if let Some((entries, sources)) = shards.last_mut() {
                entries.push(entry);
                sources.push((ours, part.layout));
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
