//! The optional API key.

use super::error::ApiError;
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use std::hint::black_box;

/// A key, kept as its hash so that a comparison takes the same time whatever is wrong.
pub struct Key([u8; 32]);

impl Key {
    /// From its text.
    pub fn new(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    fn is(&self, text: &[u8]) -> bool {
        let other: [u8; 32] = Sha256::digest(text).into();
        let differences = self.0.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b));
        black_box(differences) == 0
    }
}

/// Whether a request may go on. The page and `/health` need no key: they tell nothing of anyone's text.
///
/// # Errors
/// 401.
pub fn check(key: Option<&Key>, endpoint: &str, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = key.filter(|_| !["/", "/health"].contains(&endpoint)) else { return Ok(()) };
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let given = given.and_then(|value| match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => Some(key),
        _ => None,
    });
    match given {
        Some(given) if key.is(given) => Ok(()),
        Some(_) => Err(ApiError::unauthorized("this is not the server's API key")),
        None => Err(ApiError::unauthorized(
            "this server asks for its API key: send `Authorization: Bearer KEY`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(given: Option<&str>, endpoint: &str) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some(given) = given {
            headers.insert(header::AUTHORIZATION, given.parse().unwrap());
        }
        let checked = check(Some(&Key::new("secret")), endpoint, &headers);
        checked.map_or_else(|e| e.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_the_key_opens_the_api() {
        assert_eq!(status(Some("Bearer secret"), "/v1/models"), 200);
        assert_eq!(status(Some("bearer secret"), "/v1/models"), 200);
        for wrong in
            [None, Some("Bearer secre"), Some("Bearer secret "), Some("Basic secret"), Some("")]
        {
            assert_eq!(status(wrong, "/v1/models"), 401, "{wrong:?}");
        }
        assert_eq!((status(None, "/health"), status(None, "/metrics")), (200, 401));
    }
}
