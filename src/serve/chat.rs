//! `POST /v1/chat/completions`.

use super::App;
use super::body;
use super::error::ApiError;
use super::fields::{Fields, expected};
use super::limits::{Common, MAX_TOP_LOGPROBS};
use super::stream;
use super::updates::{Job, Updates};
use super::writer::{Shape, Writer};
use crate::generate::service::TextRequest;
use crate::tokenizer::chat_template::{ChatTemplate, Message, TemplateError};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;

const ROLES: &str = "`system`, `developer`, `user` or `assistant`";

/// What a request says beyond [`Common`].
struct Asked {
    common: Common,
    messages: Vec<Message>,
    top_logprobs: Option<usize>,
}

/// Answers a request.
pub async fn answer(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let fields = body::object(request, app.limits.body).await?;
    let Asked { common, messages, top_logprobs } = read(&app, fields)?;
    let template = app.template.as_ref().ok_or_else(|| {
        let message = "this model has no chat template; start the server with `--chat-template`, \
                       or use `/v1/completions`";
        ApiError::body("no_chat_template", message)
    })?;
    let prompt = prompt(&app, template, &messages)?;
    let mut stop = common.stop;
    stop.extend(template.stops().iter().cloned());
    let settings = TextRequest {
        prompt: Vec::new(),
        n: common.n,
        // By default as long as the model likes; the context ends it in any case.
        max_new_tokens: common.max_tokens.unwrap_or(app.limits.new_tokens),
        sampling: common.sampling,
        stop,
        ignore_eos: common.ignore_eos,
        top_logprobs,
    };
    let writer = Writer::new(&app, Shape::Chat, common.stream, common.n)
        .with_logprobs(top_logprobs.is_some())
        .with_usage(common.include_usage)
        .trimming(template.trims_reply());
    let job = Job { prompts: vec![prompt], settings, param: "messages" };
    let updates = Updates::submit(&app, job, common.stream, started)?;
    if common.stream {
        return stream::answer(updates, writer).await;
    }
    Ok(super::json_response(writer.whole(updates).await?))
}

/// Ids of the rendered conversation.
fn prompt(app: &App, template: &ChatTemplate, messages: &[Message]) -> Result<Vec<u32>, ApiError> {
    let text = template.render(messages, true).map_err(|error| match error {
        TemplateError::Refused(_) => {
            ApiError::field("messages", error).with_code("refused_by_template")
        }
        // Not the client's fault: the checkpoint's template does not work.
        _ => ApiError::internal("template_failed", error.to_string()),
    })?;
    let ids = super::at_length(|| template.encode(app.service.tokenizer(), &text));
    let ids = ids.map_err(|e| ApiError::field("messages", format!("{e:#}")))?;
    app.check_length("messages", ids.len())?;
    Ok(ids)
}

fn read(app: &App, mut fields: Fields) -> Result<Asked, ApiError> {
    app.check_model(&mut fields)?;
    let messages = fields.take("messages");
    let newer = fields.integer(
        "max_completion_tokens",
        1..=app.limits.new_tokens,
        " (`--max-new-tokens`)",
    )?;
    let mut common = Common::read(&mut fields, &app.limits)?;
    common.max_tokens = newer.or(common.max_tokens);
    let top_logprobs = top_logprobs(&mut fields)?;
    refuse_unsupported(&mut fields)?;
    fields.finish()?;
    let what = "a list of messages that is not empty";
    let messages = match messages {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        other => {
            let got = other.unwrap_or(Value::Null);
            return Err(ApiError::field("messages", expected(what, &got)));
        }
    };
    let messages = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    Ok(Asked { common, messages, top_logprobs })
}

/// `logprobs` asks for those of the tokens, `top_logprobs` for alternatives.
fn top_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.flag("logprobs")?;
    let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS, "")?;
    match (wanted, top) {
        (false, Some(1..)) => {
            Err(ApiError::field("top_logprobs", "only goes with `logprobs`: true"))
        }
        (wanted, top) => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let tools = "these models call no tools";
    fields.refuse("tools", tools, empty)?;
    fields.refuse("functions", tools, empty)?;
    let none = |value: &Value| value == "none" || value == "auto";
    fields.refuse("tool_choice", tools, none)?;
    fields.refuse("function_call", tools, none)?;
    let text = |value: &Value| value["type"] == "text";
    fields.refuse("response_format", "answers are plain text", text)?;
    let only_text =
        |value: &Value| value.as_array().is_some_and(|all| all.iter().all(|m| m == "text"));
    fields.refuse("modalities", "answers are plain text", only_text)?;
    fields.refuse("audio", "answers are plain text", |_| false)?;
    fields.refuse("prediction", "leave it out", |_| false)?;
    fields.refuse("web_search_options", "this server opens no other site", |_| false)?;
    fields.ignore(&["parallel_tool_calls", "reasoning_effort", "verbosity"]);
    Ok(())
}

fn message((i, value): (usize, Value)) -> Result<Message, ApiError> {
    let mut fields = Fields::within(&format!("messages[{i}]"), value)?;
    let role = fields.take("role").unwrap_or(Value::Null);
    let role = match role.as_str() {
        Some(role @ ("system" | "user" | "assistant")) => role,
        Some("developer") => "system",
        Some("tool" | "function") => {
            return Err(ApiError::unsupported(&fields.path("role"), "these models call no tools"));
        }
        _ => return Err(ApiError::field(&fields.path("role"), expected(ROLES, &role))),
    };
    let content = fields.take("content").unwrap_or(Value::Null);
    let path = fields.path("content");
    let content = match content {
        Value::String(text) => text,
        Value::Array(parts) => {
            let parts = parts.into_iter().enumerate().map(|(k, part)| text_part(&path, k, part));
            parts.collect::<Result<Vec<_>, _>>()?.concat()
        }
        other => {
            return Err(ApiError::field(
                &path,
                expected("a string or a list of text parts", &other),
            ));
        }
    };
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.refuse("tool_calls", "these models call no tools", empty)?;
    fields.refuse("function_call", "these models call no tools", |_| false)?;
    fields.refuse("audio", "messages are plain text", |_| false)?;
    fields.ignore(&["name", "refusal", "annotations"]);
    fields.finish()?;
    Ok(Message::new(role, content))
}

/// `{"type": "text", "text": ..}`
fn text_part(path: &str, k: usize, part: Value) -> Result<String, ApiError> {
    let mut fields = Fields::within(&format!("{path}[{k}]"), part)?;
    let kind = fields.take("type").unwrap_or(Value::Null);
    if kind != "text" {
        let (path, what) = (fields.path("type"), expected("`text`", &kind));
        return Err(ApiError::unsupported(&path, &format!("messages are plain text: {what}")));
    }
    let missing =
        || ApiError::field(&format!("{path}[{k}].text"), expected("a string", &Value::Null));
    let text = fields.string("text")?.ok_or_else(missing)?;
    fields.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn problem(value: Value) -> String {
        message((2, value)).err().unwrap().message
    }

    #[test]
    fn content_is_a_string_or_text_parts() {
        let parts = json!({"role": "developer", "content": [{"type": "text", "text": "a"},
            {"type": "text", "text": "b"}], "name": "me"});
        assert_eq!(message((0, parts)).unwrap(), Message::new("system", "ab"));
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]});
        let want = "`messages[2].content[0].type`: not supported here; messages are plain text: \
                    expected `text`, got the string \"image_url\"";
        assert_eq!(problem(image), want);
        let null = json!({"role": "assistant", "content": null});
        assert!(problem(null).starts_with("`messages[2].content`: expected a string"));
    }

    #[test]
    fn roles_are_checked() {
        let want = "`messages[2].role`: expected `system`, `developer`, `user` or `assistant`, got \
                    the string \"bot\"";
        assert_eq!(problem(json!({"role": "bot", "content": "x"})), want);
        assert!(problem(json!({"content": "x"})).ends_with("got null"));
        assert!(problem(json!({"role": "tool", "content": "x"})).contains("not supported here"));
        assert!(problem(json!("hi")).starts_with("`messages[2]`: expected an object"));
        assert!(
            problem(json!({"role": "user", "content": "x", "file": "/etc/passwd"}))
                .starts_with("`messages[2].file`: there is no such field")
        );
    }
}
