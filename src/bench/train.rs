//! Training speed: the steps of a configuration, with its data, its model and its optimizer.
//!
//! A timed step is what `pretrain` does between two log lines: read the batches, forward, backward and update, and
//! read the step's loss and gradient norm while the next one runs; its time is that from one reading to the next.
//! Validation and checkpoints are left out.

use crate::ffi;
use crate::train::run::{Run, TakenStep};
use crate::{bail_hint, config};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;
use tch::Device;

/// What `bench train` measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Card, or CPU.
    pub device: String,
    /// Preset.
    pub model: String,
    /// As in the configuration.
    pub precision: String,
    /// Sequences in a micro-batch.
    pub micro_batch_size: u64,
    /// Micro-batches a step.
    pub accumulation: u64,
    /// Tokens a step.
    pub tokens_per_step: u64,
    /// Timed steps.
    pub steps: usize,
    /// Seconds a step, median.
    pub step_seconds: f64,
    /// Tokens a second at the median step.
    pub tokens_per_sec: f64,
    /// Tokens a second at the first and at the third quartile of step times.
    pub tokens_per_sec_quartiles: [f64; 2],
    /// Model FLOPs utilisation, full attention, as a fraction; `None`: no peak known.
    pub mfu: Option<f64>,
    /// The same, causal attention.
    pub mfu_causal: Option<f64>,
    /// Most GPU memory allocated at once, GiB. `None` on the CPU.
    pub peak_memory_gib: Option<f64>,
    /// Loss of the first and of the last step: a run whose numbers are not finite is not timed.
    pub loss: [f64; 2],
}

/// Trains `warmup` and then `steps` steps of a configuration and reports the latter. Nothing is kept: the run's
/// folder is a temporary one.
///
/// # Errors
/// As `pretrain`; a loss that is not finite, since such numbers need less power and run faster.
pub fn run(path: &Path, sets: &[String], warmup: usize, steps: usize) -> Result<Report> {
    let folder = TemporaryFolder::new()?;
    let mut sets = sets.to_vec();
    sets.push(format!("out_dir={}", serde_json::to_string(&folder.0)?));
    sets.push("resume=false".into());
    let config = config::load(path, &sets)?;
    let mut run = Run::assemble(&config)?;
    let mut seconds = vec![];
    let mut losses = vec![];
    let mut clock = Instant::now();
    let mut in_flight = None;
    for i in 0..=warmup + steps {
        let launched = (i < warmup + steps).then(|| run.launch_step()).transpose()?;
        // While the card works on this step, the CPU looks at the one before.
        if let Some(before) = std::mem::replace(&mut in_flight, launched) {
            losses.push(finite(before.wait()?)?);
            let now = Instant::now();
            if i > warmup {
                seconds.push((now - clock).as_secs_f64());
            }
            clock = now;
        }
    }
    report(&run, seconds, [losses[0], losses[losses.len() - 1]])
}

/// The loss of a step whose numbers are finite.
fn finite(taken: TakenStep) -> Result<f64> {
    let TakenStep { progress, loss, grad_norm, .. } = taken;
    if !loss.is_finite() || !grad_norm.is_finite() {
        bail_hint!(
            "lower `optimizer.lr` with `--set`";
            "step {}: loss {loss}, gradient norm {grad_norm}; numbers that are not finite are not timed",
            progress.step
        );
    }
    Ok(loss)
}

fn report(run: &Run, mut seconds: Vec<f64>, loss: [f64; 2]) -> Result<Report> {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize];
    let rate = |seconds: f64| run.plan.tokens_per_step as f64 / seconds;
    let (mfu, mfu_causal) = run.utilisation(rate(at(0.5)));
    let (device, peak_memory_gib) = match run.device {
        Device::Cuda(i) => {
            let peak = ffi::cuda_memory(i)?.peak_allocated as f64 / (1u64 << 30) as f64;
            (ffi::cuda_device(i)?.name, Some(peak))
        }
        _ => (format!("CPU, {} threads", tch::get_num_threads()), None),
    };
    Ok(Report {
        device,
        model: run.model.config.name.clone(),
        precision: run.config.precision.to_string(),
        micro_batch_size: run.config.train.micro_batch_size,
        accumulation: run.plan.accumulation,
        tokens_per_step: run.plan.tokens_per_step,
        steps: seconds.len(),
        step_seconds: at(0.5),
        tokens_per_sec: rate(at(0.5)),
        tokens_per_sec_quartiles: [rate(at(0.75)), rate(at(0.25))],
        mfu,
        mfu_causal,
        peak_memory_gib,
        loss,
    })
}

/// A folder that goes with this value.
struct TemporaryFolder(std::path::PathBuf);

impl TemporaryFolder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tinyllama-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create `{}`", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
