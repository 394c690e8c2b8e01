//! What is asked for, what comes back, and what cannot be asked for.

use super::network::NetworkRef;
use super::sampler::SamplingParams;
use crate::error::WithHint;
use crate::ffi;
use anyhow::{Result, anyhow};
use serde::Serialize;
use std::time::Duration;
use tch::{Device, Tensor};

/// What to generate and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Stop after this many new tokens.
    pub max_new_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Ids that end the text; the one that did is in the output.
    pub eos: Vec<u32>,
    /// Never choose ids from here on, such as the rows that pad the head; `None`: all rows.
    pub vocab_size: Option<usize>,
    /// So many alternatives are told beside each token.
    pub top_logprobs: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        let sampling = SamplingParams::default();
        Self { max_new_tokens: 50, sampling, eos: Vec::new(), vocab_size: None, top_logprobs: 0 }
    }
}

/// A new token, as soon as it is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability under the model itself: temperature 1, nothing masked.
    pub logprob: f64,
    /// Whether it is one of [`GenerateOptions::eos`].
    pub is_eos: bool,
    /// The most likely ids with their log-probabilities, best first, as many as [`GenerateOptions::top_logprobs`].
    pub top: Vec<(u32, f64)>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// `max_new_tokens` were made.
    Length,
    /// The model ended the text.
    Eos,
    /// The receiver of the tokens wanted no more: a stop string.
    Stop,
    /// Prompt and output fill the model's context.
    Context,
    /// Nobody wants the text any more.
    Cancelled,
}

impl FinishReason {
    /// As in JSON: `length`, `eos`, `stop`, `context`, `cancelled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Context => "context",
            Self::Cancelled => "cancelled",
        }
    }
}

/// New tokens and how long they took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// New tokens, without the prompt.
    pub tokens: Vec<u32>,
    /// See [`Token::logprob`]; one a token.
    pub logprobs: Vec<f64>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Speed.
    pub timings: Timings,
    /// Bytes of the key/value cache.
    pub cache_bytes: u64,
}

/// Wall-clock of one generation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Tokens read before the first new one.
    pub prompt_tokens: usize,
    /// Until the first new token was known.
    pub prefill: Duration,
    /// Tokens made after the first.
    pub decoded_tokens: usize,
    /// From the first new token to the last.
    pub decode: Duration,
}

impl Timings {
    /// Prompt tokens read in a second.
    pub fn prefill_tokens_per_sec(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Tokens made in a second after the first; 0 where there is one only.
    pub fn decode_tokens_per_sec(&self) -> f64 {
        rate(self.decoded_tokens, self.decode)
    }

    /// New tokens in a second of the whole call, reading the prompt included.
    pub fn tokens_per_sec(&self, new_tokens: usize) -> f64 {
        rate(new_tokens, self.prefill + self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

impl Generation {
    /// Nothing yet, and a cache of `cache_bytes`.
    pub(super) fn new(prompt_tokens: usize, cache_bytes: u64) -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Length,
            timings: Timings { prompt_tokens, ..Default::default() },
            cache_bytes,
        }
    }

    /// Notes a token that was known `elapsed` after the start.
    pub(super) fn push(&mut self, id: u32, logprob: f64, elapsed: Duration) {
        match self.tokens.is_empty() {
            true => self.timings.prefill = elapsed,
            false => {
                self.timings.decoded_tokens += 1;
                self.timings.decode = elapsed - self.timings.prefill;
            }
        }
        self.tokens.push(id);
        self.logprobs.push(logprob);
    }
}

/// (1, T) of i64.
pub(super) fn ids_tensor(ids: &[u32], device: Device) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
    Tensor::from_slice(&ids).to_device(device).unsqueeze(0)
}

pub(super) fn check_prompt<'m>(model: impl Into<NetworkRef<'m>>, prompt: &[u32]) -> Result<()> {
    let model = model.into();
    let context = model.config().max_length() as usize;
    check_ids(model, prompt)?;
    if prompt.is_empty() {
        return Err(anyhow!("the prompt has no tokens"))
            .usage("give at least one token, such as bos");
    }
    if prompt.len() >= context {
        let (got, over) = (prompt.len(), prompt.len() - context + 1);
        let problem = if got == context { "fills" } else { "is longer than" };
        return Err(anyhow!(
            "the prompt {problem} the model's context: {got} tokens, `block_size` is {context}"
        ))
        .usage(format!("shorten it by at least {over} tokens to leave room for one new token"));
    }
    Ok(())
}

/// Refuses an id that has no row in the embedding (on a GPU it would end the process).
pub(super) fn check_ids<'m>(model: impl Into<NetworkRef<'m>>, ids: &[u32]) -> Result<()> {
    let rows = model.into().config().padded_vocab_size;
    let Some(at) = ids.iter().position(|&id| id as i64 >= rows) else { return Ok(()) };
    Err(anyhow!(
        "token {} at position {at} is out of the vocabulary: the model has ids 0 to {}",
        ids[at],
        rows - 1
    ))
    .usage("check that the ids come from this model's tokenizer")
}

/// Peak bytes: of libtorch's allocator on a GPU, of the process on the CPU; `None` where the system
/// does not say.
pub fn peak_memory(device: Device) -> Option<u64> {
    if let Device::Cuda(index) = device {
        return ffi::cuda_memory(index).ok().map(|memory| memory.peak_allocated as u64);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
