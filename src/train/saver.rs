//! What a checkpoint of a run holds, and how a run takes it up again.

use super::optimizer::AdamW;
use super::ranks;
use super::run::{Progress, Run};
use crate::checkpoint::{self, TrainState, adapter};
use crate::config::{Precision, RunConfig};
use crate::data::DataLoader;
use crate::ffi;
use crate::model::{Fp8, GPT};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};

/// Writes `out_dir/name` as a whole or not at all: a Hugging Face folder with the exact weights, and
/// `train_state/` with moments, random generators, data cursor and counters. Several ranks write theirs together, of
/// adapters rank 0 alone; a save that was begun beside training must have been waited for.
///
/// # Sync
/// The CPU waits for the GPU and copies one tensor at a time; with several ranks until all is written.
pub fn save(run: &mut Run, name: &str) -> Result<PathBuf> {
    if run.saver.is_some() {
        ranks::begin_save(run, name)?;
        return ranks::finish_save(run)?.context("a checkpoint that was begun is nowhere");
    }
    if run.job.is_some_and(|job| job.rank() > 0) {
        return Ok(run.config.out_dir.join(name));
    }
    let config = &run.model.config;
    let mut masters = run.optimizer.masters();
    for ((_, exact), (_, parameter)) in masters.iter_mut().zip(run.model.trained_parameters()) {
        *exact = exact.view_(parameter.size()); // of one rank of several it was flat
    }
    let mut moments = run.optimizer.state();
    moments.extend(run.model.fp8.iter().flat_map(Fp8::state));

    let state = train_state(run)?;
    let tokenizer_files = run.config.tokenizer_dir.as_deref().map(Tokenizer::files);

    let all = masters.iter().chain(&moments).map(|(_, t)| t);
    let needed = checkpoint::required_bytes(all);
    checkpoint::check_space(&run.config.out_dir, needed)?;
    let path = checkpoint::save_atomically(&run.config.out_dir, name, |dir| {
        match (run.config.lora(), &run.config.initial_checkpoint_dir) {
            (Some(lora), Some(base)) => adapter::save(dir, &run.model, &masters, base, lora)?,
            _ => checkpoint::save_model(dir, config, &masters, run.tokenizer.as_deref())?,
        }
        checkpoint::copy_files(tokenizer_files.as_deref().unwrap_or_default(), dir)?;
        if let Some(template) = &run.template {
            checkpoint::save_chat_template(dir, template.text(), run.tokenizer.as_deref())?;
        }
        checkpoint::save_train_state(dir, &state, &moments, &rng_states(run.device)?)
    })?;
    run.last_checkpoint = Some(path.clone());
    if let Some(keep) = run.config.train.keep_last {
        checkpoint::prune(&run.config.out_dir, keep as usize)?;
    }
    Ok(path)
}

/// Says at once where a checkpoint would not fit on the disk now: the first may be due in days.
pub(super) fn warn_of_space(run: &mut Run) {
    if run.job.is_some_and(|job| job.rank() > 0) {
        return;
    }
    let parts = run.ranks.as_ref().map_or(1, |ranks| ranks.groups().shards().1 as u64);
    let needed = run.optimizer.saved_sizes().into_iter().sum::<u64>().saturating_mul(parts);
    let free = checkpoint::free_bytes(&run.config.out_dir).filter(|free| *free < needed);
    let Some(free) = free else { return };
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let (needed, free, dir) = (gib(needed), gib(free), run.config.out_dir.display().to_string());
    run.note(&format!("warning: a checkpoint needs {needed:.2} GiB, `{dir}` has {free:.2} free; free some, or set another `out_dir`"));
}

/// Counters and data cursor.
pub(super) fn train_state(run: &Run) -> Result<TrainState> {
    Ok(TrainState {
        step: run.progress.step,
        iter: run.progress.iter,
        tokens: run.progress.tokens,
        elapsed_seconds: run.progress.elapsed,
        world_size: run.plan.world,
        seed: run.config.seed,
        precision: run.config.precision.to_string(),
        data: serde_json::to_value(run.loader.state())?,
    })
}

/// Loads `train_state/` of a checkpoint whose weights already sit in the model. Whether it held the
/// scales of `fp8-mixed` too: a checkpoint of another precision has none.
pub fn restore(
    dir: &Path,
    config: &RunConfig,
    model: &GPT,
    optimizer: &mut AdamW,
    loader: &mut DataLoader,
    device: Device,
) -> Result<(Progress, bool)> {
    let (state, moments, generators) = checkpoint::load_train_state(dir)?;
    check_precision(&state, config.precision)?;
    optimizer.load_state(state.step as i64, &moments)?;
    let scales = model.fp8.iter().flat_map(Fp8::state).filter(|(name, _)| moments.has(name));
    let saved = |(name, ours): (String, Tensor)| {
        let saved = moments.get(&name, ours.kind(), &ours.size())?;
        Ok((name, saved))
    };
    let scales: Vec<(String, Tensor)> = scales.map(saved).collect::<Result<_>>()?;
    let has_scales = model.restore_fp8(&scales)?;
    match state.data.is_null() {
        true => eprintln!(
            "data        `{}` holds no position in it: reading begins at the start of the order",
            dir.display()
        ),
        false => {
            let cursor = serde_json::from_value(state.data.clone())
                .with_context(|| format!("data cursor of `{}`", dir.display()))?;
            loader.restore(&cursor)?;
        }
    }
    for (name, generator) in &generators {
        match (name.as_str(), device) {
            ("cpu", _) => ffi::set_rng_state(Device::Cpu, generator)?,
            ("cuda", Device::Cuda(_)) => ffi::set_rng_state(device, generator)?,
            _ => {}
        }
    }
    report_changes(dir, config);
    let progress = Progress {
        step: state.step,
        iter: state.iter,
        tokens: state.tokens,
        elapsed: state.elapsed_seconds,
    };
    Ok((progress, has_scales))
}

/// Moments are stored in the dtype of the masters: bf16 and fp32 states do not continue each other.
fn check_precision(state: &TrainState, precision: Precision) -> Result<()> {
    let is_bf16 = |p: &str| p == Precision::Bf16True.to_string();
    if is_bf16(&state.precision) != (precision == Precision::Bf16True) {
        bail!(
            "the checkpoint was trained in `{}`, the configuration says `{precision}`",
            state.precision
        );
    }
    Ok(())
}

/// Says which settings differ from those the run was started with.
fn report_changes(dir: &Path, config: &RunConfig) {
    let before = dir.parent().map(|run| run.join("config.yaml"));
    let Some(Ok(before)) = before.map(|path| crate::config::load_either(&path, &[])) else {
        return;
    };
    for change in crate::config::diff(&before, config) {
        if !change.starts_with("resume") {
            eprintln!("changed     {change}");
        }
    }
}

pub(super) fn rng_states(device: Device) -> Result<Vec<(String, tch::Tensor)>> {
    let mut states = vec![("cpu".to_owned(), ffi::rng_state(Device::Cpu)?)];
    if device.is_cuda() {
        states.push(("cuda".to_owned(), ffi::rng_state(device)?));
    }
    Ok(states)
}
