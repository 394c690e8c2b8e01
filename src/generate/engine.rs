//! Many sequences through one model: each step reads some tokens of each, and the end of each chooses its next one.
//!
//! A sequence waits, then runs until it ends. New ones join while others run (continuous batching); long prompts are
//! read in pieces between the others' tokens (chunked prefill); samples of one prompt, and prompts that begin alike,
//! share the cache's blocks. Where blocks run out, the youngest sequence gives its own back and is read again later:
//! nothing that it said is lost. Every sequence has its own sampler, so that its draws do not depend on its company.
//! On a CUDA card that the decode kernels cover, sequences whose prompt is read go on there ([`on_card`]).
//!
//! Read [`Engine::step`] first. What it must say is what [`super::plain`] says.
//!
//! # Source
//! Orca (OSDI 2022), PagedAttention (arXiv 2309.06180), SARATHI (arXiv 2308.16369).

mod on_card;
mod options;
mod sequence;

use self::on_card::Flight;
pub use self::options::EngineOptions;
use self::sequence::Sequence;
use super::blocks::{BlockPool, Prefix, prefix};
use super::card::{Card, covers};
use super::network::NetworkRef;
use super::request::{FinishReason, GenerateOptions, Generation, Token, check_prompt};
use super::sampler::Sampler;
use crate::error::WithHint;
use crate::ffi;
use crate::model::paged_cache::{BLOCK, Batch};
use crate::model::{PagedCache, RopeType};
use crate::ops::or_panic;
use anyhow::{Result, anyhow};
use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Names a request.
pub type RequestId = u64;

/// A prompt to continue.
#[derive(Clone, Debug)]
pub struct Request {
    /// Ids.
    pub prompt: Vec<u32>,
    /// Continuations; number i draws with `seed + i`.
    pub samples: usize,
    /// How.
    pub options: GenerateOptions,
}

/// What a step made known.
#[derive(Debug)]
pub enum Event {
    /// A new token of sample `index`.
    Token {
        /// Whose.
        request: RequestId,
        /// Which of its samples.
        index: usize,
        /// The token.
        token: Token,
    },
    /// Sample `index` has ended; no more of it comes.
    Finished {
        /// Whose.
        request: RequestId,
        /// Which of its samples.
        index: usize,
        /// Why.
        reason: FinishReason,
    },
    /// A request came to nothing, all samples of it.
    Failed {
        /// Whose.
        request: RequestId,
        /// Why.
        error: anyhow::Error,
    },
}

/// Sums since the engine began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens of prompts, once a request.
    pub prompt_tokens: u64,
    /// Of these, found in the cache.
    pub cached_prompt_tokens: u64,
    /// Tokens made.
    pub new_tokens: u64,
    /// Sequences that gave their blocks back for others.
    pub preempted: u64,
    /// Passes through the model.
    pub steps: u64,
}

/// Continues many prompts at a time.
pub struct Engine<'m> {
    model: NetworkRef<'m>,
    options: EngineOptions,
    cache: PagedCache,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    running: Vec<Sequence>,
    /// Events that no step made.
    early: Vec<Event>,
    next: RequestId,
    counters: Counters,
    /// Where the decode kernels cover the model.
    card: Option<Card<'m>>,
    /// In order of launch.
    flights: VecDeque<Flight>,
}

impl<'m> Engine<'m> {
    /// An engine over a model, with its cache in the model's dtype and on its device.
    ///
    /// # Panics
    /// Where libtorch fails, such as without memory.
    pub fn new(model: impl Into<NetworkRef<'m>>, options: EngineOptions) -> Self {
        let model = model.into();
        if let Device::Cuda(card) = model.device() {
            or_panic(ffi::cuda_set_device(card)); // where this thread's graphs and events are made
        }
        let share = options.share_prefixes && !angles_depend_on_length(model);
        let cache = PagedCache::new(model.config(), options.blocks, model.kind(), model.device());
        let card = match model {
            NetworkRef::Dense(gpt) if options.decode_kernels && covers(gpt) => {
                Some(or_panic(Card::new(gpt, &cache, options.max_sequences)))
            }
            _ => None,
        };
        Self {
            model,
            options,
            cache,
            pool: BlockPool::new(options.blocks, share),
            waiting: VecDeque::new(),
            running: Vec::new(),
            early: Vec::new(),
            next: 0,
            counters: Counters::default(),
            card,
            flights: VecDeque::new(),
        }
    }

    /// Takes a request in; the next steps work on it.
    ///
    /// # Errors
    /// An empty prompt, one that leaves no room in the context or in the whole cache, an id that the model does not
    /// have, sampling parameters out of range.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let Request { prompt, samples, mut options } = request;
        check_prompt(self.model, &prompt)?;
        let room = self.model.config().max_length() as usize - prompt.len();
        let longest = prompt.len() + options.max_new_tokens.min(room);
        self.check_room(longest)?;
        let rows = self.model.config().padded_vocab_size as usize;
        let vocab_size = options.vocab_size.unwrap_or(rows).min(rows);
        options.vocab_size = Some(vocab_size);
        let device = self.model.device();
        let sampler = Sampler::new(&options.sampling, &prompt, vocab_size as i64, device)?;

        let id = self.next;
        self.next += 1;
        self.counters.prompt_tokens += prompt.len() as u64;
        if options.max_new_tokens == 0 {
            let reason = FinishReason::Length;
            let finished = |index| Event::Finished { request: id, index, reason };
            self.early.extend((0..samples).map(finished));
        } else if samples > 0 {
            self.waiting.push_back(Sequence {
                request: id,
                index: 0,
                options,
                prompt_tokens: prompt.len(),
                tokens: prompt,
                cached: 0,
                table: Vec::new(),
                published: Default::default(),
                sampler,
                siblings: samples - 1,
                seat: None,
            });
        }
        Ok(id)
    }

    /// Ends a request without an event; its blocks are free at once.
    pub fn cancel(&mut self, request: RequestId) {
        self.remove(|sequence| sequence.request == request);
        self.early.retain(|event| event.request() != request);
    }

    /// Ends one sample without an event, as where its text has met a stop string.
    pub fn stop(&mut self, request: RequestId, index: usize) {
        self.remove(|s| s.request == request && s.index == index && s.siblings == 0);
    }

    /// Forgets all requests and all that the cache holds, without events. A card is not asked: it may have failed.
    pub fn reset(&mut self) {
        self.waiting.clear();
        self.running.clear();
        self.flights.clear();
        self.card.iter_mut().for_each(Card::forget);
        self.early.clear();
        self.pool = BlockPool::new(self.options.blocks, self.pool.shares());
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.early.is_empty()
    }

    /// Samples that run, and that wait to run.
    pub fn sequences(&self) -> (usize, usize) {
        let all = |sequence: &Sequence| 1 + sequence.siblings;
        (self.running.iter().map(all).sum(), self.waiting.iter().map(all).sum())
    }

    /// Blocks that nobody uses, and all.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.free(), self.pool.len())
    }

    /// Sums since the beginning.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// One pass through the model: the next token of every sequence that has been read to its end, the next piece of
    /// the others.
    ///
    /// # Sync
    /// Waits for the chosen tokens; on the card for those of the step before.
    ///
    /// # Panics
    /// Where libtorch fails, such as without memory ([`crate::guard::catch`]).
    pub fn step(&mut self) -> Vec<Event> {
        let _no_grad = tch::no_grad_guard();
        let mut events = std::mem::take(&mut self.early);
        self.step_card(&mut events);
        self.admit();
        let plan = self.plan(&mut events);
        if plan.is_empty() {
            return events;
        }
        let parts: Vec<(&[u32], usize, &[u32])> = plan
            .iter()
            .map(|&(i, new)| (&self.running[i], new))
            .map(|(s, new)| (&s.tokens[s.cached..s.cached + new], s.cached, &s.table[..]))
            .collect();
        let batch = Batch::new(&parts, self.model.device());
        let x = self.model.hidden(&batch, &mut self.cache); // (N, C)
        self.counters.steps += 1;

        let mut ends = Vec::new(); // (sequence, row) of those read to the end
        for (&(i, new), span) in plan.iter().zip(&batch.spans) {
            let sequence = &mut self.running[i];
            sequence.cached += new;
            if sequence.cached == sequence.tokens.len() {
                ends.push((i, span.start + span.tokens - 1));
            }
        }
        self.publish(plan.iter().map(|&(i, _)| i));
        if !ends.is_empty() {
            self.choose(&x, ends, &mut events);
        }
        events
    }

    /// Lets sequences run while there are places and blocks for all their tokens so far.
    fn admit(&mut self) {
        while let Some(first) = self.waiting.front() {
            let places = self.options.max_sequences.saturating_sub(self.sequences().0);
            if places < 1 + first.siblings && !self.running.is_empty() {
                return;
            }
            // The last token is always read: its output is wanted.
            let known = self.pool.take_known(&first.tokens[..first.tokens.len() - 1]);
            let missing = first.tokens.len().div_ceil(BLOCK) - known.len();
            if missing > self.pool.free() {
                self.pool.give_back(&known);
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            sequence.cached = known.len() * BLOCK;
            if sequence.tokens.len() == sequence.prompt_tokens {
                self.counters.cached_prompt_tokens += sequence.cached as u64;
            }
            sequence.published = (known.len(), hash_up_to(&sequence.tokens, known.len()));
            sequence.table = known;
            sequence.table.extend((0..missing).filter_map(|_| self.pool.take()));
            self.running.push(sequence);
        }
    }

    /// Which sequence reads how many tokens in this step. Those that only lack their last token come first, then
    /// pieces of prompts in order of arrival, while `max_step_tokens` allow.
    fn plan(&mut self, events: &mut Vec<Event>) -> Vec<(usize, usize)> {
        while !(0..self.running.len()).all(|i| self.grow(i)) {
            self.make_room(events);
        }
        let left = |s: &Sequence| s.tokens.len() - s.cached;
        let whole = angles_depend_on_length(self.model);
        let mut budget = self.options.max_step_tokens.max(1);
        let mut plan = Vec::new();
        for decoding in [true, false] {
            let on_cpu = self.running.iter().enumerate().filter(|(_, s)| s.seat.is_none());
            for (i, sequence) in on_cpu {
                let left = left(sequence);
                if (left == 1) == decoding && budget > 0 {
                    let new = if whole { left } else { left.min(budget) };
                    budget = budget.saturating_sub(new);
                    plan.push((i, new));
                }
            }
        }
        plan
    }

    /// Gives sequence i the block that its last token needs; `false` where none is free.
    fn grow(&mut self, i: usize) -> bool {
        let sequence = &mut self.running[i];
        if sequence.seat.is_some() || sequence.tokens.len() <= sequence.table.len() * BLOCK {
            return true;
        }
        let block = self.pool.take();
        sequence.table.extend(block);
        block.is_some()
    }

    /// Blocks, by what tokens on their way may end; else the youngest sequence gives its own back and waits, before all
    /// others.
    fn make_room(&mut self, events: &mut Vec<Event>) {
        if !self.flights.is_empty() {
            while !self.flights.is_empty() {
                self.land(events);
            }
            return;
        }
        let Some(mut sequence) = self.running.pop() else { return };
        self.leave_card(std::slice::from_mut(&mut sequence));
        self.pool.give_back(&sequence.table);
        sequence.table.clear();
        sequence.cached = 0;
        self.counters.preempted += 1;
        self.waiting.push_front(sequence);
    }

    /// Tells the pool of blocks that are full now.
    fn publish(&mut self, sequences: impl Iterator<Item = usize>) {
        if !self.pool.shares() {
            return;
        }
        for i in sequences {
            let s = &mut self.running[i];
            let (mut blocks, mut before) = s.published;
            while (blocks + 1) * BLOCK <= s.cached {
                before = prefix(&before, &s.tokens[blocks * BLOCK..(blocks + 1) * BLOCK]);
                self.pool.publish(s.table[blocks], before);
                blocks += 1;
            }
            s.published = (blocks, before);
        }
    }

    /// The next token of the sequences that end at these rows of x (N, C).
    fn choose(&mut self, x: &Tensor, mut ends: Vec<(usize, i64)>, events: &mut Vec<Event>) {
        let rows: Vec<i64> = ends.iter().map(|&(_, row)| row).collect();
        let rows = Tensor::from_slice(&rows).to_device(x.device()); // (E,)
        let logits = self.model.head(&x.index_select(0, &rows)); // (E, V)

        // From here on: (sequence, row of the logits). Siblings begin with the row of their first.
        ends.iter_mut().enumerate().for_each(|(row, end)| end.1 = row as i64);
        let mut copies = Vec::new();
        for at in 0..ends.len() {
            let (i, row) = ends[at];
            let siblings = self.fork(i, &mut copies);
            ends.extend(siblings.map(|sibling| (sibling, row)));
        }
        self.cache.copy_blocks(&copies);

        let for_card = self.for_card(&ends);
        self.board(&ends[..for_card], &logits);
        let ends = &ends[for_card..];
        if ends.is_empty() {
            return;
        }
        let logprobs = logits.log_softmax(-1, Kind::Float); // (E, V)
        let mut ended = Vec::new();
        for &(i, row) in ends {
            let token = self.running[i].choose(&logits.select(0, row), &logprobs.select(0, row));
            self.tell(i, token, events, &mut ended);
        }
        self.remove_ended(&ended);
    }

    /// Tells of sequence i's new token, and of its end, which is noted in `ended`: (request, sample, or all of them).
    fn tell(
        &mut self,
        i: usize,
        token: Result<Token>,
        events: &mut Vec<Event>,
        ended: &mut Vec<(RequestId, Option<usize>)>,
    ) {
        let sequence = &self.running[i];
        let (request, index) = (sequence.request, sequence.index);
        match token {
            Ok(token) => {
                self.counters.new_tokens += 1;
                let reason = sequence.ended(&token, self.model.config().max_length() as usize);
                events.push(Event::Token { request, index, token });
                if let Some(reason) = reason {
                    events.push(Event::Finished { request, index, reason });
                    ended.push((request, Some(index)));
                }
            }
            Err(error) => {
                events.push(Event::Failed { request, error });
                ended.push((request, None));
            }
        }
    }

    fn remove_ended(&mut self, ended: &[(RequestId, Option<usize>)]) {
        if ended.is_empty() {
            return;
        }
        let ended: HashSet<_> = ended.iter().collect();
        self.remove(|s| {
            ended.contains(&(s.request, Some(s.index))) || ended.contains(&(s.request, None))
        });
    }

    /// Once sequence i has its prompt read, its siblings run beside it: they share its full blocks and copy the last.
    /// Those that find no place or block wait and read the prompt again. Returns where they run; `copies` gets blocks to copy.
    fn fork(&mut self, i: usize, copies: &mut Vec<(u32, u32)>) -> Range<usize> {
        let first_new = self.running.len();
        let siblings = std::mem::take(&mut self.running[i].siblings);
        for index in 1..=siblings {
            let has_place = self.running.len() < self.options.max_sequences;
            let leader = &self.running[i];
            let mut sequence = leader.sibling(index);
            if !has_place {
                self.waiting.push_back(sequence);
                continue;
            }
            let full = leader.cached / BLOCK;
            let last =
                leader.table.get(full).copied().filter(|_| !leader.cached.is_multiple_of(BLOCK));
            let copy = last.and_then(|_| self.pool.take());
            if last.is_some() && copy.is_none() {
                self.waiting.push_back(sequence);
                continue;
            }
            sequence.table = leader.table[..full].to_vec();
            sequence.table.iter().for_each(|&block| self.pool.share(block));
            if let (Some(last), Some(copy)) = (last, copy) {
                copies.push((last, copy));
                sequence.table.push(copy);
            }
            sequence.cached = leader.cached;
            sequence.published = leader.published;
            self.running.push(sequence);
        }
        first_new..self.running.len()
    }

    fn remove(&mut self, is: impl Fn(&Sequence) -> bool) {
        self.waiting.retain(|sequence| !is(sequence));
        let (gone, stay) = std::mem::take(&mut self.running).into_iter().partition(is);
        self.running = stay;
        let mut gone: Vec<Sequence> = gone;
        self.leave_card(&mut gone);
        gone.iter().for_each(|sequence| self.pool.give_back(&sequence.table));
    }

    /// Refuses a sequence that the whole cache could not hold.
    fn check_room(&self, tokens: usize) -> Result<()> {
        let (needed, all) = (tokens.div_ceil(BLOCK), self.pool.len());
        if needed <= all {
            return Ok(());
        }
        let room = all * BLOCK;
        Err(anyhow!(
            "the cache is too small: {tokens} tokens of prompt and output, room for {room}"
        ))
        .usage("lower the number of new tokens, shorten the prompt, or give the cache more memory")
    }
}

impl Event {
    /// The request it is about.
    pub fn request(&self) -> RequestId {
        match self {
            Self::Token { request, .. } => *request,
            Self::Finished { request, .. } => *request,
            Self::Failed { request, .. } => *request,
        }
    }
}

fn hash_up_to(tokens: &[u32], blocks: usize) -> Prefix {
    tokens.chunks_exact(BLOCK).take(blocks).fold(Prefix::default(), |hash, ids| prefix(&hash, ids))
}

/// Dynamic scaling turns a prompt beyond `block_size` by angles of its whole length: it cannot be read in pieces.
fn angles_depend_on_length(model: NetworkRef) -> bool {
    model.config().rope_scaling.as_ref().is_some_and(|s| s.rope_type == RopeType::Dynamic)
}

/// Continues `prompt` by an engine of its own: see [`super::plain::generate_plain`].
///
/// # Errors
/// As [`Engine::submit`]; logits that are not finite, errors of `on_token`.
pub fn generate<'m>(
    model: impl Into<NetworkRef<'m>>,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(Token) -> Result<bool>,
) -> Result<Generation> {
    let model = model.into();
    check_prompt(model, prompt)?;
    let sizes = EngineOptions::for_requests(model, &[(prompt.len(), options.max_new_tokens, 1)]);
    let mut engine = Engine::new(model, sizes);
    let mut out = Generation::new(prompt.len(), sizes.cache_bytes(model));
    let start = Instant::now();
    engine.submit(Request { prompt: prompt.to_vec(), samples: 1, options: options.clone() })?;
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { token, .. } => {
                    out.push(token.id, token.logprob, start.elapsed());
                    let is_eos = token.is_eos;
                    if !on_token(token)? && !is_eos {
                        out.finish_reason = FinishReason::Stop;
                        return Ok(out);
                    }
                }
                Event::Finished { reason, .. } => out.finish_reason = reason,
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    Ok(out)
}
