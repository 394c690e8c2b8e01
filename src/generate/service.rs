//! An engine on a thread of its own, for callers that come and go: text in, text out.
//!
//! Callers hand in a [`TextRequest`] and a function that is told what becomes of it. That function runs on the engine's
//! thread, between two steps, so it must not wait for anything.

#[cfg(test)]
#[allow(missing_docs)]
pub mod scripted;

use super::engine::{Engine, EngineOptions, Event, Request, RequestId};
use super::load::Loaded;
use super::network::NetworkRef;
use super::request::{FinishReason, GenerateOptions, Token};
use super::sampler::SamplingParams;
use super::text::TextStream;
use crate::guard;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// A text to continue.
#[derive(Clone, Debug)]
pub struct TextRequest {
    /// Ids of the text.
    pub prompt: Vec<u32>,
    /// Continuations; number i draws with `seed + i`.
    pub n: usize,
    /// Each ends after this many tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Each ends before any of these strings, wherever tokens begin and end.
    pub stop: Vec<String>,
    /// The ids that end a text do not end it.
    pub ignore_eos: bool,
    /// `None`: no log-probabilities. `Some(k)`: that of each token, and of the k most likely ids.
    pub top_logprobs: Option<usize>,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability under the model itself.
    pub logprob: f64,
    /// The most likely ids and theirs, best first.
    pub top: Vec<(u32, f64)>,
}

/// What became of a request since the last update.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// New text of one sample.
    Piece {
        /// Which sample.
        index: usize,
        /// Certain text: it ends on a whole character and cannot be the start of a stop string. May be empty.
        text: String,
        /// Tokens since the last piece, where log-probabilities were asked for.
        tokens: Vec<TokenInfo>,
    },
    /// A sample has ended.
    Finished {
        /// Which sample.
        index: usize,
        /// Why.
        reason: FinishReason,
        /// Tokens made, those of a stop string and eos included.
        new_tokens: usize,
    },
    /// The request came to nothing.
    Failed {
        /// Why.
        message: String,
    },
}

/// Why a request is not taken.
#[derive(Debug, Error)]
pub enum Refused {
    /// Too many wait already.
    #[error("the queue is full: {waiting} samples wait, the limit is {limit}")]
    QueueFull {
        /// Samples that wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// The service ends.
    #[error("the service is shutting down")]
    Stopping,
    /// The prompt leaves no room for a new token.
    #[error("the prompt has {prompt} tokens, the context is {context}")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of prompt and output together, at most.
        context: usize,
    },
    /// Something else about it cannot be.
    #[error("{0}")]
    Invalid(String),
}

/// Numbers of a service; those from `prompt_tokens` on are sums since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    pub running: usize,
    pub waiting: usize,
    pub free_blocks: usize,
    pub all_blocks: usize,
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    pub new_tokens: u64,
    pub finished: u64,
    pub cancelled: u64,
    pub failed: u64,
    pub preempted: u64,
}

/// Told what becomes of a request; `false`: nobody wants more of it.
pub type OnUpdate = Box<dyn FnMut(Update) -> bool + Send>;

/// An engine on its thread.
pub struct Service {
    tokenizer: Arc<Tokenizer>,
    context: usize,
    max_running: usize,
    max_waiting: usize,
    next: AtomicU64,
    orders: Mutex<Option<Sender<Order>>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    idle: Condvar,
}

/// What both sides know.
#[derive(Default)]
struct State {
    /// Of the thread, after its last step.
    status: Status,
    /// Samples handed in that the thread has not counted yet.
    on_the_way: usize,
}

impl State {
    fn status(&self) -> Status {
        Status { waiting: self.status.waiting + self.on_the_way, ..self.status }
    }
}

/// What callers want of the thread.
enum Order {
    Take(RequestId, Box<TextRequest>, OnUpdate),
    Cancel(RequestId),
}

impl Service {
    /// Starts the thread. Requests are refused while `max_waiting` samples wait.
    ///
    /// # Errors
    /// A model without a tokenizer; a cache that does not fit into memory.
    pub fn start(loaded: Loaded, sizes: EngineOptions, max_waiting: usize) -> Result<Self> {
        let Loaded { network, tokenizer, eos } = loaded;
        let tokenizer = Arc::new(tokenizer.context("this model has no tokenizer")?);
        let context = sizes.context(network.borrow());
        let shared = Arc::new(Shared::default());
        let (orders, taken) = channel();
        let (ready, is_ready) = channel();
        let theirs = (tokenizer.clone(), shared.clone());
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            let (tokenizer, shared) = theirs;
            serve(network.borrow(), &tokenizer, &eos, sizes, taken, &shared, &ready)
        })?;
        is_ready.recv().context("the engine's thread ended at its start")??;
        let orders = Mutex::new(Some(orders));
        let thread = Some(thread);
        let (max_running, next) = (sizes.max_sequences, AtomicU64::new(0));
        Ok(Self { tokenizer, context, max_running, max_waiting, next, orders, shared, thread })
    }

    /// Hands a request in.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn submit(
        &self,
        mut request: TextRequest,
        on_update: OnUpdate,
    ) -> Result<RequestId, Refused> {
        let (prompt, context) = (request.prompt.len(), self.context);
        if prompt >= context {
            return Err(Refused::TooLong { prompt, context });
        }
        request.max_new_tokens = request.max_new_tokens.min(context - prompt);
        if prompt == 0 || request.n == 0 {
            let what =
                if prompt == 0 { "the prompt has no tokens" } else { "`n` must be 1 or more" };
            return Err(Refused::Invalid(what.into()));
        }
        if request.stop.iter().any(String::is_empty) {
            return Err(Refused::Invalid("a stop string is empty".into()));
        }
        request.sampling.validate().map_err(|error| Refused::Invalid(error.to_string()))?;
        let orders = lock(&self.orders);
        let orders = orders.as_ref().ok_or(Refused::Stopping)?;
        {
            let mut state = lock(&self.shared.state);
            let (status, limit) = (state.status(), self.max_waiting);
            if status.running + status.waiting + request.n > self.max_running + limit {
                return Err(Refused::QueueFull { waiting: status.waiting, limit });
            }
            state.on_the_way += request.n;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let n = request.n;
        orders.send(Order::Take(id, Box::new(request), on_update)).map_err(|_| {
            lock(&self.shared.state).on_the_way -= n;
            Refused::Stopping
        })?;
        Ok(id)
    }

    /// Whether the thread runs: where it does not, nothing is answered any more.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Ends a request; its function is told `Cancelled` for each sample that had not ended. After
    /// [`Service::stop_accepting`] only the function itself can end it, by `false`.
    pub fn cancel(&self, id: RequestId) {
        if let Some(orders) = lock(&self.orders).as_ref() {
            let _ = orders.send(Order::Cancel(id)); // fails only where nothing runs any more
        }
    }

    /// Numbers after the last step.
    pub fn status(&self) -> Status {
        lock(&self.shared.state).status()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens of prompt and output together, at most.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Refuses requests from now on; those that were taken go on.
    pub fn stop_accepting(&self) {
        lock(&self.orders).take();
    }

    /// Waits until nothing runs or waits, at most so long; whether that is so.
    pub fn wait_until_idle(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        while state.status().running + state.status().waiting > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.idle.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Service {
    /// Waits for the thread, which ends what it has begun.
    fn drop(&mut self) {
        self.stop_accepting();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was told by its own message
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread: takes orders between steps, and sleeps where there is nothing to do.
fn serve(
    model: NetworkRef,
    tokenizer: &Tokenizer,
    eos: &[u32],
    sizes: EngineOptions,
    orders: Receiver<Order>,
    shared: &Shared,
    ready: &Sender<Result<()>>,
) {
    let lower = "give the cache less memory, or use a smaller model or number format";
    let engine = guard::catch("allocating the cache", model.device(), lower, || {
        Ok(Engine::new(model, sizes))
    });
    let mut desk = match engine {
        Ok(engine) => {
            let _ = ready.send(Ok(()));
            let (open, status, counted) = (HashMap::new(), Status::default(), 0);
            Desk { engine, tokenizer, eos, open, status, counted }
        }
        Err(error) => return drop(ready.send(Err(error))),
    };
    loop {
        desk.report(shared);
        let mut first = None;
        if desk.engine.is_idle() {
            match orders.recv() {
                Ok(order) => first = Some(order),
                Err(_) => return, // nobody can order anything any more
            }
        }
        let step = guard::catch("a step", model.device(), lower, || {
            first.into_iter().chain(orders.try_iter()).for_each(|order| desk.take(order));
            let events = desk.engine.step();
            events.into_iter().for_each(|event| desk.tell(event));
            Ok(())
        });
        if let Err(error) = step {
            desk.fail_all(&error);
        }
    }
}

/// The thread's state.
struct Desk<'a> {
    engine: Engine<'a>,
    tokenizer: &'a Tokenizer,
    eos: &'a [u32],
    /// By the engine's name for it.
    open: HashMap<RequestId, Open<'a>>,
    /// Sums over requests.
    status: Status,
    /// Samples taken since the last report.
    counted: usize,
}

/// A request that has not ended.
struct Open<'a> {
    /// The service's name for it.
    id: RequestId,
    on_update: OnUpdate,
    with_logprobs: bool,
    samples: Vec<Sample<'a>>,
}

struct Sample<'a> {
    text: TextStream<'a>,
    tokens: Vec<TokenInfo>,
    new_tokens: usize,
    ended: bool,
}

impl<'a> Desk<'a> {
    fn take(&mut self, order: Order) {
        match order {
            Order::Take(id, request, on_update) => {
                self.counted += request.n;
                self.open(id, *request, on_update);
            }
            Order::Cancel(id) => {
                let found = self.open.iter().find(|(_, open)| open.id == id).map(|(&key, _)| key);
                if let Some(key) = found {
                    self.cancel(key);
                }
            }
        }
    }

    fn open(&mut self, id: RequestId, request: TextRequest, mut on_update: OnUpdate) {
        let text = match TextStream::new(self.tokenizer, &request.prompt, &request.stop) {
            Ok(text) => text,
            Err(error) => return self.refuse(&error, &mut on_update),
        };
        let options = GenerateOptions {
            max_new_tokens: request.max_new_tokens,
            sampling: request.sampling,
            eos: if request.ignore_eos { Vec::new() } else { self.eos.to_vec() },
            vocab_size: Some(self.tokenizer.vocab_size()),
            top_logprobs: request.top_logprobs.unwrap_or(0),
        };
        let sample =
            || Sample { text: text.clone(), tokens: Vec::new(), new_tokens: 0, ended: false };
        let samples = (0..request.n).map(|_| sample()).collect();
        let with_logprobs = request.top_logprobs.is_some();
        let asked = Request { prompt: request.prompt, samples: request.n, options };
        match self.engine.submit(asked) {
            Ok(key) => drop(self.open.insert(key, Open { id, on_update, with_logprobs, samples })),
            Err(error) => self.refuse(&error, &mut on_update),
        }
    }

    fn refuse(&mut self, error: &anyhow::Error, on_update: &mut OnUpdate) {
        self.status.failed += 1;
        on_update(Update::Failed { message: format!("{error:#}") });
    }

    /// Ends a request that somebody gave up.
    fn cancel(&mut self, key: RequestId) {
        self.engine.cancel(key);
        let Some(mut open) = self.open.remove(&key) else { return };
        self.status.cancelled += 1;
        for (index, sample) in open.samples.iter().enumerate().filter(|(_, s)| !s.ended) {
            let (reason, new_tokens) = (FinishReason::Cancelled, sample.new_tokens);
            (open.on_update)(Update::Finished { index, reason, new_tokens });
        }
    }

    fn tell(&mut self, event: Event) {
        let key = event.request();
        let Some(open) = self.open.get_mut(&key) else { return };
        let wanted = match event {
            Event::Token { index, token, .. } => match open.token(index, token) {
                Told { stopped: false, wanted } => wanted,
                Told { stopped: true, .. } => {
                    self.engine.stop(key, index);
                    open.finish(index, FinishReason::Stop)
                }
            },
            Event::Finished { index, reason, .. } => open.finish(index, reason),
            Event::Failed { error, .. } => return self.fail(key, &error),
        };
        if open.samples.iter().all(|sample| sample.ended) {
            self.open.remove(&key);
            self.status.finished += 1;
        } else if !wanted {
            self.cancel(key);
        }
    }

    fn fail(&mut self, key: RequestId, error: &anyhow::Error) {
        self.engine.cancel(key);
        if let Some(mut open) = self.open.remove(&key) {
            self.refuse(error, &mut open.on_update);
        }
    }

    /// A step came to nothing, and nobody knows in what state it left the cache.
    fn fail_all(&mut self, error: &anyhow::Error) {
        self.engine.reset();
        let keys: Vec<RequestId> = self.open.keys().copied().collect();
        keys.into_iter().for_each(|key| self.fail(key, error));
    }

    /// Shows the other side where things stand.
    fn report(&mut self, shared: &Shared) {
        let (counters, (free_blocks, all_blocks)) = (self.engine.counters(), self.engine.blocks());
        let (running, waiting) = self.engine.sequences();
        let mut state = lock(&shared.state);
        state.on_the_way -= std::mem::take(&mut self.counted);
        state.status = Status {
            running,
            waiting,
            free_blocks,
            all_blocks,
            prompt_tokens: counters.prompt_tokens,
            cached_prompt_tokens: counters.cached_prompt_tokens,
            new_tokens: counters.new_tokens,
            preempted: counters.preempted,
            ..self.status
        };
        if self.engine.is_idle() {
            shared.idle.notify_all();
        }
    }
}

impl Open<'_> {
    /// Takes a sample's next token and tells of the text that is certain now.
    fn token(&mut self, index: usize, token: Token) -> Told {
        let sample = &mut self.samples[index];
        if sample.ended {
            return Told { stopped: false, wanted: true };
        }
        sample.new_tokens += 1;
        let text = if token.is_eos { String::new() } else { sample.text.push(token.id) };
        if self.with_logprobs && !token.is_eos {
            let Token { id, logprob, top, .. } = token;
            sample.tokens.push(TokenInfo { id, logprob, top });
        }
        let stopped = sample.text.stopped();
        let wanted = text.is_empty() || self.piece(index, text);
        Told { stopped, wanted }
    }

    fn piece(&mut self, index: usize, text: String) -> bool {
        let tokens = std::mem::take(&mut self.samples[index].tokens);
        (self.on_update)(Update::Piece { index, text, tokens })
    }

    /// Tells of the rest of a sample's text and of its end, once.
    fn finish(&mut self, index: usize, reason: FinishReason) -> bool {
        let sample = &mut self.samples[index];
        if std::mem::replace(&mut sample.ended, true) {
            return true;
        }
        let new_tokens = sample.new_tokens;
        let rest = sample.text.finish();
        if !rest.is_empty() || !(sample.tokens.is_empty() || sample.text.stopped()) {
            self.piece(index, rest);
        }
        (self.on_update)(Update::Finished { index, reason, new_tokens })
    }
}

/// What a token led to.
struct Told {
    /// A stop string was met.
    stopped: bool,
    /// Somebody wants more.
    wanted: bool,
}
