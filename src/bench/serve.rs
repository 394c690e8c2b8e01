//! How a server does under load: streams of `/v1/completions` as their clients see them, in the terms of vLLM's
//! `benchmark_serving`.
//!
//! Each request has a connection and a prompt of its own, random but the same for the same seed, and asks the model to go
//! on behind the end of its text. Clients are tasks of one thread. Read first: [`run`], then [`ask`] next door.

use super::decode::percentile;
use super::serve_client::{Server, ask};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What is asked of the server.
#[derive(Clone, Debug)]
pub struct Load {
    /// Requests in all.
    pub requests: usize,
    /// When each begins.
    pub pace: Pace,
    /// Tokens of a prompt; words where the server does not tell how many ids it knows.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub new_tokens: usize,
    /// 0: the most likely token.
    pub temperature: f64,
    /// Of the prompts and the times between requests.
    pub seed: u64,
}

/// When requests begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// So many are open at any time.
    Clients(usize),
    /// So many a second on average, at random times (a Poisson process), whatever became of those before.
    Rate(f64),
}

/// What came of it. Sums and times are of whole answers only.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model as the server names it.
    pub model: String,
    /// Requests whose answer was whole.
    pub whole: usize,
    /// All others.
    pub failed: usize,
    /// Why those failed, and how many.
    pub failures: BTreeMap<String, usize>,
    /// From the first request to the end of the last.
    pub seconds: f64,
    /// Tokens of prompts, as the server counts them.
    pub prompt_tokens: usize,
    /// Tokens of answers.
    pub new_tokens: usize,
    /// Whole answers a second.
    pub requests_per_sec: f64,
    /// Tokens of prompts a second.
    pub prompt_tokens_per_sec: f64,
    /// Tokens of answers a second.
    pub new_tokens_per_sec: f64,
    /// From the start of a request to its first text.
    pub first_token_ms: Option<Percentiles>,
    /// Mean time between the tokens of an answer: (end - first text) / (tokens - 1).
    pub per_token_ms: Option<Percentiles>,
    /// Between one piece of text and the next, which may hold several tokens.
    pub between_pieces_ms: Option<Percentiles>,
    /// From the start of a request to the end of its answer.
    pub whole_ms: Option<Percentiles>,
    /// Bytes, where the server runs in this process.
    pub peak_memory: Option<u64>,
}

/// So many of 100 are at most this, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Percentiles {
    /// `None` of nothing.
    fn of(times: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        let at = |percent| percentile(&times, percent);
        (!times.is_empty()).then(|| Self { p50: at(50), p90: at(90), p99: at(99) })
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Answer {
    /// As the server counts them.
    pub prompt_tokens: usize,
    /// As the server counts them.
    pub new_tokens: usize,
    /// From the start of the request to its first text.
    pub first: Duration,
    /// Between pieces of text.
    pub gaps: Vec<Duration>,
    /// From the start of the request to the end.
    pub whole: Duration,
}

/// Loads the server, after one request that is not counted.
///
/// # Errors
/// A server that is not there, refuses the key or that first request, or has a shorter context; no answer that is whole.
pub fn run(server: &Arc<Server>, load: &Load) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the clients' thread")?.block_on(async {
        let model = server.model().await?;
        check_length(model.context, load)?;
        let body = |i: usize| body(&model.id, model.vocabulary, load, i).to_string();
        ask(server, body(load.requests))
            .await
            .context("the first request, which is not counted, came to nothing")
            .hint("change its sizes or `--temperature`, or the server's limits")?;
        let start = Instant::now();
        let outcomes = drive(server, load, body).await;
        report(model.id.clone(), outcomes, start.elapsed())
    })
}

fn check_length(context: Option<usize>, load: &Load) -> Result<()> {
    let (prompt, new) = (load.prompt_tokens, load.new_tokens);
    match context {
        Some(context) if prompt + new > context => Err(anyhow!(
            "expected prompt and answer of up to {context} tokens together (the model's context), \
             got {prompt} + {new}"
        ))
        .usage("lower `--prompt-tokens` or `--new-tokens`"),
        _ => Ok(()),
    }
}

/// Request `i`: random ids, or words where it is not known which ids there are.
fn body(model: &str, vocabulary: Option<usize>, load: &Load, i: usize) -> Value {
    const WORDS: [&str; 8] = ["llamas", "eat", "grass", "and", "hay", "on", "high", "hills"];
    let mut rng = ChaCha8Rng::seed_from_u64(load.seed.wrapping_add(i as u64));
    let mut draw = |below: usize| (rng.next_u64() % below.max(1) as u64) as usize;
    let places = 0..load.prompt_tokens;
    let prompt = match vocabulary {
        Some(ids) => places.map(|_| draw(ids)).collect(),
        None => places.map(|_| WORDS[draw(WORDS.len())]).collect::<Vec<_>>().join(" ").into(),
    };
    let prompt: Value = prompt;
    json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": load.new_tokens,
        "temperature": load.temperature,
        "seed": i,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Sends all requests and waits for their ends.
async fn drive(
    server: &Arc<Server>,
    load: &Load,
    body: impl Fn(usize) -> String,
) -> Vec<Result<Answer>> {
    let open = match load.pace {
        Pace::Clients(clients) => clients,
        Pace::Rate(_) => Semaphore::MAX_PERMITS,
    };
    let places = Arc::new(Semaphore::new(open));
    let mut rng = ChaCha8Rng::seed_from_u64(load.seed);
    rng.set_stream(1); // another sequence than the first prompt's
    let (start, mut due, mut running) = (Instant::now(), 0.0, JoinSet::new());
    for i in 0..load.requests {
        let (server, body) = (server.clone(), body(i));
        if let Pace::Rate(rate) = load.pace {
            sleep(Duration::from_secs_f64(due).saturating_sub(start.elapsed())).await;
            due += time_between(rate, &mut rng);
        }
        let place = places.clone().acquire_owned().await;
        running.spawn(async move {
            let answer = ask(&server, body).await;
            drop(place);
            answer
        });
    }
    let mut outcomes = Vec::new();
    while let Some(outcome) = running.join_next().await {
        outcomes.push(outcome.unwrap_or_else(|error| Err(error.into())));
    }
    outcomes
}

/// Seconds between two events of a Poisson process: -ln(1 - u) / rate, u uniform in [0, 1).
fn time_between(rate: f64, rng: &mut ChaCha8Rng) -> f64 {
    let uniform = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    -(1.0 - uniform).ln() / rate
}

fn report(model: String, outcomes: Vec<Result<Answer>>, took: Duration) -> Result<Report> {
    let (mut answers, mut failures) = (Vec::new(), BTreeMap::new());
    for outcome in outcomes {
        match outcome {
            Ok(answer) => answers.push(answer),
            Err(error) => *failures.entry(format!("{error:#}")).or_default() += 1,
        }
    }
    let failed = failures.values().sum();
    if answers.is_empty() {
        let reasons: Vec<&str> = failures.keys().map(String::as_str).collect();
        return Err(anyhow!("none of {failed} answers came whole: {}", reasons.join("; ")))
            .hint("look at the server's own messages; give fewer `--clients` or a lower `--rate`");
    }
    let seconds = took.as_secs_f64();
    let prompt_tokens = answers.iter().map(|answer| answer.prompt_tokens).sum();
    let new_tokens = answers.iter().map(|answer| answer.new_tokens).sum();
    let per_token = |a: &Answer| {
        let rest = u32::try_from(a.new_tokens.saturating_sub(1)).ok()?;
        a.whole.saturating_sub(a.first).checked_div(rest)
    };
    Ok(Report {
        model,
        whole: answers.len(),
        failed,
        failures,
        seconds,
        prompt_tokens,
        new_tokens,
        requests_per_sec: answers.len() as f64 / seconds,
        prompt_tokens_per_sec: prompt_tokens as f64 / seconds,
        new_tokens_per_sec: new_tokens as f64 / seconds,
        first_token_ms: Percentiles::of(answers.iter().map(|answer| answer.first)),
        per_token_ms: Percentiles::of(answers.iter().filter_map(per_token)),
        between_pieces_ms: Percentiles::of(answers.iter().flat_map(|a| a.gaps.iter().copied())),
        whole_ms: Percentiles::of(answers.iter().map(|answer| answer.whole)),
        peak_memory: None,
    })
}
