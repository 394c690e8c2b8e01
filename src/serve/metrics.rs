//! Counters and histograms in Prometheus' text format, version 0.0.4.

use crate::generate::service::Status;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper ends of the buckets, in seconds.
const FIRST_TOKEN: [f64; 12] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const PER_TOKEN: [f64; 12] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0];
const WHOLE: [f64; 12] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// How a request for text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// All of its answers are whole.
    Complete,
    /// The client went away.
    Disconnected,
    /// The client did not read.
    TooSlow,
    /// Its time was over.
    OutOfTime,
    /// The engine failed.
    Failed,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Disconnected => "disconnected",
            Self::TooSlow => "too_slow",
            Self::OutOfTime => "out_of_time",
            Self::Failed => "failed",
        }
    }
}

/// All that the server counts; the engine's numbers come from its [`Status`].
pub struct Metrics {
    /// By endpoint and HTTP status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    ends: Mutex<BTreeMap<End, u64>>,
    /// From the request to its first token.
    first_token: Histogram,
    /// Mean time between the tokens of an answer.
    per_token: Histogram,
    /// From the request to the end of its answers.
    whole: Histogram,
    /// Open connections.
    pub connections: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Mutex::default(),
            ends: Mutex::default(),
            first_token: Histogram::new(&FIRST_TOKEN),
            per_token: Histogram::new(&PER_TOKEN),
            whole: Histogram::new(&WHOLE),
            connections: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, endpoint: &'static str, status: u16) {
        *lock(&self.requests).entry((endpoint, status)).or_default() += 1;
    }

    /// Notes that a request has its first token.
    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after);
    }

    /// Notes the end of a request; `decode` is the time from the first token to the last of `tokens`.
    pub fn ended(&self, end: End, whole: Duration, decode: Duration, tokens: usize) {
        *lock(&self.ends).entry(end).or_default() += 1;
        if end == End::Complete {
            self.whole.observe(whole);
            if tokens > 1 {
                self.per_token.observe(decode / (tokens - 1) as u32);
            }
        }
    }

    /// The text of `/metrics`.
    pub fn text(&self, status: &Status) -> String {
        let mut out = String::new();
        head(&mut out, "requests_total", "counter", "Answers by endpoint and HTTP status.");
        for ((endpoint, code), count) in lock(&self.requests).iter() {
            let labels = format!("{{endpoint=\"{endpoint}\",status=\"{code}\"}}");
            line(&mut out, "requests_total", &labels, count);
        }
        let what = "Requests for text by the way they ended.";
        head(&mut out, "generations_total", "counter", what);
        for (end, count) in lock(&self.ends).iter() {
            line(&mut out, "generations_total", &format!("{{end=\"{}\"}}", end.name()), count);
        }
        let mut number = |name: &str, kind: &str, what: &str, value: u64| {
            head(&mut out, name, kind, what);
            line(&mut out, name, "", &value);
        };
        let Status { running, waiting, free_blocks, all_blocks, .. } = *status;
        let connections = self.connections.load(Relaxed);
        number("connections", "gauge", "Open connections.", connections);
        number("running", "gauge", "Sequences that run.", running as u64);
        number("waiting", "gauge", "Sequences that wait for their turn.", waiting as u64);
        let what = "Blocks of the key/value cache in use.";
        number("cache_blocks_used", "gauge", what, all_blocks.saturating_sub(free_blocks) as u64);
        number("cache_blocks", "gauge", "Blocks of the key/value cache.", all_blocks as u64);
        let counters = [
            ("prompt_tokens_total", "Tokens of prompts.", status.prompt_tokens),
            (
                "cached_prompt_tokens_total",
                "Tokens of prompts that the cache had.",
                status.cached_prompt_tokens,
            ),
            ("new_tokens_total", "Tokens made.", status.new_tokens),
            ("engine_finished_total", "Prompts that the engine finished.", status.finished),
            ("engine_cancelled_total", "Prompts that were given up.", status.cancelled),
            ("engine_failed_total", "Prompts that failed.", status.failed),
            ("preempted_total", "Times a sequence gave its cache back.", status.preempted),
        ];
        for (name, what, value) in counters {
            number(name, "counter", what, value);
        }
        let name = "time_to_first_token_seconds";
        self.first_token.write(&mut out, name, "From a request to its first token.");
        let name = "time_per_token_seconds";
        self.per_token.write(&mut out, name, "Mean time between the tokens of a request.");
        let name = "generation_seconds";
        self.whole.write(&mut out, name, "From a request to the end of its answers.");
        out
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn head(out: &mut String, name: &str, kind: &str, what: &str) {
    let _ = writeln!(out, "# HELP tinyllama_{name} {what}\n# TYPE tinyllama_{name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: &dyn std::fmt::Display) {
    let _ = writeln!(out, "tinyllama_{name}{labels} {value}");
}

struct Histogram {
    bounds: &'static [f64],
    /// One a bucket, and one for what is above all of them.
    counts: Vec<AtomicU64>,
    sum_micros: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_micros: AtomicU64::new(0) }
    }

    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = self.bounds.iter().position(|&bound| seconds <= bound);
        self.counts[bucket.unwrap_or(self.bounds.len())].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, what: &str) {
        head(out, name, "histogram", what);
        let mut sum = 0;
        for (i, count) in self.counts.iter().enumerate() {
            sum += count.load(Relaxed);
            let bound = self.bounds.get(i).map_or("+Inf".into(), f64::to_string);
            line(out, &format!("{name}_bucket"), &format!("{{le=\"{bound}\"}}"), &sum);
        }
        let seconds = self.sum_micros.load(Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum"), "", &seconds);
        line(out, &format!("{name}_count"), "", &sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_counter_and_cumulative_buckets() {
        let metrics = Metrics::default();
        metrics.answered("/health", 200);
        metrics.answered("/health", 200);
        metrics.first_token(Duration::from_millis(30));
        metrics.first_token(Duration::from_secs(100));
        metrics.ended(End::Complete, Duration::from_secs(1), Duration::from_millis(90), 10);
        let status = Status { running: 3, free_blocks: 5, all_blocks: 9, ..Default::default() };
        let text = metrics.text(&status);
        for line in [
            "tinyllama_requests_total{endpoint=\"/health\",status=\"200\"} 2",
            "tinyllama_generations_total{end=\"complete\"} 1",
            "tinyllama_running 3",
            "tinyllama_cache_blocks_used 4",
            "tinyllama_time_to_first_token_seconds_bucket{le=\"0.025\"} 0",
            "tinyllama_time_to_first_token_seconds_bucket{le=\"0.05\"} 1",
            "tinyllama_time_to_first_token_seconds_bucket{le=\"+Inf\"} 2",
            "tinyllama_time_to_first_token_seconds_sum 100.03",
            "tinyllama_time_per_token_seconds_bucket{le=\"0.01\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
