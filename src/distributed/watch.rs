//! One rank's side of watching and stopping: it says every period that it lives, hears whether the job has failed, and
//! agrees with the others on the step at which a signal stops them.
//!
//! Two threads do this beside the main one, which may be stuck in a collective operation. One speaks with the store;
//! the other only looks whether the first still gets answers. Either ends the process when the job has failed.

use super::failure::{Failure, Fault};
use super::logs;
use super::observer::{Beat, Observer, key};
use super::store::Store;
use super::world::{Starter, World};
use crate::config::DistributedConfig;
use crate::error;
use anyhow::{Context, Result};
use signal_hook::low_level::exit;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long the process that serves the store stays for the others to read why the job ends.
const LINGER: Duration = Duration::from_secs(3);

/// The watch of this rank, from the meeting to the end.
pub(super) struct Watch {
    shared: Arc<Shared>,
    heart: Option<JoinHandle<()>>,
}

struct Shared {
    world: World,
    config: DistributedConfig,
    out_dir: PathBuf,
    store: Arc<Store>,
    state: Mutex<State>,
    changed: Condvar,
    /// Answers of the store so far.
    answers: AtomicU64,
    /// Training is over here.
    over: AtomicBool,
    /// A thread is ending the process.
    ending: AtomicBool,
}

#[derive(Default)]
struct State {
    beat: Beat,
    /// The last step at whose end this rank went on.
    border: Option<u64>,
    /// All ranks are asked for their votes.
    asked: bool,
    /// Step and signal at which all ranks stop.
    decision: Option<(u64, i32)>,
    /// The next beat is not to wait.
    urgent: bool,
}

impl Watch {
    /// Starts both threads.
    pub fn start(
        world: &World,
        config: &DistributedConfig,
        out_dir: PathBuf,
        store: Arc<Store>,
    ) -> Result<Self> {
        let beat = Beat { host: world.host.clone(), ..Beat::default() };
        let shared = Arc::new(Shared {
            world: world.clone(),
            config: config.clone(),
            out_dir,
            store: Arc::clone(&store),
            state: Mutex::new(State { beat, ..State::default() }),
            changed: Condvar::new(),
            answers: AtomicU64::new(0),
            over: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        });
        let ranks = match (world.starter, world.rank) {
            (Starter::Launcher, _) => None, // it observes
            (_, 0) => Some(0..world.size),
            _ => Some(0..1),
        };
        let observer = ranks.map(|ranks| Observer::new(store, ranks, world.size, config));
        let (beating, looking) = (Arc::clone(&shared), Arc::clone(&shared));
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        let heart = spawn("heart").spawn(move || beating.beat_on(observer));
        let heart = heart.context("cannot start a thread")?;
        spawn("look").spawn(move || looking.look_on()).context("cannot start a thread")?;
        Ok(Self { shared, heart: Some(heart) })
    }

    /// Notes a sign of progress: this rank is in `stage` of `step`. Costs a lock that nobody holds for long.
    pub fn tick(&self, step: u64, stage: &'static str) {
        let beat = &mut self.shared.lock().beat;
        beat.ticks += 1;
        (beat.step, beat.stage) = (step, stage.into());
    }

    /// Notes that this rank waits for something outside the job, in `stage` of `step`.
    pub fn wait_on(&self, step: u64, stage: &'static str) {
        let beat = &mut self.shared.lock().beat;
        beat.waits += 1;
        (beat.step, beat.stage) = (step, stage.into());
    }

    /// Notes the last line that this rank wrote.
    pub fn note(&self, line: &str) {
        line.clone_into(&mut self.shared.lock().beat.line);
    }

    /// See [`super::Job::agree_to_stop`].
    pub fn agree_to_stop(&self, local: Option<i32>, step: u64) -> Option<i32> {
        let mut state = self.shared.lock();
        if local.is_some() && state.beat.stop.is_none() {
            state.beat.stop = local;
            self.shared.hurry(&mut state);
        }
        loop {
            match (state.decision, state.beat.vote) {
                (Some((at, signal)), _) if step >= at => return Some(signal),
                // The others may have voted for a later step: with the vote given, this rank cannot go on yet.
                (None, Some(vote)) if step >= vote => {
                    state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                _ => {
                    state.border = Some(step);
                    return None;
                }
            }
        }
    }

    /// Tells all ranks that this one cannot go on, and why. The job, and with it this process, ends.
    pub fn fail(&self, error: &anyhow::Error) -> ! {
        {
            let mut state = self.shared.lock();
            state.beat.fault = Some(Fault::of(error));
            self.shared.hurry(&mut state);
        }
        // The heart hears the verdict and ends the process; this is for where it cannot.
        let verdict = self.shared.config.heartbeat_timeout * 4.0 / 3.0;
        thread::sleep(Duration::from_secs_f64(verdict) + 2 * LINGER);
        self.shared.leave(error::exit_code(error), || error::report(error))
    }

    /// Tells the others that this rank is through, and waits until all are: `srun` and `torchrun` kill the rest as soon
    /// as one process ends with another code than 0.
    pub fn finish(mut self) {
        {
            let mut state = self.shared.lock();
            state.beat.done = true;
            self.shared.hurry(&mut state);
        }
        if let Some(heart) = self.heart.take() {
            let _ = heart.join();
        }
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hurry(&self, state: &mut State) {
        state.urgent = true;
        self.changed.notify_all();
    }

    /// The thread that speaks with the store.
    fn beat_on(&self, mut observer: Option<Observer>) {
        let mut last = Instant::now();
        let mut counted = false;
        loop {
            let elapsed = std::mem::replace(&mut last, Instant::now()).elapsed();
            match self.beat(observer.as_mut(), elapsed, &mut counted) {
                Ok(true) => return,
                Ok(false) => {}
                Err(_) if counted => return, // whoever serves the store has left before this rank heard of it
                Err(error) => {
                    let seen = observer.as_ref().and_then(|observer| observer.last_beat(0));
                    self.lost(&error::causes(&error).join(": "), seen);
                }
            }
            self.answers.fetch_add(1, Ordering::Relaxed);
            let urgent = observer.as_ref().is_some_and(Observer::is_urgent);
            self.pause(urgent);
        }
    }

    /// Until the next beat.
    fn pause(&self, urgent: bool) {
        let mut state = self.lock();
        let urgent = urgent || state.beat.done || (state.asked && state.decision.is_none());
        let period = self.config.period();
        let period = if urgent { period.min(Duration::from_millis(100)) } else { period };
        let waited = self.changed.wait_timeout_while(state, period, |state| !state.urgent);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.urgent = false;
    }

    /// Says that this rank lives and hears what there is to hear. Whether all is over.
    fn beat(
        &self,
        observer: Option<&mut Observer>,
        elapsed: Duration,
        counted: &mut bool,
    ) -> Result<bool> {
        let (beat, asked, decided) = {
            let mut state = self.lock();
            state.beat.count += 1;
            if state.asked && state.beat.vote.is_none() {
                // A rank that has not come to the end of a step stops at the first, if all can.
                state.beat.vote = Some(state.border.map_or(0, |step| step + 1));
            }
            (state.beat.clone(), state.asked, state.decision.is_some())
        };
        self.store.set_json(&key::beat(self.world.rank), &beat)?;
        let failure = match observer {
            Some(observer) => observer.look(elapsed, &[])?,
            None => self.store.json(key::FAILED)?,
        };
        if let Some(failure) = failure {
            self.end(&failure);
        }
        if !asked && self.store.check(key::STOPPING)? {
            let mut state = self.lock();
            state.asked = true;
            state.urgent = true;
        }
        if asked && !decided {
            let decision = self.store.json(key::STOP)?;
            self.lock().decision = decision;
            self.changed.notify_all();
        }
        if !beat.done {
            return Ok(false);
        }
        let finished = self.store.add(key::FINISHED, i64::from(!*counted))?;
        *counted = true;
        if finished < self.world.size as i64 {
            return Ok(false);
        }
        self.store.add(key::LEFT, 1)?;
        if self.world.serves() {
            self.linger(key::LEFT, self.world.size);
        }
        Ok(true)
    }

    /// Keeps the store that this process serves until so many ranks have counted themselves.
    fn linger(&self, key: &str, ranks: usize) {
        let start = Instant::now();
        while start.elapsed() < LINGER
            && self.store.add(key, 0).is_ok_and(|counted| counted < ranks as i64)
        {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The thread that looks whether the store answers.
    fn look_on(&self) {
        let limit = Duration::from_secs_f64(self.config.heartbeat_timeout);
        let pause = self.config.period().min(Duration::from_millis(200));
        let (mut answers, mut silence) = (0, Duration::ZERO);
        let mut last = Instant::now();
        while !self.over.load(Ordering::Relaxed) {
            thread::sleep(pause);
            // Where this process was stopped for a while, that is no silence of the store.
            silence += std::mem::replace(&mut last, Instant::now()).elapsed().min(pause * 2);
            let now = self.answers.load(Ordering::Relaxed);
            if now != answers {
                (answers, silence) = (now, Duration::ZERO);
            }
            if silence > limit {
                self.lost(&format!("no answer for {:.0} s", silence.as_secs_f64()), None);
            }
        }
    }

    /// The job has failed.
    fn end(&self, failure: &Failure) -> ! {
        let tell = || {
            self.tell(failure);
            let _ = self.store.add(key::ENDED, 1);
            if self.world.serves() {
                self.linger(key::ENDED, self.world.size - usize::from(!failure.is_alive));
            }
        };
        self.leave(failure.code, tell)
    }

    /// Explains the failure where this rank is the one to do it.
    fn tell(&self, failure: &Failure) {
        let rank = self.world.rank;
        let launched = self.world.starter == Starter::Launcher;
        if launched && rank == 0 {
            return; // the launcher does
        }
        if !launched && rank == failure.told_by {
            let log = (failure.rank != 0).then(|| logs::path(&self.out_dir, failure.rank));
            return logs::to_terminal(&failure.message(log.as_deref()));
        }
        let own = failure.rank == rank;
        let text = if own { failure.message(None) } else { failure.line(rank) + "\n" };
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    /// The store is gone, and with it who served it.
    fn lost(&self, why: &str, rank_0: Option<&Beat>) -> ! {
        let master = &self.world.master;
        let who = match self.world.starter {
            Starter::Launcher => "the launcher",
            Starter::Torchrun if self.world.has_store => "torchrun's agent",
            _ => "rank 0",
        };
        let mut failure = Failure::of_end(0, &master.host, "", None);
        failure.causes = vec![format!("{who}, whose store was at {master}, is gone: {why}")];
        failure.last_line = rank_0.and_then(Beat::last_line);
        failure.told_by = usize::from(!self.world.has_store);
        self.leave(failure.code, || self.tell(&failure))
    }

    /// Ends the process without destructors, which could wait for ever for what other threads hold.
    fn leave(&self, code: u8, tell: impl FnOnce()) -> ! {
        if self.ending.swap(true, Ordering::Relaxed) {
            // Another thread is at it; it may hang where the store does.
            thread::sleep(2 * LINGER);
        } else {
            tell();
        }
        let _ = std::io::stdout().flush();
        exit(code.into())
    }
}
