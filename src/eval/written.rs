//! Answers that the model writes: many at a time, by the engine that also serves.

use super::Model;
use super::task::Generate;
use crate::bail_hint;
use crate::generate::engine::{Engine, EngineOptions, Event, Request, RequestId};
use crate::generate::text::TextStream;
use crate::generate::{GenerateOptions, SamplingParams};
use anyhow::{Context, Result};
use rayon::prelude::*;
use std::collections::HashMap;

/// What each prompt's answer is, up to one of `generate.until` or the model's own end, and how many prompts were cut from the
/// left so that `generate.max_tokens` fit behind them. Tokens are the likeliest ones. `at_once`: answers written at a time.
/// `done` is called with the number of answers that are through.
///
/// # Sync
/// The CPU waits once a step.
///
/// # Errors
/// A context that has no room for an answer; the tokenizer's; logits that are not finite.
pub fn answers(
    model: Model,
    prompts: &[&str],
    generate: &Generate,
    at_once: Option<usize>,
    mut done: impl FnMut(usize),
) -> Result<(Vec<String>, usize)> {
    let Model { network, tokenizer, eos } = model;
    let room = room(generate.max_tokens, network.config().block_size as usize)?;
    let encoded = prompts.par_iter().map(|prompt| tokenizer.encode_default(prompt));
    let mut encoded: Vec<Vec<u32>> = encoded.collect::<Result<_>>()?;
    let mut cut = 0;
    for prompt in &mut encoded {
        let over = prompt.len().saturating_sub(room);
        prompt.drain(..over);
        cut += usize::from(over > 0);
    }

    let needs = encoded.iter().map(|ids| (ids.len(), generate.max_tokens, 1));
    let most = at_once.unwrap_or(if network.device().is_cuda() { 256 } else { 32 });
    let mut longest: Vec<_> = needs.collect();
    longest.sort_unstable_by(|a, b| b.cmp(a));
    longest.truncate(most);
    let share_prefixes = prompts.len() > 1;
    let sizes = EngineOptions::for_requests(network, &longest);
    let mut engine = Engine::new(network, EngineOptions { share_prefixes, ..sizes });
    let mut open: HashMap<RequestId, (usize, TextStream)> = HashMap::new();
    for (i, prompt) in encoded.into_iter().enumerate() {
        let options = GenerateOptions {
            max_new_tokens: generate.max_tokens,
            sampling: SamplingParams::greedy(),
            eos: eos.to_vec(),
            vocab_size: None,
            top_logprobs: 0,
        };
        let id = engine
            .submit(Request { prompt, samples: 1, options })
            .with_context(|| format!("question {} cannot be asked", i + 1))?;
        open.insert(id, (i, TextStream::new(tokenizer, &[], &generate.until)?));
    }

    let mut texts = vec![String::new(); prompts.len()];
    while !engine.is_idle() {
        for event in engine.step() {
            let request = event.request();
            // A request that met a stop string is gone, and may still have an event on its way.
            let Some((i, stream)) = open.get_mut(&request) else { continue };
            match event {
                Event::Token { token, .. } if !token.is_eos => {
                    texts[*i] += &stream.push(token.id);
                    if stream.stopped() {
                        engine.stop(request, 0);
                        open.remove(&request);
                        done(prompts.len() - open.len());
                    }
                }
                Event::Token { .. } => {}
                Event::Finished { .. } => {
                    texts[*i] += &stream.finish();
                    open.remove(&request);
                    done(prompts.len() - open.len());
                }
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    Ok((texts, cut))
}

/// Tokens of a context that are left for a prompt before an answer of `max_tokens`.
///
/// # Errors
/// None are.
pub fn room(max_tokens: usize, context: usize) -> Result<usize> {
    match context.checked_sub(max_tokens) {
        Some(room) if room > 0 => Ok(room),
        _ => bail_hint!(
            "evaluate a model with a longer context, or a task with a smaller `generate.max_tokens`";
            "answers of {max_tokens} tokens leave no room for a question in the model's context of {context}"
        ),
    }
}
