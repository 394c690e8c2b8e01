//! Hugging Face folders: `config.json`, `model.safetensors` (or shards and an index), or quantised matrices.

use super::hf_config::{self, Extras, GENERATION};
use super::names::{self, Layout, Part};
use super::quantised;
use super::source::Parameters;
use super::tensors::{self, Entry};
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig};
use crate::quant::{Scheme, round_matrix};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::{ChatTemplate, SpecialTokens};
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
pub(super) fn weights_files(dir: &Path, quantised: bool) -> Result<Vec<PathBuf>> {
    let there = |name: &&&str| dir.join(name).is_file();
    let known: &[&str] = match quantised {
        true => &[quantised::SINGLE, quantised::INDEX],
        false => &[SINGLE, INDEX, PICKLE, PICKLE_INDEX],
    };
    let Some(&found) = known.iter().find(there) else {
        let looked: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
        bail_hint!(
            format!("a checkpoint is a folder with `config.json` and `{}`", known[0]);
            "no weights in `{}`: looked for {}", dir.display(), looked.join(", ")
        );
    };
    let index = dir.join(found);
    if matches!(found, SINGLE | PICKLE | quantised::SINGLE) {
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
    save_all(dir, config, parameters, None, tokenizer, max_shard_bytes)
}

/// [`save_parameters`] with the matrices rounded: `quantized.safetensors` (`quantised.rs` has the layout).
///
/// # Errors
/// As [`save_weights`]; rows that groups do not divide.
pub fn save_quantised(
    dir: &Path,
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Scheme,
    tokenizer: Option<&Tokenizer>,
    max_shard_bytes: u64,
) -> Result<()> {
    save_all(dir, config, parameters, Some(scheme), tokenizer, max_shard_bytes)
}

fn save_all(
    dir: &Path,
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Option<Scheme>,
    tokenizer: Option<&Tokenizer>,
    max_shard_bytes: u64,
) -> Result<()> {
    let extras = Extras {
        dtype: match written_kind(config, parameters, scheme) {
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
    let mut json = hf_config::to_json(config, &extras);
    if let Some(scheme) = scheme {
        json["quantization_config"] = quantised::config_json(scheme);
    }
    write_json(&dir.join("config.json"), &json)?;
    write_json(&dir.join(GENERATION), &hf_config::generation_json(&extras))?;
    save_shards(dir, config, parameters, scheme, max_shard_bytes)
}

/// Dtype of the first parameter that is written as it is.
fn written_kind(config: &ModelConfig, parameters: &Parameters, scheme: Option<Scheme>) -> Kind {
    let plain = |entry: &&Entry| quantised::format_of(entry, config, scheme).is_none();
    parameters.entries.iter().find(plain).map_or(Kind::Float, |entry| entry.kind)
}

/// Bytes of the weights that [`save_quantised`] writes.
pub(super) fn quantised_bytes(
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Scheme,
) -> u64 {
    let shards = plan_shards(config, parameters, Some(scheme), u64::MAX);
    shards.iter().flat_map(|(entries, _)| entries).map(Entry::bytes).sum()
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
    save_shards(dir, config, &Parameters::of(named, kind), None, max_shard_bytes)
}

fn save_shards(
    dir: &Path,
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Option<Scheme>,
    max_shard_bytes: u64,
) -> Result<()> {
    let problems = hf_config::unsupported(config);
    if !problems.is_empty() {
        let list = problems.join("\n  ");
        return Err(anyhow!("Hugging Face's layout has no place for this model:\n  {list}"))
            .hint("change these fields of `model_config`");
    }
    let (single, index) = match scheme {
        Some(_) => (quantised::SINGLE, quantised::INDEX),
        None => (SINGLE, INDEX),
    };
    let stem = single.trim_end_matches(".safetensors");
    let shards = plan_shards(config, parameters, scheme, max_shard_bytes);
    let (mut weight_map, mut total, count) = (Map::new(), 0, shards.len());
    // The parts of one parameter come one after the other: it is made once.
    let last: RefCell<Option<(usize, Vec<Tensor>)>> = RefCell::new(None);
    for (i, (entries, sources)) in shards.iter().enumerate() {
        let file = match count {
            1 => single.to_owned(),
            _ => format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1),
        };
        tensors::write_lazily(&dir.join(&file), entries, |i| {
            let (parameter, layout, piece) = sources[i];
            let made = last.take().filter(|(before, _)| *before == parameter);
            let ours = match made {
                Some((_, made)) => made,
                None => pieces(config, parameters, scheme, parameter)?,
            };
            let theirs = names::to_disk(&ours[piece], layout, config);
            last.replace(Some((parameter, ours)));
            Ok(theirs)
        })?;
        total += entries.iter().map(Entry::bytes).sum::<u64>();
        weight_map.extend(entries.iter().map(|e| (e.name.clone(), file.clone().into())));
    }
    // Whichever form an earlier save into this folder had, it must not be read instead.
    let stale = dir.join(if count == 1 { index } else { single });
    if stale.exists() {
        std::fs::remove_file(&stale)
            .with_context(|| format!("cannot remove `{}`", stale.display()))?;
    }
    if count == 1 {
        return Ok(());
    }
    let json = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&dir.join(index), &json)
}

/// What is written of a parameter, whole: itself, or the tensors of a quantised matrix.
fn pieces(
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Option<Scheme>,
    i: usize,
) -> Result<Vec<Tensor>> {
    let entry = &parameters.entries[i];
    let ours = parameters.get(i)?;
    match quantised::format_of(entry, config, scheme) {
        None => Ok(vec![ours]),
        Some(format) => quantised::tensors(&round_matrix(&entry.name, &ours, format)?),
    }
}

/// What one file will hold, and of which parameter, which rows and which of its [`pieces`] each entry is.
type Shard = (Vec<Entry>, Vec<(usize, Layout, usize)>);

/// The tensors of a matrix lie in the same file.
fn plan_shards(
    config: &ModelConfig,
    parameters: &Parameters,
    scheme: Option<Scheme>,
    max_shard_bytes: u64,
) -> Vec<Shard> {
    let mut shards: Vec<Shard> = Vec::new();
    let mut in_shard = 0;
    for (i, ours) in parameters.entries.iter().enumerate() {
        let format = quantised::format_of(ours, config, scheme);
        for Part { name, layout } in names::parts(&ours.name, config) {
            let shape = names::disk_shape(&ours.shape, layout);
            let new = match format {
                Some(format) => quantised::entries(&name, format, shape[0], shape[1]),
                None => vec![Entry { name, kind: ours.kind, shape }],
            };
            let bytes: u64 = new.iter().map(Entry::bytes).sum();
            if shards.is_empty() || (in_shard > 0 && in_shard + bytes > max_shard_bytes) {
                shards.push(Shard::default());
                in_shard = 0;
            }
            in_shard += bytes;
            if let Some((entries, sources)) = shards.last_mut() {
                sources.extend((0..new.len()).map(|piece| (i, layout, piece)));
                entries.extend(new);
            }
        }
    }
    shards
}

/// Pretty JSON with a final line break.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    replace(path, &text)
}

/// Writes a file, in the place of one that was copied there, which may be read-only.
fn replace(path: &Path, text: &str) -> Result<()> {
    let write = || {
        if path.exists() {
            std::fs::remove_file(path)?;
        }
        std::fs::write(path, text)
    };
    write().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Writes `chat_template.jinja`, which `chat`, `serve` and transformers use, and adds the tokens that end its turns to
/// the ends of a text in `generation_config.json`, so that transformers' `generate` stops at them too. What else that
/// file has stays.
///
/// # Errors
/// A template that is no Jinja; a `generation_config.json` that is no JSON; an I/O error.
pub fn save_chat_template(dir: &Path, text: &str, tokenizer: Option<&Tokenizer>) -> Result<()> {
    replace(&dir.join("chat_template.jinja"), text)?;
    let Some(tokenizer) = tokenizer else { return Ok(()) };
    let template = ChatTemplate::new(text, "`chat_template.jinja`", SpecialTokens::default())?;
    let turns = template.end_ids(tokenizer);
    if turns.is_empty() {
        return Ok(());
    }
    let json = hf_config::read_generation(dir)?.unwrap_or_default();
    let mut ends = Vec::new();
    for id in tokenizer.eos_id().into_iter().chain(turns).chain(hf_config::eos_ids(&json)) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    let json = hf_config::with_ends(json, tokenizer.bos_id(), &ends);
    write_json(&dir.join(GENERATION), &json)
}
