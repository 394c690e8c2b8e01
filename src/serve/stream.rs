//! Answers by server-sent events: `data: {..}`, an empty line, and `data: [DONE]` at the end.

use super::error::ApiError;
use super::updates::{Told, Updates};
use super::writer::Writer;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use http_body::Frame;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// So long an error can still become the answer's status; afterwards the headers go out.
const PATIENCE: Duration = Duration::from_secs(5);
/// A comment goes out where nothing else did for so long, so that nobody between takes the connection for dead.
const QUIET: Duration = Duration::from_secs(15);
/// Events that wait go out together, up to so many bytes.
const FRAME: usize = 16 << 10;

/// The answer whose body follows a job.
///
/// # Errors
/// A job that fails before its first token, as an error with its own status.
pub async fn answer(mut updates: Updates, mut writer: Writer) -> Result<Response, ApiError> {
    let mut ready = String::new();
    if let Ok(Some(first)) = timeout(PATIENCE, updates.next()).await {
        writer.opening(&mut ready);
        write(&mut writer, first?, &mut ready);
    } else {
        writer.opening(&mut ready);
    }
    let quiet = Box::pin(sleep(QUIET));
    let events = Events { updates, writer, ready, quiet, done: false, broken: false };
    let mut response = Body::new(events).into_response();
    let headers = response.headers_mut();
    let mut set = |name, value| headers.insert(name, HeaderValue::from_static(value));
    set(header::CONTENT_TYPE, "text/event-stream; charset=utf-8");
    set(header::CACHE_CONTROL, "no-cache");
    set(header::HeaderName::from_static("x-accel-buffering"), "no"); // nginx would hold events back
    Ok(response)
}

fn write(writer: &mut Writer, told: Told, out: &mut String) {
    match told {
        Told::Piece { choice, text, tokens } => writer.piece(out, choice, text, &tokens),
        Told::Finished { choice, reason } => writer.finished(out, choice, reason),
    }
}

struct Events {
    updates: Updates,
    writer: Writer,
    /// Events that have not gone out.
    ready: String,
    quiet: Pin<Box<Sleep>>,
    /// The last event has been written.
    done: bool,
    /// The connection must not end as if all were well.
    broken: bool,
}

impl Events {
    /// Writes whatever has come.
    fn fill(&mut self, cx: &mut Context<'_>) {
        while !self.done && self.ready.len() < FRAME {
            match self.updates.poll(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(told))) => write(&mut self.writer, told, &mut self.ready),
                Poll::Ready(Some(Err(error))) => {
                    self.done = true;
                    self.broken = self.updates.overflowed();
                    self.ready += &format!("data: {}\n\n", error.json());
                }
                Poll::Ready(None) => {
                    self.done = true;
                    self.writer.closing(&mut self.ready, self.updates.tokens());
                }
            }
        }
    }
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        this.fill(cx);
        if this.broken {
            let error = io::Error::new(io::ErrorKind::TimedOut, "the client does not read");
            return Poll::Ready(Some(Err(error)));
        }
        if this.ready.is_empty() && !this.done && this.quiet.as_mut().poll(cx).is_ready() {
            this.ready += ": waiting\n\n";
        }
        if !this.ready.is_empty() {
            this.quiet.as_mut().reset(Instant::now() + QUIET);
            let frame = Frame::data(Bytes::from(std::mem::take(&mut this.ready)));
            return Poll::Ready(Some(Ok(frame)));
        }
        if this.done { Poll::Ready(None) } else { Poll::Pending }
    }
}
