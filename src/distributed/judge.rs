//! Which rank is to blame: silence, progress, errors and deaths of all ranks, in that order of doubt.

use super::failure::Failure;
use super::observer::{Beat, Death};
use crate::config::DistributedConfig;
use std::ops::Range;
use std::time::Duration;

/// What is known of the ranks, without the store.
pub(super) struct Judge {
    /// The watched ranks.
    pub seen: Vec<Seen>,
    /// Between two beats.
    pub period: Duration,
    /// Silence after which a rank counts as dead.
    silence: Duration,
    /// Time without progress after which the job counts as stuck.
    still: Duration,
    /// Sees some ranks only, and so not who is to blame for what it sees; it judges silence alone.
    pub is_partial: bool,
    /// Something went wrong that may be the work of another rank, which is looked for so long.
    suspect: Option<(Failure, Duration)>,
}

/// What is known of a rank.
pub(super) struct Seen {
    /// Its number.
    pub rank: usize,
    /// What it said last.
    pub beat: Option<Beat>,
    /// Observed time since the last beat. Sums of short spans: where everything was stopped together, nobody is dead.
    quiet: Duration,
    /// Observed time since the last progress.
    still: Duration,
}

impl Seen {
    /// `beat` was heard now, `elapsed` after the last look.
    pub fn update(&mut self, beat: Option<Beat>, elapsed: Duration) {
        let Some(beat) = beat else { return };
        let before = self.beat.replace(beat);
        let (Some(before), Some(now)) = (before, &self.beat) else { return };
        self.quiet = if now.count == before.count { self.quiet + elapsed } else { Duration::ZERO };
        let same = (now.ticks, now.waits) == (before.ticks, before.waits);
        self.still = if same { self.still + elapsed } else { Duration::ZERO };
    }

    fn running(&self) -> Option<&Beat> {
        self.beat.as_ref().filter(|beat| !beat.done)
    }
}

impl Judge {
    pub fn new(ranks: Range<usize>, size: usize, config: &DistributedConfig) -> Self {
        let seen = |rank| Seen { rank, beat: None, quiet: Duration::ZERO, still: Duration::ZERO };
        Self {
            is_partial: ranks.len() < size,
            seen: ranks.map(seen).collect(),
            period: config.period(),
            silence: Duration::from_secs_f64(config.heartbeat_timeout),
            still: Duration::from_secs_f64(config.timeout),
            suspect: None,
        }
    }

    /// Why the job ends, if it does.
    pub fn verdict(&mut self, elapsed: Duration, deaths: &[Death]) -> Option<Failure> {
        if self.is_partial {
            return self.silent(self.silence, usize::MAX);
        }
        let end = |death: &Death| {
            let beat = self.seen.iter().find(|seen| seen.rank == death.rank);
            let line = beat.and_then(|seen| seen.beat.as_ref()?.last_line());
            let line = death.last_line.clone().or(line);
            Failure::of_end(death.rank, &death.host, &death.what, line)
        };
        let fault = |seen: &Seen, is_root: bool| {
            let beat = seen.running()?;
            let fault = beat.fault.as_ref().filter(|fault| fault.is_root == is_root)?;
            Some(Failure::of_fault(seen.rank, &beat.host, fault, beat.last_line()))
        };
        let root = self.seen.iter().find_map(|seen| fault(seen, true));
        let root = root.or_else(|| deaths.iter().find(|death| death.is_root).map(end));
        let root = root.or_else(|| self.silent(self.silence, usize::MAX)).or_else(|| self.stuck());
        if root.is_some() {
            return root;
        }
        // What may be a consequence: its cause shows itself by a death or by silence, in a third of the usual time.
        let grace = self.silence / 3;
        if let Some((suspect, waited)) = &mut self.suspect {
            *waited += elapsed.min(self.period * 2);
            if *waited < grace {
                return None;
            }
            let suspect = suspect.clone();
            let cause = deaths.first().map(end);
            return cause.or_else(|| self.silent(grace * 3 / 4, suspect.rank)).or(Some(suspect));
        }
        let first = deaths.first().map(end);
        let first = first.or_else(|| self.seen.iter().find_map(|seen| fault(seen, false)));
        self.suspect = first.map(|failure| (failure, Duration::ZERO));
        None
    }

    /// The rank that has been silent longest, if longer than `limit`.
    fn silent(&self, limit: Duration, but: usize) -> Option<Failure> {
        let others = self.seen.iter().filter(|s| s.running().is_some() && s.rank != but);
        let seen = others.max_by_key(|seen| seen.quiet).filter(|seen| seen.quiet >= limit)?;
        let beat = seen.beat.as_ref()?;
        let what = format!(
            "gave no sign of life for {:.0} s (stopped, or its node or network is gone)",
            seen.quiet.as_secs_f64().max(1.0)
        );
        Some(Failure::of_end(seen.rank, &beat.host, &what, beat.last_line()))
    }

    /// Where a rank has made no progress for too long, the one that is furthest behind.
    fn stuck(&self) -> Option<Failure> {
        let begun = |seen: &&Seen| seen.running().is_some_and(|beat| beat.ticks > 0);
        let stuck = self.seen.iter().filter(begun).any(|seen| seen.still >= self.still);
        let running = self.seen.iter().filter_map(|seen| Some((seen, seen.running()?)));
        let (seen, beat) = running.min_by_key(|(_, beat)| beat.ticks).filter(|_| stuck)?;
        let what = format!(
            "made no progress for {:.0} s (`distributed.timeout`), in step {}: {}",
            seen.still.as_secs_f64().max(1.0),
            beat.step,
            if beat.stage.is_empty() { "before its first one" } else { &beat.stage }
        );
        Some(Failure::of_end(seen.rank, &beat.host, &what, beat.last_line()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::failure::Fault;
    use super::*;

    /// Three ranks on one judge with a silence of 15 s, looked at every second.
    struct Scene {
        judge: Judge,
        beats: Vec<Beat>,
        deaths: Vec<Death>,
    }

    impl Scene {
        fn new() -> Self {
            let config = DistributedConfig { timeout: 60.0, ..Default::default() };
            let beat = Beat { host: "a".into(), ticks: 1, step: 1, ..Beat::default() };
            let judge = Judge::new(0..3, 3, &config);
            Self { judge, beats: vec![beat; 3], deaths: Vec::new() }
        }

        /// Some seconds in which the ranks of `alive` beat and those of `busy` make progress.
        fn pass(&mut self, seconds: u64, alive: &[usize], busy: &[usize]) -> Option<Failure> {
            let second = Duration::from_secs(1);
            for _ in 0..seconds {
                alive.iter().for_each(|rank| self.beats[*rank].count += 1);
                busy.iter().for_each(|rank| self.beats[*rank].ticks += 1);
                for (seen, beat) in self.judge.seen.iter_mut().zip(&self.beats) {
                    seen.update(Some(beat.clone()), second);
                }
                if let Some(failure) = self.judge.verdict(second, &self.deaths) {
                    return Some(failure);
                }
            }
            None
        }
    }

    const ALL: [usize; 3] = [0, 1, 2];

    fn death(rank: usize, is_root: bool) -> Death {
        let (host, what) = ("a".to_owned(), "was killed".to_owned());
        Death { rank, host, what, is_root, last_line: None }
    }

    fn gloo_error() -> Fault {
        Fault::of(&anyhow::anyhow!("gloo: Connection closed by peer"))
    }

    #[test]
    fn a_silent_rank_is_dead_after_the_timeout_and_one_that_is_through_is_not() {
        let mut scene = Scene::new();
        assert_eq!(scene.pass(100, &ALL, &ALL), None);
        scene.beats[2].done = true;
        assert_eq!(scene.pass(13, &[0], &[0]), None);
        let failure = scene.pass(3, &[0], &[0]).unwrap();
        assert_eq!(failure.rank, 1);
        assert!(failure.causes[0].starts_with("rank 1 on a gave no sign of life for 15 s"));
    }

    #[test]
    fn a_rank_that_waits_for_a_disk_is_not_stuck_and_its_signs_of_waiting_blame_nobody() {
        let mut scene = Scene::new();
        for _ in 0..100 {
            scene.beats.iter_mut().skip(1).for_each(|beat| beat.waits += 5);
            scene.beats[0].waits += 1;
            assert_eq!(scene.pass(1, &ALL, &[]), None);
        }
        let failure = scene.pass(61, &ALL, &[0, 1]).unwrap();
        assert_eq!(failure.rank, 2);
    }

    #[test]
    fn an_error_that_another_ranks_end_explains_is_laid_at_its_door() {
        let mut scene = Scene::new();
        scene.pass(3, &ALL, &ALL);
        scene.beats[0].fault = Some(gloo_error());
        let failure = scene.pass(10, &[0, 1], &[]).unwrap();
        assert_eq!(failure.rank, 2); // within 5 s of silence, not 15

        let mut scene = Scene::new();
        scene.pass(3, &ALL, &ALL);
        scene.beats[0].fault = Some(gloo_error());
        assert_eq!(scene.pass(5, &ALL, &[]), None);
        let failure = scene.pass(2, &ALL, &[]).unwrap();
        assert_eq!((failure.rank, failure.causes.len()), (0, 2)); // nobody else did it

        let mut scene = Scene::new();
        scene.pass(3, &ALL, &ALL);
        scene.beats[0].fault = Some(gloo_error());
        scene.pass(1, &ALL, &[]);
        scene.deaths = vec![death(1, false)]; // aborted, which a peer's end may cause as well
        assert_eq!(scene.pass(10, &[0, 2], &[]).unwrap().rank, 1);
    }

    #[test]
    fn an_error_of_its_own_or_a_kill_is_told_at_once() {
        let mut scene = Scene::new();
        scene.pass(3, &ALL, &ALL);
        scene.beats[0].fault = Some(gloo_error());
        scene.pass(1, &ALL, &[]);
        scene.beats[2].fault = Some(Fault::of(&anyhow::anyhow!("no space left")));
        scene.beats[2].line = "step 1".into();
        let failure = scene.pass(1, &ALL, &[]).unwrap();
        assert_eq!((failure.rank, failure.last_line.as_deref()), (2, Some("step 1")));

        let mut scene = Scene::new();
        scene.pass(1, &ALL, &ALL);
        scene.deaths = vec![death(0, false), death(1, true)];
        let failure = scene.pass(1, &ALL, &ALL).unwrap();
        assert_eq!((failure.rank, failure.told_by), (1, 0));
        assert_eq!(failure.last_line.as_deref(), Some("(in step 1: )"));
    }

    #[test]
    fn of_ranks_that_make_no_progress_the_one_behind_is_stuck() {
        let mut scene = Scene::new();
        scene.pass(5, &ALL, &ALL);
        scene.pass(1, &ALL, &[0, 2]);
        scene.beats[1].stage = "reading data".into();
        assert_eq!(scene.pass(58, &ALL, &[]), None);
        let failure = scene.pass(3, &ALL, &[]).unwrap();
        assert_eq!(failure.rank, 1);
        assert!(failure.causes[0].ends_with("in step 1: reading data"), "{failure:?}");
    }

    #[test]
    fn who_sees_rank_0_alone_blames_it_for_silence_only() {
        let mut scene = Scene::new();
        scene.judge =
            Judge::new(0..1, 3, &DistributedConfig { timeout: 60.0, ..Default::default() });
        scene.beats[0].fault = Some(gloo_error());
        assert_eq!(scene.pass(100, &[0], &[]), None);
        assert_eq!(scene.pass(20, &[], &[]).map(|failure| failure.rank), Some(0));
    }

    #[test]
    fn where_everything_was_stopped_together_nobody_is_dead() {
        let mut scene = Scene::new();
        scene.pass(3, &ALL, &ALL);
        let hour = Duration::from_secs(3600);
        for seen in &mut scene.judge.seen {
            seen.update(Some(scene.beats[0].clone()), hour.min(scene.judge.period * 2));
        }
        assert_eq!(scene.judge.verdict(hour, &[]), None);
        assert_eq!(scene.pass(5, &ALL, &ALL), None);
    }
}
