//! Sharded checkpoints, written beside training.
//!
//! A save begins with copies of this rank's exact weights and moments in host memory ([`super::staging`]); that is all
//! that training waits for. A thread then writes the moments to this rank's own file, and passes the weights, unit by
//! unit, to rank 0, which writes the model as Hugging Face has it and gives the folder its name when every rank is
//! through. So no rank ever has another's moments, and rank 0 needs host memory for the model, no card memory.
//!
//! Only the first of the replicas writes. `out_dir` must be one folder to all its ranks.

use super::layout::Layout;
use super::staging::Staging;
use crate::checkpoint::{self, TrainState};
use crate::error::WithHint;
use crate::ffi::{ProcessGroup, ReduceOp};
use crate::model::ModelConfig;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow, bail};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

type Named = Vec<(String, Tensor)>;

/// What a checkpoint is made of, on the host; of sharded tensors this rank's parts.
pub struct Snapshot {
    /// The run's folder, and the checkpoint's name in it.
    pub out_dir: PathBuf,
    /// `step-00001000`, `final`.
    pub name: String,
    /// Sizes, for `config.json`.
    pub model: ModelConfig,
    /// For the special ids in `config.json`.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Copied into the folder.
    pub files: Vec<PathBuf>,
    /// Jinja of a finetuning run.
    pub template: Option<String>,
    /// How the units are cut.
    pub layouts: Vec<Layout>,
    /// Dtype of the exact weights.
    pub kind: Kind,
    /// Exact weights, in the order of the layouts' slices.
    pub masters: Named,
    /// Moments, as the optimizer names them.
    pub moments: Named,
    /// Counters.
    pub state: TrainState,
    /// States of random generators.
    pub generators: Named,
    /// How many checkpoints stay.
    pub keep_last: Option<usize>,
}

/// Writes one checkpoint at a time in a thread of its own.
pub struct Saver {
    /// The ranks that together have one copy of everything, on the host; `None`: this rank does not write.
    group: Option<Arc<ProcessGroup>>,
    /// Process id of rank 0, part of the temporary folder's name.
    leader: u32,
    staging: Staging,
    writing: Option<(String, JoinHandle<Result<PathBuf>>)>,
}

impl Saver {
    /// `group`: see [`Saver`]; all its ranks call this. `staging`: where this rank's snapshots go.
    ///
    /// # Sync
    /// The CPU waits for rank 0.
    pub fn new(group: Option<ProcessGroup>, staging: Staging) -> Result<Self> {
        let leader = Tensor::from_slice(&[i64::from(std::process::id())]);
        if let Some(group) = &group {
            group.broadcast(&leader, 0)?.wait()?;
        }
        let leader = leader.int64_value(&[0]) as u32;
        Ok(Self { group: group.map(Arc::new), leader, staging, writing: None })
    }

    /// Whether this rank has a part to write.
    pub fn writes(&self) -> bool {
        self.group.is_some()
    }

    /// Whether a checkpoint is being written, or was and [`Saver::wait`] has not told so.
    pub fn is_busy(&self) -> bool {
        self.writing.is_some()
    }

    /// Whether [`Saver::wait`] would not wait.
    pub fn is_done(&self) -> bool {
        self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished())
    }

    /// The name of the checkpoint that is being written, or was and nobody has waited for it.
    pub fn begun(&self) -> Option<String> {
        self.writing.as_ref().map(|(name, _)| name.clone())
    }

    /// Copies of this rank's exact weights and moments in host memory, for a [`Snapshot`]; none on a rank that does not
    /// write. The checkpoint before must have been waited for.
    ///
    /// # Sync
    /// The CPU waits for the card.
    pub fn copies(
        &mut self,
        masters: impl IntoIterator<Item = (String, Tensor)>,
        moments: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<(Named, Named)> {
        if self.is_busy() {
            bail!("a checkpoint was begun while another was being written");
        }
        if !self.writes() {
            return Ok((Vec::new(), Vec::new()));
        }
        if let Err(e) = self.staging.reuse() {
            eprintln!("warning: {e:#}; training waits longer for copies in ordinary memory");
        }
        let mut used = 0;
        let masters = self.staging.copies(&mut used, masters);
        Ok((masters, self.staging.copies(&mut used, moments)))
    }

    /// Starts to write. The one before must have been waited for.
    pub fn start(&mut self, snapshot: Snapshot) -> Result<()> {
        if self.is_busy() {
            bail!("a checkpoint was begun while another was being written");
        }
        let (group, leader) = (self.group.clone(), self.leader);
        let name = snapshot.name.clone();
        let write = move || match group {
            Some(group) => write(&snapshot, &group, leader),
            None => Ok(snapshot.out_dir.join(&snapshot.name)),
        };
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.writing = Some((name, thread.context("cannot start a thread")?));
        Ok(())
    }

    /// Waits for the checkpoint that is being written: its folder; `None` where there is none. `tick` is called now and
    /// then meanwhile.
    ///
    /// # Sync
    /// The CPU waits for the disk and the other ranks.
    ///
    /// # Errors
    /// Why it was not written, on every rank that writes.
    pub fn wait(&mut self, tick: impl Fn()) -> Result<Option<PathBuf>> {
        let mut looks = 0;
        while self.is_busy() && !self.is_done() {
            if looks % 50 == 0 {
                tick();
            }
            looks += 1;
            thread::sleep(Duration::from_millis(20));
        }
        let Some((_, thread)) = self.writing.take() else { return Ok(None) };
        let outcome = thread.join().map_err(|_| anyhow!("the thread that wrote it panicked"))?;
        outcome.map(Some)
    }
}

/// Whether all ranks of the group are well.
fn all_well(group: &ProcessGroup, well: bool) -> Result<bool> {
    let failed = Tensor::from_slice(&[i64::from(!well)]);
    group.all_reduce(&failed, ReduceOp::Max)?.wait()?;
    Ok(failed.int64_value(&[0]) == 0)
}

fn write(s: &Snapshot, group: &ProcessGroup, leader: u32) -> Result<PathBuf> {
    if group.rank() > 0 {
        let dir = checkpoint::temporary_folder(&s.out_dir, &s.name, leader);
        if !all_well(group, true)? {
            bail!("rank 0 could not begin the checkpoint; its message says why");
        }
        write_part(s, group, &dir)?;
        return Ok(s.out_dir.join(&s.name));
    }
    let begun = Cell::new(false);
    let saved =
        checkpoint::check_space(&s.out_dir, required_bytes(s, group.size())).and_then(|()| {
            checkpoint::save_atomically(&s.out_dir, &s.name, |dir| {
                begun.set(true);
                all_well(group, true)?;
                write_part(s, group, dir)
            })
        });
    if !begun.get() {
        all_well(group, false)?;
    }
    let path = saved?;
    if let Some(keep) = s.keep_last {
        checkpoint::prune(&s.out_dir, keep)?;
    }
    Ok(path)
}

/// As if all ranks had as much as this one.
fn required_bytes(s: &Snapshot, ranks: usize) -> u64 {
    let all = s.masters.iter().chain(&s.moments).map(|(_, t)| t);
    checkpoint::required_bytes(all).saturating_mul(ranks as u64)
}

/// This rank's moments, and on rank 0 all that there is one of. Where one rank fails, all do.
fn write_part(s: &Snapshot, group: &ProcessGroup, dir: &Path) -> Result<()> {
    let shard = if dir.is_dir() {
        checkpoint::save_shard(dir, group.rank(), group.size(), &s.moments)
    } else {
        let hint = "put `out_dir` on a file system that all nodes share";
        Err(anyhow!("`{}`, which rank 0 made, is not to be seen here", dir.display())).hint(hint)
    };
    let weights = gather_weights(s, group)?; // every rank takes part, whatever became of its file
    let written = shard.and_then(|()| match group.rank() {
        0 => write_model(s, dir, &weights),
        _ => Ok(()),
    });
    if let (Err(error), true) = (&written, group.rank() > 0) {
        eprintln!("warning: cannot write this rank's part of `{}`: {error:#}", s.name); // into its log
    }
    let all = all_well(group, written.is_ok())?;
    written.with_context(|| format!("cannot write this rank's part of `{}`", s.name))?;
    if !all {
        bail!("another rank could not write its part of `{}`; its log says why", s.name);
    }
    Ok(())
}

fn write_model(s: &Snapshot, dir: &Path, weights: &Named) -> Result<()> {
    checkpoint::save_model(dir, &s.model, weights, s.tokenizer.as_deref())?;
    checkpoint::copy_files(&s.files, dir)?;
    if let Some(template) = &s.template {
        checkpoint::save_chat_template(dir, template, s.tokenizer.as_deref())?;
    }
    checkpoint::save_counters(dir, &s.state, &s.generators)
}

/// The exact weights under their names, on rank 0; one unit at a time travels.
fn gather_weights(s: &Snapshot, group: &ProcessGroup) -> Result<Named> {
    let (mut parts, mut weights) = (s.masters.iter(), Vec::new());
    for layout in &s.layouts {
        let shard = Tensor::zeros([layout.shard], (s.kind, Device::Cpu)); // (len/S,)
        for slice in layout.slices(group.rank() as i64) {
            let (_, part) = parts.next().context("fewer parts than the layout has")?;
            shard.narrow(0, slice.in_shard, slice.len).copy_(part);
        }
        let whole = Tensor::empty([layout.len], (s.kind, Device::Cpu)); // (len,)
        group.all_gather_into(&whole, &shard)?.wait()?;
        if group.rank() == 0 {
            for place in &layout.places {
                let weight = whole.narrow(0, place.start, place.numel()).view(&place.shape[..]);
                weights.push((place.name.clone(), weight));
            }
        }
    }
    Ok(weights)
}
