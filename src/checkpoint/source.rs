//! Reading checkpoints: an opened one gives its architecture and each parameter, one at a time.

use super::adapter::Adapter;
use super::folder::copy_files;
use super::formats::{self, Training};
use super::gguf::Type;
use super::hf::write_json;
use super::hf_config::{self, GENERATION};
use super::names::{self, Layout, Naming, Part, presets_that_fit};
use super::outline::outline;
use super::tensors::Entry;
use super::weights::{Packed, Weights};
use crate::bail_hint;
use crate::ffi;
use crate::model::{GPT, ModelConfig};
use crate::quant::Groups;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Values of a tensor that are copied at a time: 16 MiB in fp32.
const CHUNK: i64 = 1 << 22;

/// An opened checkpoint. Its files are mapped; no tensor is read before it is asked for.
pub struct Source {
    /// The folder, or the file.
    pub path: PathBuf,
    /// Its architecture.
    pub config: ModelConfig,
    format: &'static str,
    naming: Naming,
    weights: Weights,
    /// Files of a tokenizer that lies inside.
    tokenizer: Vec<(&'static str, Vec<u8>)>,
    /// Folders that may say which ids end a text; the first that does counts.
    folders: Vec<PathBuf>,
    /// The ids of a file that says so itself.
    ends_inside: Vec<u32>,
    pub(super) training: Option<Training>,
    /// The ones that others were trained on come first.
    adapters: Vec<Adapter>,
}

impl Source {
    /// Opens a folder or a file of any format that is read here.
    ///
    /// # Errors
    /// No format that is known; no configuration, or one of another architecture; a damaged file; a missing shard.
    pub fn open(path: &Path) -> Result<Self> {
        let adapters = Adapter::chain(path)?;
        let base = adapters.first().map_or(path, |adapter| adapter.base.as_path());
        let opened = formats::open(base)?;
        let formats::Opened { format, config, naming, weights, mut tokenizer, training } = opened;
        for adapter in &adapters {
            adapter.check(&config)?;
        }
        let mut folders: Vec<PathBuf> = adapters.iter().rev().map(|a| a.path.clone()).collect();
        let ends_inside = match tokenizer.iter().find(|(name, _)| *name == GENERATION) {
            Some((_, bytes)) => hf_config::eos_ids(&serde_json::from_slice(bytes)?),
            None => {
                folders.push(folder_of(base).to_owned());
                Vec::new()
            }
        };
        // Adapters without a tokenizer are used with their base's.
        let own = adapters.iter().rev().find(|adapter| Tokenizer::is_in(&adapter.path));
        if own.is_some() {
            tokenizer.clear();
        }
        let path = own.map_or(base, |adapter| &adapter.path).to_owned();
        let training = training.filter(|_| adapters.is_empty());
        Ok(Self {
            path,
            config,
            format,
            naming,
            weights,
            tokenizer,
            folders,
            ends_inside,
            training,
            adapters,
        })
    }

    /// Adds adapters to those of this checkpoint, whatever base their configuration names.
    ///
    /// # Errors
    /// No adapters, or such of other matrices.
    pub fn merge(&mut self, dir: &Path) -> Result<()> {
        let mut adapter = Adapter::open(dir)?;
        adapter.base.clone_from(&self.path);
        adapter.check(&self.config)?;
        if Tokenizer::is_in(dir) {
            self.tokenizer.clear();
            self.path = dir.to_owned();
        }
        self.folders.insert(0, dir.to_owned());
        self.adapters.push(adapter);
        self.training = None;
        Ok(())
    }

    /// Name of the format, for people.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The folder, or that of the file.
    pub fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    /// The ids that end a text, beside the tokenizer's own: those of `generation_config.json`, else of `config.json`, in
    /// the adapters' folder, then in the base's. A file with a vocabulary inside has them inside too: what lies beside
    /// it may be another model's.
    ///
    /// # Errors
    /// Such a file is damaged.
    pub fn end_ids(&self) -> Result<Vec<u32>> {
        for dir in &self.folders {
            let ids = hf_config::end_ids(dir)?;
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
        Ok(self.ends_inside.clone())
    }

    /// Calls `read` with a folder of tokenizer files: the checkpoint's own, or a temporary one of what lies inside.
    pub fn read_tokenizer<T>(&self, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        if self.tokenizer.is_empty() {
            return read(self.folder());
        }
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        for (name, bytes) in &self.tokenizer {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes)
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        read(dir.path())
    }

    /// [`Source::read_tokenizer`] for a copy of the checkpoint: where the folder has no `generation_config.json` that
    /// names the ends of a text but the checkpoint does elsewhere, `read` gets a temporary folder with one.
    pub fn with_tokenizer<T>(&self, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let Some(generation) = self.missing_generation()? else { return self.read_tokenizer(read) };
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        copy_files(&Tokenizer::files(self.folder()), dir.path())?;
        write_json(&dir.path().join(GENERATION), &generation)?;
        read(dir.path())
    }

    /// The `generation_config.json` that the tokenizer's folder ought to have: see [`Source::with_tokenizer`].
    fn missing_generation(&self) -> Result<Option<Value>> {
        if !self.tokenizer.is_empty() {
            return Ok(None); // it lies inside too
        }
        let dir = self.folder();
        let own = hf_config::read_generation(dir)?;
        let named = own.as_ref().is_some_and(|json| !hf_config::eos_ids(json).is_empty());
        let mut ends = self.end_ids()?;
        if named || ends.is_empty() {
            return Ok(None);
        }
        let tokenizer = Tokenizer::is_in(dir).then(|| Tokenizer::load(dir)).transpose()?;
        let ids = |id: fn(&Tokenizer) -> Option<u32>| tokenizer.as_ref().and_then(id);
        let (bos, eos) = (ids(Tokenizer::bos_id), ids(Tokenizer::eos_id));
        if let Some(eos) = eos {
            ends.retain(|id| *id != eos);
            ends.insert(0, eos);
        }
        let elsewhere = || -> Result<_> {
            for dir in &self.folders {
                if let Some(json) = hf_config::read_generation(dir)? {
                    return Ok(Some(json));
                }
            }
            Ok(None)
        };
        let json = own.map_or_else(elsewhere, |own| Ok(Some(own)))?;
        // What the tokenizer says by itself is written without this.
        let is_said = json.is_none() && eos.is_some_and(|eos| ends == [eos]);
        Ok((!is_said).then(|| hf_config::with_ends(json.unwrap_or_default(), bos, &ends)))
    }

    /// The model in the given dtype.
    ///
    /// # Errors
    /// As [`Source::check`].
    pub fn load_model(&self, kind: Kind, device: Device) -> Result<GPT> {
        let mut model = GPT::empty(&self.config, device);
        model.reallocate(kind);
        self.copy_into(&model)?;
        Ok(model)
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
    pub(super) fn plan(&self) -> Vec<(String, Vec<i64>, Vec<Part>)> {
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

    /// A matrix as the blocks of quantised values that it is stored in: one or more parts, one below the other. `None`
    /// where a part is stored otherwise.
    ///
    /// # Errors
    /// A name that is no parameter's, a damaged file.
    pub fn blocks(&self, name: &str) -> Result<Option<Vec<Blocks>>> {
        if self.adapters.iter().any(|adapter| adapter.changes(name, &self.config)) {
            return Ok(None);
        }
        let plan = self.plan();
        let found = plan.iter().find(|(planned, ..)| planned == name);
        let (_, shape, parts) = found.with_context(|| format!("no parameter `{name}`"))?;
        let mut all = Vec::new();
        for Part { name, layout } in parts {
            let Some(packed) = self.weights.blocks(name)? else { return Ok(None) };
            let (rows, columns) =
                (names::disk_shape(shape, *layout)[0] as usize, shape[1] as usize);
            let values = match (packed, layout) {
                (Packed::Grouped(groups), Layout::Same | Layout::Rows { .. }) => {
                    BlockValues::Grouped(groups.into_owned())
                }
                (Packed::Gguf(kind, bytes), Layout::Same | Layout::Rows { .. }) => {
                    BlockValues::Gguf { kind, bytes: bytes.to_vec() }
                }
                (Packed::Gguf(kind, bytes), Layout::RotaryPairs { .. }) => {
                    let bytes = unpaired(bytes, rows, self.config.head_size as usize);
                    BlockValues::Gguf { kind, bytes }
                }
                _ => return Ok(None),
            };
            all.push(Blocks { rows, columns, values });
        }
        Ok(Some(all))
    }

    /// Whether any matrix is stored in blocks of quantised values.
    pub fn is_quantised(&self) -> bool {
        self.adapters.is_empty() && self.weights.names().any(|name| self.weights.is_quantised(name))
    }

    /// Whether the tensors are those of the architecture, before any is read.
    ///
    /// # Errors
    /// All that are missing, left over, or of another shape or dtype.
    pub fn check(&self) -> Result<()> {
        self.refuse_adapters()?;
        let (mut known, mut missing, mut problems) = (HashSet::new(), Vec::new(), Vec::new());
        for (_, shape, parts) in self.plan() {
            for Part { name, layout } in parts {
                let expected = names::disk_shape(&shape, layout);
                match self.weights.has(&name) {
                    true => problems.extend(self.weights.problem(&name, &expected)),
                    false => missing.push((name.clone(), expected)),
                }
                known.insert(name);
            }
        }
        let (tie, head) = (self.config.tie_embeddings, self.head());
        let is_known =
            |name: &&str| known.contains(*name) || names::is_buffer(name) || tie && *name == head;
        let left: Vec<&str> = self.weights.names().filter(|name| !is_known(name)).collect();
        for (name, shape) in missing {
            let near =
                nearest(&name, &left).map_or(String::new(), |near| format!("; is it `{near}`?"));
            problems.push(format!("`{name}`: missing, expected shape {shape:?}{near}"));
        }
        problems.extend(left.iter().map(|name| format!("`{name}`: not expected in this model")));
        let fits = || {
            let fits = presets_that_fit(self.naming, |name| self.weights.shape(name));
            fits.into_iter().map(|config| config.name).collect::<Vec<_>>().join(" or ")
        };
        refuse_tensors(problems, &self.path, fits)
    }

    /// Adapters change what a model computes, so that its other weights alone are another model.
    fn refuse_adapters(&self) -> Result<()> {
        let is_lora = |name: &&str| name.contains("lora_");
        let adapters: Vec<&str> = self.weights.names().filter(is_lora).collect();
        match adapters.first() {
            None => Ok(()),
            Some(first) => bail_hint!(
                "merge them into the weights first: litgpt's `litgpt merge_lora`, PEFT's `merge_and_unload()`";
                "`{}` has {} tensors of LoRA adapters that are not merged, as `{first}`",
                self.path.display(), adapters.len()
            ),
        }
    }

    /// Copies all weights into a model of this architecture in place, converting to its dtype.
    ///
    /// # Errors
    /// As [`Source::check`]; a damaged file.
    pub fn copy_into(&self, model: &GPT) -> Result<()> {
        self.check()?;
        for ((name, ours), (planned, _, parts)) in model.named_parameters().iter().zip(self.plan())
        {
            assert_eq!(*name, planned, "outline and model differ");
            self.read(name, &parts, ours)?;
        }
        Ok(())
    }

    /// Copies the parameter that lies in `parts` into `ours`, with what adapters add to it.
    pub(super) fn read(&self, name: &str, parts: &[Part], ours: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        ffi::want_huge_pages(ours);
        fill(ours, &self.weights, parts, &self.config)?;
        self.adapters.iter().try_for_each(|adapter| adapter.add_to(name, ours, &self.config))
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
            let Entry { name, kind, shape } = &all[i];
            let ours = Tensor::empty(shape, (*kind, Device::Cpu));
            self.read(name, &places[i], &ours)?;
            Ok(ours)
        };
        Ok(Parameters { entries, get: Box::new(get) })
    }

    /// The optimizer's moments of a training checkpoint, under the names of `train_state/`, in fp32.
    ///
    /// # Errors
    /// Moments that are missing or do not have their weights' shapes.
    pub fn moments(&self) -> Result<Option<Parameters<'_>>> {
        let Some(training) = &self.training else { return Ok(None) };
        let (mut entries, mut places, mut problems) = (Vec::new(), Vec::new(), Vec::new());
        for (moment, weights) in ["exp_avg", "exp_avg_sq"].into_iter().zip(&training.moments) {
            for (name, shape, parts) in self.plan() {
                for Part { name, layout } in &parts {
                    let shape = names::disk_shape(&shape, *layout);
                    let problem = weights.problem(name, &shape);
                    problems.extend(problem.map(|problem| format!("{moment} of {problem}")));
                }
                entries.push(Entry { name: format!("{moment}.{name}"), kind: Kind::Float, shape });
                places.push((weights, parts));
            }
        }
        refuse_tensors(problems, &self.path, String::new)?;
        let all = entries.clone();
        let get = move |i: usize| {
            let ours = Tensor::empty(&all[i].shape, (Kind::Float, Device::Cpu));
            let (weights, parts) = &places[i];
            fill(&ours, weights, parts, &self.config).map(|()| ours)
        };
        Ok(Some(Parameters { entries, get: Box::new(get) }))
    }
}

/// A folder, or that of a file.
fn folder_of(path: &Path) -> &Path {
    match path.is_dir() {
        true => path,
        false => formats::folder_of(path),
    }
}

/// Rows of quantised values.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// N.
    pub rows: usize,
    /// K.
    pub columns: usize,
    /// As they are stored.
    pub values: BlockValues,
}

/// How a file stores [`Blocks`].
#[derive(Clone, Debug)]
pub enum BlockValues {
    /// As GGUF does.
    Gguf {
        /// Their type.
        kind: Type,
        /// One row behind the other.
        bytes: Vec<u8>,
    },
    /// As `convert --quantize` does.
    Grouped(Groups<'static>),
}

/// Rows of whole heads that are rotated in pairs of neighbours, in our order ([`Layout::RotaryPairs`]).
fn unpaired(bytes: &[u8], rows: usize, head_size: usize) -> Vec<u8> {
    let (row, half) = (bytes.len() / rows.max(1), head_size / 2);
    let theirs = |ours: usize| {
        let (head, i) = (ours / head_size, ours % head_size);
        head * head_size + 2 * (i % half) + i / half
    };
    (0..rows).flat_map(|ours| &bytes[theirs(ours) * row..][..row]).copied().collect()
}

/// Copies the parts of a parameter into it, converting to its dtype and device; some rows at a time where they lie in
/// the same order.
fn fill(ours: &Tensor, weights: &Weights, parts: &[Part], config: &ModelConfig) -> Result<()> {
    for Part { name, layout } in parts {
        let first = match layout {
            Layout::Same => 0,
            Layout::Rows { start, .. } => *start,
            _ => {
                names::from_disk(ours, &weights.tensor(name)?, *layout, config);
                continue;
            }
        };
        let shape = names::disk_shape(&ours.size(), *layout);
        let mut whole = ours.narrow(0, first, shape.first().copied().unwrap_or(1));
        if weights.kind(name)? == ours.kind()
            && let Some(bytes) = ffi::bytes_of_mut(&mut whole)
            && weights.read(name, bytes)?
        {
            continue;
        }
        let row = shape.iter().skip(1).product::<i64>().max(1);
        let (rows, step) = (shape.first().copied().unwrap_or(1), (CHUNK / row).max(1));
        for start in (0..rows).step_by(step as usize) {
            let n = step.min(rows - start);
            let theirs = weights.rows(name, start..start + n)?;
            ours.narrow(0, first + start, n).copy_(&theirs);
        }
    }
    Ok(())
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

/// The name most like another one, if one is much like it.
fn nearest<'a>(name: &str, others: &[&'a str]) -> Option<&'a str> {
    let likeness = |other: &str| strsim::normalized_levenshtein(name, other);
    let best = others.iter().map(|other| (likeness(other), *other));
    best.filter(|(likeness, _)| *likeness > 0.7).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, o)| o)
}

/// One message for all tensors that do not fit; `preset` names the one whose tensors they are, if there is one.
fn refuse_tensors(
    mut problems: Vec<String>,
    path: &Path,
    preset: impl Fn() -> String,
) -> Result<()> {
    const SHOWN: usize = 40;
    let n = problems.len();
    if n == 0 {
        return Ok(());
    }
    if n > SHOWN {
        problems.truncate(SHOWN);
        problems.push(format!("... and {} more", n - SHOWN));
    }
    let preset = preset();
    if !preset.is_empty() {
        problems.push(format!("the tensors are those of the preset {preset}"));
    }
    bail_hint!(
        "weights and configuration of a checkpoint must belong together; copy it again";
        "{n} tensor(s) of `{}` do not fit its configuration:\n  {}",
        path.display(), problems.join("\n  ")
    )
}
