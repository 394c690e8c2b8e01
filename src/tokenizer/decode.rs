//! From ids back to text, at once or piece by piece.
//!
//! A token is a run of *bytes*: one token may be half a character. Decoding joins the bytes and
//! reads them as UTF-8; a stream does the same but holds back an unfinished character, so the two
//! agree.

use super::Tokenizer;

/// What a token adds to the text.
pub(super) enum Token {
    /// Nothing: control and special tokens, and ids without a token.
    Skip,
    /// Bytes of text, whose leading space may be the dummy prefix.
    Text(Box<[u8]>),
    /// Bytes that are kept whatever stands before them.
    Verbatim(Box<[u8]>),
}

/// What happens to the space that encoding put before the text.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Leading {
    /// Encoding put none.
    Keep,
    /// One leading space goes.
    DropOne,
    /// One leading space of each token goes until there is text (SentencePiece's rule for models
    /// that remove extra white space).
    DropAll,
}

/// How many U+FFFD bytes become that are no UTF-8.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Invalid {
    /// One a byte (SentencePiece).
    EachByte,
    /// One a maximal unfinished character (`String::from_utf8_lossy`).
    Maximal,
}

/// A table from ids to bytes.
pub(super) struct Detokenizer {
    tokens: Vec<Token>,
    leading: Leading,
    invalid: Invalid,
}

/// Where a decoding stands.
#[derive(Clone, Default)]
struct State {
    /// The leading space has been dealt with.
    started: bool,
    /// Bytes not given out yet.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub(super) fn new(tokens: Vec<Token>, leading: Leading, invalid: Invalid) -> Self {
        Self { tokens, leading, invalid }
    }

    /// Text of all `ids`; ids without a token add nothing.
    pub(super) fn decode(&self, ids: &[u32]) -> String {
        let mut state = State::default();
        ids.iter().for_each(|&id| self.append(id, &mut state));
        self.take(&mut state, true)
    }

    /// Text of one token in the middle of a text.
    pub(super) fn decode_token(&self, id: u32) -> String {
        let mut state = State { started: true, pending: Vec::new() };
        self.append(id, &mut state);
        self.take(&mut state, true)
    }

    fn append(&self, id: u32, state: &mut State) {
        let (bytes, may_strip) = match self.tokens.get(id as usize) {
            None | Some(Token::Skip) => return,
            Some(Token::Text(bytes)) => (bytes, !state.started && self.leading != Leading::Keep),
            Some(Token::Verbatim(bytes)) => (bytes, false),
        };
        let bytes = match bytes.strip_prefix(b" ").filter(|_| may_strip) {
            Some(rest) => {
                state.started = self.leading == Leading::DropOne;
                rest
            }
            None => bytes,
        };
        state.started |= !bytes.is_empty();
        state.pending.extend_from_slice(bytes);
    }

    /// Takes the finished characters of `state`; at the end of the text (`all`) everything.
    fn take(&self, state: &mut State, all: bool) -> String {
        let mut out = String::new();
        let mut rest = state.pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, tail) = rest.split_at(error.valid_up_to());
            out.push_str(std::str::from_utf8(valid).unwrap_or_default());
            rest = tail;
            let bad = match error.error_len() {
                None if !all => break,
                None => tail.len(),
                Some(len) => len,
            };
            out.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[if self.invalid == Invalid::EachByte { 1 } else { bad }..];
        }
        let kept = rest.len();
        state.pending.drain(..state.pending.len() - kept);
        out
    }
}

/// Decodes ids one at a time, for text that is shown while it is generated.
///
/// The pieces given out, joined, are [`Tokenizer::decode`] of all ids pushed.
#[derive(Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    state: State,
    /// For decoders without a byte table: all ids, and how much of their text is out.
    ids: Vec<u32>,
    given: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let mut stream =
            Self { tokenizer, state: State::default(), ids: Vec::new(), given: String::new() };
        for &id in prompt {
            stream.push(id);
        }
        stream
    }

    /// Adds a token; returns the text that is now certain, if any. Ids outside the vocabulary (rows
    /// of a padded output layer) and special tokens add nothing.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let text = match self.tokenizer.table() {
            Some(table) => {
                table.append(id, &mut self.state);
                table.take(&mut self.state, false)
            }
            None => {
                self.ids.push(id);
                self.slow(false)
            }
        };
        (!text.is_empty()).then_some(text)
    }

    /// Ends the text: gives out an unfinished character as U+FFFD.
    pub fn finish(mut self) -> Option<String> {
        let text = match self.tokenizer.table() {
            Some(table) => table.take(&mut self.state, true),
            None => self.slow(true),
        };
        (!text.is_empty()).then_some(text)
    }

    /// Decodes everything again and gives out what is new: O(n) a token, for rare decoders only.
    fn slow(&mut self, all: bool) -> String {
        let text = self.tokenizer.decode_lossy(&self.ids);
        let certain = if all { text.as_str() } else { text.trim_end_matches('\u{fffd}') };
        let new = certain.strip_prefix(self.given.as_str()).unwrap_or_default().to_string();
        self.given.push_str(&new);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(leading: Leading, invalid: Invalid) -> Detokenizer {
        let text = |s: &str| Token::Text(s.as_bytes().into());
        let mut tokens = vec![Token::Skip, text(" a"), text(" "), text("b"), text("\u{20ac}")];
        tokens.extend((0..=255u8).map(|b| Token::Verbatim([b].into())));
        Detokenizer::new(tokens, leading, invalid)
    }

    #[test]
    fn the_dummy_prefix_goes_once_or_wholly_or_not_at_all() {
        let ids = [0, 2, 2, 1];
        assert_eq!(table(Leading::Keep, Invalid::Maximal).decode(&ids), "   a");
        assert_eq!(table(Leading::DropOne, Invalid::Maximal).decode(&ids), "  a");
        assert_eq!(table(Leading::DropAll, Invalid::Maximal).decode(&ids), "a");
    }

    #[test]
    fn broken_characters_become_one_mark_a_byte_or_one_a_character() {
        let ids = [5 + 0xe4, 5 + 0xbd, 3, 5 + 0xf0];
        assert_eq!(
            table(Leading::Keep, Invalid::EachByte).decode(&ids),
            "\u{fffd}\u{fffd}b\u{fffd}"
        );
        assert_eq!(table(Leading::Keep, Invalid::Maximal).decode(&ids), "\u{fffd}b\u{fffd}");
    }
}
