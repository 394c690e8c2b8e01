//! Plain text, a file a document, however long; and CSV.

use super::source::Source;
use super::{MAX_ROW, PIECE, Piece, Row, Selection, Skipped};
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use std::io::Read;

/// A text longer than this is given out in parts.
const LONG: u64 = 8 * PIECE as u64;

/// A file that is one document.
pub(super) struct Parts<'a> {
    source: Source,
    tokenizer: Option<&'a Tokenizer>,
    input: Box<dyn Read + Send>,
    /// Read and not given out; of a file in parts, valid UTF-8 but for its end.
    buffer: Vec<u8>,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    /// Nothing is given out yet.
    Start,
    /// Parts with this checksum of the first were given out.
    Within(u32),
    End,
}

impl<'a> Parts<'a> {
    pub(super) fn open(source: &Source, tokenizer: Option<&'a Tokenizer>) -> Result<Self> {
        let input = source.bytes()?;
        let source = source.clone();
        Ok(Self { source, tokenizer, input, buffer: Vec::new(), state: State::Start })
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        match self.state {
            State::End => Ok(None),
            State::Start => {
                self.read_more(LONG)?;
                if (self.buffer.len() as u64) < LONG || self.tokenizer.is_none() {
                    if self.read_more(MAX_ROW as u64)? {
                        return self.too_long();
                    }
                    self.state = State::End;
                    return Ok(Some(whole(std::mem::take(&mut self.buffer))));
                }
                if let Some(row) = check_utf8(self.source.bytes_unseen()?).transpose() {
                    self.state = State::End;
                    return row
                        .with_context(|| self.source.cannot("read"))
                        .map(|row| Some(Piece::Rows(vec![row])));
                }
                self.part(None)
            }
            State::Within(key) => self.part(Some(key)),
        }
    }

    /// The text up to the last place in the buffer where it may be cut; more is read until there is one.
    fn part(&mut self, key: Option<u32>) -> Result<Option<Piece>> {
        loop {
            let wanted = (2 * self.buffer.len()).max(PIECE) as u64;
            let at_end = !self.read_more(wanted - self.buffer.len() as u64)?;
            let text = valid(&self.buffer);
            let cut = match at_end {
                true => Some(text.len()),
                false => self.tokenizer.and_then(|t| t.safe_cut(text)),
            };
            let Some(cut) = cut else {
                if self.buffer.len() > MAX_ROW {
                    return self.too_long();
                }
                continue;
            };
            let text = text[..cut].to_owned();
            self.buffer.drain(..cut);
            let this = key.unwrap_or_else(|| crc32c::crc32c(text.as_bytes()));
            self.state = if at_end { State::End } else { State::Within(this) };
            return Ok(Some(Piece::Part { text, first: key.is_none(), last: at_end, key: this }));
        }
    }

    fn too_long(&self) -> Result<Option<Piece>> {
        let (path, limit) = (self.source.path().display(), MAX_ROW >> 20);
        Err(anyhow!("`{path}`: more than {limit} MiB of text in one piece"))
            .hint("split the file; with most tokenizers `prepare` takes a text of any length")
    }

    /// Reads up to `n` bytes more; `false` where the file ended before them.
    fn read_more(&mut self, n: u64) -> Result<bool> {
        let read = (&mut self.input).take(n).read_to_end(&mut self.buffer);
        let read = read.with_context(|| self.source.cannot("read"));
        Ok(read.hint("copy the file again, or leave it out")? as u64 == n)
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.read().transpose();
        if matches!(piece, Some(Err(_))) {
            self.state = State::End;
        }
        piece
    }
}

fn whole(bytes: Vec<u8>) -> Piece {
    Piece::Rows(vec![match String::from_utf8(bytes) {
        Ok(text) => Row::Text(text),
        Err(e) => not_utf8(e.utf8_error().valid_up_to() as u64),
    }])
}

fn not_utf8(at: u64) -> Row {
    Skipped::damaged("not UTF-8", 1, format!("at byte {at}"))
}

/// The text of `bytes`, without a character whose end is missing.
fn valid(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) => std::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or_default(),
    }
}

/// A row left out if the file is no UTF-8: looked at before its first part is used.
fn check_utf8(mut input: impl Read) -> std::io::Result<Option<Row>> {
    let (mut buffer, mut before) = (Vec::new(), 0);
    loop {
        let read = (&mut input).take(PIECE as u64).read_to_end(&mut buffer)?;
        let good = match std::str::from_utf8(&buffer) {
            Ok(text) => text.len(),
            Err(e) if e.error_len().is_none() && read > 0 => e.valid_up_to(),
            Err(e) => return Ok(Some(not_utf8(before + e.valid_up_to() as u64))),
        };
        if read == 0 {
            return Ok(None);
        }
        before += good as u64;
        buffer.drain(..good);
    }
}

/// A CSV file: a first row with names, quotes and line ends within fields as RFC 4180 has them.
pub(super) struct Csv {
    source: Source,
    reader: csv::Reader<Box<dyn Read + Send>>,
    column: usize,
    name: String,
    rows: u64,
    failed: bool,
}

impl Csv {
    pub(super) fn open(source: &Source, selection: &Selection) -> Result<Self> {
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(source.bytes()?);
        let names = reader.byte_headers().with_context(|| source.cannot("read"))?.clone();
        let names: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name)).collect();
        let fields = selection.fields();
        let Some(column) = fields.iter().find_map(|f| names.iter().position(|name| name == f))
        else {
            return no_column(source, &fields, &names.join("`, `"));
        };
        let name = names[column].to_string();
        Ok(Self { source: source.clone(), reader, column, name, rows: 0, failed: false })
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        let mut record = csv::ByteRecord::new();
        while bytes < PIECE && !self.failed {
            match self.reader.read_byte_record(&mut record) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) if !rows.is_empty() => break, // the reader says it again
                Err(e) => {
                    self.failed = true;
                    let place = format!("{} after row {}", self.source.cannot("read"), self.rows);
                    return Err(e).context(place).hint("copy the file again, or leave it out");
                }
            }
            self.rows += 1;
            let text = record.get(self.column).map(|text| String::from_utf8(text.to_vec()));
            rows.push(match text {
                Some(Ok(text)) => Row::Text(text),
                Some(Err(e)) => {
                    let at = format!("at byte {}", e.utf8_error().valid_up_to());
                    Skipped::damaged("not UTF-8", self.rows, at)
                }
                None => {
                    let why = format!("no text under `{}`", self.name);
                    let there = format!("it has {} fields", record.len());
                    Skipped::damaged(why, self.rows, there)
                }
            });
            bytes += record.as_slice().len();
        }
        Ok(if rows.is_empty() { None } else { Some(Piece::Rows(rows)) })
    }
}

impl Iterator for Csv {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The error of a file without the column that holds the text.
pub(super) fn no_column<T>(source: &Source, wanted: &[&str], there: &str) -> Result<T> {
    let missing = wanted.join("` or `");
    Err(anyhow!("`{}` has no column `{missing}`", source.path().display()))
        .usage(format!("its columns are `{there}`; name one with `--text-field`"))
}

#[cfg(test)]
mod tests {
    use super::super::{Schema, rows};
    use super::*;

    #[test]
    fn csv_rows_keep_quotes_and_line_ends_and_a_short_one_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.csv");
        let csv = "id,text\n1,\"a, \"\"b\"\"\nc\"\n2\n3,d\r\n";
        std::fs::write(&path, csv).unwrap();
        let got: Result<Vec<Row>> = rows(&path, Schema::Csv, None).unwrap().collect();
        let got = got.unwrap();
        let skipped = Skipped::damaged("no text under `text`", 2, "it has 1 fields");
        assert_eq!(got, [Row::Text("a, \"b\"\nc".into()), skipped, Row::Text("d".into())]);
        let error = rows(&path, Schema::Csv, Some("body")).err().unwrap().to_string();
        assert!(error.contains("has no column `body`"), "{error}");
    }

    #[test]
    fn utf8_is_checked_across_the_borders_of_blocks() {
        let good = "\u{1f999}".repeat(PIECE / 2 + 3);
        assert_eq!(check_utf8(good.as_bytes()).unwrap(), None);
        assert_eq!(
            check_utf8(&good.as_bytes()[..good.len() - 1]).unwrap(),
            Some(not_utf8(good.len() as u64 - 4))
        );
        let mut bad = good.into_bytes();
        bad[PIECE + 1] = b'a';
        assert_eq!(check_utf8(&bad[..]).unwrap(), Some(not_utf8(PIECE as u64)));
    }
}
