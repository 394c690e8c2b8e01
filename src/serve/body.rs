//! A request's body: bounded in size and time, UTF-8, a JSON object.

use super::error::ApiError;
use super::fields::{Fields, expected};
use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use serde_json::Value;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::timeout;

/// How long a body may take to come.
pub const BODY_TIME: Duration = Duration::from_secs(30);
/// So much of a body that is too large is read before the answer, as some clients read nothing while they write.
const DRAINED: usize = 16 << 20;

/// Reads the body.
///
/// # Errors
/// 400, 408, 413, 415.
pub async fn object(request: Request, limit: usize) -> Result<Fields, ApiError> {
    let (parts, mut body) = request.into_parts();
    check_type(&parts.headers)?;
    let read = timeout(BODY_TIME, read(&mut body, limit)).await;
    parse(read.map_err(|_| ApiError::slow_body(BODY_TIME.as_secs()))??)
}

/// Other types are refused for a reason: a page of another site can send those unasked, and JSON not.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Err(ApiError::media_type("nothing"));
    };
    let value = String::from_utf8_lossy(value.as_bytes());
    let kind = value.split(';').next().unwrap_or_default().trim();
    match kind.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(ApiError::media_type(&value)),
    }
}

async fn read(body: &mut Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let announced = body.size_hint().exact().unwrap_or(0);
    let mut bytes = Vec::with_capacity((announced as usize).min(limit));
    let mut seen = 0;
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        let frame = match frame {
            None if seen > limit => return Err(ApiError::body_too_large(limit)),
            None => return Ok(bytes),
            Some(frame) => frame.map_err(|e| {
                ApiError::body("broken_body", format!("the body did not come whole: {e}"))
            })?,
        };
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len();
        if seen <= limit {
            bytes.extend_from_slice(&data);
        } else if seen > limit.saturating_add(DRAINED) || announced > (limit + DRAINED) as u64 {
            return Err(ApiError::body_too_large(limit));
        }
    }
}

fn parse(bytes: Vec<u8>) -> Result<Fields, ApiError> {
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        ApiError::body("invalid_utf8", format!("the body is no valid UTF-8 at byte {at}"))
    })?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Fields::new(object)),
        Ok(other) => {
            let message = format!("the body: {}", expected("an object", &other));
            Err(ApiError::body("invalid_json", message))
        }
        Err(e) => Err(ApiError::body("invalid_json", format!("the body is no valid JSON: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: &[u8]) -> String {
        parse(bytes.to_vec()).err().unwrap().message
    }

    #[test]
    fn bodies_that_are_no_json_object_are_told_why() {
        assert!(message(b"{\"a\": }").contains("expected value at line 1 column 7"));
        assert!(message(b"").contains("EOF while parsing"), "{}", message(b""));
        assert_eq!(message(b"{\"a\": \"\xff\"}"), "the body is no valid UTF-8 at byte 7");
        assert_eq!(message(b"[1]"), "the body: expected an object, got a list of 1 items");
        let deep = "[".repeat(100_000);
        assert!(
            message(deep.as_bytes()).contains("recursion limit"),
            "{}",
            message(deep.as_bytes())
        );
        assert!(message(b"{\"a\": \"\\ud800\"}").contains("no valid JSON"));
    }

    #[test]
    fn only_json_is_taken() {
        let typed = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
            check_type(&headers)
        };
        assert!(typed("application/json").is_ok());
        assert!(typed("Application/JSON; charset=utf-8").is_ok());
        assert_eq!(typed("text/plain").err().unwrap().status, 415);
        assert_eq!(check_type(&HeaderMap::new()).err().unwrap().status, 415);
    }
}
