//! SentencePiece's text normaliser: character rules, white space, user-defined symbols.
//!
//! The rules of a `tokenizer.model` are a compiled map: a double-array trie (the Darts layout) over
//! UTF-8 bytes, whose values point into a table of replacements. At each position the longest rule
//! wins. Llama's model is `identity`: it has no rules. Every constant here is SentencePiece's.

use std::collections::HashMap;

/// SentencePiece writes a space as U+2581.
pub(super) const SPACE: char = '\u{2581}';

/// Symbols a model's author declared: never split, never merged, exempt from character rules.
#[derive(Default)]
pub(super) struct UserSymbols {
    /// First byte -> symbols that start with it, longest first.
    by_first_byte: HashMap<u8, Vec<(String, u32)>>,
}

impl UserSymbols {
    pub(super) fn new(symbols: impl Iterator<Item = (String, u32)>) -> Self {
        let mut by_first_byte: HashMap<u8, Vec<(String, u32)>> = HashMap::new();
        for (text, id) in symbols {
            if let Some(&byte) = text.as_bytes().first() {
                by_first_byte.entry(byte).or_default().push((text, id));
            }
        }
        for list in by_first_byte.values_mut() {
            list.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        }
        Self { by_first_byte }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_first_byte.is_empty()
    }

    /// Length in bytes and id of the longest symbol that `text` starts with.
    pub(super) fn longest(&self, text: &str) -> Option<(usize, u32)> {
        let list = self.by_first_byte.get(text.as_bytes().first()?)?;
        list.iter()
            .find(|(symbol, _)| text.starts_with(symbol.as_str()))
            .map(|(s, id)| (s.len(), *id))
    }
}

/// Character rules compiled by SentencePiece (`precompiled_charsmap`).
#[derive(Default)]
pub(super) struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    /// `[u32 size of the trie in bytes][trie][replacements, each ended by NUL]`; `None` if
    /// malformed.
    pub(super) fn parse(blob: &[u8]) -> Option<Self> {
        if blob.is_empty() {
            return Some(Self::default());
        }
        let (head, rest) = blob.split_first_chunk::<4>()?;
        let (trie, replacements) = rest.split_at_checked(u32::from_le_bytes(*head) as usize)?;
        let (units, tail) = trie.as_chunks::<4>();
        let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = String::from_utf8(replacements.to_vec()).ok()?;
        (tail.is_empty() && !units.is_empty()).then_some(Self { units, replacements })
    }

    fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// The longest rule that matches at the start of `text`: (bytes consumed, replacement).
    ///
    /// A unit of the trie holds: bit 31 value flag, bits 30-10 offset, bit 9 wide offset, bit 8
    /// "has a value", bits 7-0 label. A child sits at `parent ^ offset ^ label`.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut best = None;
        let mut node = offset(*self.units.first()?);
        for (i, &byte) in text.as_bytes().iter().enumerate() {
            node ^= byte as usize;
            let Some(&unit) = self.units.get(node) else {
                break;
            };
            if unit & ((1 << 31) | 0xff) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit & (1 << 8) != 0 && text.is_char_boundary(i + 1) {
                let value = self.units.get(node).map(|leaf| (leaf & 0x7fff_ffff) as usize);
                let tail = value.and_then(|start| self.replacements.get(start..));
                if let Some(tail) = tail {
                    best = Some((i + 1, tail.split('\0').next().unwrap_or("")));
                }
            }
        }
        best
    }
}

/// What a model does to text before merging.
#[derive(Default)]
pub(super) struct Normalizer {
    pub(super) rules: CharsMap,
    /// Write a space before the text, so that a word is the same token at its start and within.
    pub(super) add_dummy_prefix: bool,
    /// Drop leading and trailing spaces and shrink runs of spaces to one.
    pub(super) remove_extra_whitespaces: bool,
    pub(super) symbols: UserSymbols,
}

impl Normalizer {
    /// Whether no character is rewritten.
    pub(super) fn rules_are_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Normalised text with every space written as U+2581; "" gives "".
    pub(super) fn normalize(&self, text: &str) -> String {
        let mut text = text;
        while self.remove_extra_whitespaces && !text.is_empty() {
            let (" ", used) = self.next(text) else { break };
            text = &text[used..];
        }
        if text.is_empty() {
            return String::new();
        }
        let mut out = String::with_capacity(text.len() + text.len() / 4 + 3);
        if self.add_dummy_prefix {
            out.push(SPACE);
        }
        if self.rules.is_empty() && !self.remove_extra_whitespaces {
            out.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
            return out;
        }
        self.apply_rules(text, &mut out);
        if self.remove_extra_whitespaces {
            out.truncate(out.trim_end_matches(SPACE).len());
        }
        out
    }

    fn apply_rules(&self, mut text: &str, out: &mut String) {
        let mut after_space = self.remove_extra_whitespaces;
        while !text.is_empty() {
            let (mut piece, used) = self.next(text);
            if after_space {
                piece = piece.trim_start_matches(' ');
            }
            if !piece.is_empty() {
                out.extend(piece.chars().map(|c| if c == ' ' { SPACE } else { c }));
                after_space = self.remove_extra_whitespaces && piece.ends_with(' ');
            }
            text = &text[used..];
        }
    }

    /// What the start of `text` becomes, and how many of its bytes that consumes (at least 1).
    fn next<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some((len, _)) = self.symbols.longest(text) {
            return (&text[..len], len);
        }
        if let Some((len, replacement)) = self.rules.longest(text) {
            return (replacement, len);
        }
        let len = text.chars().next().map_or(text.len(), char::len_utf8);
        (&text[..len], len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_become_u2581_after_one_dummy_prefix() {
        let n = Normalizer { add_dummy_prefix: true, ..Default::default() };
        assert_eq!(n.normalize(" a  b\n"), "\u{2581}\u{2581}a\u{2581}\u{2581}b\n");
        assert_eq!(n.normalize(""), "");
    }

    #[test]
    fn extra_spaces_go_when_the_model_says_so() {
        let n = Normalizer { remove_extra_whitespaces: true, ..Default::default() };
        assert_eq!(n.normalize("  a   b "), "a\u{2581}b");
        assert_eq!(n.normalize("   "), "");
    }

    #[test]
    fn the_longest_user_symbol_wins() {
        let symbols = ["<a>", "<a>>", "<"].map(str::to_string);
        let s = UserSymbols::new(symbols.into_iter().zip(7u32..));
        assert_eq!(s.longest("<a>>x"), Some((4, 8)));
        assert_eq!(s.longest("<b"), Some((1, 9)));
        assert_eq!(s.longest("x<"), None);
    }

    #[test]
    fn a_malformed_rule_map_is_refused_and_a_hostile_one_does_not_panic() {
        assert!(CharsMap::parse(&[9, 0, 0, 0, 1]).is_none());
        assert!(CharsMap::parse(&[3, 0, 0, 0, 1, 2, 3]).is_none());
        let mut blob = 1024u32.to_le_bytes().to_vec();
        blob.extend((0..1024u32).map(|i| (i * 37) as u8));
        if let Some(map) = CharsMap::parse(&blob) {
            for text in ["a", "\u{e9}\u{301}", "\0\0\0", "zzzz"] {
                let _ = map.longest(text);
            }
        }
    }
}
