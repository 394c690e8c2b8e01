//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use crate::generate::service::Refused;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An answer that tells what was wrong.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP's status.
    pub status: StatusCode,
    /// OpenAI's class of errors.
    kind: &'static str,
    /// What a program can tell it by.
    pub code: Option<&'static str>,
    /// The field of the request that it is about.
    pub param: Option<String>,
    /// What, where, expected, got.
    pub message: String,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self { status, kind, code: Some(code), param: None, message: message.into() }
    }

    /// 400: a field that is not as it must be.
    pub fn field(name: &str, problem: impl std::fmt::Display) -> Self {
        let message = format!("`{name}`: {problem}");
        let (status, param) = (StatusCode::BAD_REQUEST, Some(name.into()));
        Self { status, kind: INVALID, code: None, param, message }
    }

    /// The same with something that a program can tell it by.
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// 400: a field that this server does nothing with, where doing nothing would change the answer.
    pub fn unsupported(name: &str, what: &str) -> Self {
        let error = Self::field(name, format_args!("not supported here; {what}"));
        error.with_code("unsupported_parameter")
    }

    /// 400: the body as a whole.
    pub fn body(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, code, message)
    }

    /// 400: the prompt is longer than something allows.
    pub fn too_long(param: &str, message: String) -> Self {
        let error = Self::body("context_length_exceeded", message);
        Self { param: Some(param.into()), ..error }
    }

    /// 401.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID, "invalid_api_key", message)
    }

    /// 404 of a path.
    pub fn no_endpoint(method: &str, path: &str) -> Self {
        let message = format!("there is no `{method} {path}` here; the API begins at `/v1`");
        Self::new(StatusCode::NOT_FOUND, INVALID, "unknown_url", message)
    }

    /// 404 of a model.
    pub fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("the model `{asked}` does not exist; this server has `{served}`");
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    /// 405.
    pub fn method(method: &str, path: &str) -> Self {
        let message = format!("`{path}` does not take `{method}`");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", message)
    }

    /// 408: the body did not come in time.
    pub fn slow_body(seconds: u64) -> Self {
        let message = format!("the body was not complete after {seconds} s");
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "request_timeout", message)
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes, the limit (`--max-body`)");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "request_too_large", message)
    }

    /// 415.
    pub fn media_type(got: &str) -> Self {
        let message =
            format!("expected `Content-Type: application/json`, got `{}`", shortened(got));
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type", message)
    }

    /// 500: nothing the client could have done better.
    pub fn internal(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, code, message)
    }

    /// 503.
    pub fn stopping() -> Self {
        let message = "the server is shutting down";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "shutting_down", message)
    }

    /// 504: the answer was not complete in time.
    pub fn out_of_time(seconds: f64) -> Self {
        let message = format!(
            "the answer was not complete after {seconds} s, the limit (`--request-timeout`)"
        );
        Self::new(StatusCode::GATEWAY_TIMEOUT, SERVER, "request_timeout", message)
    }

    /// What the engine said to a request; `param` names the field with the prompt.
    pub fn refused(refused: &Refused, param: &str) -> Self {
        match refused {
            Refused::QueueFull { .. } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                Self::new(status, "rate_limit_error", "queue_full", refused.to_string())
            }
            Refused::Stopping => Self::stopping(),
            Refused::TooLong { .. } => Self::too_long(param, refused.to_string()),
            Refused::Invalid(message) => Self::body("invalid_value", message.clone()),
        }
    }

    /// The body of the answer, or of the last event of a stream.
    pub fn json(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // The rest of the body may still be on its way.
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

/// A text as an error shows it: whole, or its beginning.
pub fn shortened(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_openais_shape() {
        let error = ApiError::field("top_p", "expected a number from 0 to 1, got 7");
        let want = json!({"error": {"message": "`top_p`: expected a number from 0 to 1, got 7",
            "type": "invalid_request_error", "param": "top_p", "code": null}});
        assert_eq!(error.json(), want);
        let full = ApiError::refused(&Refused::QueueFull { waiting: 3, limit: 3 }, "prompt");
        let response = full.into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        let long = ApiError::refused(&Refused::TooLong { prompt: 9, context: 8 }, "prompt");
        assert_eq!((long.status.as_u16(), long.code), (400, Some("context_length_exceeded")));
        assert_eq!(long.param.as_deref(), Some("prompt"));
    }

    #[test]
    fn long_texts_are_shortened_between_characters() {
        assert_eq!(shortened("short"), "short");
        assert_eq!(shortened(&"ä".repeat(61)), format!("{}...", "ä".repeat(60)));
    }
}
