//! The loop over tokens in its plainest form: one sequence, its cache in one piece. The [engine](super::engine) must say
//! the same.

use super::request::{FinishReason, GenerateOptions, Generation, Token, check_prompt, ids_tensor};
use super::sampler::Sampler;
use crate::model::{GPT, KvCache};
use anyhow::Result;
use std::time::Instant;
use tch::Kind;

/// Continues `prompt`. `on_token` gets each new token at once, without alternatives, and says whether to go on; an
/// error of its own ends the generation with that error.
///
/// # Sync
/// Once or twice a token: the next one depends on the last.
///
/// # Errors
/// An empty prompt, one that leaves no room in the context, an id that the model does not have,
/// sampling parameters out of range, logits that are not finite, errors of `on_token`.
pub fn generate_plain(
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
    let cache_tokens = prompt.len() + new;
    let mut out = Generation::new(prompt.len(), KvCache::bytes(config, cache_tokens, model.kind()));
    if new == 0 {
        return Ok(out);
    }

    let mut cache = KvCache::new(config, 1, cache_tokens as i64, model.kind(), device);
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
        let go_on = on_token(Token { id, logprob, is_eos, top: Vec::new() })?;
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
