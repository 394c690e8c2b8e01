//! `train_state/`: what resume needs beside the weights, bit for bit.

use super::hf::write_json;
use super::tensors::{self, TensorFile};
use crate::error::WithHint;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::Tensor;

/// Counters and settings, in `train_state/state.json`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches done on each rank.
    pub iter: u64,
    /// Tokens seen over all ranks.
    pub tokens: u64,
    /// Seconds of training.
    pub elapsed_seconds: f64,
    /// Ranks that wrote it.
    pub world_size: u64,
    /// Seed of weights and data order.
    pub seed: u64,
    /// `precision` of the run.
    pub precision: String,
    /// Data cursor of the loader.
    pub data: serde_json::Value,
}

/// Named tensors.
pub type Tensors = Vec<(String, Tensor)>;

/// Writes counters, optimizer moments and generator states below a checkpoint folder.
pub fn save_train_state(
    dir: &Path,
    state: &TrainState,
    moments: &[(String, Tensor)],
    generators: &[(String, Tensor)],
) -> Result<()> {
    let dir = dir.join("train_state");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    write_json(&dir.join("state.json"), &serde_json::to_value(state)?)?;
    tensors::write(&dir.join("optimizer.safetensors"), moments)?;
    tensors::write(&dir.join("rng.safetensors"), generators)
}

/// Reads `train_state/state.json` alone.
pub fn load_counters(dir: &Path) -> Result<TrainState> {
    let path = dir.join("train_state/state.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))
        .hint("only checkpoints written by training can be resumed")?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", path.display()))
}

/// Reads counters, optimizer moments and generator states.
pub fn load_train_state(dir: &Path) -> Result<(TrainState, Tensors, Tensors)> {
    let file = |name: &str| TensorFile::open(&dir.join("train_state").join(name))?.all();
    Ok((load_counters(dir)?, file("optimizer.safetensors")?, file("rng.safetensors")?))
}
