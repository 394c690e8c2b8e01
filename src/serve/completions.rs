//! `POST /v1/completions`.

use super::App;
use super::body;
use super::error::ApiError;
use super::fields::{Fields, expected};
use super::limits::Common;
use super::stream;
use super::updates::{Job, Updates};
use super::writer::{Shape, Writer};
use crate::generate::service::TextRequest;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;
const PROMPT: &str = "a string, a list of strings, a list of token ids, or a list of such lists";

/// What a request says beyond [`Common`].
struct Asked {
    common: Common,
    prompts: Vec<Prompt>,
    top_logprobs: Option<usize>,
    echo: bool,
}

struct Prompt {
    text: Option<String>,
    ids: Vec<u32>,
}

/// Answers a request.
pub async fn answer(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let fields = body::object(request, app.limits.body).await?;
    let Asked { common, prompts, top_logprobs, echo } = read(&app, fields)?;
    let echoed: Vec<String> = match echo {
        true => prompts.iter().map(|prompt| prompt.text(&app)).collect::<Result<_, _>>()?,
        false => vec![String::new(); prompts.len()],
    };
    let choices = prompts.len() * common.n;
    let writer = Writer::new(&app, Shape::Text, common.stream, choices)
        .with_logprobs(top_logprobs.is_some())
        .with_usage(common.include_usage)
        .echoing(&echoed, common.n);
    let settings = TextRequest {
        prompt: Vec::new(),
        n: common.n,
        max_new_tokens: common.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(app.limits.new_tokens)),
        sampling: common.sampling,
        stop: common.stop,
        ignore_eos: common.ignore_eos,
        top_logprobs,
    };
    let prompts = prompts.into_iter().map(|prompt| prompt.ids).collect();
    let job = Job { prompts, settings, param: "prompt" };
    let updates = Updates::submit(&app, job, common.stream, started)?;
    if common.stream {
        return stream::answer(updates, writer).await;
    }
    Ok(super::json_response(writer.whole(updates).await?))
}

fn read(app: &App, mut fields: Fields) -> Result<Asked, ApiError> {
    app.check_model(&mut fields)?;
    let prompt = fields.take("prompt");
    let common = Common::read(&mut fields, &app.limits)?;
    let top_logprobs = fields.integer("logprobs", 0..=super::limits::MAX_TOP_LOGPROBS, "")?;
    let echo = fields.flag("echo")?;
    if echo && top_logprobs.is_some() {
        let what = "the prompt's own log-probabilities are told by `tinyllama score`";
        return Err(ApiError::unsupported("echo", &format!("together with `logprobs`: {what}")));
    }
    let n = common.n as u64;
    fields.refuse("best_of", "it may only equal `n`", |value| value.as_u64() == Some(n))?;
    let empty = |value: &Value| value.as_str().is_some_and(str::is_empty);
    fields.refuse("suffix", "these models do not fill gaps", empty)?;
    fields.finish()?;
    let missing = || ApiError::field("prompt", expected(PROMPT, &Value::Null));
    let prompts = prompts(app, prompt.ok_or_else(missing)?)?;
    let (all, limit) = (prompts.len() * common.n, app.limits.choices);
    if all > limit {
        let what = format!("{} prompts times `n` are {all} answers", prompts.len());
        let problem = format!("{what}, more than {limit} (`--max-choices`)");
        return Err(ApiError::field("prompt", problem));
    }
    Ok(Asked { common, prompts, top_logprobs, echo })
}

fn prompts(app: &App, value: Value) -> Result<Vec<Prompt>, ApiError> {
    match value {
        Value::String(text) => Ok(vec![of_text(app, "prompt", text)?]),
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            Ok(vec![of_ids(app, "prompt", &items)?])
        }
        Value::Array(items) if !items.is_empty() && items.len() <= app.limits.choices => {
            let one = |(i, item): (usize, Value)| {
                let name = format!("prompt[{i}]");
                match item {
                    Value::String(text) => of_text(app, &name, text),
                    Value::Array(ids) => of_ids(app, &name, &ids),
                    other => Err(ApiError::field(&name, expected("a prompt", &other))),
                }
            };
            items.into_iter().enumerate().map(one).collect()
        }
        Value::Array(items) if !items.is_empty() => {
            let (got, limit) = (items.len(), app.limits.choices);
            let problem = format!("expected up to {limit} prompts (`--max-choices`), got {got}");
            Err(ApiError::field("prompt", problem))
        }
        other => Err(ApiError::field("prompt", expected(PROMPT, &other))),
    }
}

fn of_text(app: &App, name: &str, text: String) -> Result<Prompt, ApiError> {
    let tokenizer = app.service.tokenizer();
    let encoded = super::at_length(|| tokenizer.encode_default(&text));
    let mut ids = encoded.map_err(|e| ApiError::field(name, format!("{e:#}")))?;
    if ids.is_empty() {
        // Without bos, eos is what separates documents.
        ids.extend(tokenizer.bos_id().or(tokenizer.eos_id()));
    }
    app.check_length(name, ids.len())?;
    Ok(Prompt { text: Some(text), ids })
}

fn of_ids(app: &App, name: &str, items: &[Value]) -> Result<Prompt, ApiError> {
    let vocabulary = app.service.tokenizer().vocab_size();
    app.check_length(name, items.len())?;
    let id = |(i, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|&id| (id as usize) < vocabulary).ok_or_else(|| {
            let what = format!("a token id from 0 to {}", vocabulary - 1);
            ApiError::field(&format!("{name}[{i}]"), expected(what, item))
        })
    };
    let ids: Vec<u32> = items.iter().enumerate().map(id).collect::<Result<_, _>>()?;
    if ids.is_empty() {
        return Err(ApiError::field(name, "expected at least one token id, got none"));
    }
    Ok(Prompt { text: None, ids })
}

impl Prompt {
    /// For `echo`.
    fn text(&self, app: &App) -> Result<String, ApiError> {
        match &self.text {
            Some(text) => Ok(text.clone()),
            None => {
                let text = app.service.tokenizer().decode(&self.ids);
                text.map_err(|e| ApiError::field("prompt", format!("{e:#}")))
            }
        }
    }
}
