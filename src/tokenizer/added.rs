//! Added tokens of a `tokenizer.json`: strings such as `</s>` that are one token wherever a text
//! has them, as the `tokenizers` crate finds them.
//!
//! Plain ones are found here, leftmost and longest first: those with `normalized: false` in the
//! text as it is, then the others in what is left. Those that take white space with them, must be
//! whole words, or are matched against text that the normaliser changed are left to the crate: a
//! text in which one may occur is not for the fast way ([`Added::leaves_alone`]).

use super::sp_normalizer::SPACE;
use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

/// What the normaliser of a file does to text, as far as added tokens are concerned.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Normalized {
    /// Nothing, or nothing in texts that take the fast way.
    Same,
    /// Spaces become U+2581, and there may be one before the text.
    Spaces,
}

/// The added tokens of a file.
pub(super) struct Added {
    raw: Option<Finder>,
    rest: Option<Finder>,
    /// Strings without which no token that is left to the crate can match.
    suspects: Option<Finder>,
    /// All tokens, if all are found here.
    plain: Option<Vec<String>>,
}

struct Finder {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

/// A part of a text.
pub(super) enum Part<'t> {
    Token(u32),
    /// Text between tokens, and whether it starts the text.
    Text(&'t str, bool),
}

impl Added {
    /// `None` if they cannot be searched for.
    pub(super) fn new(tokens: Vec<(u32, AddedToken)>, normalized: Normalized) -> Option<Self> {
        let (mut raw, mut rest, mut suspects) = (Vec::new(), Vec::new(), Vec::new());
        let mut plain = Vec::new();
        for (id, token) in tokens.into_iter().filter(|(_, token)| !token.content.is_empty()) {
            let flags = token.single_word || token.lstrip || token.rstrip;
            let changed = token.normalized
                && match normalized {
                    Normalized::Same => !token.content.is_ascii(),
                    Normalized::Spaces => true,
                };
            if flags || changed {
                suspects.push((core(&token.content)?, id));
                continue;
            }
            plain.push(token.content.clone());
            if token.normalized { &mut rest } else { &mut raw }.push((token.content, id));
        }
        let plain = suspects.is_empty().then_some(plain);
        Some(Self {
            raw: Finder::new(raw)?,
            rest: Finder::new(rest)?,
            suspects: Finder::new(suspects)?,
            plain,
        })
    }

    /// No added tokens.
    pub(super) fn none() -> Self {
        Self { raw: None, rest: None, suspects: None, plain: Some(Vec::new()) }
    }

    /// Whether no token that only the crate knows how to find is in `text`.
    pub(super) fn leaves_alone(&self, text: &str) -> bool {
        !self.suspects.as_ref().is_some_and(|finder| finder.automaton.is_match(text))
    }

    /// All tokens, if no text is left to the crate on their account.
    pub(super) fn plain(&self) -> Option<&[String]> {
        self.plain.as_deref()
    }

    /// Calls `each` for the parts of `text` in order; none is empty.
    pub(super) fn parts<'t>(&self, text: &'t str, each: &mut impl FnMut(Part<'t>)) {
        find(self.raw.as_ref(), text, true, &mut |part| match part {
            Part::Text(text, first) => find(self.rest.as_ref(), text, first, each),
            token => each(token),
        });
    }
}

fn find<'t>(finder: Option<&Finder>, text: &'t str, first: bool, each: &mut impl FnMut(Part<'t>)) {
    let mut at = 0;
    let text_until = |at: usize, end: usize, each: &mut dyn FnMut(Part<'t>)| {
        if at < end {
            each(Part::Text(&text[at..end], first && at == 0));
        }
    };
    if let Some(finder) = finder {
        for found in finder.automaton.find_iter(text) {
            text_until(at, found.start(), each);
            each(Part::Token(finder.ids[found.pattern().as_usize()]));
            at = found.end();
        }
    }
    text_until(at, text.len(), each);
}

impl Finder {
    /// The inner `None` if there is nothing to find.
    fn new(patterns: Vec<(String, u32)>) -> Option<Option<Self>> {
        if patterns.is_empty() {
            return Some(None);
        }
        let (patterns, ids): (Vec<String>, Vec<u32>) = patterns.into_iter().unzip();
        let mut builder = AhoCorasick::builder();
        let automaton = builder.match_kind(MatchKind::LeftmostLongest).build(&patterns).ok()?;
        Some(Some(Self { automaton, ids }))
    }
}

/// The longest part of a token without spaces, which normalising changes; `None` if it has none,
/// or if characters could be written in more than one way.
fn core(content: &str) -> Option<String> {
    let longest = content.split([' ', SPACE]).max_by_key(|part| part.len())?;
    (!longest.is_empty() && longest.is_ascii()).then(|| longest.to_string())
}
