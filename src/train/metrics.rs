//! What a run leaves behind to be read: `metrics.jsonl`, TensorBoard events, log lines, `loss.png`.
//!
//! `metrics.jsonl` is the truth: one JSON object a logged step or validation, handed to the system
//! line by line. The other three are views of the same records. Only rank 0 opens a [`RunLog`].

use super::append::AppendFile;
use super::plot;
use super::progress::{self, NO_VALUE, Progress};
use super::tensorboard::EventWriter;
use crate::model::Fp8Record;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A logged optimizer step. Rates and times are means over the steps since the last logged one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// Optimizer steps done, from 1.
    pub step: u64,
    /// Micro-batches done on one rank.
    pub iter: u64,
    /// Tokens trained on so far, over all ranks.
    pub tokens: u64,
    /// Training loss in nats a token: mean over all ranks and micro-batches of the step.
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens a second, over all ranks.
    pub tokens_per_sec: f64,
    /// Tokens a second of one rank.
    pub tokens_per_sec_per_gpu: f64,
    /// Model FLOPs utilisation, full attention, as a fraction; see [`super::flops`]. `None`: no
    /// peak known.
    pub mfu: Option<f64>,
    /// The same, causal attention.
    pub mfu_causal: Option<f64>,
    /// Most GPU memory allocated at once so far, in GiB. `None` on the CPU.
    pub peak_memory_gib: Option<f64>,
    /// Milliseconds of one micro-batch, the optimizer's share included.
    pub iter_time_ms: f64,
    /// Wall clock in seconds since 1970 (UTC); see [`unix_time`].
    pub time: f64,
    /// Every scale of `fp8-mixed`; absent in other precisions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fp8: Option<Vec<Fp8Record>>,
    /// Of preferences: how much larger the reward of the chosen answer is than the rejected one's, on average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_margin: Option<f64>,
    /// Part of the step's pairs whose chosen answer has the larger reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_accuracy: Option<f64>,
}

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ValRecord {
    /// Optimizer steps done before it; 0: before training.
    pub step: u64,
    /// Tokens trained on before it, over all ranks.
    pub tokens: u64,
    /// Loss in nats a token, over all ranks.
    pub val_loss: f64,
    /// Perplexity: `exp(val_loss)`.
    pub val_ppl: f64,
    /// It went through the whole set.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub whole: bool,
}

impl ValRecord {
    /// A validation of a part of the set with this loss; fills in the perplexity.
    pub fn new(step: u64, tokens: u64, val_loss: f64) -> ValRecord {
        ValRecord { step, tokens, val_loss, val_ppl: val_loss.exp(), whole: false }
    }
}

/// Scores of a task while the model is trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskRecord {
    /// Optimizer steps done before it.
    pub step: u64,
    /// Tokens trained on before it, over all ranks.
    pub tokens: u64,
    /// Its name.
    pub task: String,
    /// Samples, which may be the first of the set.
    pub samples: u64,
    /// Examples before each question.
    pub num_fewshot: u64,
    /// Metrics by name, and beside each its standard error.
    #[serde(flatten)]
    pub scores: serde_json::Map<String, serde_json::Value>,
}

/// Where a run will end, as far as the configuration says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Tokens, over all ranks.
    pub tokens: Option<u64>,
}

/// Seconds since 1970 (UTC).
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The log of a run.
pub struct RunLog {
    out_dir: PathBuf,
    totals: Totals,
    metrics: AppendFile,
    events: EventWriter,
    progress: Progress,
    /// Smoothed tokens a second, for the time left.
    rate: Option<f64>,
    speed: SpeedMean,
    /// A full disk is told once, not every step.
    warned: bool,
}

impl RunLog {
    /// Opens the log of the run in `out_dir`, which is created if missing.
    ///
    /// `resume_step: Some(s)` goes on behind step s: lines of later steps, which the earlier
    /// process wrote and lost when the run went back to its checkpoint, are dropped, atomically.
    /// `None` starts anew; an earlier `metrics.jsonl` is kept as `metrics.old.jsonl`. `quiet` shows
    /// nothing on stderr.
    ///
    /// # Errors
    /// Where a file cannot be created. Later write failures are told once and do not end the run.
    pub fn open(
        out_dir: &Path,
        resume_step: Option<u64>,
        total: Totals,
        quiet: bool,
    ) -> Result<RunLog> {
        fs::create_dir_all(out_dir)
            .with_context(|| format!("cannot create {}", out_dir.display()))?;
        let path = metrics_path(out_dir);
        match resume_step {
            Some(step) => keep_through(&path, step),
            None => set_aside(&path),
        }
        .with_context(|| format!("cannot prepare {}", path.display()))?;
        let metrics =
            AppendFile::open(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let first_step = resume_step.map_or(0, |step| step + 1);
        Ok(RunLog {
            out_dir: out_dir.to_owned(),
            totals: total,
            metrics,
            events: EventWriter::create(out_dir, first_step, unix_time())?,
            progress: Progress::new(total.steps.or(total.tokens), quiet),
            rate: None,
            speed: SpeedMean::default(),
            warned: false,
        })
    }

    /// Logs a step everywhere. A full disk is told once and does not end the run.
    ///
    /// # Errors
    /// None today; `Result` so that the loop need not change if that changes.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        let json = serde_json::to_string(record)?;
        let r = record;
        let mut scalars = vec![
            ("train/loss", r.loss),
            ("train/lr", r.lr),
            ("train/grad_norm", r.grad_norm),
            ("train/tokens", r.tokens as f64),
            ("throughput/tokens_per_sec", r.tokens_per_sec),
            ("throughput/tokens_per_sec_per_gpu", r.tokens_per_sec_per_gpu),
            ("throughput/iter_time_ms", r.iter_time_ms),
        ];
        let optional = [
            ("throughput/mfu", r.mfu),
            ("throughput/mfu_causal", r.mfu_causal),
            ("memory/peak_gib", r.peak_memory_gib),
            ("train/reward_margin", r.reward_margin),
            ("train/reward_accuracy", r.reward_accuracy),
        ];
        scalars.extend(optional.iter().filter_map(|(tag, value)| value.map(|v| (*tag, v))));
        self.write(&json, r.step, r.time, &scalars);

        // Half the weight to the last ten or so lines: steady, yet it follows a change of speed.
        let rate = self.rate.map_or(r.tokens_per_sec, |old| 0.93 * old + 0.07 * r.tokens_per_sec);
        self.rate = rate.is_finite().then_some(rate);
        self.speed.add(r);
        let eta = self.eta(r.step, r.tokens);
        self.progress.line(&log_line(r, &self.totals, eta));
        self.progress.set(
            if self.totals.steps.is_some() { r.step } else { r.tokens },
            format!("loss {} | eta {}", progress::fit(r.loss, 6), eta_text(eta)),
        );
        Ok(())
    }

    /// Logs a validation everywhere and redraws `loss.png`, so that a run that is killed has a
    /// curve.
    ///
    /// # Errors
    /// As [`RunLog::step`].
    pub fn validation(&mut self, record: &ValRecord) -> Result<()> {
        let json = serde_json::to_string(record)?;
        let scalars = [("val/loss", record.val_loss), ("val/ppl", record.val_ppl)];
        self.write(&json, record.step, unix_time(), &scalars);
        self.progress.line(&val_line(record, &self.totals));
        if let Err(e) = self.draw() {
            self.warn(&format!("cannot draw loss.png: {e:#}"));
        }
        Ok(())
    }

    /// Logs the scores of a task everywhere.
    ///
    /// # Errors
    /// As [`RunLog::step`].
    pub fn task(&mut self, record: &TaskRecord) -> Result<()> {
        let json = serde_json::to_string(record)?;
        let means = record.scores.iter().filter(|(name, _)| !name.ends_with("_stderr"));
        let named = means.filter_map(|(name, score)| Some((name, score.as_f64()?)));
        let tagged: Vec<(String, f64)> =
            named.map(|(name, score)| (format!("tasks/{}/{name}", record.task), score)).collect();
        let scalars: Vec<(&str, f64)> = tagged.iter().map(|(tag, x)| (tag.as_str(), *x)).collect();
        self.write(&json, record.step, unix_time(), &scalars);
        self.progress.line(&task_line(record, &self.totals));
        Ok(())
    }

    /// Prints a line on stderr without garbling the progress bar.
    pub fn note(&self, text: &str) {
        self.progress.line(text);
    }

    /// Ends the log: takes the bar away, prints mean speed, both MFUs and peak memory, draws the
    /// curve.
    ///
    /// Returns the path of `loss.png`.
    ///
    /// # Errors
    /// Where the picture cannot be drawn or written.
    pub fn finish(&mut self) -> Result<PathBuf> {
        self.progress.clear();
        if let Some(line) = self.speed.line() {
            self.progress.line(&line);
        }
        self.draw()
    }

    fn draw(&self) -> Result<PathBuf> {
        let png = self.out_dir.join("loss.png");
        plot::loss_curve(&metrics_path(&self.out_dir), &png)?;
        Ok(png)
    }

    /// A line of `metrics.jsonl` and an event, both as far as the disk allows.
    fn write(&mut self, json: &str, step: u64, time: f64, scalars: &[(&str, f64)]) {
        if let Err(e) = self.metrics.append(format!("{json}\n").as_bytes()) {
            self.warn(&format!("cannot write metrics.jsonl: {e}"));
        }
        if let Err(e) = self.events.scalars(step, time, scalars) {
            self.warn(&format!("cannot write TensorBoard events: {e}"));
        }
    }

    fn warn(&mut self, problem: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            let dir = self.out_dir.display();
            self.progress
                .line(&format!("warning: {problem}, in {dir}; training goes on without it"));
        }
    }

    /// Seconds to the nearest end, at the smoothed rate; validation and saving come on top.
    fn eta(&self, step: u64, tokens: u64) -> Option<f64> {
        let rate = self.rate.filter(|r| *r > 0.0)?;
        let by_tokens = self.totals.tokens.map(|total| total.saturating_sub(tokens) as f64);
        let by_steps = self.totals.steps.filter(|_| step > 0).map(|total| {
            total.saturating_sub(step) as f64 * (tokens as f64 / step as f64) // tokens of a step
        });
        let left = match (by_tokens, by_steps) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        Some(left / rate)
    }
}

fn metrics_path(out_dir: &Path) -> PathBuf {
    out_dir.join("metrics.jsonl")
}

/// Whether a validation over the whole set after this step is in the run's `metrics.jsonl`.
///
/// # Errors
/// The file is there and cannot be read.
pub fn holds_validation(out_dir: &Path, step: u64) -> Result<bool> {
    let path = metrics_path(out_dir);
    let text = match fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let of_it = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        line["step"] == step && line["whole"] == true
    };
    Ok(text.lines().rev().any(of_it))
}

/// Renames the file of an earlier run out of the way.
fn set_aside(path: &Path) -> io::Result<()> {
    match fs::rename(path, path.with_extension("old.jsonl")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Drops lines of steps behind `last_step`, and a torn last line; a crash leaves the old file or
/// the new one, never a mixture.
fn keep_through(path: &Path, last_step: u64) -> io::Result<()> {
    #[derive(Deserialize)]
    struct Line {
        step: u64,
    }
    let old = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let temporary = path.with_extension("jsonl.tmp");
    let mut new = BufWriter::new(File::create(&temporary)?);
    for line in old.split(b'\n') {
        let line = line?;
        if serde_json::from_slice::<Line>(&line).is_ok_and(|l| l.step <= last_step) {
            new.write_all(&line)?;
            new.write_all(b"\n")?;
        }
    }
    new.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(temporary, path)
}

/// Means over what this process logged, without the first line, which holds the warm-up.
#[derive(Default)]
struct SpeedMean {
    lines: u64,
    tokens_per_sec: f64,
    tokens_per_sec_per_gpu: f64,
    mfu: Option<f64>,
    mfu_causal: Option<f64>,
    peak_memory_gib: Option<f64>,
}

impl SpeedMean {
    fn add(&mut self, r: &StepRecord) {
        self.lines += 1;
        let n = self.lines.saturating_sub(1).max(1) as f64; // the second line replaces the first
        // Of rates, by the time of each: a last step that was under way when the clock began anew takes next to none.
        let mean =
            |old: f64, new: f64| if n == 1.0 { new } else { n / ((n - 1.0) / old + 1.0 / new) };
        let mean_of = |old: Option<f64>, new: Option<f64>| {
            new.map(|new| mean(old.unwrap_or(new), new)).or(old)
        };
        self.tokens_per_sec = mean(self.tokens_per_sec, r.tokens_per_sec);
        self.tokens_per_sec_per_gpu = mean(self.tokens_per_sec_per_gpu, r.tokens_per_sec_per_gpu);
        self.mfu = mean_of(self.mfu, r.mfu);
        self.mfu_causal = mean_of(self.mfu_causal, r.mfu_causal);
        self.peak_memory_gib = r.peak_memory_gib.or(self.peak_memory_gib);
    }

    fn line(&self) -> Option<String> {
        let percent = |v: Option<f64>| v.map_or("n/a".into(), |v| format!("{:.1}%", 100.0 * v));
        (self.lines > 0).then(|| {
            format!(
                "mean speed: {} tok/s, {} a rank | mfu {} | mfu_causal {} | peak memory {}",
                progress::count(self.tokens_per_sec),
                progress::count(self.tokens_per_sec_per_gpu),
                percent(self.mfu),
                percent(self.mfu_causal),
                self.peak_memory_gib.map_or("n/a".into(), |v| format!("{v:.1} GiB")),
            )
        })
    }
}

fn eta_text(seconds: Option<f64>) -> String {
    seconds.map_or(NO_VALUE.into(), progress::duration)
}

/// `step   1200/715256 |  1.26B/1.50T tok`: the columns that both kinds of line begin with.
fn position(step: u64, tokens: u64, totals: &Totals) -> String {
    let (of_steps, width) = match totals.steps {
        Some(total) => (format!("/{total}"), total.to_string().len().max(6)),
        None => (String::new(), 6),
    };
    let of_tokens =
        totals.tokens.map_or(String::new(), |t| format!("/{}", progress::count(t as f64)));
    let tokens = progress::count(tokens as f64);
    format!("step {step:>width$}{of_steps} | {tokens:>6}{of_tokens} tok")
}

/// One fixed-width line a logged step; columns stay aligned over a run.
fn log_line(r: &StepRecord, totals: &Totals, eta_seconds: Option<f64>) -> String {
    // On the CPU there is no card to count by: the rate of all ranks.
    let (rate, unit) = match r.peak_memory_gib {
        Some(_) => (r.tokens_per_sec_per_gpu, "tok/s/gpu"),
        None => (r.tokens_per_sec, "tok/s"),
    };
    let mfu = r.mfu.map_or(format!("{NO_VALUE:>5}"), |v| format!("{:>4.1}%", 100.0 * v));
    let memory = r.peak_memory_gib.map_or(NO_VALUE.into(), |v| format!("{v:.1}"));
    let rewards = r.reward_margin.zip(r.reward_accuracy);
    let rewards = rewards.map_or(String::new(), |(margin, accuracy)| {
        format!(" | margin {} | right {:>3.0}%", progress::fit(margin, 5), 100.0 * accuracy)
    });
    format!(
        "{} | loss {}{rewards} | lr {} | gnorm {} | {} | {:>5} {unit} | mfu {mfu} | {memory:>4} GiB \
         | eta {}",
        position(r.step, r.tokens, totals),
        progress::fit(r.loss, 6),
        exponent(r.lr),
        progress::fit(r.grad_norm, 4),
        progress::milliseconds(r.iter_time_ms),
        progress::count(rate),
        eta_text(eta_seconds),
    )
}

/// Seven characters: `4.00e-4`, `1.5e-10`.
fn exponent(value: f64) -> String {
    let text = format!("{value:.2e}");
    let text = if text.len() > 7 { format!("{value:.1e}") } else { text };
    format!("{text:>7}")
}

/// A validation's line.
fn val_line(r: &ValRecord, totals: &Totals) -> String {
    format!(
        "{} | val loss {} | val ppl {}",
        position(r.step, r.tokens, totals),
        progress::fit(r.val_loss, 6),
        progress::fit(r.val_ppl, 6).trim_start(),
    )
}

fn task_line(r: &TaskRecord, totals: &Totals) -> String {
    let scores = r.scores.iter().filter(|(name, _)| !name.ends_with("_stderr"));
    let shown = scores.map(|(name, score)| {
        let score = score.as_f64().unwrap_or(f64::NAN);
        let error = r.scores.get(&format!("{name}_stderr")).and_then(|error| error.as_f64());
        let error = error.map_or(String::new(), |error| format!(" ± {error:.3}"));
        format!("{name} {score:.4}{error}")
    });
    let shown: Vec<String> = shown.collect();
    format!(
        "{} | {} | {} | {} samples",
        position(r.step, r.tokens, totals),
        r.task,
        shown.join(" | "),
        r.samples
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> StepRecord {
        StepRecord {
            step: 1200,
            iter: 9600,
            tokens: 1_258_291_200,
            loss: 3.24159,
            lr: 4e-4,
            grad_norm: 0.82,
            tokens_per_sec: 430_400.0,
            tokens_per_sec_per_gpu: 26_900.0,
            mfu: Some(0.581),
            mfu_causal: Some(0.537),
            peak_memory_gib: Some(31.2),
            iter_time_ms: 312.0,
            time: 1.5e9,
            fp8: None,
            reward_margin: None,
            reward_accuracy: None,
        }
    }

    fn totals() -> Totals {
        Totals { steps: Some(715_256), tokens: Some(1_500_000_000_000) }
    }

    #[test]
    fn the_log_line_is_the_house_style() {
        assert_eq!(
            log_line(&record(), &totals(), Some(9.0 * 86400.0 + 3.0 * 3600.0)),
            "step   1200/715256 |  1.26B/1.50T tok | loss 3.2416 | lr 4.00e-4 | gnorm 0.82 \
             | 312 ms | 26.9k tok/s/gpu | mfu 58.1% | 31.2 GiB | eta 9d 03h"
        );
        let val = ValRecord::new(5000, 10_485_760_000, 2.5);
        assert_eq!(
            val_line(&val, &totals()),
            "step   5000/715256 |  10.5B/1.50T tok | val loss 2.5000 | val ppl 12.182"
        );
    }

    #[test]
    fn columns_stay_aligned_over_a_run_and_without_a_card() {
        let bars = |line: &str| line.match_indices('|').map(|(at, _)| at).collect::<Vec<_>>();
        let reference = bars(&log_line(&record(), &totals(), None));
        let odd = [
            StepRecord { step: 1, tokens: 8192, loss: 10.8268, grad_norm: 123.4, ..record() },
            StepRecord { step: 715_256, tokens: 1_500_000_000_000, lr: 0.0, ..record() },
            StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, lr: 1.5e-10, ..record() },
            StepRecord { mfu: Some(0.05), peak_memory_gib: Some(7.0), ..record() },
            StepRecord { iter_time_ms: 1250.0, tokens_per_sec_per_gpu: 853.0, ..record() },
            StepRecord { mfu: None, mfu_causal: None, iter_time_ms: 12.5, ..record() },
        ];
        for r in &odd {
            assert_eq!(bars(&log_line(r, &totals(), None)), reference, "{r:?}");
        }
        let cpu = StepRecord { mfu: None, peak_memory_gib: None, ..record() };
        assert_eq!(
            log_line(&cpu, &Totals::default(), None),
            "step   1200 |  1.26B tok | loss 3.2416 | lr 4.00e-4 | gnorm 0.82 | 312 ms \
             |  430k tok/s | mfu     - |    - GiB | eta -"
        );
    }

    #[test]
    fn a_full_disk_is_told_once_and_does_not_end_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RunLog::open(dir.path(), None, totals(), true).unwrap();
        let working =
            std::mem::replace(&mut log.metrics, AppendFile::open(Path::new("/dev/full")).unwrap());
        for step in 1..=3 {
            log.step(&StepRecord { step, ..record() }).unwrap();
            assert!(log.warned);
        }
        log.metrics = working; // space again
        log.step(&StepRecord { step: 4, ..record() }).unwrap();
        let text = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        assert!(text.starts_with("{\"step\":4,") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn the_time_left_is_that_of_the_nearer_end() {
        let dir = tempfile::tempdir().unwrap();
        let totals = Totals { steps: Some(2400), tokens: Some(u64::MAX) };
        let mut log = RunLog::open(dir.path(), None, totals, true).unwrap();
        assert_eq!(log.eta(1200, 1200), None);
        log.rate = Some(100.0);
        assert_eq!(log.eta(1200, 1_200_000), Some(12_000.0));
        log.totals.tokens = Some(1_300_000);
        assert_eq!(log.eta(1200, 1_200_000), Some(1000.0));
        log.totals = Totals::default();
        assert_eq!(log.eta(1200, 1_200_000), None);
    }

    #[test]
    fn the_mean_speed_leaves_out_the_warm_up_and_shows_both_mfus() {
        let mut mean = SpeedMean::default();
        assert_eq!(mean.line(), None);
        mean.add(&StepRecord { tokens_per_sec: 10.0, mfu: Some(0.01), ..record() });
        for (rate, mfu) in [(200.0, 0.5), (300.0, 0.6)] {
            mean.add(&StepRecord { tokens_per_sec: rate, mfu: Some(mfu), ..record() });
        }
        let want = "mean speed: 240 tok/s, 26.9k a rank | mfu 54.5% | mfu_causal 53.7% \
                    | peak memory 31.2 GiB";
        assert_eq!(mean.line().unwrap(), want);
    }
}
