//! The answers, field by field as OpenAI has them.

use serde::Serialize;
use serde_json::{Map, Value};

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl Usage {
    /// From prompt and new tokens.
    pub fn new((prompt_tokens, completion_tokens): (usize, usize)) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// What answers and events begin with.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    pub id: String,
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub system_fingerprint: &'static str,
}

/// An answer, or an event of a stream.
#[derive(Serialize)]
pub struct Answer<'a, C> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<C>,
    /// `Some(None)`: null, as in all events but the last where usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// A choice of `/v1/completions`, whole or in pieces.
#[derive(Serialize)]
pub struct TextChoice {
    pub text: String,
    pub index: usize,
    pub logprobs: Option<TextLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// Log-probabilities of `/v1/completions`; one entry a token in each list.
#[derive(Default, Serialize)]
pub struct TextLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<f64>,
    /// Token -> log-probability, best first.
    pub top_logprobs: Vec<Map<String, Value>>,
    /// Characters before the token.
    pub text_offset: Vec<usize>,
}

/// A choice of `/v1/chat/completions`.
#[derive(Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: Reply,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// What the assistant said.
#[derive(Serialize)]
pub struct Reply {
    pub role: &'static str,
    pub content: String,
    /// Always null; OpenAI's clients look for it.
    pub refusal: Option<String>,
}

/// A piece of a choice of `/v1/chat/completions`.
#[derive(Serialize)]
pub struct ChatPiece {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// What is new.
#[derive(Default, Serialize)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities of `/v1/chat/completions`.
#[derive(Default, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    /// Always null.
    pub refusal: Option<String>,
}

/// A token and its alternatives.
#[derive(Serialize)]
pub struct ChatToken {
    #[serde(flatten)]
    pub token: Likely,
    pub top_logprobs: Vec<Likely>,
}

/// A token and how likely it is.
#[derive(Serialize)]
pub struct Likely {
    pub token: String,
    pub logprob: f64,
    /// `None` where the token is a part of a character.
    pub bytes: Option<Vec<u8>>,
}
