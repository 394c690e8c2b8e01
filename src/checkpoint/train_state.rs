//! `train_state/`: what resume needs beside the weights, bit for bit.
//!
//! ```text
//! train_state/state.json               counters, data cursor, precision (TrainState)
//! train_state/optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, as the optimizer keeps them: in the
//!                                      dtype of the weights, bf16, or 8-bit codes with exp_avg_scale.NAME and
//!                                      exp_avg_sq_scale.NAME
//! train_state/optimizer-0000I-of-0000N.safetensors
//!                                      the same of a sharded run: each of N ranks its parts, 1-D, under
//!                                      exp_avg.NAME@START, of the values of NAME from START on (scales: blocks)
//! train_state/rng.safetensors          cpu, and cuda where the run was on a GPU (u8)
//! ```
//!
//! The weights are not here: `model.safetensors` beside it holds the exact masters (fp32 in
//! `32-true` and `bf16-mixed`, bf16 in `bf16-true` and with `optimizer.master: bf16`).

use super::hf::write_json;
use super::moments::Moments;
use super::source::Parameters;
use super::tensors::{self, TensorFile};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::Tensor;

const DIR: &str = "train_state";
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const RNG: &str = "rng.safetensors";

/// Counters and settings, in `train_state/state.json`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches done on each rank.
    pub iter: u64,
    /// Tokens seen over all ranks.
    pub tokens: u64,
    /// Seconds of training, over all resumes.
    pub elapsed_seconds: f64,
    /// Ranks that wrote it.
    pub world_size: u64,
    /// Seed of weights and data order.
    pub seed: u64,
    /// `precision` of the run.
    pub precision: String,
    /// Data cursor of the loader, opaque here; null in what was imported.
    pub data: serde_json::Value,
}

/// Named tensors.
pub type Tensors = Vec<(String, Tensor)>;

/// Writes counters, optimizer moments and generator states below a checkpoint folder.
///
/// # Sync
/// The CPU waits for each CUDA tensor; one is copied at a time.
pub fn save_train_state(
    dir: &Path,
    state: &TrainState,
    moments: &[(String, Tensor)],
    generators: &[(String, Tensor)],
) -> Result<()> {
    save_counters(dir, state, generators)?;
    tensors::write(&dir.join(DIR).join(OPTIMIZER), moments)
}

/// Writes counters and generator states.
pub fn save_counters(
    dir: &Path,
    state: &TrainState,
    generators: &[(String, Tensor)],
) -> Result<()> {
    let dir = dir.join(DIR);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    write_json(&dir.join(STATE), &serde_json::to_value(state)?)?;
    tensors::write(&dir.join(RNG), generators)
}

/// Writes moments that are made one at a time.
pub(super) fn save_moments(dir: &Path, moments: &Parameters) -> Result<()> {
    tensors::write_lazily(&dir.join(DIR).join(OPTIMIZER), &moments.entries, |i| moments.get(i))
}

/// Writes the moments of one of `ranks` ranks.
pub fn save_shard(
    dir: &Path,
    rank: usize,
    ranks: usize,
    moments: &[(String, Tensor)],
) -> Result<()> {
    let dir = dir.join(DIR);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    let path = dir.join(shard_file(rank, ranks));
    tensors::write(&path, moments)?;
    // Rank 0's sync of the folder may not reach what this node's system still holds.
    let sync = std::fs::File::open(&path).and_then(|file| file.sync_all());
    sync.with_context(|| format!("cannot sync `{}`", path.display()))
}

fn shard_file(rank: usize, ranks: usize) -> String {
    format!("optimizer-{:05}-of-{ranks:05}.safetensors", rank + 1)
}

/// Reads `train_state/state.json` alone.
///
/// # Errors
/// The folder has no `train_state/` (weights alone), or the file is damaged.
pub fn load_counters(dir: &Path) -> Result<TrainState> {
    let path = dir.join(DIR).join(STATE);
    if !path.is_file() {
        return Err(anyhow!("`{}` has no `{DIR}/{STATE}` to resume from", dir.display()))
            .hint("start from its weights alone with `initial_checkpoint_dir`");
    }
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("`{}` is damaged", path.display()))
        .hint("resume from an earlier checkpoint, `--resume PATH`")
}

/// Reads counters and generator states, and opens the optimizer moments; the tensors are on the CPU.
///
/// # Errors
/// A file is missing or damaged.
pub fn load_train_state(dir: &Path) -> Result<(TrainState, Moments, Tensors)> {
    let state = load_counters(dir)?;
    let open = |name: &str| {
        TensorFile::open(&dir.join(DIR).join(name))
            .hint("resume from an earlier checkpoint, `--resume PATH`")
    };
    let files = match shards_of(&dir.join(DIR)) {
        Some(ranks) => {
            (0..ranks).map(|rank| open(&shard_file(rank, ranks))).collect::<Result<_>>()?
        }
        None => vec![open(OPTIMIZER)?],
    };
    Ok((state, Moments::of_files(files)?, open(RNG)?.all()?))
}

/// How many ranks wrote moments there; `None`: not ranks, but one process.
fn shards_of(dir: &Path) -> Option<usize> {
    if dir.join(OPTIMIZER).is_file() {
        return None;
    }
    let ranks = |name: &str| {
        let (_, ranks) = name.strip_prefix("optimizer-")?.split_once("-of-")?;
        ranks.strip_suffix(".safetensors")?.parse().ok()
    };
    let names = std::fs::read_dir(dir).ok()?.flatten();
    names.filter_map(|entry| ranks(&entry.file_name().to_string_lossy())).max()
}
