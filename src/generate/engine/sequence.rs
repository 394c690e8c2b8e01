//! One sample of a request, from its prompt to its end.

use super::RequestId;
use super::on_card::Seat;
use crate::generate::blocks::Prefix;
use crate::generate::request::{FinishReason, GenerateOptions, Token};
use crate::generate::sampler::Sampler;
use anyhow::Result;
use tch::{Kind, Tensor};

/// One sample of a request.
pub(super) struct Sequence {
    pub request: RequestId,
    pub index: usize,
    pub options: GenerateOptions,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    /// The first so many have keys and values in the blocks of `table`.
    pub cached: usize,
    pub table: Vec<u32>,
    /// Of the blocks that others may know: how many, and the hash up to the last.
    pub published: (usize, Prefix),
    pub sampler: Sampler,
    /// Samples 1.. of the request, which begin once the prompt is read.
    pub siblings: usize,
    /// Where it is on the card.
    pub seat: Option<Seat>,
}

impl Sequence {
    /// Sample `index` of the same request, with nothing read yet.
    pub fn sibling(&self, index: usize) -> Self {
        Self {
            request: self.request,
            index,
            options: self.options.clone(),
            tokens: self.tokens.clone(),
            prompt_tokens: self.prompt_tokens,
            cached: 0,
            table: Vec::new(),
            published: Default::default(),
            sampler: self.sampler.sibling(index as u64),
            siblings: 0,
            seat: None,
        }
    }

    /// # Shapes
    /// logits, logprobs (V,).
    pub fn choose(&mut self, logits: &Tensor, logprobs: &Tensor) -> Result<Token> {
        let vocab_size = self.sampler.vocab_size();
        let id = self.sampler.sample(&logits.narrow(0, 0, vocab_size))?;
        let logprob = logprobs.double_value(&[id as i64]);
        let top = match (self.options.top_logprobs as i64).min(vocab_size) {
            0 => Vec::new(),
            k => best(&logprobs.narrow(0, 0, vocab_size), k)?,
        };
        self.tokens.push(id);
        Ok(Token { id, logprob, is_eos: self.options.eos.contains(&id), top })
    }

    /// Whether and why the sequence ends with this token.
    pub fn ended(&self, token: &Token, context: usize) -> Option<FinishReason> {
        let (made, room) = (self.tokens.len() - self.prompt_tokens, context - self.prompt_tokens);
        self.options.ended(token.is_eos, true, made, room)
    }
}

/// The k largest of (V,), best first.
fn best(logprobs: &Tensor, k: i64) -> Result<Vec<(u32, f64)>> {
    let (values, ids) = logprobs.topk(k, 0, true, true); // (k,) x2
    let values: Vec<f64> = Vec::try_from(&values.to_kind(Kind::Double))?;
    let ids: Vec<i64> = Vec::try_from(&ids)?;
    Ok(ids.into_iter().map(|id| id as u32).zip(values).collect())
}
