//! The client of `bench serve`: one request a connection, its answer's events with the time of each.

use super::serve::Answer;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow, bail, ensure};
use axum::body::Bytes;
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use std::future::poll_fn;
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A server that is there tells its model in this time.
const GREETING: Duration = Duration::from_secs(10);
/// A stream that is silent for longer has failed.
const SILENCE: Duration = Duration::from_secs(600);

/// Where a server is.
#[derive(Debug)]
pub struct Server {
    /// `HOST:PORT`
    authority: String,
    key: Option<String>,
}

/// What a server tells of its model; other servers than ours may leave out the numbers.
pub struct Model {
    /// Its name.
    pub id: String,
    /// Tokens of prompt and answer together.
    pub context: Option<usize>,
    /// Token ids are below this.
    pub vocabulary: Option<usize>,
}

impl Server {
    /// From `http://HOST:PORT`; a `/v1` behind it is the same.
    ///
    /// # Errors
    /// Another scheme, no host, another path.
    pub fn new(url: &str, key: Option<String>) -> Result<Self> {
        let authority = url.parse::<Uri>().ok().and_then(|uri| {
            let path = uri.path().trim_end_matches('/');
            let fits = uri.scheme_str() == Some("http") && ["", "/v1"].contains(&path);
            let host = uri.host().filter(|_| fits)?;
            Some(format!("{host}:{}", uri.port_u16().unwrap_or(80)))
        });
        let authority =
            authority.ok_or_else(|| anyhow!("`--url`: expected http://HOST:PORT, got `{url}`"));
        let hint = "give the address that `tinyllama serve` prints; there is no TLS here";
        Ok(Self { authority: authority.usage(hint)?, key })
    }

    /// Its first model.
    ///
    /// # Errors
    /// Nobody listens or answers; a key that is refused; something else than a list of models.
    pub async fn model(&self) -> Result<Model> {
        let url = format!("http://{}", self.authority);
        let response = timeout(GREETING, self.send(Method::GET, "/v1/models", String::new()))
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer in {} s", GREETING.as_secs())))
            .with_context(|| format!("cannot reach a server at {url}"))
            .hint("start one with `tinyllama serve`, or correct `--url`")?;
        let status = response.status();
        if [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status) {
            let got = if self.key.is_some() { "another one" } else { "none" };
            return Err(anyhow!("the server at {url} expected its API key, got {got}"))
                .hint("give the server's key by `--key`, or in TINYLLAMA_API_KEY");
        }
        let told: Value = serde_json::from_slice(&all(response).await?).unwrap_or_default();
        let model = &told["data"][0];
        let number = |name: &str| model[name].as_u64().map(|n| n as usize);
        let id = model["id"].as_str().with_context(|| {
            format!("expected a list of models from {url}/v1/models, got status {status}")
        });
        let id =
            id.hint("give the address of a server with OpenAI's API, such as `tinyllama serve`")?;
        let (context, vocabulary) = (number("max_model_len"), number("vocab_size"));
        Ok(Model { id: id.to_owned(), context, vocabulary })
    }

    async fn send(&self, method: Method, path: &str, body: String) -> Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(body)?;
        let stream = TcpStream::connect(&self.authority).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection); // ends with the response, or when that is dropped
        Ok(sender.send_request(request).await?)
    }
}

/// One streamed answer, from the connection to its last event.
///
/// # Errors
/// A refusal, an error within the stream, a stream that ends too early.
pub async fn ask(server: &Server, body: String) -> Result<Answer> {
    let start = Instant::now();
    let response = server.send(Method::POST, "/v1/completions", body).await?;
    let status = response.status();
    if status != StatusCode::OK {
        let told: Value = serde_json::from_slice(&all(response).await?).unwrap_or_default();
        let error = &told["error"];
        // Messages of a full queue tell how full, which would make each a reason of its own.
        let reason = error["code"].as_str().or(error["message"].as_str()).unwrap_or("no reason");
        bail!("status {}: {reason}", status.as_u16());
    }
    let (mut body, mut stream, mut rest) = (response.into_body(), Stream::default(), Vec::new());
    while let Some(bytes) = piece(&mut body).await? {
        let now = start.elapsed();
        rest.extend_from_slice(&bytes);
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            stream.line(&line, now)?;
        }
    }
    stream.end()
}

async fn piece(body: &mut Incoming) -> Result<Option<Bytes>> {
    loop {
        let frame = timeout(SILENCE, poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx))).await;
        match frame.with_context(|| format!("silent for {} s", SILENCE.as_secs()))? {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(data) = frame.context("the connection broke")?.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn all(response: Response<Incoming>) -> Result<Vec<u8>> {
    let (mut body, mut bytes) = (response.into_body(), Vec::new());
    while let Some(more) = piece(&mut body).await? {
        bytes.extend_from_slice(&more);
    }
    Ok(bytes)
}

/// An event of `/v1/completions`.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// An answer as its events come.
#[derive(Default)]
struct Stream {
    answer: Answer,
    /// When text came last.
    last: Option<Duration>,
    finished: bool,
    counted: bool,
    done: bool,
}

impl Stream {
    fn line(&mut self, line: &[u8], now: Duration) -> Result<()> {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return Ok(()) };
        if data == b"[DONE]" {
            self.done = true;
            self.answer.whole = now;
            return Ok(());
        }
        let event: Event = serde_json::from_slice(data).context("an event that is no JSON")?;
        if let Some(error) = event.error {
            bail!("an error in the stream: {}", error["message"].as_str().unwrap_or("no reason"));
        }
        for choice in event.choices {
            self.finished |= choice.finish_reason.is_some();
            if choice.text.is_empty() && !self.finished {
                continue;
            }
            match self.last {
                None => self.answer.first = now,
                Some(last) if !choice.text.is_empty() => self.answer.gaps.push(now - last),
                Some(_) => {}
            }
            self.last = Some(now);
        }
        if let Some(usage) = event.usage {
            self.counted = true;
            self.answer.prompt_tokens = usage.prompt_tokens;
            self.answer.new_tokens = usage.completion_tokens;
        }
        Ok(())
    }

    fn end(self) -> Result<Answer> {
        let Self { finished, counted, done, .. } = self;
        ensure!(finished && counted && done, "the stream ended before its answer was whole");
        Ok(self.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[(u64, &str)]) -> Result<Answer> {
        let mut stream = Stream::default();
        for (at, line) in lines {
            stream.line(line.as_bytes(), Duration::from_millis(*at))?;
        }
        stream.end()
    }

    #[test]
    fn times_are_those_of_pieces_with_text() {
        let text = |text: &str| format!("data: {{\"choices\": [{{\"text\": \"{text}\"}}]}}\n");
        let (a, b) = (text("a"), text("b"));
        let end = "data: {\"choices\": [{\"text\": \"\", \"finish_reason\": \"length\"}], \"usage\": null}\n";
        let usage = "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 3, \"completion_tokens\": 2}}\n";
        let lines = [(1, ": waiting\n"), (1, "\n"), (5, &a), (9, &b), (9, end), (9, usage)];
        let error = told(&lines).unwrap_err().to_string();
        assert_eq!(error, "the stream ended before its answer was whole");
        let answer = told(&[&lines[..], &[(10, "data: [DONE]\n")]].concat()).unwrap();
        assert_eq!((answer.prompt_tokens, answer.new_tokens), (3, 2));
        assert_eq!(answer.first, Duration::from_millis(5));
        assert_eq!(answer.gaps, [Duration::from_millis(4)]);
        assert_eq!(answer.whole, Duration::from_millis(10));
        let error =
            told(&[(5, &a), (6, "data: {\"error\": {\"message\": \"no\"}}\n")]).unwrap_err();
        assert_eq!(error.to_string(), "an error in the stream: no");
    }

    #[test]
    fn an_address_is_http_and_has_a_host() {
        for (url, want) in [
            ("http://127.0.0.1:8000", "127.0.0.1:8000"),
            ("http://[::1]:8000/v1/", "[::1]:8000"),
            ("http://llama", "llama:80"),
        ] {
            assert_eq!(Server::new(url, None).unwrap().authority, want);
        }
        for url in ["127.0.0.1:8000", "https://a:1", "http://", "http://a/b", ""] {
            let error = Server::new(url, None).unwrap_err().to_string();
            assert!(error.ends_with(&format!("expected http://HOST:PORT, got `{url}`")), "{error}");
        }
    }
}
