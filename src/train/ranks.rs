//! What a run does differently where it is one rank of several.

use super::memory::Share;
use super::optimizer::AdamW;
use super::pick_attention::{self, Picked};
use super::run::Run;
use super::{saver, signals};
use crate::bail_hint;
use crate::config::{DistributedConfig, RunConfig};
use crate::distributed::saver::{Saver, Snapshot};
use crate::distributed::staging::Staging;
use crate::distributed::{self, Fill, Groups, Job, Plan, Ranks};
use crate::model::{Fp8, GPT, ModelConfig};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tch::Device;

/// What ranks agree to stop for when `train.max_time` is over; no signal has this number.
pub const TIME_IS_UP: i32 = 1000;

/// Does `work` on rank 0, then on the first rank of each other node, for what is made once a folder; a node that shares
/// rank 0's folder finds it done. The others wait as long as it takes.
///
/// # Sync
/// The CPU waits for the other ranks.
pub fn one_after_another(job: &Job, work: impl Fn() -> Result<()>) -> Result<()> {
    let first_here = job.local_rank() == 0;
    let nodes = job.nodes()?.len() as i64;
    if job.rank() == 0 {
        work()?;
        job.store().set("prepared", b"1")?;
    }
    while !job.store().check("prepared")? {
        thread::sleep(Duration::from_millis(200)); // the watch ends this where rank 0 fails
    }
    if first_here && job.rank() > 0 {
        work()?;
    }
    if first_here {
        job.store().add("nodes-prepared", 1)?;
    }
    // A rank opens its data only when its node is through, and nobody knows which: so when all are.
    while job.store().add("nodes-prepared", 0)? < nodes {
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// The checkpoint that rank 0 found, on all ranks.
///
/// # Sync
/// The CPU waits for rank 0.
///
/// # Errors
/// Its own; a rank that does not see that folder.
pub fn find_resume(
    job: &Job,
    find: impl FnOnce() -> Result<Option<PathBuf>>,
) -> Result<Option<PathBuf>> {
    if job.rank() == 0 {
        let found = find()?;
        let text = found.as_ref().map_or(String::new(), |path| path.display().to_string());
        job.store().set("resume", text.as_bytes())?;
        return Ok(found);
    }
    let text = String::from_utf8(job.store().get("resume")?).context("the path of a checkpoint")?;
    if text.is_empty() {
        return Ok(None);
    }
    let path = PathBuf::from(text);
    if !path.is_dir() {
        bail_hint!(
            "put `out_dir` on a file system that all nodes share";
            "rank 0 resumes from `{}`, which rank {} does not see", path.display(), job.rank()
        );
    }
    Ok(Some(path))
}

/// The kernels of attention that rank 0 picked, on all ranks: by their own clocks they might pick differently.
///
/// # Sync
/// The CPU waits for rank 0.
pub fn pick_attention(job: &Job, pick: impl FnOnce() -> Result<Picked>) -> Result<Picked> {
    if job.rank() == 0 {
        let picked = pick()?;
        let told = (picked.backend, picked.told.is_some());
        job.store().set("attention", &serde_json::to_vec(&told)?)?;
        return Ok(picked);
    }
    let (backend, was_open) = serde_json::from_slice(&job.store().get("attention")?)?;
    if was_open {
        pick_attention::obey(backend)?;
    }
    Ok(Picked { backend, told: None })
}

/// What this rank keeps, for the memory plan. All ranks call this.
///
/// # Sync
/// The CPU waits for the other ranks.
pub fn share(job: &Job, config: &RunConfig, model: &ModelConfig) -> Result<Share> {
    let local = job.nodes()?.first().map_or(1, Vec::len) as u64;
    Ok(Share::of(config.distributed.strategy, job.size() as u64, local, model))
}

/// Shares the model among the ranks as the configuration says. All ranks call this, with `fill` where it is an outline.
///
/// # Sync
/// The CPU waits for the other ranks.
///
/// # Errors
/// Those of [`distributed::parallelize`]; groups of ranks that do not come together.
pub fn parallelize(
    job: &Job,
    model: &mut GPT,
    config: &RunConfig,
    fill: Option<&Fill>,
) -> Result<(Ranks, AdamW)> {
    let plan = Plan {
        strategy: config.distributed.strategy,
        reduce_dtype: config.distributed.reduce_dtype,
        precision: config.precision,
        optimizer: &config.optimizer,
        sharers: sharers(job)?,
    };
    let groups = Groups::of(job, plan.strategy)?;
    distributed::parallelize(model, groups, Arc::clone(job.group()), plan, fill)
}

/// The writer of checkpoints, with a group of its own: it works beside training.
///
/// # Sync
/// The CPU waits for the other ranks.
pub fn new_saver(job: &Job, ranks: &Ranks, optimizer: &AdamW, config: &RunConfig) -> Result<Saver> {
    let sharers = sharers(job)?; // asked by all ranks
    let (replica, _) = ranks.groups().replicas();
    let (_, shards) = ranks.groups().shards();
    // The first replica's ranks are those of the first node, all, or, where nothing is cut, rank 0.
    let members: Vec<usize> = (0..shards as usize).collect();
    let writes = replica == 0 && members.contains(&job.rank());
    // Ranks wait there for rank 0's disk; one that dies is the watch's to find.
    let day = Some(Duration::from_secs(24 * 3600));
    let group = || job.new_group("checkpoint", &members, Device::Cpu, day);
    let periodic = config.train.save_interval.is_some() && !config.optimizer.cpu_offload;
    let staging = match job.device().is_cuda() && writes && periodic {
        true => Staging::start(&optimizer.saved_sizes(), job.device(), sharers.min(members.len()))?,
        false => Staging::default(),
    };
    Saver::new(writes.then(group).transpose()?, staging)
}

/// As many ranks as there are on a node share its memory. All ranks call this.
///
/// # Sync
/// The CPU waits for the other ranks.
fn sharers(job: &Job) -> Result<usize> {
    Ok(job.nodes()?.iter().map(Vec::len).max().unwrap_or(1))
}

/// A line that says who keeps what.
pub fn told(job: &Job, ranks: &Ranks, config: &DistributedConfig) -> Result<String> {
    let held = ranks.fsdp.held();
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let name = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let strategy = name(serde_json::to_value(config.strategy)?);
    let dtype = name(serde_json::to_value(config.reduce_dtype)?);
    Ok(format!(
        "{} over {}, {strategy}, gradients travel in {dtype}; each keeps {:.2} GiB of weights, {:.2} GiB of gradients",
        job.size(),
        job.group().backend(),
        gib(held.weights),
        gib(held.gradients)
    ))
}

/// Starts to write a checkpoint: how long training waited for it, in seconds.
///
/// # Sync
/// The CPU waits for the card and copies this rank's part, where it writes one.
///
/// # Errors
/// The checkpoint before could not be written; no memory on the host.
pub fn begin_save(run: &mut Run, name: &str) -> Result<f64> {
    let started = Instant::now();
    let state = saver::train_state(run)?;
    let ranks = run.ranks.as_ref().context("a sharded save of one rank")?;
    let writer = run.saver.as_mut().context("a rank without writer")?;
    let mut moments = run.optimizer.state();
    if ranks.rank() == 0 {
        moments.extend(run.model.fp8.iter().flat_map(Fp8::state));
    }
    let (masters, moments) = writer.copies(run.optimizer.exact_weights(), moments)?;
    ranks.check()?; // the CPU has waited for the card: what was copied is good
    let files = run.config.tokenizer_dir.as_deref().map(Tokenizer::files);
    writer.start(Snapshot {
        out_dir: run.config.out_dir.clone(),
        name: name.to_owned(),
        model: run.model.config.clone(),
        tokenizer: run.tokenizer.clone(),
        files: files.unwrap_or_default(),
        template: run.template.as_ref().map(|template| template.text().to_owned()),
        layouts: ranks.layouts.clone(),
        kind: run.optimizer.exact_kind(),
        masters,
        moments,
        state,
        generators: saver::rng_states(run.device)?,
        keep_last: run.config.train.keep_last.map(|n| n as usize),
    })?;
    Ok(started.elapsed().as_secs_f64())
}

/// Whether this is rank 0, and the checkpoint that was begun is there: rank 0 says so at once, the others wait for it
/// when they need it.
pub fn leads_a_save_that_is_done(run: &Run) -> bool {
    run.job.is_none_or(|job| job.rank() == 0) && run.saver.as_ref().is_some_and(Saver::is_done)
}

/// Waits for the checkpoint that is being written, if one is: on each rank until rank 0 has given it its name, with signs
/// of progress, so that a slow disk is not taken for a rank that hangs in the next collective.
///
/// # Sync
/// The CPU waits for the disk and the other ranks.
///
/// # Errors
/// Why it was not written.
pub fn finish_save(run: &mut Run) -> Result<Option<PathBuf>> {
    let (job, step) = (run.job, run.progress.step + 1);
    let Some(writer) = &mut run.saver else { return Ok(None) };
    let tick = || {
        if let Some(job) = job {
            job.wait_on(step, "saving");
        }
    };
    let begun = writer.begun();
    let written = writer.wait(tick);
    if let (Some(job), Some(name)) = (job, begun) {
        let key = format!("saved/{name}");
        match job.rank() {
            0 => job.store().set(&key, b"1")?, // written or not
            _ => {
                while !job.store().check(&key)? {
                    tick();
                    thread::sleep(Duration::from_millis(200));
                }
            }
        }
    }
    let path = written?;
    if path.is_some() {
        run.last_checkpoint = path.clone();
    }
    Ok(path)
}

/// Where this rank's part of the gradients is finite but the norm is not: another knows the parameter, and its error
/// ends the job while this one waits.
pub fn let_others_tell(job: &Job, config: &DistributedConfig) {
    if job.size() > 1 {
        thread::sleep(Duration::from_secs_f64(config.heartbeat_timeout));
    }
}

/// For what all ranks stop after this step, if they do: a signal, or [`TIME_IS_UP`].
pub fn stop_for(run: &Run, stop: &signals::StopSignal) -> Option<i32> {
    let Some(job) = run.job else { return stop.requested() };
    let local = stop.requested().or_else(|| run.time_is_up().then_some(TIME_IS_UP));
    job.agree_to_stop(local, run.progress.step)
}

/// What rank 0 says to a question that each rank could answer otherwise, of a folder that they see at different times.
///
/// # Sync
/// The CPU waits for rank 0.
///
/// # Errors
/// Rank 0's own.
pub fn as_rank_0(job: Option<&Job>, key: &str, ask: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let Some(job) = job else { return ask() };
    if job.rank() > 0 {
        return Ok(job.store().get(key)? == b"1");
    }
    let yes = ask()?;
    job.store().set(key, if yes { b"1" } else { b"0" })?;
    Ok(yes)
}

/// For which signal all ranks stop here, if they do. `place`: where a rank is after the steps, counted on from them; all
/// stop at the same one. Where time was up none is heard: ranks agree on one stop.
///
/// # Sync
/// As [`Job::agree_to_stop`].
pub fn signal_for(job: Option<&Job>, stop: &signals::StopSignal, place: u64) -> Option<i32> {
    let Some(job) = job else { return stop.requested() };
    job.agree_to_stop(stop.requested(), place).filter(|signal| *signal != TIME_IS_UP)
}
