//! An OpenAI-compatible HTTP server on a [`Service`], and a chat page.
//!
//! Read first: [`router`], then [`chat`] or [`completions`] (a request from its fields to its answer), [`updates`] (from
//! the engine's thread to a client), [`stream`] (server-sent events). No request names a file, and nothing that a client
//! does makes the engine wait. `docs/serving.md` is the user's side.

mod api;
mod auth;
mod body;
mod chat;
mod completions;
mod connections;
mod error;
mod fields;
mod limits;
mod logprobs;
mod metrics;
mod page;
mod stream;
mod updates;
mod writer;

#[cfg(test)]
mod tests;

pub use limits::Limits;

use crate::error::WithHint;
use crate::generate::service::{Service, Status};
use crate::tokenizer::chat_template::ChatTemplate;
use crate::train::signals::{self, StopSignal};
use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use fields::Fields;
use metrics::Metrics;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::runtime::{Runtime, RuntimeFlavor};
use tokio::sync::watch;
use tokio::time::sleep;

/// How to serve.
pub struct Options {
    /// Host name or address.
    pub host: String,
    /// 0: any that is free.
    pub port: u16,
    /// Clients must give it as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// How the API calls the model.
    pub model: String,
    /// Of each request.
    pub limits: Limits,
    /// How long running requests may take after the signal to stop.
    pub drain: Duration,
    /// A line on stderr for each request for text.
    pub log: bool,
}

/// What handlers share.
pub struct App {
    service: Arc<Service>,
    /// `None`: chat is refused.
    template: Option<ChatTemplate>,
    model: String,
    created: u64,
    limits: Limits,
    api_key: Option<auth::Key>,
    metrics: Metrics,
    stopping: AtomicBool,
    log: bool,
}

impl App {
    /// From its parts.
    pub fn new(service: Arc<Service>, template: Option<ChatTemplate>, options: &Options) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            service,
            template,
            model: options.model.clone(),
            created: now.as_secs(),
            limits: options.limits.clone(),
            api_key: options.api_key.as_deref().map(auth::Key::new),
            metrics: Metrics::default(),
            stopping: AtomicBool::new(false),
            log: options.log,
        }
    }

    /// Takes `model`, which may be missing: there is one only.
    fn check_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        match fields.string("model")? {
            Some(model) if model != self.model => {
                Err(ApiError::no_model(&error::shortened(&model), &self.model))
            }
            _ => Ok(()),
        }
    }

    fn check_length(&self, name: &str, tokens: usize) -> Result<(), ApiError> {
        let (limit, context) = (self.limits.prompt_tokens, self.service.context());
        let (most, why) = match tokens {
            _ if tokens >= context => (context - 1, format!("the context is {context}")),
            _ if tokens > limit => (limit, "`--max-prompt-tokens`".into()),
            _ => return Ok(()),
        };
        let message =
            format!("`{name}`: expected a prompt of up to {most} tokens ({why}), got {tokens}");
        Err(ApiError::too_long(name, message))
    }
}

/// All endpoints.
pub fn router(app: &Arc<App>) -> axum::Router {
    axum::Router::new()
        .route("/", get(page::answer))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::answer))
        .route("/v1/chat/completions", post(chat::answer))
        .fallback(async |method: Method, uri: Uri| {
            ApiError::no_endpoint(method.as_str(), &error::shortened(uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::method(method.as_str(), &error::shortened(uri.path()))
        })
        .layer(from_fn_with_state(app.clone(), around))
        .with_state(app.clone())
}

/// Around each request: the key, the counters, the headers that all answers have.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let endpoint = endpoint(request.uri().path());
    let mut response = match auth::check(app.api_key.as_ref(), endpoint, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    app.metrics.answered(endpoint, response.status().as_u16());
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

/// A path as it is counted: clients must not be able to make up new names.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: [&str; 6] =
        ["/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"];
    match KNOWN.iter().find(|known| **known == path) {
        Some(known) => known,
        None if path.starts_with("/v1/models/") => "/v1/models",
        None => "other",
    }
}

/// Does what may take a while, such as encoding a long text, without keeping this thread's other clients waiting.
fn at_length<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(), // there is no other thread for them
    }
}

fn json_response(body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.stopping.load(Relaxed) {
        return ApiError::stopping().into_response();
    }
    if !app.service.is_alive() {
        return ApiError::internal("engine_ended", "the engine has ended: start the server again")
            .into_response();
    }
    let status = app.service.status();
    let (running, waiting) = (status.running, status.waiting);
    let body = json!({"status": "ok", "model": app.model, "running": running, "waiting": waiting});
    json_response(body.to_string())
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::from(app.metrics.text(&app.service.status())));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn described(app: &App) -> Value {
    json!({
        "id": app.model,
        "object": "model",
        "created": app.created,
        "owned_by": "tinyllama",
        "max_model_len": app.service.context(),
        "vocab_size": app.service.tokenizer().vocab_size(),
        "chat": app.template.is_some(),
        "max_new_tokens": app.limits.new_tokens,
    })
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_response(json!({"object": "list", "data": [described(&app)]}).to_string())
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    match id == app.model {
        true => Ok(json_response(described(&app).to_string())),
        false => Err(ApiError::no_model(&error::shortened(&id), &app.model)),
    }
}

/// Serves until SIGINT or SIGTERM, then finishes what runs. Another signal, more than a second later, ends the process
/// at once.
///
/// # Errors
/// An address that cannot be bound; a runtime or a signal handler that the system refuses.
pub fn run(service: Arc<Service>, template: Option<ChatTemplate>, options: &Options) -> Result<()> {
    let runtime = threads()?;
    let app = Arc::new(App::new(service.clone(), template, options));
    let done = runtime.block_on(async {
        let listener = bind(&options.host, options.port).await?;
        let signal = StopSignal::install(true)?;
        say_hello(&app, listener.local_addr()?, options.api_key.is_some());
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(watch_signal(app.clone(), signal, stop, options.drain));
        let served =
            connections::serve(app.clone(), router(&app), listener, stopped, options.drain);
        anyhow::Ok(served.await)
    })?;
    if !done {
        let Status { running, waiting, .. } = service.status();
        eprintln!(
            "warning: {} s are over; {} sequences are cut off",
            options.drain.as_secs(),
            running + waiting
        );
    }
    runtime.shutdown_background();
    Ok(())
}

fn threads() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2) // waits for clients, mostly; the engine has the cores
        .thread_name("serve")
        .enable_all()
        .build()
        .context("cannot start the server's threads")
}

/// A server beside whatever else this process does. Dropped, it ends at once; signals are not its business.
pub struct Background {
    address: SocketAddr,
    _stop: watch::Sender<bool>,
    _runtime: Runtime,
}

impl Background {
    /// Serves from now on.
    ///
    /// # Errors
    /// An address that cannot be bound; a runtime that the system refuses.
    pub fn start(service: Arc<Service>, options: &Options) -> Result<Self> {
        let (runtime, app) = (threads()?, Arc::new(App::new(service, None, options)));
        let listener = runtime.block_on(bind(&options.host, options.port))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = watch::channel(false);
        let router = router(&app);
        runtime.spawn(connections::serve(app, router, listener, stopped, options.drain));
        Ok(Self { address, _stop: stop, _runtime: runtime })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn watch_signal(
    app: Arc<App>,
    signal: StopSignal,
    stop: watch::Sender<bool>,
    drain: Duration,
) {
    let number = loop {
        match signal.requested() {
            Some(number) => break number,
            None => sleep(Duration::from_millis(50)).await,
        }
    };
    let Status { running, waiting, .. } = app.service.status();
    eprintln!(
        "{}: finishing {} sequences, at most {} s; another signal ends at once",
        signals::name(number),
        running + waiting,
        drain.as_secs(),
    );
    app.stopping.store(true, Relaxed);
    app.service.stop_accepting();
    let _ = stop.send(true); // nobody waits for it where the server has ended
    std::future::pending::<()>().await
}

async fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let hint = "choose another `--port` (0: any that is free), or a `--host` of this machine";
    let bound = TcpListener::bind((host, port)).await;
    bound.with_context(|| format!("cannot listen on {host}:{port}")).hint(hint)
}

fn say_hello(app: &App, address: SocketAddr, has_key: bool) {
    eprintln!("serving `{}` | chat page http://{address}/ | API http://{address}/v1", app.model);
    if app.template.is_none() {
        eprintln!(
            "warning: the checkpoint has no chat template: chat is off; name one with `--chat-template`"
        );
    }
    if !address.ip().is_loopback() && !has_key {
        eprintln!(
            "warning: {address} can be reached from other machines and there is no `--api-key`"
        );
    }
}
