//! Training speed: the steps of a configuration, with its data, its model and its optimizer.
//!
//! A timed step is what `pretrain` does between two log lines: read the batches, forward, backward and update, and
//! read the step's loss and gradient norm while the next one runs; its time is that from one reading to the next.
//! Validation and checkpoints are left out.
//!
//! After the timed steps a few more are recorded ([`profile`](super::profile)), to tell where their time goes.

use super::profile::{Profile, StepSpan, write_trace};
use crate::bail_hint;
use crate::config::{RunConfig, counted};
use crate::distributed::{Job, World};
use crate::error::WithHint;
use crate::ffi;
use crate::ffi::profile::{Activity, Recording};
use crate::train::run::{LaunchedStep, Run, TakenStep};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::Device;

/// What `bench train` measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Card, or CPU; rank 0's.
    pub device: String,
    /// Ranks, each on a card of its own.
    pub ranks: u64,
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
    /// Tokens a second at the median step, over all ranks.
    pub tokens_per_sec: f64,
    /// Tokens a second at the first and at the third quartile of step times.
    pub tokens_per_sec_quartiles: [f64; 2],
    /// Model FLOPs utilisation, full attention, as a fraction; `None`: no peak known.
    pub mfu: Option<f64>,
    /// The same, causal attention.
    pub mfu_causal: Option<f64>,
    /// Most GPU memory allocated at once on rank 0, GiB. `None` on the CPU.
    pub peak_memory_gib: Option<f64>,
    /// Loss of the first and of the last step: a run whose numbers are not finite is not timed.
    pub loss: [f64; 2],
    /// Loss of each step from the first, those before the timed ones among them.
    pub losses: Vec<f64>,
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

/// Trains `warmup` and then `steps` steps of a configuration and reports the latter. Nothing is kept: `out_dir` is to
/// be a [`TemporaryFolder`]. `job`: as one of several ranks, which all call this; the report is rank 0's.
///
/// # Errors
/// As `pretrain`; a loss that is not finite, since such numbers need less power and run faster; a trace that is
/// asked for on the CPU or cannot be written. What the profiler cannot do is told in the report.
pub fn run(config: &RunConfig, job: Option<&Job>, options: Options) -> Result<Report> {
    let Options { warmup, steps, .. } = options;
    let mut run = Run::assemble(config, job)?;
    let traced = options.trace.filter(|_| reports(&run));
    let trace = traced.map(|path| open_trace(path, run.device)).transpose()?;
    let mut seconds = vec![];
    let mut losses = vec![];
    let mut clock = Instant::now();
    let mut in_flight = None;
    for i in 0..=warmup + steps {
        let launched = (i < warmup + steps).then(|| run.launch_step()).transpose()?;
        // While the card works on this step, the CPU looks at the one before.
        if let Some(before) = std::mem::replace(&mut in_flight, launched) {
            losses.push(conclude(&run, before)?);
            let now = Instant::now();
            if i > warmup {
                seconds.push((now - clock).as_secs_f64());
            }
            clock = now;
        }
    }
    let mut report = report(&run, seconds, losses)?;
    if options.profile_steps > 0 {
        match profile(&mut run, options.profile_steps, trace) {
            Ok(profile) => report.profile = profile,
            Err(e) => report.no_profile = Some(format!("{e:#}")),
        }
    }
    Ok(report)
}

/// Whether this rank's times are told.
fn reports(run: &Run) -> bool {
    run.job.is_none_or(|job| job.rank() == 0)
}

/// The loss of a step whose numbers are finite.
///
/// # Sync
/// The CPU waits for the step's end.
fn conclude(run: &Run, step: LaunchedStep) -> Result<f64> {
    let TakenStep { progress, loss, grad_norm, .. } = step.wait()?;
    if let Some(ranks) = &run.ranks {
        ranks.check()?;
    }
    if !loss.is_finite() || !grad_norm.is_finite() {
        bail_hint!(
            "lower `optimizer.lr` with `--set`";
            "step {}: loss {loss}, gradient norm {grad_norm}; numbers that are not finite are not timed",
            progress.step
        );
    }
    Ok(loss)
}

/// Where the time of `n` more steps goes; their kernels also to `trace`. All ranks take those steps.
fn profile(run: &mut Run, n: usize, trace: Option<File>) -> Result<Option<Profile>> {
    if !run.device.is_cuda() {
        return Err(anyhow!("the run is on the CPU; kernels of a CUDA GPU are recorded"));
    }
    let Some((mut activities, spans)) = record_steps(run, n)? else { return Ok(None) };
    let (first, last) = (spans[0].start_ns, spans[n - 1].end_ns);
    activities.retain(|a| (first..last).contains(&a.start_ns));
    if let Some(file) = trace {
        write_trace(&activities, BufWriter::new(file)).context("cannot write the trace")?;
    }
    Ok(Some(Profile::new(&activities, &spans)))
}

/// Records `n` steps after one that lets the profiler allocate its buffers; `None`: they are another rank's to tell.
fn record_steps(run: &mut Run, n: usize) -> Result<Option<(Vec<Activity>, Vec<StepSpan>)>> {
    let recording = match reports(run).then(Recording::start).transpose() {
        Ok(Some(recording)) => recording,
        other => {
            if run.job.is_some() {
                take_steps(run, 1 + n)?; // the other ranks do
            }
            return other.map(|_| None);
        }
    };
    take_steps(run, 1)?;
    let mut spans = vec![];
    for _ in 0..n {
        let start_ns = recording.now_ns()?;
        let launched = run.launch_step()?;
        let launched_ns = recording.now_ns()?;
        conclude(run, launched)?; // the CPU waits for the GPU
        spans.push(StepSpan { start_ns, launched_ns, end_ns: recording.now_ns()? });
    }
    Ok(Some((recording.stop()?, spans)))
}

fn take_steps(run: &mut Run, n: usize) -> Result<()> {
    (0..n).try_for_each(|_| {
        let launched = run.launch_step()?;
        conclude(run, launched).map(drop)
    })
}

/// Before the steps, so that a path that cannot be written costs no time.
fn open_trace(path: &Path, device: Device) -> Result<File> {
    if !device.is_cuda() {
        let error = Err(anyhow!("`--trace` records a CUDA GPU, and this run is on the CPU"));
        return error.usage("leave out `--trace`, or set `device` to `cuda`");
    }
    File::create(path).with_context(|| format!("cannot write `{}`", path.display()))
}

fn report(run: &Run, mut seconds: Vec<f64>, losses: Vec<f64>) -> Result<Report> {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize];
    let rate = |seconds: f64| run.plan.tokens_per_step as f64 / seconds;
    let (mfu, mfu_causal) = run.utilisation(rate(at(0.5)));
    let (device, peak_memory_gib) = match run.device {
        Device::Cuda(i) => {
            let peak = ffi::cuda_memory(i)?.peak_allocated as f64 / (1u64 << 30) as f64;
            (ffi::cuda_device(i)?.name, Some(peak))
        }
        _ => (format!("CPU, {}", counted(tch::get_num_threads() as u64, "thread")), None),
    };
    Ok(Report {
        device,
        ranks: run.plan.world,
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
        loss: [losses[0], losses[losses.len() - 1]],
        losses,
        profile: None,
        no_profile: None,
    })
}

/// A folder that goes with the value of the process that made it.
pub struct TemporaryFolder {
    /// Where it is: the same on all ranks of this node.
    pub path: PathBuf,
    is_ours: bool,
}

impl TemporaryFolder {
    /// A new one, or, of a worker, its launcher's.
    pub fn new(world: Option<&World>) -> Result<Self> {
        let name = match world {
            None => format!("{}", std::process::id()),
            Some(world) => match world.launcher {
                Some(launcher) => format!("{launcher}"),
                None => format!("port-{}", world.master.port),
            },
        };
        let path = std::env::temp_dir().join(format!("tinyllama-bench-{name}"));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create `{}`", path.display()))?;
        let is_ours = world.is_none_or(|world| world.launcher.is_none() && world.local_rank == 0);
        Ok(Self { path, is_ours })
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        if self.is_ours {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
