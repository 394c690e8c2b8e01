//! Training speed: the steps of a configuration, with its data, its model and its optimizer.
//!
//! A timed step is what `pretrain` does between two log lines: read the batches, forward, backward and update, and
//! read the step's loss and gradient norm while the next one runs; its time is that from one reading to the next.
//! Validation and checkpoints are left out.
//!
//! After the timed steps a few more are recorded ([`profile`](super::profile)), to tell where their time goes.

use super::profile::{Profile, StepSpan, write_trace};
use crate::error::WithHint;
use crate::ffi;
use crate::ffi::profile::{Activity, Recording};
use crate::train::run::{Run, TakenStep};
use crate::{bail_hint, config};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::fs::File;
use std::io::BufWriter;
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
    /// Where the time of further steps went.
    pub profile: Option<Profile>,
    /// Why there is no `profile`, where one was asked for.
    pub no_profile: Option<String>,
}

/// Which steps are run, and what is told of them.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Steps before the timed ones.
    pub warmup: usize,
    /// Timed steps.
    pub steps: usize,
    /// Steps after them whose kernels are recorded; 0: none.
    pub profile_steps: usize,
    /// Where the recorded kernels go as a Chrome trace.
    pub trace: Option<&'a Path>,
}

/// Trains `warmup` and then `steps` steps of a configuration and reports the latter. Nothing is kept: the run's
/// folder is a temporary one.
///
/// # Errors
/// As `pretrain`; a loss that is not finite, since such numbers need less power and run faster; a trace that is
/// asked for on the CPU or cannot be written. What the profiler cannot do is told in the report.
pub fn run(path: &Path, sets: &[String], options: Options) -> Result<Report> {
    let Options { warmup, steps, .. } = options;
    let folder = TemporaryFolder::new()?;
    let mut sets = sets.to_vec();
    sets.push(format!("out_dir={}", serde_json::to_string(&folder.0)?));
    sets.push("resume=false".into());
    let config = config::load(path, &sets)?;
    let mut run = Run::assemble(&config, None)?;
    let trace = options.trace.map(|path| open_trace(path, run.device)).transpose()?;
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
    let mut report = report(&run, seconds, [losses[0], losses[losses.len() - 1]])?;
    if options.profile_steps > 0 {
        match profile(&mut run, options.profile_steps, trace) {
            Ok(profile) => report.profile = Some(profile),
            Err(e) => report.no_profile = Some(format!("{e:#}")),
        }
    }
    Ok(report)
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

/// Where the time of `n` more steps goes; their kernels also to `trace`.
fn profile(run: &mut Run, n: usize, trace: Option<File>) -> Result<Profile> {
    if !run.device.is_cuda() {
        return Err(anyhow!("the run is on the CPU; kernels of a CUDA GPU are recorded"));
    }
    let (mut activities, spans) = record_steps(run, n)?;
    let (first, last) = (spans[0].start_ns, spans[n - 1].end_ns);
    activities.retain(|a| (first..last).contains(&a.start_ns));
    if let Some(file) = trace {
        write_trace(&activities, BufWriter::new(file)).context("cannot write the trace")?;
    }
    Ok(Profile::new(&activities, &spans))
}

/// Records `n` steps after one that lets the profiler allocate its buffers.
fn record_steps(run: &mut Run, n: usize) -> Result<(Vec<Activity>, Vec<StepSpan>)> {
    let recording = Recording::start()?;
    finite(run.launch_step()?.wait()?)?;
    let mut spans = vec![];
    for _ in 0..n {
        let start_ns = recording.now_ns()?;
        let launched = run.launch_step()?;
        let launched_ns = recording.now_ns()?;
        finite(launched.wait()?)?; // the CPU waits for the GPU
        spans.push(StepSpan { start_ns, launched_ns, end_ns: recording.now_ns()? });
    }
    Ok((recording.stop()?, spans))
}

/// Before the steps, so that a path that cannot be written costs no time.
fn open_trace(path: &Path, device: Device) -> Result<File> {
    if !device.is_cuda() {
        let error = Err(anyhow!("`--trace` records a CUDA GPU, and this run is on the CPU"));
        return error.usage("leave out `--trace`, or set `device` to `cuda`");
    }
    File::create(path).with_context(|| format!("cannot write `{}`", path.display()))
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
        profile: None,
        no_profile: None,
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
