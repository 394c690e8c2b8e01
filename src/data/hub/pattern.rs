//! Patterns of paths as Python's `fnmatch` has them, and so `allow_patterns`.

/// Whether a path matches: `*` is any run of characters, `/` among them, `?` any one, `[a-c]` one of these,
/// `[!a-c]` one that is none of these.
pub fn matches(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), path.chars().collect());
    let (mut at, mut read) = (0, 0);
    // The last `*`, and up to where it reaches: the only choice that may have to be taken back.
    let mut star = None;
    while read < path.len() {
        if pattern.get(at) == Some(&'*') {
            star = Some((at, read));
            at += 1;
        } else if let Some(length) = one(&pattern[at..], path[read]) {
            at += length;
            read += 1;
        } else if let Some((start, reach)) = star {
            star = Some((start, reach + 1));
            (at, read) = (start + 1, reach + 1);
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|c| *c == '*')
}

/// Characters of the pattern's next piece, where it matches this one character.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '[' => {
            let from = if pattern.get(1) == Some(&'!') { 2 } else { 1 };
            // A `]` that comes first is one of the set.
            let Some(length) = pattern.iter().skip(from + 1).position(|c| *c == ']') else {
                return (c == '[').then_some(1); // never closed: the character itself
            };
            let end = from + 1 + length;
            (in_set(&pattern[from..end], c) == (from == 1)).then_some(end + 1)
        }
        literal => (*literal == c).then_some(1),
    }
}

fn in_set(set: &[char], c: char) -> bool {
    match set {
        [] => false,
        [first, '-', last, rest @ ..] => (*first..=*last).contains(&c) || in_set(rest, c),
        [first, rest @ ..] => *first == c || in_set(rest, c),
    }
}

/// The folder that all matches of a pattern lie in; empty: the top one.
pub fn folder(pattern: &str) -> &str {
    let plain = pattern.split(['*', '?', '[']).next().unwrap_or_default();
    plain.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_fnmatch() {
        for (pattern, path, want) in [
            ("train/*.zst", "train/a/b.zst", true),
            ("train/*.zst", "train/a.zst.part", false),
            ("*", "", true),
            ("a*b*c", "a1b2b3c", true),
            ("a*b*c", "a1b2b3", false),
            ("*ab", "aab", true),
            ("chunk[12]/?.x", "chunk2/\u{e9}.x", true),
            ("chunk[12]/?.x", "chunk3/a.x", false),
            ("[!a-c]x", "dx", true),
            ("[!a-c]x", "bx", false),
            ("[]a]", "]", true),
            ("[a-]", "-", true),
            ("[", "[", true),
            ("x", "x/y", false),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, path), want, "{pattern} {path}");
        }
    }

    #[test]
    fn a_pattern_has_a_folder() {
        for (pattern, want) in
            [("a/b/*.x", "a/b"), ("a/b[0-9]/c", "a"), ("*", ""), ("a", ""), ("a/b/c", "a/b")]
        {
            assert_eq!(folder(pattern), want, "{pattern}");
        }
    }
}
