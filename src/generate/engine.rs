//! The loop over tokens: read the prompt at once, then one token at a time from the cache.

use super::sampler::{Sampler, SamplingParams};
use crate::error::WithHint;
use crate::ffi;
use crate::model::{GPT, KvCache};
use anyhow::{Result, anyhow};
use serde::Serialize;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

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
}

impl Default for GenerateOptions {
    fn default() -> Self {
        let sampling = SamplingParams::default();
        Self { max_new_tokens: 50, sampling, eos: Vec::new(), vocab_size: None }
    }
}

/// A new token, as soon as it is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability under the model itself: temperature 1, nothing masked.
    pub logprob: f64,
    /// Whether it is one of [`GenerateOptions::eos`].
    pub is_eos: bool,
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
}

impl FinishReason {
    /// As in JSON: `length`, `eos`, `stop`, `context`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Context => "context",
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

/// Continues `prompt`. `on_token` gets each new token at once and says whether to go on; an error
/// of its own ends the generation with that error.
///
/// # Sync
/// Once or twice a token: the next one depends on the last.
///
/// # Errors
/// An empty prompt, one that leaves no room in the context, an id that the model does not have,
/// sampling parameters out of range, logits that are not finite, errors of `on_token`.
pub fn generate(
    model: &GPT,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(Token) -> Result<bool>,
) -> Result<Generation> {
    let _no_grad = tch::no_grad_guard();
    let (config, device) = (&model.config, model.device());
    check_prompt(model, prompt)?;
    let room = config.max_length() as usize - prompt.len();
    let new = options.max_new_tokens.min(room);
    let vocab_size =
        options.vocab_size.unwrap_or(usize::MAX).min(config.padded_vocab_size as usize);
    let mut sampler = Sampler::new(&options.sampling, prompt, vocab_size as i64, device)?;
    let mut out = Generation::new(prompt.len(), model, prompt.len() + new);
    if new == 0 {
        return Ok(out);
    }

    let mut cache = KvCache::new(config, 1, (prompt.len() + new) as i64, model.kind(), device);
    let mut input = ids_tensor(prompt, device); // (1, P), later (1, 1)
    let start = Instant::now();
    loop {
        let x = model.hidden(&input, None, Some(&mut cache)); // (1, T, C)
        let last = x.select(1, -1); // (1, C): only the last position chooses a token
        let logits = model.head(&last).squeeze_dim(0); // (V,)
        let id = sampler.sample(&logits.narrow(0, 0, vocab_size as i64))?;
        let logprob = logits.log_softmax(-1, Kind::Float).double_value(&[id as i64]);
        out.push(id, logprob, start.elapsed());

        let is_eos = options.eos.contains(&id);
        let go_on = on_token(Token { id, logprob, is_eos })?;
        let reason = match () {
            _ if is_eos => Some(FinishReason::Eos),
            _ if !go_on => Some(FinishReason::Stop),
            _ if out.tokens.len() == options.max_new_tokens => Some(FinishReason::Length),
            _ if out.tokens.len() == room => Some(FinishReason::Context),
            _ => None,
        };
        if let Some(reason) = reason {
            out.finish_reason = reason;
            return Ok(out);
        }
        input = ids_tensor(&[id], device); // (1, 1)
    }
}

impl Generation {
    fn new(prompt_tokens: usize, model: &GPT, cache_tokens: usize) -> Self {
        let c = &model.config;
        let element = model.kind().elt_size_in_bytes() as u64;
        let values = (2 * c.n_layer * c.n_query_groups * c.head_size) as u64 * cache_tokens as u64;
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Length,
            timings: Timings { prompt_tokens, ..Default::default() },
            cache_bytes: values * element,
        }
    }

    /// Notes a token that was known `elapsed` after the start.
    fn push(&mut self, id: u32, logprob: f64, elapsed: Duration) {
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

fn check_prompt(model: &GPT, prompt: &[u32]) -> Result<()> {
    let context = model.config.max_length() as usize;
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
pub(super) fn check_ids(model: &GPT, ids: &[u32]) -> Result<()> {
    let rows = model.config.padded_vocab_size;
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
