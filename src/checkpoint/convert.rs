//! A checkpoint of any format that is read here -> one of another, one parameter in memory at a time.

use super::disk::free_bytes;
use super::folder::{copy_files, create_atomically, create_file_atomically};
use super::formats::{Plan, mix_of};
use super::gguf::mix::Mix;
use super::source::{Parameters, Source};
use super::tensors::Entry;
use super::train_state::{TrainState, save_counters, save_moments};
use super::{hf, litgpt, quantised};
use crate::error::WithHint;
use crate::quant::Scheme;
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
        /// 4 or 8 bits for matrices, which only this program reads (`quantised.rs`).
        quantise: Option<Scheme>,
    },
    /// `model_config.yaml` and `lit_model.safetensors`.
    LitGpt,
    /// One file, of the types of a scheme, or of the dtype of the weights.
    Gguf {
        /// How matrices are stored.
        mix: Option<Mix>,
    },
}

/// Files that are a tokenizer by themselves.
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

/// What was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The folder or file.
    pub path: PathBuf,
    /// Parameters, counted once where they are tied.
    pub parameters: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Files of tokenizer and generation that came along; GGUF takes the tokenizer in.
    pub other_files: usize,
    /// The optimizer step of the training state that came along.
    pub step: Option<u64>,
}

/// Writes the checkpoint `from` as a new folder or file `to`, in `kind` or in the dtypes that it has. It appears whole
/// or not at all. `tick` is called with the bytes of each parameter that was made, and of all.
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
            .usage("name a new folder or file, or remove this one first");
    }
    let parameters = from.parameters(kind)?;
    let total: u64 = parameters.entries.iter().map(Entry::bytes).sum();
    let entries = parameters.entries.clone();
    let told = Parameters::lazily(entries.clone(), |i| {
        tick(entries[i].bytes(), total);
        parameters.get(i)
    });
    from.with_tokenizer(|folder| {
        let files = Tokenizer::files(folder);
        let is_tokenizer = |file: &PathBuf| TOKENIZERS.iter().any(|name| file.ends_with(name));
        let folder = files.iter().any(is_tokenizer).then_some(folder);
        let mut done = Converted {
            path: to.to_owned(),
            parameters: entries.iter().map(|e| e.shape.iter().product::<i64>() as u64).sum(),
            bytes: total,
            other_files: files.len(),
            step: None,
        };
        match target {
            Target::HuggingFace { max_shard_bytes, quantise: Some(scheme) } => {
                quantised::check(&from.config, &entries, scheme)?;
                done.bytes = hf::quantised_bytes(&from.config, &told, scheme);
                check_free(to, done.bytes)?;
                let tokenizer = folder.map(Tokenizer::load).transpose()?;
                create_atomically(to, |dir| {
                    let (tokenizer, max) = (tokenizer.as_ref(), max_shard_bytes);
                    hf::save_quantised(dir, &from.config, &told, scheme, tokenizer, max)?;
                    copy_files(&files, dir)
                })?;
            }
            Target::HuggingFace { max_shard_bytes, quantise: None } => {
                let moments = from.moments()?;
                let state: u64 = moments.iter().flat_map(|m| &m.entries).map(Entry::bytes).sum();
                check_free(to, total + state)?;
                let tokenizer = folder.map(Tokenizer::load).transpose()?;
                create_atomically(to, |dir| {
                    let tokenizer = tokenizer.as_ref();
                    hf::save_parameters(dir, &from.config, &told, tokenizer, max_shard_bytes)?;
                    if let Some(moments) = &moments {
                        save_training(dir, from, moments)?;
                    }
                    copy_files(&files, dir)
                })?;
                done.step = from.training.as_ref().map(|training| training.step);
            }
            Target::LitGpt => {
                check_free(to, total)?;
                create_atomically(to, |dir| {
                    litgpt::save(dir, &from.config, &told)?;
                    copy_files(&files, dir)
                })?;
            }
            Target::Gguf { mix } => {
                let mix = mix.unwrap_or_else(|| {
                    mix_of(entries.first().map_or(Kind::Float, |entry| entry.kind))
                });
                let plan = Plan::of(&from.config, &told, mix, folder)?;
                (done.bytes, done.other_files) = (plan.bytes()?, 0);
                check_free(to, done.bytes)?;
                create_file_atomically(to, |path| plan.write(path, &from.config, &told))?;
            }
        }
        Ok(done)
    })
}

/// Whether there is space for so many bytes, and a little more.
fn check_free(to: &Path, needed: u64) -> Result<()> {
    match free_bytes(to) {
        Some(free) if free < needed + (1 << 20) => Err(anyhow!(
            "out of disk: `{}` will have {}, {} are free there",
            to.display(),
            bytes(needed),
            bytes(free)
        ))
        .hint("free space, or convert to a smaller dtype with `--dtype bf16`"),
        _ => Ok(()),
    }
}

/// `train_state/` of another's training checkpoint: moments and counters. There is no position in the data and no state
/// of a generator in it.
fn save_training(dir: &Path, from: &Source, moments: &Parameters) -> Result<()> {
    let Some(training) = &from.training else { return Ok(()) };
    let state = TrainState {
        step: training.step,
        iter: training.iter,
        tokens: training.tokens,
        elapsed_seconds: 0.0,
        world_size: 1,
        seed: 0,
        precision: "32-true".into(),
        data: serde_json::Value::Null,
    };
    save_counters(dir, &state, &[])?;
    save_moments(dir, moments)
}
