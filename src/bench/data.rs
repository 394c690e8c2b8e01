//! Reading alone: how fast a run's batches come, and what they cost the CPU.
//!
//! One rank's [`DataLoader`], whose batches are dropped as they come: one thread reads, another takes. The files are in
//! the page cache as far as they fit into it: a first round is not counted.

use crate::data::packed::Access;
use crate::data::{DataLoader, LoaderOptions};
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::time::{Duration, Instant};

/// What `bench data` measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// A line each.
    pub sources: Vec<String>,
    /// B
    pub micro_batch_size: usize,
    /// T
    pub block_size: usize,
    /// Ways of reading.
    pub rows: Vec<Row>,
}

/// One way of reading.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `mapped` or `opened`.
    pub access: &'static str,
    /// Read in all.
    pub tokens: u64,
    /// Tokens a second by the clock.
    pub tokens_per_sec: f64,
    /// CPU time of all threads, nanoseconds a token.
    pub cpu_ns_per_token: f64,
    /// Share of one core that 100,000 tokens a second take.
    pub core_at_100k: f64,
}

/// Reads for so many seconds in both ways.
///
/// # Errors
/// As the loader; a system that does not tell a process's CPU time.
pub fn run(options: &LoaderOptions, seconds: f64) -> Result<Report> {
    let mut sources = Vec::new();
    let mut rows = Vec::new();
    for (name, access) in [("mapped", Access::Mapped), ("opened", Access::Opened)] {
        let mut loader = DataLoader::train(LoaderOptions { access, ..options.clone() })?;
        if rows.is_empty() {
            sources = loader.describe();
        }
        let span = Duration::from_secs_f64(seconds);
        read_for(&mut loader, span / 4)?;
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        let tokens = read_for(&mut loader, span)?;
        let cpu = cpu_seconds()? - cpu;
        let (wall, n) = (start.elapsed().as_secs_f64(), tokens as f64);
        rows.push(Row {
            access: name,
            tokens,
            tokens_per_sec: n / wall,
            cpu_ns_per_token: 1e9 * cpu / n,
            core_at_100k: 1e5 * cpu / n,
        });
    }
    let (micro_batch_size, block_size) = (options.micro_batch_size, options.block_size);
    Ok(Report { sources, micro_batch_size, block_size, rows })
}

fn read_for(loader: &mut DataLoader, span: Duration) -> Result<u64> {
    let (start, mut tokens) = (Instant::now(), 0);
    while start.elapsed() < span || tokens == 0 {
        tokens += loader.next()?.n_targets as u64;
    }
    Ok(tokens)
}

/// CPU time of this process's threads that live, in seconds: the first number of each one's `schedstat`, nanoseconds.
fn cpu_seconds() -> Result<f64> {
    let mut nanoseconds = 0;
    for task in fs::read_dir("/proc/self/task").context("cannot list this process's threads")? {
        // A thread may end while they are listed.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let first = text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
        nanoseconds += first.context("no CPU time in /proc/self/task/*/schedstat")?;
    }
    Ok(nanoseconds as f64 / 1e9)
}
