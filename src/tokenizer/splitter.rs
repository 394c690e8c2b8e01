//! The patterns by which GPT-2's and Llama 3's tokenizers cut text into words, without a regex
//! engine. The tests compare every character and mixed texts with the engine that defines them.

use regex_syntax::hir::{Class as HirClass, HirKind};
use std::sync::LazyLock;

/// GPT-2's pattern, the one of `ByteLevel` with `use_regex`.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3's pattern up to and after how many digits are one word.
const LLAMA3: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// How text is cut into words.
pub(super) struct Splitter {
    pattern: Pattern,
    /// Numeric characters are words of their own, and what is between them is cut as if alone.
    lone_digits: bool,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Pattern {
    Gpt2,
    /// At most so many digits a word.
    Llama3(usize),
}

/// What the patterns tell apart.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Class {
    Letter,
    Number,
    /// A number that is a word of its own.
    Lone,
    /// White space but `\r` and `\n`.
    Space,
    Newline,
    Other,
}

impl Splitter {
    /// The splitter of a known pattern.
    pub(super) fn of(pattern: &str, lone_digits: bool) -> Option<Self> {
        let digits = || pattern.strip_prefix(LLAMA3[0])?.strip_suffix(LLAMA3[1]);
        let pattern = match pattern {
            GPT2 => Pattern::Gpt2,
            _ => match digits()? {
                "" => Pattern::Llama3(1),
                "{1,3}" => Pattern::Llama3(3),
                _ => return None,
            },
        };
        Some(Self { pattern, lone_digits })
    }

    /// End of the word that starts at byte `start` of `text`.
    #[inline]
    pub(super) fn word_end(&self, text: &str, start: usize) -> usize {
        match self.pattern {
            Pattern::Gpt2 => self.gpt2_end(text, start),
            Pattern::Llama3(digits) => self.llama3_end(text, start, digits),
        }
    }

    fn gpt2_end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        if bytes[start] == b'\'' {
            let len = match bytes.get(start + 1..).unwrap_or_default() {
                [b's' | b't' | b'm' | b'd', ..] => 2,
                [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => 3,
                _ => 0,
            };
            if len > 0 {
                return start + len;
            }
        }
        let body = start + usize::from(bytes[start] == b' ');
        match self.class(text, body) {
            None | Some((Class::Space | Class::Newline, _)) => self.space_end(text, start),
            Some((Class::Lone, _)) if body > start => body,
            Some((Class::Lone, len)) => body + len,
            Some((class, len)) => self.run_end(text, body + len, class),
        }
    }

    fn llama3_end(&self, text: &str, start: usize, digits: usize) -> usize {
        let bytes = text.as_bytes();
        if bytes[start] == b'\'' {
            let len = contraction(&bytes[start + 1..]);
            if len > 0 {
                return start + 1 + len;
            }
        }
        let Some((first, len)) = self.class(text, start) else {
            return text.len();
        };
        let second = || self.class(text, start + len);
        match (first, second()) {
            (Class::Lone, _) => return start + len,
            (Class::Letter, _) => return self.run_end(text, start + len, Class::Letter),
            (Class::Space | Class::Other, Some((Class::Letter, letter))) => {
                return self.run_end(text, start + len + letter, Class::Letter);
            }
            (Class::Number, _) => return self.numbers_end(text, start + len, digits - 1),
            _ => {}
        }
        let body = start + usize::from(bytes[start] == b' ');
        match self.class(text, body) {
            Some((Class::Other, len)) => {
                let end = self.run_end(text, body + len, Class::Other);
                self.run_end(text, end, Class::Newline)
            }
            _ => self.space_end(text, start),
        }
    }

    fn numbers_end(&self, text: &str, mut at: usize, more: usize) -> usize {
        for _ in 0..more {
            match self.class(text, at) {
                Some((Class::Number, len)) => at += len,
                _ => break,
            }
        }
        at
    }

    /// End of the characters of `class` that follow.
    #[inline]
    fn run_end(&self, text: &str, mut at: usize, class: Class) -> usize {
        while let Some((next, len)) = self.class(text, at) {
            if next != class {
                break;
            }
            at += len;
        }
        at
    }

    /// End of a word of white space: up to the last line break in it (Llama 3), else all of it at
    /// the end of a piece, else all but the last, which belongs to the next word.
    fn space_end(&self, text: &str, start: usize) -> usize {
        let (mut at, mut last, mut newline) = (start, start, None);
        let piece_ends = loop {
            match self.class(text, at) {
                Some((class @ (Class::Space | Class::Newline), len)) => {
                    last = at;
                    at += len;
                    if class == Class::Newline {
                        newline = Some(at);
                    }
                }
                None | Some((Class::Lone, _)) => break true,
                _ => break false,
            }
        };
        match newline {
            Some(end) if self.pattern != Pattern::Gpt2 => end,
            _ if piece_ends || last == start => at,
            _ => last,
        }
    }

    /// Class and length in bytes of the character at `at`.
    #[inline]
    fn class(&self, text: &str, at: usize) -> Option<(Class, usize)> {
        let &byte = text.as_bytes().get(at)?;
        let (class, len) = match byte {
            0..128 => (ASCII[usize::from(byte)], 1),
            _ => {
                let c = text[at..].chars().next()?;
                let class = class_of(c);
                let lone = self.lone_digits && c.is_numeric();
                (if lone { Class::Lone } else { class }, c.len_utf8())
            }
        };
        match class {
            Class::Number if self.lone_digits && byte < 128 => Some((Class::Lone, len)),
            _ => Some((class, len)),
        }
    }
}

/// Length of what follows the apostrophe of `'s`, `'re`, .. in any case; U+017F is an s too.
fn contraction(rest: &[u8]) -> usize {
    let lower = |at: usize| rest.get(at).map_or(0, u8::to_ascii_lowercase);
    match (lower(0), lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => 1,
        (b'r' | b'v', b'e') | (b'l', b'l') | (0xc5, 0xbf) => 2,
        _ => 0,
    }
}

static ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut at = 0;
    while at < 128 {
        classes[at] = match at as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\r' | b'\n' => Class::Newline,
            b' ' | b'\t' | 0x0b | 0x0c => Class::Space,
            _ => Class::Other,
        };
        at += 1;
    }
    classes
};

fn class_of(c: char) -> Class {
    static TABLE: LazyLock<Vec<Class>> = LazyLock::new(|| {
        let mut table = Vec::new();
        for (name, class) in
            [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)]
        {
            for (start, end) in ranges(name) {
                table.resize(table.len().max(end as usize + 1), Class::Other);
                table[start as usize..=end as usize].fill(class);
            }
        }
        table
    });
    TABLE.get(c as usize).copied().unwrap_or(Class::Other)
}

/// The characters of a class as the regex engine has them.
fn ranges(class: &str) -> Vec<(u32, u32)> {
    match regex_syntax::parse(class).map(|hir| hir.into_kind()) {
        Ok(HirKind::Class(HirClass::Unicode(class))) => {
            class.iter().map(|range| (u32::from(range.start()), u32::from(range.end()))).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::digits::Digits;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::tokenizer::SplitDelimiterBehavior;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let (mut words, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let end = splitter.word_end(text, at);
            words.push(&text[at..end]);
            at = end;
        }
        words
    }

    #[test]
    fn gpt2_words() {
        let gpt2 = Splitter::of(GPT2, false).unwrap();
        let text = "It's  12ab\n\n x='ll ";
        assert_eq!(
            words(&gpt2, text),
            ["It", "'s", " ", " 12", "ab", "\n\n", " x", "='", "ll", " "]
        );
        let digits = Splitter::of(GPT2, true).unwrap();
        assert_eq!(words(&digits, "a  12 b"), ["a", "  ", "1", "2", " b"]);
    }

    #[test]
    fn llama3_words() {
        let llama3 = Splitter::of(&[LLAMA3[0], "{1,3}", LLAMA3[1]].concat(), false).unwrap();
        let text = "It'S (ab) 1234;\r\n\n  \n  x\u{a0}y";
        assert_eq!(
            words(&llama3, text),
            ["It", "'S", " (", "ab", ")", " ", "123", "4", ";\r\n\n", "  \n", " ", " x", "\u{a0}y"]
        );
    }

    /// Words by the crate and its regex engine.
    fn words_of_the_crate(pattern: &str, lone_digits: bool, text: &str) -> Vec<String> {
        let pattern = SplitPattern::Regex(pattern.into());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
        let mut words = PreTokenizedString::from(text);
        if lone_digits {
            Digits::new(true).pre_tokenize(&mut words).unwrap();
        }
        split.pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        words.into_iter().map(|(word, ..)| word.to_string()).collect()
    }

    fn patterns() -> [(String, bool); 4] {
        let llama3 = |digits: &str| [LLAMA3[0], digits, LLAMA3[1]].concat();
        [(GPT2.into(), false), (GPT2.into(), true), (llama3("{1,3}"), false), (llama3(""), false)]
    }

    fn compare(text: &str) {
        for (pattern, lone_digits) in patterns() {
            let splitter = Splitter::of(&pattern, lone_digits).unwrap();
            let expected = words_of_the_crate(&pattern, lone_digits, text);
            assert_eq!(words(&splitter, text), expected, "{pattern} {lone_digits} {text:?}");
        }
    }

    #[test]
    fn every_character_is_cut_as_the_engine_cuts_it() {
        let chars: Vec<char> = ('\0'..=char::MAX).filter(|&c| c < '\u{33500}').collect();
        for some in chars.chunks(1 << 12) {
            let text: String = some.iter().flat_map(|&c| ['x', c, ' ', c, '1', c, '\n']).collect();
            compare(&text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000, failure_persistence: None, ..ProptestConfig::default()
        })]

        #[test]
        fn texts_are_cut_as_the_engine_cuts_them(
            parts in prop::collection::vec(prop_oneof![
                4 => prop::sample::select(vec![
                    " ", "  ", "\n", "\r\n", "\t", "a", "Bc", "\u{e9}", "\u{301}", "1", "23", "4567", "\u{661}", "'",
                    "'s", "'S", "'\u{17f}", "'re", "'LL", "'v", "!", "--", "\u{a0}", "\u{3000}", "\u{85}", "\u{4e2d}", "\u{2160}",
                    "\u{1f600}", "\0", "\u{200d}",
                ]).prop_map(String::from),
                1 => any::<String>(),
            ], 0..12)
        ) {
            compare(&parts.concat());
        }
    }

    #[test]
    fn the_tables_of_characters_are_there() {
        assert!(ranges(r"\p{L}").len() > 500 && ranges(r"\p{N}").len() > 100);
        assert_eq!(class_of('\u{4e2d}'), Class::Letter);
        assert_eq!(class_of('\u{2028}'), Class::Space);
        assert!(Splitter::of(r"\w+|\s+", false).is_none());
    }
}
