//! Loading a checkpoint into a model of the same architecture.

use super::names::Part;
use super::source::Source;
use crate::bail_hint;
use crate::model::{GPT, ModelConfig, RopeScaling, RopeType};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The architecture of the checkpoint in `dir`.
///
/// # Errors
/// No checkpoint there, or a damaged one.
pub fn load_config(dir: &Path) -> Result<ModelConfig> {
    Ok(Source::open(dir)?.config)
}

/// Builds the model of a checkpoint folder in the given dtype.
///
/// # Errors
/// As [`load_weights`], but for another architecture.
pub fn load_model(dir: &Path, kind: Kind, device: Device) -> Result<GPT> {
    Source::open(dir)?.load_model(kind, device)
}

/// Copies the weights in `dir` into a model in place, converting to its dtype. Everything is
/// checked before anything is copied.
///
/// # Errors
/// Another architecture (its differing fields are named); missing, unknown or mis-shaped tensors,
/// all at once; a damaged file; a missing shard.
pub fn load_weights(model: &GPT, dir: &Path) -> Result<()> {
    open_same(&model.config, dir)?.copy_into(model)
}

/// [`load_weights`] for continued pretraining: context length and RoPE may differ from the
/// checkpoint's, since no tensor depends on them. What differs is said on stderr.
///
/// # Errors
/// As [`load_weights`].
pub fn load_initial_weights(model: &GPT, dir: &Path) -> Result<()> {
    open_initial(&model.config, dir)?.copy_into(model)
}

fn open_same(config: &ModelConfig, dir: &Path) -> Result<Source> {
    let source = Source::open(dir)?;
    refuse_architecture(differences(config, &source.config), dir)?;
    Ok(source)
}

fn open_initial(config: &ModelConfig, dir: &Path) -> Result<Source> {
    let of_positions = |d: &Difference| POSITIONS.contains(&d.key.as_str());
    let source = Source::open(dir)?;
    let (positions, other) =
        differences(config, &source.config).into_iter().partition::<Vec<_>, _>(of_positions);
    refuse_architecture(other, dir)?;
    for Difference { key, ours, theirs } in positions {
        eprintln!("positions   `{key}`: expected {theirs}, got {ours}");
    }
    Ok(source)
}

/// Weights of a checkpoint, one parameter at a time.
pub struct WeightReader {
    source: Source,
    places: HashMap<String, Vec<Part>>,
}

impl WeightReader {
    /// Those in `dir`, for a model of this architecture.
    ///
    /// # Errors
    /// As [`load_weights`].
    pub fn open(config: &ModelConfig, dir: &Path) -> Result<Self> {
        Self::of(open_same(config, dir)?)
    }

    /// [`WeightReader::open`] for continued pretraining, as [`load_initial_weights`].
    ///
    /// # Errors
    /// As [`load_weights`].
    pub fn open_initial(config: &ModelConfig, dir: &Path) -> Result<Self> {
        Self::of(open_initial(config, dir)?)
    }

    fn of(source: Source) -> Result<Self> {
        source.check()?;
        let places = source.plan().into_iter().map(|(name, _, parts)| (name, parts)).collect();
        Ok(Self { source, places })
    }

    /// Copies the parameter of this lit-gpt name into `ours`, converting to its dtype and device.
    ///
    /// # Errors
    /// No such parameter; a damaged file.
    pub fn read(&self, name: &str, ours: &Tensor) -> Result<()> {
        let parts = self.places.get(name).with_context(|| format!("no parameter `{name}`"))?;
        self.source.read(name, parts, ours)
    }
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
