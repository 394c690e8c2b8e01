//! JSON: objects a line, or the elements of an array.

use super::chat;
use super::source::Source;
use super::{MAX_ROW, PIECE, Piece, Row, Schema, Selection, Skipped};
use crate::error::WithHint;
use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde_json::Value;
use std::io::{self, Read};

/// The bytes of a file, read a block at a time into a buffer that its owner empties.
struct Blocks {
    source: Source,
    input: Box<dyn Read + Send>,
    buffer: Vec<u8>,
    /// At the end of the file, or at its damage.
    end: Option<io::Result<()>>,
    /// Rows before the buffer.
    rows: u64,
}

impl Blocks {
    fn open(source: &Source) -> Result<Self> {
        let input = source.bytes()?;
        Ok(Self { source: source.clone(), input, buffer: Vec::new(), end: None, rows: 0 })
    }

    /// Reads another block, unless the file has ended.
    fn read_more(&mut self) -> Result<()> {
        if self.buffer.len() > MAX_ROW {
            let (path, row) = (self.source.path().display(), self.rows + 1);
            bail!("`{path}`: row {row} is longer than {} MiB", MAX_ROW >> 20);
        }
        let start = self.buffer.len();
        self.buffer.resize(start + (PIECE >> 2), 0);
        let read = self.input.read(&mut self.buffer[start..]);
        self.buffer.truncate(start + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => self.end = Some(Ok(())),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => self.end = Some(Err(e)),
        }
        Ok(())
    }

    /// The error of a damaged file, once; `None` where it ended well.
    fn ending(&mut self) -> Option<Result<Piece>> {
        match self.end.replace(Ok(())) {
            Some(Err(e)) => {
                let place = format!("{} after row {}", self.source.cannot("read"), self.rows);
                Some(Err(e).context(place).hint("copy the file again, or leave it out"))
            }
            _ => None,
        }
    }

    /// The first `n` bytes, which hold `rows` rows.
    fn take(&mut self, n: usize, rows: u64) -> Piece {
        let rest = self.buffer.split_off(n);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let first = self.rows + 1;
        self.rows += rows;
        Piece::Lines { bytes, first }
    }
}

/// A file of one JSON object a line.
pub(super) struct Lines {
    blocks: Blocks,
    /// Bytes of the buffer that hold no end of a line.
    searched: usize,
}

impl Lines {
    pub(super) fn open(source: &Source) -> Result<Self> {
        Ok(Self { blocks: Blocks::open(source)?, searched: 0 })
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        let b = &mut self.blocks;
        loop {
            if b.buffer.len() >= PIECE || b.end.is_some() {
                let last = memchr::memrchr(b'\n', &b.buffer[self.searched..]);
                let cut = match (last, &b.end) {
                    (Some(at), _) => self.searched + at + 1,
                    (None, Some(Ok(()))) => b.buffer.len(), // a last line without an end
                    (None, Some(Err(_))) => 0,
                    (None, None) => {
                        self.searched = b.buffer.len();
                        0
                    }
                };
                if cut > 0 {
                    self.searched = 0;
                    let rows = memchr::memchr_iter(b'\n', &b.buffer[..cut]).count() as u64;
                    return Ok(Some(b.take(cut, rows)));
                }
            }
            if b.end.is_some() {
                return b.ending().transpose();
            }
            b.read_more()?;
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// A file of JSON values: an array of them, or one after the other, on as many lines as they like.
pub(super) struct Values {
    blocks: Blocks,
    /// Values found and not given out, one a line.
    lines: Vec<u8>,
    /// How many those are.
    count: u64,
}

impl Values {
    pub(super) fn open(source: &Source) -> Result<Self> {
        Ok(Self { blocks: Blocks::open(source)?, lines: Vec::new(), count: 0 })
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        loop {
            let broken = self.find_values().err();
            let over = self.blocks.end.is_some() || broken.is_some();
            if self.count > 0 && (over || self.lines.len() >= PIECE) {
                let bytes = std::mem::take(&mut self.lines);
                let first = self.blocks.rows + 1;
                self.blocks.rows += std::mem::take(&mut self.count);
                return Ok(Some(Piece::Lines { bytes, first }));
            }
            if let Some(e) = broken {
                let place =
                    format!("{} after row {}", self.blocks.source.cannot("read"), self.blocks.rows);
                self.blocks.buffer.clear();
                self.blocks.end = Some(Ok(()));
                return Err(e).context(place).hint("expected JSON objects or one array of them");
            }
            if self.blocks.end.is_some() {
                return self.blocks.ending().transpose();
            }
            // Twice as much, so that a long value is looked at few times.
            for _ in 0..=self.blocks.buffer.len() / (PIECE >> 2) {
                self.blocks.read_more()?;
            }
        }
    }

    /// Moves the values that are whole from the buffer to `lines`.
    ///
    /// # Errors
    /// The buffer begins with something that is no JSON; at the end of the file also with half a value.
    fn find_values(&mut self) -> serde_json::Result<()> {
        let b = &mut self.blocks;
        let at_end = b.end.is_some();
        let mut at = 0;
        let found = loop {
            let between = |c: &u8| c.is_ascii_whitespace() || matches!(c, b',' | b']');
            at += b.buffer[at..].iter().take_while(|c| between(c)).count();
            if b.rows + self.count == 0 && b.buffer[at..].first() == Some(&b'[') {
                at += 1; // of the array that holds the values
                continue;
            }
            let rest = &b.buffer[at..];
            let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
            match values.next() {
                None => break Ok(()),
                Some(Err(e)) if e.is_eof() && !at_end => break Ok(()),
                Some(Err(e)) => break Err(e),
                Some(Ok(_)) => {}
            }
            let len = values.byte_offset();
            if len == rest.len() && !at_end {
                break Ok(()); // a number may go on
            }
            let spaced = |&c: &u8| if c == b'\n' { b' ' } else { c };
            self.lines.extend(rest[..len].iter().map(spaced));
            self.lines.push(b'\n');
            self.count += 1;
            at += len;
        };
        b.buffer.drain(..at);
        found
    }
}

impl Iterator for Values {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The row of a line.
pub(super) fn row(line: &[u8], row: u64, selection: &Selection) -> Row {
    let mut value = match serde_json::from_slice::<Value>(line) {
        Ok(value) => value,
        Err(e) if std::str::from_utf8(line).is_err() => {
            return Skipped::damaged("not UTF-8", row, e.to_string());
        }
        Err(e) => return Skipped::damaged("no JSON", row, e.to_string()),
    };
    let Some(object) = value.as_object_mut() else {
        return Skipped::damaged("no JSON object", row, format!("it is {}", kind(&value)));
    };
    if selection.schema == Schema::SlimPajama {
        let set = object.get("meta").and_then(|meta| meta["redpajama_set_name"].as_str());
        match set {
            Some("RedPajamaGithub") => return Skipped::on_purpose("RedPajamaGithub", row),
            Some(set) if !selection.takes(set) => {
                return Skipped::on_purpose(format!("subset {set}"), row);
            }
            _ => {}
        }
    }
    let fields = selection.fields();
    let why = || format!("no text under `{}`", fields.join("` or `"));
    let field = fields.iter().find(|field| object.contains_key(**field));
    match field.and_then(|field| object.get_mut(*field)).map(Value::take) {
        Some(Value::String(text)) => return Row::Text(text),
        Some(other) => return Skipped::damaged(why(), row, format!("it is {}", kind(&other))),
        None => {}
    }
    let is_chat = selection.schema == Schema::Sft && selection.field.is_none();
    match chat::text(object).filter(|_| is_chat) {
        Some(text) => Row::Text(text),
        None => {
            let there: Vec<&str> = object.keys().map(String::as_str).collect();
            let detail = format!("its fields are `{}`", there.join("`, `"));
            Skipped::damaged(why(), row, detail)
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn rows(name: &str, bytes: &[u8]) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        super::super::rows(&path, Schema::of_file(&path), None)?.collect()
    }

    fn text(text: &str) -> Row {
        Row::Text(text.into())
    }

    fn one(line: &[u8], schema: Schema) -> Row {
        row(line, 4, &Selection::all(schema, None))
    }

    #[test]
    fn github_rows_of_slimpajama_are_dropped_and_rows_without_text_say_why() {
        let github = br#"{"text": "x", "meta": {"redpajama_set_name": "RedPajamaGithub"}}"#;
        assert_eq!(one(github, Schema::SlimPajama), Skipped::on_purpose("RedPajamaGithub", 4));
        assert_eq!(one(github, Schema::Json), text("x"));
        for (line, why, detail) in [
            (&b"{"[..], "no JSON", "EOF while parsing an object at line 1 column 1"),
            (b"[1]", "no JSON object", "it is an array"),
            (b"{\"text\": 3}", "no text under `text`", "it is a number"),
            (b"{\"a\": 3, \"body\": \"x\"}", "no text under `text`", "its fields are `a`, `body`"),
        ] {
            assert_eq!(one(line, Schema::SlimPajama), Skipped::damaged(why, 4, detail));
        }
        let Row::Skipped(skipped) = one(b"{\"text\": \"\xff\"}", Schema::Json) else { panic!() };
        assert_eq!(skipped.why, "not UTF-8");
    }

    #[test]
    fn subsets_of_slimpajama_are_told_by_its_rows() {
        let line = br#"{"text": "x", "meta": {"redpajama_set_name": "RedPajamaBook"}}"#;
        let mut selection = Selection::all(Schema::SlimPajama, None);
        selection.subsets = vec!["RedPajamaBook".into()];
        assert_eq!(row(line, 1, &selection), text("x"));
        selection.exclude_subsets = selection.subsets.clone();
        assert_eq!(row(line, 1, &selection), Skipped::on_purpose("subset RedPajamaBook", 1));
    }

    #[test]
    fn a_json_file_is_an_array_or_values_one_after_the_other() {
        let want = [text("a\nb"), text("]},{"), text("c")];
        let array = r#" [ {"text": "a\nb"},
            { "x": [1, {"y": "}"}],
              "text": "]},{" }, {"text":"c"} ] "#;
        assert_eq!(rows("x.json", array.as_bytes()).unwrap(), want);
        let values = r#"{"text":"a\nb"}{"text":"]},{"}
            {"text": "c"}"#;
        assert_eq!(rows("x.json", values.as_bytes()).unwrap(), want);
        assert_eq!(rows("x.json", b"[]").unwrap(), []);
        assert_eq!(rows("x.json", b"").unwrap(), []);
        let long = format!(r#"[{{"text": "{}"}}, {{"text": "z"}}]"#, "y".repeat(3 * PIECE));
        assert_eq!(rows("x.json", long.as_bytes()).unwrap()[1], text("z"));
        let error = rows("x.json", br#"[{"text": "a"}, {"text": "#).unwrap_err();
        assert!(format!("{error:#}").contains("x.json` after row 1: EOF"), "{error:#}");
    }

    #[test]
    fn lines_longer_than_a_piece_and_a_last_one_without_an_end_are_whole() {
        let texts: Vec<String> =
            [10, PIECE, 3, 3 * PIECE, 5].iter().map(|&n| "x".repeat(n)).collect();
        let lines: Vec<String> =
            texts.iter().map(|text| format!(r#"{{"text": "{text}"}}"#)).collect();
        let want: Vec<Row> = texts.iter().map(|t| text(t)).collect();
        assert_eq!(rows("x.jsonl", lines.join("\n").as_bytes()).unwrap(), want);
        assert_eq!(rows("x.jsonl", lines.join("\r\n\n").as_bytes()).unwrap(), want);
        let mut source = Lines::open(&Source::new(Path::new("/dev/null"))).unwrap();
        assert!(source.next().is_none());
    }
}
