//! From the engine's thread to a client: what becomes of a request's prompts, in one bounded queue.
//!
//! The engine never waits: where a client does not read and the queue is full, the client is cut off. A client that goes
//! away drops its [`Updates`], and with that everything it asked for is cancelled.

use super::App;
use super::error::ApiError;
use super::metrics::End;
use crate::generate::FinishReason;
use crate::generate::engine::RequestId;
use crate::generate::service::{OnUpdate, Refused, TextRequest, TokenInfo, Update};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, Sender, channel, error::TrySendError};
use tokio::time::{Sleep, sleep};

/// Updates that wait for a client of a stream, for each of its answers: a minute of text as people read it.
const STREAM_BUFFER: usize = 1024;

/// What a client is told. `choice` counts over all prompts and their samples.
#[derive(Debug, PartialEq)]
pub enum Told {
    /// New text.
    Piece { choice: usize, text: String, tokens: Vec<TokenInfo> },
    /// An answer is whole; why, as OpenAI has it.
    Finished { choice: usize, reason: &'static str },
}

/// Several prompts with the same settings.
pub struct Job {
    /// Ids of each.
    pub prompts: Vec<Vec<u32>>,
    /// As for the first one, which this gives its place in `prompts`.
    pub settings: TextRequest,
    /// The field that the prompts came in, for errors.
    pub param: &'static str,
}

/// The stream of a job's updates.
pub struct Updates {
    receiver: Receiver<(usize, Update)>,
    hold: Hold,
    /// Samples of each prompt.
    n: usize,
    /// Answers that are not whole.
    open: usize,
    prompt_tokens: usize,
    new_tokens: usize,
    started: Instant,
    first: Option<Instant>,
    deadline: Pin<Box<Sleep>>,
    app: Arc<App>,
    /// Its end has been counted.
    ended: bool,
}

/// Cancels when dropped.
struct Hold {
    app: Arc<App>,
    ids: Vec<RequestId>,
    state: Arc<Flags>,
}

#[derive(Default)]
struct Flags {
    /// Nobody listens.
    gone: AtomicBool,
    /// The queue was full.
    overflow: AtomicBool,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.state.gone.store(true, Relaxed);
        for &id in &self.ids {
            self.app.service.cancel(id);
        }
    }
}

impl Updates {
    /// Hands a job to the engine; `started` is when its request came.
    ///
    /// # Errors
    /// What [`crate::generate::service::Service::submit`] refuses; then nothing of the job runs.
    pub fn submit(
        app: &Arc<App>,
        job: Job,
        stream: bool,
        started: Instant,
    ) -> Result<Self, ApiError> {
        let Job { prompts, settings, param } = job;
        let n = settings.n;
        let open = n * prompts.len();
        let room = if stream { STREAM_BUFFER * open.max(1) } else { Semaphore::MAX_PERMITS };
        let (sender, receiver) = channel(room);
        let state = Arc::new(Flags::default());
        let mut hold = Hold { app: app.clone(), ids: Vec::new(), state: state.clone() };
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        for (at, prompt) in prompts.into_iter().enumerate() {
            // So that two equal prompts of a list are not answered alike.
            let seed = settings.sampling.seed.wrapping_add((at * n) as u64);
            let mut request = TextRequest { prompt, ..settings.clone() };
            request.sampling.seed = seed;
            let told = listener(at, sender.clone(), state.clone());
            let id = app.service.submit(request, told);
            hold.ids.push(id.map_err(|refused: Refused| ApiError::refused(&refused, param))?);
        }
        let left = app.limits.time.saturating_sub(started.elapsed());
        Ok(Self {
            receiver,
            hold,
            n,
            open,
            prompt_tokens,
            new_tokens: 0,
            started,
            first: None,
            deadline: Box::pin(sleep(left)),
            app: app.clone(),
            ended: false,
        })
    }

    /// Tokens of prompts and answers so far.
    pub fn tokens(&self) -> (usize, usize) {
        (self.prompt_tokens, self.new_tokens)
    }

    /// The client was cut off because it did not read.
    pub fn overflowed(&self) -> bool {
        self.hold.state.overflow.load(Relaxed)
    }

    /// The next update; `None` once all answers are whole. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Told, ApiError>> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// [`Self::next`] for a body that is polled.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Told, ApiError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            self.end(End::OutOfTime);
            let limit = self.app.limits.time.as_secs_f64();
            return Poll::Ready(Some(Err(ApiError::out_of_time(limit))));
        }
        if self.overflowed() {
            self.end(End::TooSlow);
            let error = ApiError::internal("client_too_slow", "the client did not read its stream");
            return Poll::Ready(Some(Err(error)));
        }
        let Some(update) = std::task::ready!(self.receiver.poll_recv(cx)) else {
            self.end(End::Failed);
            let message = "the engine ended in the middle of the answer";
            return Poll::Ready(Some(Err(ApiError::internal("engine_ended", message))));
        };
        Poll::Ready(Some(self.take(update)))
    }

    fn take(&mut self, (prompt, update): (usize, Update)) -> Result<Told, ApiError> {
        if self.first.is_none() {
            self.first = Some(Instant::now());
            self.app.metrics.first_token(self.started.elapsed());
        }
        match update {
            Update::Piece { index, text, tokens } => {
                Ok(Told::Piece { choice: prompt * self.n + index, text, tokens })
            }
            Update::Finished { index, reason, new_tokens } => {
                self.open -= 1;
                self.new_tokens += new_tokens;
                let reason = match reason {
                    FinishReason::Length | FinishReason::Context => "length",
                    FinishReason::Eos | FinishReason::Stop => "stop",
                    FinishReason::Cancelled => {
                        self.end(End::Failed);
                        return Err(ApiError::internal("cancelled", "the request was cancelled"));
                    }
                };
                if self.open == 0 {
                    self.end(End::Complete);
                }
                Ok(Told::Finished { choice: prompt * self.n + index, reason })
            }
            Update::Failed { message } => {
                self.end(End::Failed);
                Err(ApiError::internal("engine_failed", message))
            }
        }
    }

    fn end(&mut self, end: End) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let decode = self.first.map_or(Duration::ZERO, |first| first.elapsed());
        let (whole, tokens) = (self.started.elapsed(), self.new_tokens / (self.n.max(1)));
        self.app.metrics.ended(end, whole, decode, tokens);
        if end == End::Complete {
            self.hold.ids.clear(); // nothing is left to cancel
        }
        if self.app.log {
            let (prompt, new) = self.tokens();
            let first = self.first.map_or(Duration::ZERO, |first| first - self.started);
            eprintln!(
                "{end:?} | {prompt} prompt + {new} new tokens | first after {:.0} ms | {:.2} s",
                first.as_secs_f64() * 1e3,
                whole.as_secs_f64(),
            );
        }
    }
}

impl Drop for Updates {
    fn drop(&mut self) {
        let end = if self.overflowed() { End::TooSlow } else { End::Disconnected };
        self.end(end);
    }
}

/// What the engine's thread calls for prompt `at`: it never waits.
fn listener(at: usize, sender: Sender<(usize, Update)>, state: Arc<Flags>) -> OnUpdate {
    Box::new(move |update| {
        if state.gone.load(Relaxed) {
            return false;
        }
        match sender.try_send((at, update)) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(_)) => {
                state.overflow.store(true, Relaxed);
                state.gone.store(true, Relaxed);
                false
            }
        }
    })
}
