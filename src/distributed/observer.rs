//! Who watches the ranks: tells a dead, stuck or failed one from those that merely suffer from it, and gathers the
//! ranks' votes on the step at which a signal stops them.
//!
//! A launcher observes all ranks; where there is none, rank 0 does, and the others observe rank 0.

use super::failure::{Failure, Fault};
use super::judge::Judge;
use super::store::Store;
use crate::config::DistributedConfig;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What a rank says of itself, every period.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Beat {
    /// The rank's node.
    pub host: String,
    /// Rises with every beat.
    pub count: u64,
    /// Rises with every sign of progress; 0: training has not begun. All ranks go through the same ones.
    pub ticks: u64,
    /// Rises while the rank waits for something outside the job, such as a disk.
    pub waits: u64,
    /// Optimizer step that the rank is in.
    pub step: u64,
    /// What it does in it.
    pub stage: Cow<'static, str>,
    /// The last line that it wrote.
    pub line: String,
    /// A signal that asks the run to stop.
    pub stop: Option<i32>,
    /// The first step's end at which this rank can stop.
    pub vote: Option<u64>,
    /// Why it cannot go on.
    pub fault: Option<Fault>,
    /// Training is over on this rank.
    pub done: bool,
}

impl Beat {
    /// The last line, or the last sign of progress.
    pub fn last_line(&self) -> Option<String> {
        match (self.line.is_empty(), self.ticks) {
            (false, _) => Some(self.line.clone()),
            (true, 0) => None,
            (true, _) => Some(format!("(in step {}: {})", self.step, self.stage)),
        }
    }
}

/// The end of a rank's process that is no success.
#[derive(Clone, Debug, PartialEq)]
pub struct Death {
    /// The rank.
    pub rank: usize,
    /// Its node.
    pub host: String,
    /// How it ended, as in `was killed by SIGKILL`.
    pub what: String,
    /// Not merely what another rank's end can do to this one.
    pub is_root: bool,
    /// The last line of its log.
    pub last_line: Option<String>,
}

/// Keys of the store that the ranks of a run share.
pub(super) mod key {
    /// A [`super::Beat`].
    pub fn beat(rank: usize) -> String {
        format!("beat/{rank}")
    }
    /// The [`super::Failure`] that ends the job.
    pub const FAILED: &str = "failed";
    /// How many ranks have seen it.
    pub const ENDED: &str = "ended";
    /// The signal that asks all ranks for their votes.
    pub const STOPPING: &str = "stopping";
    /// `[step, signal]`: where all ranks stop.
    pub const STOP: &str = "stop";
    /// How many ranks are through.
    pub const FINISHED: &str = "finished";
    /// How many ranks know that all are.
    pub const LEFT: &str = "left";
}

/// Watches some ranks, or all.
pub struct Observer {
    store: Arc<Store>,
    judge: Judge,
    stopping: Option<i32>,
    decided: bool,
}

impl Observer {
    /// Watches `ranks` among `size`; who watches all of them also gathers votes.
    pub fn new(
        store: Arc<Store>,
        ranks: Range<usize>,
        size: usize,
        config: &DistributedConfig,
    ) -> Self {
        let judge = Judge::new(ranks, size, config);
        Self { store, judge, stopping: None, decided: false }
    }

    /// Looks at all ranks, `elapsed` after the last time. The failure that ends the job, if there is one: what the
    /// others found, or what is seen here and then told to them.
    pub fn look(&mut self, elapsed: Duration, deaths: &[Death]) -> Result<Option<Failure>> {
        if let Some(failure) = self.failed()? {
            return Ok(Some(failure));
        }
        for seen in &mut self.judge.seen {
            let done = seen.beat.as_ref().is_some_and(|beat| beat.done);
            if !done {
                let beat = self.store.json(&key::beat(seen.rank))?;
                seen.update(beat, elapsed.min(self.judge.period * 2));
            }
        }
        if let Some(failure) = self.judge.verdict(elapsed, deaths) {
            return self.store.set_first(key::FAILED, &failure).map(Some);
        }
        if !self.judge.is_partial {
            self.gather_votes()?;
        }
        Ok(None)
    }

    /// The failure that others found. One request, where a look has several for each rank.
    pub fn failed(&self) -> Result<Option<Failure>> {
        self.store.json(key::FAILED)
    }

    /// Asks for votes once a rank wants to stop; once all are there, tells the step: the latest.
    fn gather_votes(&mut self) -> Result<()> {
        let mut beats = self.judge.seen.iter().map(|seen| seen.beat.as_ref());
        if self.stopping.is_none()
            && let Some(signal) = beats.clone().find_map(|beat| beat?.stop)
        {
            self.stopping = Some(self.store.set_first(key::STOPPING, &signal)?);
        }
        let Some(signal) = self.stopping.filter(|_| !self.decided) else { return Ok(()) };
        // A rank that is through stops nowhere, and then all will be.
        let vote = |beat: &Beat| if beat.done { Some(u64::MAX) } else { beat.vote };
        let votes: Option<Vec<u64>> = beats.try_fold(Vec::new(), |mut votes, beat| {
            votes.push(vote(beat?)?);
            Some(votes)
        });
        if let Some(step) = votes.and_then(|votes| votes.into_iter().max()) {
            let _: (u64, i32) = self.store.set_first(key::STOP, &(step, signal))?;
            self.decided = true;
        }
        Ok(())
    }

    /// Ranks wait for the next look.
    pub fn is_urgent(&self) -> bool {
        self.stopping.is_some() && !self.decided
    }

    /// The last beat of a rank.
    pub fn last_beat(&self, rank: usize) -> Option<&Beat> {
        self.judge.seen.iter().find(|seen| seen.rank == rank)?.beat.as_ref()
    }
}
