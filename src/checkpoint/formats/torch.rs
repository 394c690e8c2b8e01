//! PyTorch files: state dicts of transformers, litgpt, lit-gpt and TinyLlama, alone or in a training checkpoint.
//!
//! A training checkpoint holds the weights under `model` (`state_dict`, `module`), AdamW's state under `optimizer`, by
//! name where FSDP gathered it and by number (the order of the weights) where one GPU trained, and counters beside:
//! TinyLlama's `iter_num`, `step_count` and `hparams`.

use super::{Opened, folder_of};
use crate::checkpoint::names::{LitGpt, Naming, presets_that_fit};
use crate::checkpoint::torch_file::{Dtype, TorchFile, TorchTensor, Value};
use crate::checkpoint::weights::{Store, Weights};
use crate::checkpoint::{hf_config, litgpt};
use crate::error::WithHint;
use crate::ffi::{self, TensorView};
use crate::model::ModelConfig;
use anyhow::{Context, Result, anyhow};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use tch::Kind;

/// Keys under which training scripts put the weights.
const MODEL: [&str; 3] = ["model", "state_dict", "module"];

/// What wrappers of modules put before each name.
const PREFIXES: [&str; 4] = ["_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module."];

/// AdamW's state and the counters of a training checkpoint.
pub(in crate::checkpoint) struct Training {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches done on each rank.
    pub iter: u64,
    /// By the counters and one node's batch; 0: not known.
    pub tokens: u64,
    /// `exp_avg`, then `exp_avg_sq`, under the weights' names.
    pub moments: [Weights; 2],
}

/// Opens a single file, with the configuration beside it or the one that its hyper-parameters or shapes name.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let file = Rc::new(TorchFile::open(path)?);
    let key = model_key(&file);
    let mut weights = Weights::default();
    weights.add(Box::new(TorchStore::of(Rc::clone(&file))), |name| {
        Some(clean(below(name, key)?).to_owned())
    })?;
    let naming = naming(&weights);
    let config = config_beside(path, naming)?;
    let config = match config {
        Some(config) => config,
        None => guess_config(&file, naming, &weights).hint(format!(
            "put the model's `model_config.yaml` or `config.json` beside `{}`",
            path.display()
        ))?,
    };
    let format = match naming {
        Naming::LitGpt(variant) => variant.describe(),
        _ => "PyTorch, Hugging Face's names",
    };
    let training = match key {
        Some(key) => training(&file, key, &config)?,
        None => None,
    };
    Ok(Opened { training, ..Opened::new(format, config, naming, weights) })
}

/// Whose names these are.
fn naming(weights: &Weights) -> Naming {
    match weights.names().any(|name| name.starts_with("transformer.")) {
        true => Naming::LitGpt(LitGpt::of(weights.names())),
        false if weights.has("tok_embeddings.weight") => Naming::Meta,
        false => Naming::HuggingFace,
    }
}

/// The key of the weights; `None`: the file is a state dict itself.
fn model_key(file: &TorchFile) -> Option<&'static str> {
    let root = file.root();
    let has_tensors = |value: Value| value.entries().any(|(_, item)| item.as_tensor().is_some());
    MODEL.into_iter().find(|key| root.get(key).is_some_and(has_tensors))
}

/// A tensor's name below a key.
fn below<'a>(name: &'a str, key: Option<&str>) -> Option<&'a str> {
    match key {
        Some(key) => name.strip_prefix(key)?.strip_prefix('.'),
        None => Some(name),
    }
}

/// A name without what wrappers put before it.
fn clean(mut name: &str) -> &str {
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)) {
        name = rest;
    }
    name
}

fn config_beside(path: &Path, naming: Naming) -> Result<Option<ModelConfig>> {
    let dir = folder_of(path);
    if matches!(naming, Naming::LitGpt(_))
        && let Some(config) = litgpt::read_config(dir)?
    {
        return Ok(Some(config));
    }
    dir.join("config.json").is_file().then(|| hf_config::read(dir)).transpose()
}

/// The preset that TinyLlama's hyper-parameters name, or the only one whose tensors these could be.
fn guess_config(file: &TorchFile, naming: Naming, weights: &Weights) -> Result<ModelConfig> {
    let fits = presets_that_fit(naming, |name| weights.shape(name));
    let named = file.root().get("hparams").and_then(|h| h.get("model_name")?.as_str());
    let is_named =
        |config: &&ModelConfig| named.is_some_and(|name| plain(name) == plain(&config.name));
    let chosen = fits.iter().find(is_named).or(fits.first().filter(|_| fits.len() == 1));
    let names: Vec<&str> = fits.iter().map(|config| config.name.as_str()).collect();
    chosen.cloned().ok_or_else(|| match names.is_empty() {
        true => anyhow!("the file does not say its architecture, and its tensors fit no preset"),
        false => anyhow!(
            "the file does not say its architecture, and its tensors fit several presets: {}",
            names.join(", ")
        ),
    })
}

/// A model's name without spelling: `tiny_LLaMA_1b` and `tiny-llama-1.1b` are `tinyllama1b`.
fn plain(name: &str) -> String {
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    name.to_ascii_lowercase().replace("11b", "1b")
}

/// The optimizer's moments, if the file has them for all weights.
fn training(file: &Rc<TorchFile>, key: &str, config: &ModelConfig) -> Result<Option<Training>> {
    let root = file.root();
    let Some(state) = root.get("optimizer").and_then(|optimizer| optimizer.get("state")) else {
        return Ok(None);
    };
    // By number: the place among the weights, in the order of the file.
    let weights = root.get(key).map(|weights| weights.entries());
    let by_number: Vec<&str> =
        weights.into_iter().flatten().filter_map(|(name, _)| name.as_str()).collect();
    let owner = |name: &str, moment: &str| {
        let key = name.strip_prefix("optimizer.state.")?.strip_suffix(moment)?.strip_suffix('.')?;
        let name = match key.parse::<usize>() {
            Ok(number) => by_number.get(number)?,
            Err(_) => key,
        };
        Some(clean(name).to_owned())
    };
    let mut moments = [Weights::default(), Weights::default()];
    for (weights, moment) in moments.iter_mut().zip(["exp_avg", "exp_avg_sq"]) {
        weights
            .add(Box::new(TorchStore::of(Rc::clone(file))), |name| owner(name, moment))
            .context("in the optimizer's state")?;
    }
    if moments[0].names().next().is_none() {
        return Ok(None);
    }
    let number = |value: Option<Value>| value.and_then(|v| v.as_u64());
    let of_state = state.entries().next().and_then(|(_, one)| number_of(file, one.get("step")?));
    let step = number(root.get("step_count")).or(of_state).unwrap_or(0);
    let batch = root.get("hparams").and_then(|h| number(h.get("global_batch_size"))).unwrap_or(0);
    Ok(Some(Training {
        step,
        iter: number(root.get("iter_num")).unwrap_or(step),
        tokens: step.saturating_mul(batch).saturating_mul(config.block_size as u64),
        moments,
    }))
}

/// A number, or the value of a tensor of one.
fn number_of(file: &TorchFile, value: Value) -> Option<u64> {
    let Some(tensor) = value.as_tensor() else { return value.as_u64() };
    let bytes = file.bytes(tensor).ok()?;
    match tensor.dtype() {
        Dtype::Float32 => Some(f32::from_le_bytes((*bytes).try_into().ok()?) as u64),
        Dtype::Int64 => Some(u64::from_le_bytes((*bytes).try_into().ok()?)),
        _ => None,
    }
}

/// Tensors of a file under the keys that lead to them.
pub(super) struct TorchStore {
    file: Rc<TorchFile>,
    tensors: HashMap<String, TorchTensor>,
}

impl TorchStore {
    pub fn of(file: Rc<TorchFile>) -> Self {
        let tensors = file.tensors().into_iter().map(|(name, t)| (name, t.clone())).collect();
        Self { file, tensors }
    }

    /// A file that is a state dict, of transformers or of Meta.
    pub fn of_state_dict(path: &Path) -> Result<Self> {
        Ok(Self::of(Rc::new(TorchFile::open(path)?)))
    }

    fn find(&self, name: &str) -> Result<&TorchTensor> {
        self.tensors.get(name).with_context(|| format!("no tensor `{name}`"))
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::Float64 => Kind::Double,
        Dtype::Float32 => Kind::Float,
        Dtype::Float16 => Kind::Half,
        Dtype::BFloat16 => Kind::BFloat16,
        Dtype::Int64 => Kind::Int64,
        Dtype::Int32 => Kind::Int,
        Dtype::Int16 => Kind::Int16,
        Dtype::Int8 => Kind::Int8,
        Dtype::Uint8 => Kind::Uint8,
        Dtype::Bool => Kind::Bool,
        _ => return None,
    })
}

impl Store for TorchStore {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.tensors.get(name)?.shape().iter().map(|&n| n as i64).collect())
    }

    fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.find(name)?.dtype();
        kind_of(dtype)
            .with_context(|| format!("`{name}`: the dtype {} is not read here", dtype.name()))
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let (tensor, kind) = (self.find(name)?, self.kind(name)?);
        let mut shape = self.shape(name).unwrap_or_default();
        let bytes = self.file.bytes(tensor)?;
        let mut range = 0..bytes.len();
        if let Some(first) = shape.first_mut() {
            let row = bytes.len() / (*first).max(1) as usize;
            range = rows.start as usize * row..rows.end as usize * row;
            *first = rows.end - rows.start;
        }
        Ok(match bytes {
            Cow::Borrowed(bytes) => TensorView::over(&bytes[range], &shape, kind),
            Cow::Owned(bytes) => ffi::tensor_from_bytes(&bytes[range], &shape, kind).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_every_wrapper_and_nothing_else() {
        for (name, want) in [
            ("_orig_mod.transformer.wte.weight", "transformer.wte.weight"),
            ("module._orig_mod.module.lm_head.weight", "lm_head.weight"),
            ("transformer.module.weight", "transformer.module.weight"),
        ] {
            assert_eq!(clean(name), want);
        }
        assert_eq!(plain("tiny_LLaMA_1b"), plain("tiny-llama-1.1b"));
    }
}
