//! A checkpoint of any format that is read here -> a folder of another, one parameter in memory at a time.

use super::disk::free_bytes;
use super::folder::{copy_files, create_atomically};
use super::source::{Parameters, Source};
use super::tensors::Entry;
use super::{hf, litgpt};
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use crate::train::progress::bytes;
use anyhow::{Result, anyhow};
use std::path::{Path, PathBuf};
use tch::Kind;

/// Formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `config.json` and `model.safetensors`, or shards of at most so many bytes with an index.
    HuggingFace {
        /// Largest file.
        max_shard_bytes: u64,
    },
    /// `model_config.yaml` and `lit_model.safetensors`.
    LitGpt,
}

/// Files that are a tokenizer by themselves.
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

/// What was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The folder.
    pub path: PathBuf,
    /// Parameters, counted once where they are tied.
    pub parameters: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Files of tokenizer and generation that came along.
    pub other_files: usize,
}

/// Writes the checkpoint `from` as a new folder `to`, in `kind` or in the dtypes that it has. The folder appears whole
/// or not at all. `tick` is called with the bytes of each parameter that was
/// made, and of all.
///
/// # Errors
/// `to` is there already; too little space; tensors that do not fit the architecture; what the target has no place for.
pub fn convert(
    from: &Source,
    to: &Path,
    target: Target,
    kind: Option<Kind>,
    tick: &dyn Fn(u64, u64),
) -> Result<Converted> {
    if to.exists() {
        return Err(anyhow!("`{}` exists already", to.display()))
            .usage("name a new folder, or remove this one first");
    }
    let parameters = from.parameters(kind)?;
    let total: u64 = parameters.entries.iter().map(Entry::bytes).sum();
    if let Some(free) = free_bytes(to)
        && free < total + (1 << 20)
    {
        return Err(anyhow!(
            "out of disk: `{}` will have {}, {} are free there",
            to.display(),
            bytes(total),
            bytes(free)
        ))
        .hint("free space, or convert to a smaller dtype with `--dtype bf16`");
    }
    let entries = parameters.entries.clone();
    let told = Parameters::lazily(entries.clone(), |i| {
        tick(entries[i].bytes(), total);
        parameters.get(i)
    });
    let folder = if from.path.is_dir() { &*from.path } else { from.path.parent().unwrap_or(to) };
    let files = Tokenizer::files(folder);
    let is_tokenizer = |file: &PathBuf| TOKENIZERS.iter().any(|name| file.ends_with(name));
    let tokenizer = match files.iter().any(is_tokenizer) {
        true => Some(Tokenizer::load(folder)?),
        false => None,
    };
    create_atomically(to, |dir| {
        match target {
            Target::HuggingFace { max_shard_bytes } => {
                let tokenizer = tokenizer.as_ref();
                hf::save_parameters(dir, &from.config, &told, tokenizer, max_shard_bytes)?;
            }
            Target::LitGpt => litgpt::save(dir, &from.config, &told)?,
        }
        copy_files(&files, dir)
    })?;
    Ok(Converted {
        path: to.to_owned(),
        parameters: entries.iter().map(|e| e.shape.iter().product::<i64>() as u64).sum(),
        bytes: total,
        other_files: files.len(),
    })
}
