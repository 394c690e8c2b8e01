//! Speculative decoding: something cheap proposes the next tokens, the model judges them all in one pass.
//!
//! A pass over a few tokens costs hardly more than over one, because both read all weights once. A proposed token x
//! with probability q(x) where it was proposed is kept with probability min(1, p(x) / q(x)); the first that is not
//! kept is replaced by a draw from max(0, p - q), normalised. So each token has exactly the model's distribution p, and
//! greedy output is exactly the model's own.
//!
//! Read [`generate_speculative`], then [`judge`].
//!
//! # Source
//! Speculative sampling (arXiv 2211.17192, 2302.01318); prompt lookup decoding (A. Saxena, 2023).

use super::network::NetworkRef;
use super::request::{GenerateOptions, Generation, Token, check_prompt};
use super::sampler::{Distribution, Sampler, SamplingParams};
use crate::error::WithHint;
use crate::model::PagedCache;
use crate::model::paged_cache::{BLOCK, Batch};
use crate::tokenizer::Tokenizer;
use anyhow::{Result, anyhow};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// What proposes tokens.
#[derive(Clone, Copy, Debug)]
pub enum Draft<'m> {
    /// A smaller model with the same tokenizer.
    Model(NetworkRef<'m>),
    /// What followed the last n tokens where they stood before, n as long as possible, at most this.
    Lookup(usize),
}

/// How proposals fared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Acceptance {
    /// Tokens proposed.
    pub proposed: usize,
    /// Of these, kept.
    pub accepted: usize,
    /// Passes of the model after the prompt.
    pub passes: usize,
    /// Time of a pass over one token.
    pub one_token: Duration,
}

impl Acceptance {
    /// Part of the proposals that was kept.
    pub fn rate(&self) -> f64 {
        self.accepted as f64 / self.proposed.max(1) as f64
    }

    /// Speed against one pass a token, for a generation of these timings.
    pub fn speed_up(&self, generation: &Generation) -> f64 {
        let alone = self.one_token.as_secs_f64() * generation.timings.decoded_tokens as f64;
        let decode = generation.timings.decode.as_secs_f64();
        if decode > 0.0 { alone / decode } else { 1.0 }
    }
}

/// Refuses a draft whose ids do not mean what the model's mean.
///
/// # Errors
/// Another number of ids, or the first id that stands for another text.
pub fn check_tokenizers(target: &Tokenizer, draft: &Tokenizer) -> Result<()> {
    let (ours, theirs) = (target.vocab_size(), draft.vocab_size());
    let problem = match (0..ours.min(theirs) as u32).find(|&id| target.token(id) != draft.token(id))
    {
        Some(id) => {
            let name = |t: &Tokenizer| t.token(id).unwrap_or_default();
            format!(
                "id {id} is `{}` in the model's, `{}` in the draft's",
                name(target),
                name(draft)
            )
        }
        None if ours != theirs => format!("{ours} ids in the model's, {theirs} in the draft's"),
        None => return Ok(()),
    };
    Err(anyhow!("model and draft have different tokenizers: {problem}"))
        .usage("use a draft of the model's own family, or `--draft-lookup`, which needs none")
}

/// [`super::generate_plain`], with at most `draft_tokens` proposals a pass. As many are made as pay, by the part that
/// was kept so far. Alternatives are not told.
///
/// # Numerics
/// Greedy output is that of [`super::generate_plain`] as far as products over several tokens round as products over
/// one do: in fp32 it was equal on all prompts of `greedy_output_is_the_models_own`.
///
/// # Sync
/// Once a proposal and once a pass.
///
/// # Errors
/// As [`super::generate_plain`].
pub fn generate_speculative<'m>(
    model: impl Into<NetworkRef<'m>>,
    draft: Draft,
    draft_tokens: usize,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(Token) -> Result<bool>,
) -> Result<(Generation, Acceptance)> {
    let _no_grad = tch::no_grad_guard();
    let model = model.into();
    check_prompt(model, prompt)?;
    let room = model.config().max_length() as usize - prompt.len();
    let new = options.max_new_tokens.min(room);
    let mut drafter = Drafter::new(model, draft, draft_tokens, prompt.len() + new, options)?;
    let vocab_size = [Some(model.config().padded_vocab_size), options.vocab_size.map(|v| v as i64)];
    let vocab_size = vocab_size.into_iter().flatten().chain(drafter.rows()).min().unwrap_or(0);
    let mut sampler = Sampler::new(&options.sampling, prompt, vocab_size, model.device())?;
    let mut reader = Reader::new(model, prompt.len() + new);
    let (mut out, mut acceptance) =
        (Generation::new(prompt.len(), reader.cache_bytes()), Acceptance::default());
    let mut tokens = prompt.to_vec();
    let start = Instant::now();
    while out.tokens.len() < new {
        // The first tokens come alone, which tells what a pass over one token costs.
        let left = new - out.tokens.len();
        let proposals = match out.tokens.len() {
            0..3 => Vec::new(),
            _ => drafter.propose(&tokens, left - 1, vocab_size)?,
        };
        let pass = Instant::now();
        let unread = &tokens[reader.len..];
        let read: Vec<u32> = unread.iter().copied().chain(proposals.iter().map(|p| p.id)).collect();
        let x = reader.read(&read); // (T, C)
        let judged = proposals.len() as i64 + 1; // rows that say what comes next
        let x = x.narrow(0, x.size()[0] - judged, judged); // (K+1, C)
        let logits = model.head(&x); // (K+1, V)
        let chosen = judge(&logits.narrow(1, 0, vocab_size), &proposals, &mut sampler)?;
        let logprobs = logprobs_of(&logits, &chosen); // one a chosen token
        if !out.tokens.is_empty() {
            acceptance.note(proposals.len(), chosen.len() - 1, pass.elapsed());
            drafter.learn(proposals.len(), chosen.len() - 1);
        }

        reader.truncate(tokens.len() + chosen.len() - 1);
        for (id, logprob) in chosen.into_iter().zip(logprobs) {
            tokens.push(id);
            out.push(id, logprob, start.elapsed());
            let is_eos = options.eos.contains(&id);
            let go_on = on_token(Token { id, logprob, is_eos, top: Vec::new() })?;
            if let Some(reason) = options.ended(is_eos, go_on, out.tokens.len(), room) {
                out.finish_reason = reason;
                return Ok((out, acceptance));
            }
        }
    }
    Ok((out, acceptance))
}

/// One sequence that is read on, and back where proposals were not kept.
struct Reader<'m> {
    model: NetworkRef<'m>,
    cache: PagedCache,
    table: Vec<u32>,
    /// Tokens whose keys and values the cache has.
    len: usize,
}

impl<'m> Reader<'m> {
    fn new(model: NetworkRef<'m>, tokens: usize) -> Self {
        let blocks = tokens.div_ceil(BLOCK);
        let cache = PagedCache::new(model.config(), blocks, model.kind(), model.device());
        Self { model, cache, table: (0..blocks as u32).collect(), len: 0 }
    }

    fn cache_bytes(&self) -> u64 {
        let block = PagedCache::block_bytes(self.model.config(), self.model.kind());
        self.table.len() as u64 * block
    }

    /// # Shapes
    /// T tokens -> (T, C).
    fn read(&mut self, tokens: &[u32]) -> Tensor {
        let batch = Batch::new(&[(tokens, self.len, &self.table[..])], self.model.device());
        self.len += tokens.len();
        self.model.hidden(&batch, &mut self.cache)
    }

    fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }
}

/// A proposed token and the distribution that it was drawn from.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The token.
    pub id: u32,
    /// Of all tokens, where this one was proposed.
    pub from: Distribution,
}

/// The tokens that come next: the proposals up to the first that is not kept, and one of the model's own.
///
/// # Shapes
/// logits (K+1, V): row i is the model's before proposal i, the last one behind all K.
///
/// # Errors
/// Logits that are not finite.
pub fn judge(logits: &Tensor, proposals: &[Proposal], sampler: &mut Sampler) -> Result<Vec<u32>> {
    let mut chosen = Vec::new();
    for (i, proposal) in proposals.iter().enumerate() {
        let p = sampler.distribution(&logits.get(i as i64))?;
        let (kept, offered) = (p.of(proposal.id), proposal.from.of(proposal.id));
        if sampler.uniform() * offered >= kept {
            let id = p.without(&proposal.from).draw(sampler.uniform())?;
            sampler.see(&[id]);
            chosen.push(id);
            return Ok(chosen);
        }
        sampler.see(&[proposal.id]);
        chosen.push(proposal.id);
    }
    chosen.push(sampler.sample(&logits.get(proposals.len() as i64))?);
    Ok(chosen)
}

/// # Shapes
/// logits (K+1, V); of the first rows, one an id.
fn logprobs_of(logits: &Tensor, ids: &[u32]) -> Vec<f64> {
    let logprobs = logits.log_softmax(-1, Kind::Float); // (K+1, V)
    let of = |(i, &id): (usize, &u32)| logprobs.double_value(&[i as i64, id as i64]);
    ids.iter().enumerate().map(of).collect()
}

impl Acceptance {
    fn note(&mut self, proposed: usize, accepted: usize, time: Duration) {
        self.passes += 1;
        self.proposed += proposed;
        self.accepted += accepted;
        if proposed == 0 && (self.one_token.is_zero() || time < self.one_token) {
            self.one_token = time;
        }
    }
}

/// Part of the proposals that is expected to be kept, before any was.
const EXPECTED: f64 = 0.7;
/// Share of the latest pass in what is expected of the next.
const FORGET: f64 = 0.1;
/// Cost of one more token in a pass of the model, against a pass over one token.
const READ: f64 = 0.04;

/// A [`Draft`] at work.
struct Drafter<'m> {
    kind: DraftKind<'m>,
    most: usize,
    /// Of a proposal, against a pass of the model: by bytes of weights. Measured times would make draws depend on them.
    cost: f64,
    /// Expected part of the proposals that is kept.
    expected: f64,
}

enum DraftKind<'m> {
    /// The reader has a beginning of the sequence; the sampler draws, and never penalises.
    Model {
        reader: Box<Reader<'m>>,
        sampler: Box<Sampler>,
    },
    Lookup {
        longest: usize,
    },
}

impl<'m> Drafter<'m> {
    fn new(
        model: NetworkRef,
        draft: Draft<'m>,
        most: usize,
        tokens: usize,
        options: &GenerateOptions,
    ) -> Result<Self> {
        let cost = match draft {
            Draft::Lookup(_) => 0.0,
            Draft::Model(small) => small.step_bytes() as f64 / model.step_bytes() as f64,
        };
        let kind = match draft {
            Draft::Lookup(longest) => DraftKind::Lookup { longest },
            Draft::Model(model) => {
                let room = tokens.min(model.config().max_length() as usize);
                let reader = Box::new(Reader::new(model, room));
                let params = SamplingParams {
                    repetition_penalty: 1.0,
                    seed: options.sampling.seed ^ 0x6472_6166_7400, // draws of its own
                    ..options.sampling.clone()
                };
                let rows = model.config().padded_vocab_size;
                let sampler = Box::new(Sampler::new(&params, &[], rows, model.device())?);
                DraftKind::Model { reader, sampler }
            }
        };
        Ok(Self { kind, most, cost, expected: EXPECTED })
    }

    /// Ids that it can propose; `None`: all.
    fn rows(&self) -> Option<i64> {
        match &self.kind {
            DraftKind::Model { reader, .. } => Some(reader.model.config().padded_vocab_size),
            DraftKind::Lookup { .. } => None,
        }
    }

    /// The number of proposals with the most kept tokens for the cost: (1 - a^(k+1)) / (1 - a) tokens are expected of k
    /// proposals where each is kept with probability a.
    fn count(&self) -> usize {
        let (mut best, mut most) = (0, 1.0);
        let (mut tokens, mut power) = (1.0, 1.0);
        for k in 1..=self.most {
            power *= self.expected;
            tokens += power;
            let gain = tokens / (1.0 + k as f64 * (self.cost + READ));
            if gain > most {
                (best, most) = (k, gain);
            }
        }
        best.max(1) // never to propose would be never to learn
    }

    fn learn(&mut self, proposed: usize, accepted: usize) {
        if proposed > 0 {
            // Of `accepted` + 1 judgements, or `proposed` where all were kept, so many were in favour.
            let judged = (accepted + 1).min(proposed) as f64;
            let weight = 1.0 - (1.0 - FORGET).powf(judged);
            self.expected += weight * (accepted as f64 / judged - self.expected);
        }
    }

    /// At most `most` proposals of what follows `tokens`.
    fn propose(&mut self, tokens: &[u32], most: usize, vocab_size: i64) -> Result<Vec<Proposal>> {
        match &self.kind {
            DraftKind::Lookup { longest } => {
                let most = self.count().min(most);
                let ids = look_up(tokens, *longest, most);
                let certain = |&id: &u32| Proposal { id, from: Distribution::Certain(id) };
                Ok(ids.iter().map(certain).collect())
            }
            DraftKind::Model { .. } => self.propose_by_model(tokens, most, vocab_size),
        }
    }

    fn propose_by_model(
        &mut self,
        tokens: &[u32],
        most: usize,
        vocab_size: i64,
    ) -> Result<Vec<Proposal>> {
        let count = self.count().min(most);
        let DraftKind::Model { reader, sampler } = &mut self.kind else {
            return Ok(Vec::new());
        };
        // Beyond the draft's own context it has nothing to say.
        let context = reader.model.config().max_length() as usize;
        let count = count.min(context.saturating_sub(tokens.len()));
        let mut proposals: Vec<Proposal> = Vec::new();
        reader.truncate(tokens.len() - 1);
        while proposals.len() < count {
            let unread: Vec<u32> = match proposals.last() {
                Some(last) => vec![last.id],
                None => tokens[reader.len..].to_vec(),
            };
            let x = reader.read(&unread); // (T, C)
            let last = x.narrow(0, x.size()[0] - 1, 1); // (1, C)
            let logits = reader.model.head(&last).squeeze_dim(0).narrow(0, 0, vocab_size); // (V,)
            let from = sampler.distribution(&logits)?;
            let id = from.draw(sampler.uniform())?;
            proposals.push(Proposal { id, from });
        }
        Ok(proposals)
    }
}

/// What followed the latest earlier place of the last n tokens, for the largest n up to `longest` that has one.
fn look_up(tokens: &[u32], longest: usize, most: usize) -> &[u32] {
    for n in (1..=longest.min(tokens.len().saturating_sub(1))).rev() {
        let (before, end) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - n..]);
        if let Some(at) = before.windows(n).rposition(|window| window == end) {
            let follows = &tokens[at + n..];
            return &follows[..follows.len().min(most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// Frequencies of the first `N` tokens that come out where every proposal is judged against the same p.
    fn frequencies(p: &[f64], q: &[f64], draws: usize) -> Vec<Vec<f64>> {
        let v = p.len();
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let logits = Tensor::from_slice(&logits).repeat([3, 1]); // (K+1, V)
        let from = Distribution::Spread(q.iter().map(|&q| q as f32).collect());
        let params = SamplingParams { temperature: 1.0, top_k: None, ..Default::default() };
        let mut sampler = Sampler::new(&params, &[], v as i64, Device::Cpu).unwrap();
        let mut proposer = Sampler::new(&params, &[], v as i64, Device::Cpu).unwrap();
        let mut counts = vec![vec![0.0; v]; 3];
        for _ in 0..draws {
            let propose =
                |_| Proposal { id: from.draw(proposer.uniform()).unwrap(), from: from.clone() };
            let proposals: Vec<Proposal> = (0..2).map(propose).collect();
            let chosen = judge(&logits, &proposals, &mut sampler).unwrap();
            for (counts, id) in counts.iter_mut().zip(chosen) {
                counts[id as usize] += 1.0;
            }
        }
        counts
    }

    #[test]
    fn judged_tokens_have_the_models_distribution() {
        let p = [0.4, 0.3, 0.2, 0.1];
        for q in [[0.25; 4], [0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01], p] {
            for counts in frequencies(&p, &q, 4000) {
                let n: f64 = counts.iter().sum();
                let of = |(count, p): (&f64, &f64)| (count - n * p).powi(2) / (n * p);
                let chi_square: f64 = counts.iter().zip(&p).map(of).sum();
                assert!(chi_square < 16.27, "{q:?}: {chi_square}, 0.1 % of fair draws reach 16.27");
            }
        }
    }

    #[test]
    fn the_longest_end_that_stood_before_is_looked_up() {
        let tokens = [1, 2, 3, 9, 2, 3, 7, 8, 2, 3];
        assert_eq!(look_up(&tokens, 3, 2), [7, 8], "the latest place");
        assert_eq!(look_up(&tokens, 3, 10), [7, 8, 2, 3]);
        assert_eq!(
            look_up(&[1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 3, 2),
            [9, 2],
            "three tokens before two"
        );
        assert!(look_up(&[1, 2, 3], 3, 5).is_empty());
        assert!(look_up(&[1], 3, 5).is_empty());
        assert_eq!(look_up(&[4, 4], 3, 5), [4]);
    }
}
