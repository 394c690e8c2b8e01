//! Reading checkpoints: an opened one gives its architecture and each parameter, one at a time.

use super::hf::weights_files;
use super::names::{self, LitGpt, Naming, Part};
use super::outline::outline;
use super::tensors::{Entry, TensorFile};
use super::weights::Weights;
use super::{hf_config, litgpt};
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig, RopeScaling, RopeType};
use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The architecture of the checkpoint in `dir`.
pub fn load_config(dir: &Path) -> Result<ModelConfig> {
    Ok(Source::open(dir)?.config)
}

/// Builds the model of a checkpoint folder in the given dtype.
pub fn load_model(dir: &Path, kind: Kind, device: Device) -> Result<GPT> {
    let source = Source::open(dir)?;
    let mut model = GPT::empty(&source.config, device);
    model.reallocate(kind);
    source.copy_into(&model)?;
    Ok(model)
}

/// Copies the weights in `dir` into a model in place, converting to its dtype. Everything is
/// checked before anything is copied.
///
/// # Errors
/// Another architecture (its differing fields are named); missing, unknown or mis-shaped tensors,
/// all at once; a damaged file; a missing shard.
pub fn load_weights(model: &GPT, dir: &Path) -> Result<()> {
    let source = Source::open(dir)?;
    refuse_architecture(differences(&model.config, &source.config), dir)?;
    source.copy_into(model)
}

/// [`load_weights`] for continued pretraining: context length and RoPE may differ from the
/// checkpoint's, since no tensor depends on them. What differs is said on stderr.
pub fn load_initial_weights(model: &GPT, dir: &Path) -> Result<()> {
    let of_positions = |d: &Difference| POSITIONS.contains(&d.key.as_str());
    let source = Source::open(dir)?;
    let (positions, other) =
        differences(&model.config, &source.config).into_iter().partition::<Vec<_>, _>(of_positions);
    refuse_architecture(other, dir)?;
    for Difference { key, ours, theirs } in positions {
        eprintln!("positions   `{key}`: expected {theirs}, got {ours}");
    }
    source.copy_into(model)
}

/// An opened checkpoint. Its files are mapped; no tensor is read before it is asked for.
pub struct Source {
    /// The folder, or the file.
    pub path: PathBuf,
    /// Its architecture.
    pub config: ModelConfig,
    naming: Naming,
    weights: Weights,
}

impl Source {
    /// Opens a folder of Hugging Face's layout, or of litgpt's.
    ///
    /// # Errors
    /// No configuration, or one of another architecture; a damaged file; a missing shard.
    pub fn open(dir: &Path) -> Result<Self> {
        let litgpt = dir.join(litgpt::WEIGHTS);
        let (config, files) = match litgpt::read_config(dir)? {
            Some(config) if litgpt.is_file() => (config, vec![litgpt]),
            _ => (hf_config::read(dir)?, weights_files(dir)?),
        };
        let is_litgpt = files.iter().any(|file| file.ends_with(litgpt::WEIGHTS));
        let mut weights = Weights::default();
        for path in files {
            let file =
                TensorFile::open(&path).hint("copy the file again, or use another checkpoint")?;
            weights.add(Box::new(file), |name| Some(name.to_owned()))?;
        }
        let naming = match is_litgpt {
            true => Naming::LitGpt(LitGpt::of(weights.names())),
            false => Naming::HuggingFace,
        };
        Ok(Self { path: dir.to_owned(), config, naming, weights })
    }

    /// Name of the format, for people.
    pub fn format(&self) -> &'static str {
        match self.naming {
            Naming::HuggingFace => "Hugging Face safetensors",
            Naming::LitGpt(LitGpt { interleaved: true, .. }) => "lit-gpt, QKV packed by group",
            Naming::LitGpt(_) => "litgpt",
            Naming::Meta => "Meta",
        }
    }

    /// Every tensor as it is stored: name, shape, dtype, bytes.
    pub fn stored(&self) -> Result<Vec<StoredTensor>> {
        let tensor = |name: &str| {
            Ok(StoredTensor {
                name: name.to_owned(),
                shape: self.weights.shape(name).unwrap_or_default(),
                dtype: self.weights.stored_as(name)?,
                bytes: self.weights.bytes(name)?,
            })
        };
        self.weights.names().map(tensor).collect()
    }

    /// One tensor as it is stored.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.weights.tensor(name)
    }

    /// What parameter lies where: name and shape in memory, parts on disk. Tied weights may have been saved under the
    /// head's name alone.
    fn plan(&self) -> Vec<(String, Vec<i64>, Vec<Part>)> {
        let head = self.head();
        let parts = |name: &str| {
            let mut parts = self.naming.parts(name, &self.config);
            let tied = name == "transformer.wte.weight" && self.config.tie_embeddings;
            if tied && !self.weights.has(&parts[0].name) && self.weights.has(&head) {
                parts[0].name = head.clone();
            }
            parts
        };
        let with_parts = |(name, shape): (String, Vec<i64>)| {
            let parts = parts(&name);
            (name, shape, parts)
        };
        outline(&self.config).into_iter().map(with_parts).collect()
    }

    /// The head's name on disk.
    fn head(&self) -> String {
        self.naming.parts("lm_head.weight", &self.config).swap_remove(0).name
    }

    /// Whether the tensors are those of the architecture, before any is read.
    ///
    /// # Errors
    /// All that are missing, left over, or of another shape or dtype.
    pub fn check(&self) -> Result<()> {
        let (mut known, mut problems) = (HashSet::new(), Vec::new());
        for (_, shape, parts) in self.plan() {
            for Part { name, layout } in parts {
                problems.extend(self.weights.problem(&name, &names::disk_shape(&shape, layout)));
                known.insert(name);
            }
        }
        let (tie, head) = (self.config.tie_embeddings, self.head());
        for name in self.weights.names() {
            let expected = known.contains(name) || names::is_buffer(name) || tie && name == head;
            if !expected {
                problems.push(format!("`{name}`: not expected in this model"));
            }
        }
        refuse_tensors(&problems, &self.path)
    }

    /// Copies all weights into a model of this architecture in place, converting to its dtype.
    ///
    /// # Errors
    /// As [`Source::check`].
    pub fn copy_into(&self, model: &GPT) -> Result<()> {
        self.check()?;
        let _guard = tch::no_grad_guard();
        for ((name, ours), (planned, _, parts)) in model.named_parameters().iter().zip(self.plan())
        {
            assert_eq!(*name, planned, "outline and model differ");
            self.fill(ours, &parts)?;
        }
        Ok(())
    }

    fn fill(&self, ours: &Tensor, parts: &[Part]) -> Result<()> {
        for Part { name, layout } in parts {
            names::from_disk(ours, &self.weights.tensor(name)?, *layout, &self.config);
        }
        Ok(())
    }

    /// Every parameter by its lit-gpt name, in `kind`, or in the dtype that it is stored in.
    ///
    /// # Errors
    /// As [`Source::check`].
    pub fn parameters(&self, kind: Option<Kind>) -> Result<Parameters<'_>> {
        self.check()?;
        let (mut entries, mut places) = (Vec::new(), Vec::new());
        for (name, shape, parts) in self.plan() {
            let kind = kind.map_or_else(|| self.weights.kind(&parts[0].name), Ok)?;
            entries.push(Entry { name, kind, shape });
            places.push(parts);
        }
        let all = entries.clone();
        let get = move |i: usize| {
            let Entry { kind, shape, .. } = &all[i];
            let ours = Tensor::empty(shape, (*kind, Device::Cpu));
            self.fill(&ours, &places[i]).map(|()| ours)
        };
        Ok(Parameters { entries, get: Box::new(get) })
    }
}

/// A tensor of a checkpoint, as it lies on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoredTensor {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<i64>,
    /// In the words of its format.
    pub dtype: String,
    /// On disk.
    pub bytes: u64,
}

/// Parameters by lit-gpt name, made when they are asked for.
pub struct Parameters<'a> {
    /// Name, dtype and shape of each.
    pub entries: Vec<Entry>,
    get: Box<dyn Fn(usize) -> Result<Tensor> + 'a>,
}

impl<'a> Parameters<'a> {
    /// Those of a model in memory, in `kind`.
    pub fn of(named: &'a [(String, Tensor)], kind: Kind) -> Self {
        let entry =
            |(name, t): &(String, Tensor)| Entry { name: name.clone(), kind, shape: t.size() };
        let entries = named.iter().map(entry).collect();
        Self { entries, get: Box::new(|i| Ok(named[i].1.detach())) }
    }

    /// Those that `get` makes.
    pub fn lazily(entries: Vec<Entry>, get: impl Fn(usize) -> Result<Tensor> + 'a) -> Self {
        Self { entries, get: Box::new(get) }
    }

    /// The i-th, on any device and of any float dtype.
    pub fn get(&self, i: usize) -> Result<Tensor> {
        (self.get)(i)
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
