//! Which format a checkpoint has, found by what its files hold.
//!
//! | format                     | a folder with                             | a file that begins with          |
//! |----------------------------|-------------------------------------------|----------------------------------|
//! | Hugging Face               | `config.json`, safetensors or `.bin`      |                                  |
//! | the same, quantised        | `config.json`, `quantized.safetensors`    |                                  |
//! | litgpt, lit-gpt, TinyLlama | `model_config.yaml` or `lit_config.json`, `lit_model.safetensors` or `.pth` | a zip archive or PyTorch's number |
//! | Meta                       | `params.json`, `consolidated.*.pth`       |                                  |
//! | GGUF                       | one `.gguf` file                          | `GGUF`                           |
//! | llama2.c                   |                                           | `24ka`, or sizes that its length fits |
//! | PEFT's LoRA                | `adapter_config.json`, `adapter_model.safetensors` |                         |

mod gguf;
mod gguf_write;
mod llama2c;
mod meta;
mod torch;

pub(super) use gguf_write::{Plan, mix_of};
pub(super) use torch::Training;

use super::hf::weights_files;
use super::names::{LitGpt, Naming};
use super::tensors::TensorFile;
use super::torch_file::is_torch_file;
use super::weights::{Store, Weights};
use super::{adapter, hf_config, litgpt, quantised};
use crate::bail_hint;
use crate::error::WithHint;
use crate::model::ModelConfig;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A checkpoint whose files are open.
pub(super) struct Opened {
    /// Name of the format, for people.
    pub format: &'static str,
    pub config: ModelConfig,
    pub naming: Naming,
    pub weights: Weights,
    /// Files of a tokenizer that lies inside: name and bytes.
    pub tokenizer: Vec<(&'static str, Vec<u8>)>,
    /// Optimizer state and counters of a training checkpoint.
    pub training: Option<Training>,
}

impl Opened {
    fn new(format: &'static str, config: ModelConfig, naming: Naming, weights: Weights) -> Self {
        Self { format, config, naming, weights, tokenizer: Vec::new(), training: None }
    }
}

/// Opens a checkpoint of any format; reads no tensor.
///
/// # Errors
/// No format that is known here; a damaged file; a missing shard; an architecture that is not supported.
pub(super) fn open(path: &Path) -> Result<Opened> {
    if path.is_dir() {
        return open_folder(path);
    }
    match Kind::of(path)? {
        Some(Kind::Gguf) => gguf::open(path),
        Some(Kind::Torch) => torch::open(path),
        Some(Kind::Llama2c) => llama2c::open(path),
        None => bail_hint!(
            "name a checkpoint folder, a run's `out_dir`, or a `.safetensors`, `.gguf`, `.pth` or llama2.c `.bin` file";
            "`{}` is no checkpoint of a format that is known here", path.display()
        ),
    }
}

/// Formats of single files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Gguf,
    Torch,
    Llama2c,
}

impl Kind {
    fn of(file: &Path) -> Result<Option<Self>> {
        let told = || format!("cannot read `{}`", file.display());
        let mut first = Vec::new();
        let open = File::open(file).with_context(told)?;
        let length = open.metadata().with_context(told)?.len();
        open.take(512).read_to_end(&mut first).with_context(told)?;
        Ok(match () {
            () if first.starts_with(b"GGUF") => Some(Self::Gguf),
            () if is_torch_file(&first) => Some(Self::Torch),
            () if llama2c::Header::of(&first, length).is_some() => Some(Self::Llama2c),
            () => None,
        })
    }
}

/// Whether a file is a checkpoint by itself.
pub(super) fn is_checkpoint_file(path: &Path) -> bool {
    Kind::of(path).is_ok_and(|kind| kind.is_some())
}

/// Whether a folder is a checkpoint, rather than a run's with checkpoints in it.
pub(super) fn is_checkpoint_folder(dir: &Path) -> bool {
    dir.join("config.json").is_file()
        || adapter::is_one(dir)
        || litgpt::weights_file(dir).is_some()
        || meta::is_one(dir)
        || only_gguf(dir).is_some()
}

/// The one `.gguf` file of a folder.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    let paths = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let mut found = paths.filter(|p| p.is_file() && p.extension().is_some_and(|e| e == "gguf"));
    found.next().filter(|_| found.next().is_none())
}

fn open_folder(dir: &Path) -> Result<Opened> {
    if let (Some(config), Some(file)) = (litgpt::read_config(dir)?, litgpt::weights_file(dir)) {
        if Kind::of(&file)? == Some(Kind::Torch) {
            return torch::open(&file);
        }
        let weights = weights_of(&[file])?;
        let variant = LitGpt::of(weights.names());
        return Ok(Opened::new(variant.describe(), config, Naming::LitGpt(variant), weights));
    }
    if !dir.join("config.json").is_file() {
        if meta::is_one(dir) {
            return meta::open(dir);
        }
        if let Some(file) = only_gguf(dir) {
            return gguf::open(&file);
        }
    }
    let config = hf_config::read(dir)?;
    let quantised = quantised::is_one(&hf_config::read_json(dir)?)?;
    let files = weights_files(dir, quantised)?;
    let weights = weights_of(&files)?;
    let is_bin = |file: &PathBuf| file.extension().is_some_and(|e| e == "bin");
    let (format, weights) = match (quantised, files.first().is_some_and(is_bin)) {
        (true, _) => ("Hugging Face, quantised by tinyllama", quantised::whole(weights, dir)?),
        (false, true) => ("Hugging Face, PyTorch files", weights),
        (false, false) => ("Hugging Face safetensors", weights),
    };
    Ok(Opened::new(format, config, Naming::HuggingFace, weights))
}

/// Every tensor of some safetensors or PyTorch files.
fn weights_of(files: &[PathBuf]) -> Result<Weights> {
    let mut weights = Weights::default();
    for path in files {
        let store: Box<dyn Store> = match Kind::of(path)? {
            Some(Kind::Torch) => Box::new(torch::TorchStore::of_state_dict(path)?),
            _ => Box::new(
                TensorFile::open(path).hint("copy the file again, or use another checkpoint")?,
            ),
        };
        weights.add(store, |name| Some(name.to_owned()))?;
    }
    Ok(weights)
}

/// The folder of a file.
pub(super) fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
