//! Log-probabilities in the two shapes that OpenAI has for them.

use super::api::{ChatLogprobs, ChatToken, Likely, TextLogprobs};
use crate::generate::service::TokenInfo;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value};

/// The text of a token and its bytes: its own spelling where it is no text of its own, such as a special token or a part
/// of a character.
fn text_and_bytes(tokenizer: &Tokenizer, id: u32) -> (String, Option<Vec<u8>>) {
    let text = tokenizer.decode_token(id).unwrap_or_default();
    if !text.is_empty() && !text.contains('\u{fffd}') {
        let bytes = text.clone().into_bytes();
        return (text, Some(bytes));
    }
    let spelling = tokenizer.token(id).unwrap_or(text);
    let byte = spelling.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    let bytes = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()).map(|byte| vec![byte]);
    (spelling, bytes)
}

fn likely(tokenizer: &Tokenizer, id: u32, logprob: f64) -> Likely {
    let (token, bytes) = text_and_bytes(tokenizer, id);
    Likely { token, logprob: finite(logprob), bytes }
}

/// JSON has no infinity; OpenAI writes this in its place.
fn finite(logprob: f64) -> f64 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// For `/v1/chat/completions`.
pub fn of_chat(tokenizer: &Tokenizer, tokens: &[TokenInfo]) -> ChatLogprobs {
    let token = |info: &TokenInfo| ChatToken {
        token: likely(tokenizer, info.id, info.logprob),
        top_logprobs: info.top.iter().map(|&(id, p)| likely(tokenizer, id, p)).collect(),
    };
    ChatLogprobs { content: tokens.iter().map(token).collect(), refusal: None }
}

/// For `/v1/completions`; `offset` is the number of characters before, and moves on.
pub fn of_text(tokenizer: &Tokenizer, tokens: &[TokenInfo], offset: &mut usize) -> TextLogprobs {
    let mut all = TextLogprobs::default();
    for info in tokens {
        let (text, _) = text_and_bytes(tokenizer, info.id);
        all.text_offset.push(*offset);
        *offset += text.chars().count();
        let mut top = Map::new();
        for &(id, logprob) in &info.top {
            // Two ids may have the same text: the more likely one is told.
            let entry = top.entry(text_and_bytes(tokenizer, id).0);
            entry.or_insert_with(|| Value::from(finite(logprob)));
        }
        all.tokens.push(text);
        all.token_logprobs.push(finite(info.logprob));
        all.top_logprobs.push(top);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::service::scripted::byte_tokenizer;

    #[test]
    fn tokens_are_told_by_their_text_or_their_spelling() {
        let tokenizer = byte_tokenizer();
        let id = |byte: u8| u32::from(byte) + 2;
        assert_eq!(text_and_bytes(&tokenizer, id(b'a')), ("a".into(), Some(b"a".to_vec())));
        assert_eq!(text_and_bytes(&tokenizer, 1), ("</s>".into(), None));
        let (spelling, bytes) = text_and_bytes(&tokenizer, id(0xc3)); // the first half of a letter
        assert_eq!((spelling.chars().count(), bytes), (1, None));
    }

    #[test]
    fn offsets_count_characters() {
        let tokenizer = byte_tokenizer();
        let token = |byte: u8| TokenInfo {
            id: u32::from(byte) + 2,
            logprob: f64::NEG_INFINITY,
            top: vec![(u32::from(b'x') + 2, -0.5)],
        };
        let mut offset = 7;
        let all = of_text(&tokenizer, &[token(b'a'), token(b'b')], &mut offset);
        assert_eq!((all.text_offset, offset), (vec![7, 8], 9));
        assert_eq!(all.token_logprobs, [-9999.0, -9999.0]);
        assert_eq!(all.top_logprobs[0]["x"], -0.5);
    }
}
