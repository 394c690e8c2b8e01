//! The fast way from text to ids, for tokenizers of the Llama and GPT families.
//!
//! Text is cut into words at places that change no id (`cuts`) or where the file's pattern says so
//! (`splitter`); a word's ids come from a cache (`word_cache`) or are merged (`merges`). Spaces are
//! never rewritten: a space counts as U+2581 in the tables. What the tables cannot say exactly is
//! not for this way: [`Fast::encode`] then declines, and the slow way encodes the text.

use super::added::{Added, Part};
use super::cuts::Neighbours;
use super::merges::{Merges, Table, Work};
use super::sp_normalizer::SPACE;
use super::splitter::Splitter;
use super::word_cache::{Ids, WordCache};
use std::collections::HashMap;

/// What an encoder keeps between texts.
#[derive(Default)]
pub(super) struct State {
    cache: WordCache,
    work: Work,
    scratch: String,
}

impl State {
    /// After a word of millions of characters its buffers are not kept.
    fn give_back(&mut self) {
        if self.work.symbols.capacity().max(self.scratch.capacity()) > LARGE {
            (self.work, self.scratch) = Default::default();
        }
    }
}

/// Symbols, or bytes of text, whose buffers an encoder keeps.
const LARGE: usize = 1 << 18;

/// A tokenizer in tables.
pub(super) struct Fast {
    pub(super) merges: Merges,
    pub(super) symbols: Symbols,
    pub(super) words: Words,
    pub(super) prefix: Prefix,
    pub(super) added: Added,
    /// The file normalises to NFC: texts that are not in it yet are declined.
    pub(super) nfc: bool,
    /// Tokens that win over merging where they are a whole word (`ignore_merges`).
    pub(super) whole: HashMap<Vec<u8>, u32>,
}

/// What a word is merged from.
pub(super) enum Symbols {
    Chars(Box<Chars>),
    /// Ids of the bytes.
    Bytes(Box<[u32; 256]>),
}

/// Ids of characters; what is no token is spelt in bytes.
pub(super) struct Chars {
    ascii: [u32; 128],
    others: Table,
    bytes: [u32; 256],
}

/// How text is cut.
pub(super) enum Words {
    Cut(Box<Neighbours>),
    Split(Splitter),
}

/// Where a space is put before text.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Prefix {
    Never,
    /// Before the text and before what follows an added token.
    Always,
    /// The same, but not where there is a space.
    UnlessSpace,
    /// Before the text alone, unless it starts with a space.
    FirstUnlessSpace,
}

const NO_ID: u32 = u32::MAX;

impl Chars {
    /// From the tokens of one character and the tokens of the 256 bytes.
    pub(super) fn new(tokens: impl Iterator<Item = (char, u32)>, bytes: [u32; 256]) -> Self {
        let mut ascii = [NO_ID; 128];
        let mut others = Vec::new();
        for (c, id) in tokens {
            match c {
                ' ' => {} // never met: it is U+2581 by then
                SPACE => ascii[usize::from(b' ')] = id,
                '\0'..='\x7f' => ascii[c as usize] = id,
                _ => others.push(([u32::from(c), 0], [id, 0])),
            }
        }
        Self { ascii, others: Table::new(others.into_iter()), bytes }
    }

    fn spell(&self, word: &str, out: &mut Vec<u32>) {
        for c in word.chars() {
            let c = if c == SPACE { ' ' } else { c };
            let id = match self.ascii.get(c as usize) {
                Some(&id) => id,
                None => self.others.get(u32::from(c), 0)[0],
            };
            if id != NO_ID {
                out.push(id);
                continue;
            }
            let c = if c == ' ' { SPACE } else { c };
            let mut buffer = [0; 4];
            out.extend(c.encode_utf8(&mut buffer).bytes().map(|b| self.bytes[usize::from(b)]));
        }
    }
}

impl Fast {
    /// Appends the ids of `text`; `false`, and an unfinished `out`, if this text is for the slow
    /// way. A `continued` text gets no space before it.
    pub(super) fn encode(
        &self,
        text: &str,
        continued: bool,
        state: &mut State,
        out: &mut Vec<u32>,
    ) -> bool {
        if !self.added.leaves_alone(text) || self.nfc && !is_nfc(text) {
            return false;
        }
        state.cache.warm_up();
        let mut out = Ids::new(out);
        self.added.parts(text, &mut |part| match part {
            Part::Token(id) => out.extend(&[id]),
            Part::Text(text, first) => {
                let space = self.wants_space(text, first) && !(first && continued);
                self.encode_part(text, space, state, &mut out);
            }
        });
        out.end();
        state.give_back();
        true
    }

    /// Whether the slow way encodes a continued text right too.
    pub(super) fn needs_no_prefix(&self) -> bool {
        self.prefix == Prefix::Never
    }

    /// See [`super::Tokenizer::safe_cut`].
    pub(super) fn safe_cut(&self, text: &str) -> Option<usize> {
        let added = self.added.plain()?;
        let touches_added = |left: char, right: char| {
            added.iter().any(|token| {
                token.ends_with(left)
                    || token.chars().zip(token.chars().skip(1)).any(|pair| pair == (left, right))
            })
        };
        let mut chars = text.char_indices().rev();
        let (mut at, mut right) = chars.next()?;
        for (left_at, left) in chars {
            let cut = match &self.words {
                Words::Cut(neighbours) => !neighbours.has(left, right),
                Words::Split(_) => right == ' ' && !left.is_whitespace(),
            };
            if cut && !(self.nfc && left >= '\u{300}') && !touches_added(left, right) {
                return Some(at);
            }
            (at, right) = (left_at, left);
        }
        None
    }

    fn wants_space(&self, text: &str, first: bool) -> bool {
        let spaced = || match self.symbols {
            Symbols::Chars(_) => text.starts_with([' ', SPACE]),
            Symbols::Bytes(_) => text.starts_with(' '),
        };
        match self.prefix {
            Prefix::Never => false,
            Prefix::Always => true,
            Prefix::UnlessSpace => !spaced(),
            Prefix::FirstUnlessSpace => first && !spaced(),
        }
    }

    fn encode_part(&self, text: &str, space: bool, state: &mut State, out: &mut Ids<'_>) {
        match &self.words {
            Words::Cut(neighbours) => {
                let mut start = 0;
                if space {
                    start = neighbours.word_end(text, 0);
                    let spaced = spaced(&text[..start], state);
                    self.encode_word(&spaced, (0, spaced.len()), state, out);
                    state.scratch = spaced;
                }
                self.encode_words(text, start, state, out, |at| neighbours.word_end(text, at));
            }
            Words::Split(splitter) if space => {
                let spaced = spaced(text, state);
                let word_end = |at| splitter.word_end(&spaced, at);
                self.encode_words(&spaced, 0, state, out, word_end);
                state.scratch = spaced;
            }
            Words::Split(splitter) => {
                self.encode_words(text, 0, state, out, |at| splitter.word_end(text, at));
            }
        }
    }

    #[inline]
    fn encode_words(
        &self,
        text: &str,
        start: usize,
        state: &mut State,
        out: &mut Ids<'_>,
        word_end: impl Fn(usize) -> usize,
    ) {
        let mut start = start;
        while start < text.len() {
            let end = word_end(start);
            self.encode_word(text, (start, end), state, out);
            start = end;
        }
    }

    #[inline]
    fn encode_word(
        &self,
        text: &str,
        (start, end): (usize, usize),
        state: &mut State,
        out: &mut Ids<'_>,
    ) {
        let State { cache, work, .. } = state;
        cache.encode((text.as_bytes(), start, end), out, || self.merge(&text[start..end], work));
    }

    fn merge<'w>(&self, word: &str, work: &'w mut Work) -> &'w [u32] {
        work.symbols.clear();
        if let Some(&id) = self.whole.get(word.as_bytes()) {
            work.symbols.push(id);
            return &work.symbols;
        }
        match &self.symbols {
            Symbols::Chars(chars) => chars.spell(word, &mut work.symbols),
            Symbols::Bytes(ids) => work.symbols.extend(word.bytes().map(|b| ids[usize::from(b)])),
        }
        self.merges.merge(work);
        &work.symbols
    }
}

/// `text` behind a space, in the memory of `state.scratch`.
fn spaced(text: &str, state: &mut State) -> String {
    let mut scratch = std::mem::take(&mut state.scratch);
    scratch.clear();
    scratch.push(' ');
    scratch.push_str(text);
    scratch
}

/// Whether NFC leaves `text` as it is.
fn is_nfc(text: &str) -> bool {
    let below_u0300 = |&byte: &u8| byte < 0xcc;
    text.as_bytes().iter().all(below_u0300) || unicode_normalization_alignments::is_nfc(text)
}
