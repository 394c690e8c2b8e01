//! Where text may be cut without changing an id: between two characters that stand beside each
//! other in no token.
//!
//! Merging only ever joins neighbours into a token of the vocabulary. A token that reached across
//! such a place would hold both characters side by side, and there is none; so what is left of the
//! place and what is right of it merge as if they were alone. Llama's 32,000 tokens are cut so
//! before nearly every space, around digits, line breaks and most punctuation.

use super::merges::Table;
use super::sp_normalizer::SPACE;

/// Pairs of characters that stand side by side in some token. U+2581 is a space here, and a space
/// is U+2581: the two are one character to these tokenizers.
pub(super) struct Neighbours {
    /// By the first character; bit of the second.
    ascii: [[u64; 2]; 128],
    others: Table,
    /// Whether a space may stand behind another character within a word.
    spaces_stay: bool,
}

impl Neighbours {
    pub(super) fn new<'t>(tokens: impl Iterator<Item = &'t str>) -> Self {
        let mut ascii = [[0; 2]; 128];
        let mut others = Vec::new();
        for token in tokens {
            let chars = || token.chars().map(plain);
            for (a, b) in chars().zip(chars().skip(1)) {
                match a.max(b) {
                    0..128 => ascii[a as usize][b as usize / 64] |= 1 << (b % 64),
                    _ => others.push(([a, b], [0, 0])),
                }
            }
        }
        Self { ascii, others: Table::new(others.into_iter()), spaces_stay: true }
    }

    /// Cuts before every space too, whatever the tokens hold.
    pub(super) fn cut_before_spaces(&mut self) {
        for row in &mut self.ascii {
            row[0] &= !(1 << b' ');
        }
        self.spaces_stay = false;
    }

    #[inline]
    fn has_ascii(&self, a: u8, b: u8) -> bool {
        self.ascii[usize::from(a & 127)][usize::from(b >> 6 & 1)] >> (b & 63) & 1 != 0
    }

    /// Whether some token holds `a` followed by `b`.
    pub(super) fn has(&self, a: char, b: char) -> bool {
        let (a, b) = (plain(a), plain(b));
        match a.max(b) {
            0..128 => self.has_ascii(a as u8, b as u8),
            _ => self.others.has(a, b) && (self.spaces_stay || b != u32::from(' ')),
        }
    }

    /// End of the word that starts at byte `start` of `text`: the next cut.
    #[inline]
    pub(super) fn word_end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        let mut last = bytes[start];
        let mut at = start + 1;
        if last < 128 {
            while let Some(&byte) = bytes.get(at) {
                if byte >= 128 {
                    return self.wide_word_end(text, at - 1);
                }
                if !self.has_ascii(last, byte) {
                    return at;
                }
                last = byte;
                at += 1;
            }
            return at;
        }
        self.wide_word_end(text, start)
    }

    /// [`Self::word_end`] from any character of the word.
    fn wide_word_end(&self, text: &str, start: usize) -> usize {
        let mut chars = text[start..].char_indices();
        let mut last = chars.next().map_or(' ', |(_, c)| c);
        for (at, c) in chars {
            if !self.has(last, c) {
                return start + at;
            }
            last = c;
        }
        text.len()
    }
}

fn plain(c: char) -> u32 {
    if c == SPACE { u32::from(' ') } else { u32::from(c) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(tokens: &[&str], text: &'t str) -> Vec<&'t str> {
        let neighbours = Neighbours::new(tokens.iter().copied());
        let mut words = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let end = neighbours.word_end(text, at);
            words.push(&text[at..end]);
            at = end;
        }
        words
    }

    #[test]
    fn words_end_where_no_token_reaches_across() {
        let tokens = ["\u{2581}a", "ab", "bc", "\u{2581}\u{2581}", "\u{e9}b", "b\u{e9}"];
        assert_eq!(words(&tokens, "abc  a1\u{2581}ac"), ["abc", "  a", "1", "\u{2581}a", "c"]);
        assert_eq!(words(&tokens, "ab\u{e9}b\u{e9}a\u{e9}"), ["ab\u{e9}b\u{e9}", "a", "\u{e9}"]);
        assert_eq!(words(&tokens, "\u{4e2d}\u{4e2d}\n"), ["\u{4e2d}", "\u{4e2d}", "\n"]);
        assert_eq!(words(&["\u{4e2d}\u{4e2d}"], "\u{4e2d}\u{4e2d}\n"), ["\u{4e2d}\u{4e2d}", "\n"]);
    }
}
