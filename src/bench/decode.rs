//! How fast the engine reads prompts and makes tokens, beside what reading the weights from memory allows.

use crate::ffi;
use crate::generate::engine::{Engine, EngineOptions, Event, Request};
use crate::generate::network::NetworkRef;
use crate::generate::request::{GenerateOptions, peak_memory};
use crate::generate::sampler::SamplingParams;
use crate::model::PagedCache;
use crate::model::paged_cache::BLOCK;
use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// One measurement: `prompts` prompts of random ids, `samples` continuations of each.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Prompts.
    pub prompts: usize,
    /// Continuations of each.
    pub samples: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of a continuation.
    pub new_tokens: usize,
}

/// What a case gave.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Sequences decoded at the same time.
    pub sequences: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of a continuation.
    pub new_tokens: usize,
    /// Prompt tokens read a second, until every sequence has its first token.
    pub prefill_tokens_per_sec: f64,
    /// Tokens made a second, after the first of each sequence.
    pub decode_tokens_per_sec: f64,
    /// All tokens made, over the whole time.
    pub tokens_per_sec: f64,
    /// Milliseconds of a decoding step: half of them take at most this.
    pub step_ms_p50: f64,
    /// 99 of 100 take at most this.
    pub step_ms_p99: f64,
    /// Decoding speed against [`Report::limit_tokens_per_sec`].
    pub share_of_limit: f64,
    /// Memory bandwidth over the bytes of weights and cache that a step has to read.
    pub limit_tokens_per_sec: f64,
    /// Bytes a second that a sum over a large tensor reads.
    pub read_bandwidth: f64,
    /// Bytes of weights that a step reads.
    pub weight_bytes: u64,
    /// Peak memory: of the allocator on a GPU, of the process on the CPU.
    pub peak_memory: Option<u64>,
}

/// Runs a case `repeats` times, after once that is not counted, and tells of the one with the median decoding speed.
///
/// # Errors
/// Prompts that the model has no room for; logits that are not finite.
pub fn run(
    model: NetworkRef,
    case: Case,
    sampling: &SamplingParams,
    repeats: usize,
) -> Result<Report> {
    let read_bandwidth = read_bandwidth(model.device());
    let mut runs = Vec::new();
    for repeat in 0..=repeats {
        let run = once(model, case, sampling)?;
        if repeat > 0 {
            runs.push(run);
        }
    }
    runs.sort_by_key(Run::decode);
    let run = &runs[runs.len() / 2];
    let sequences = case.prompts * case.samples;
    let new = (case.new_tokens * sequences) as f64;
    let decode = (new - sequences as f64) / run.decode().as_secs_f64().max(1e-9);
    let weight_bytes = model.step_bytes();
    let mean_context = case.prompt_tokens + case.new_tokens / 2;
    let block_bytes = PagedCache::block_bytes(model.config(), model.kind());
    let cache_bytes = (sequences * mean_context) as u64 * block_bytes / BLOCK as u64;
    let limit = sequences as f64 * read_bandwidth / (weight_bytes + cache_bytes) as f64;
    Ok(Report {
        sequences,
        prompt_tokens: case.prompt_tokens,
        new_tokens: case.new_tokens,
        prefill_tokens_per_sec: (case.prompts * case.prompt_tokens) as f64
            / run.prefill.as_secs_f64(),
        decode_tokens_per_sec: decode,
        tokens_per_sec: new / run.all.as_secs_f64(),
        step_ms_p50: percentile(&run.steps, 50),
        step_ms_p99: percentile(&run.steps, 99),
        share_of_limit: decode / limit,
        limit_tokens_per_sec: limit,
        read_bandwidth,
        weight_bytes,
        peak_memory: peak_memory(model.device()),
    })
}

struct Run {
    /// Until every sequence has its first token.
    prefill: Duration,
    all: Duration,
    /// Of the steps after that, sorted.
    steps: Vec<Duration>,
}

impl Run {
    fn decode(&self) -> Duration {
        self.all - self.prefill
    }
}

fn once(model: NetworkRef, case: Case, sampling: &SamplingParams) -> Result<Run> {
    let needs = vec![(case.prompt_tokens, case.new_tokens, case.samples); case.prompts];
    let sequences = case.prompts * case.samples;
    let sizes = EngineOptions {
        max_sequences: sequences,
        share_prefixes: false,
        ..EngineOptions::for_requests(model, &needs)
    };
    let mut engine = Engine::new(model, sizes);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for i in 0..case.prompts {
        let rows = model.config().vocab_size as u64;
        let prompt = (0..case.prompt_tokens).map(|_| (rng.next_u64() % rows) as u32).collect();
        let sampling = SamplingParams { seed: (i * case.samples) as u64, ..sampling.clone() };
        let options =
            GenerateOptions { max_new_tokens: case.new_tokens, sampling, ..Default::default() };
        engine.submit(Request { prompt, samples: case.samples, options })?;
    }
    let (start, mut begun) = (Instant::now(), 0);
    let (mut prefill, mut steps) = (None, Vec::new());
    while !engine.is_idle() {
        let step = Instant::now();
        let mut tokens = 0;
        for event in engine.step() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Finished { .. } => {}
                Event::Failed { error, .. } => return Err(error),
            }
        }
        begun += tokens;
        match prefill {
            Some(_) => steps.push(step.elapsed()),
            // Those that began early go on meanwhile; all have begun once every sequence made one token at least.
            None if begun >= sequences => prefill = Some(start.elapsed()),
            None => {}
        }
    }
    steps.sort();
    let all = start.elapsed();
    Ok(Run { prefill: prefill.unwrap_or(all), all, steps })
}

/// Milliseconds that so many of 100 take at most; 0 where there are none.
pub(super) fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(0.0, |step| step.as_secs_f64() * 1e3)
}

/// Bytes a second of a sum over 1 GiB of fp32, the best of five.
fn read_bandwidth(device: Device) -> f64 {
    let x = Tensor::ones([1 << 28], (Kind::Float, device));
    let wait = || {
        if let Device::Cuda(index) = device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        wait();
        let start = Instant::now();
        let _sum = x.sum(Kind::Float);
        wait();
        best = best.min(start.elapsed().as_secs_f64());
    }
    drop(x);
    if let Device::Cuda(index) = device {
        let _ = ffi::cuda_reset_peak_memory(index); // so that the peak is the engine's
    }
    (1u64 << 30) as f64 / best
}
