//! Documents of a corpus: text, JSON, CSV, Parquet; plain, gzip or zstd, told by the first bytes.
//!
//! Read first: [`Schema`], which says how the files of a corpus are laid out; then [`Reader`], which gives a
//! file out in pieces of about a MiB, and [`rows_of`], which turns a piece into rows. Reading a file is the
//! work of one thread at a time; what costs most, parsing, is done on the pieces, by as many as there are.

mod chat;
mod json;
mod objects;
mod parquet;
mod source;
mod text;

pub use objects::{Object, objects};
pub use source::{Source, SourceSum};

use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use std::fmt;
use std::path::{Path, PathBuf};

/// Bytes of text that are read together, as a rule: a longer row is a piece of its own.
const PIECE: usize = 1 << 20;
/// The longest row; a longer one is damage, or a whole corpus in one line.
const MAX_ROW: usize = 1 << 30;

/// One row of a source.
#[derive(Debug, PartialEq)]
pub enum Row {
    /// A document.
    Text(String),
    /// A row left out.
    Skipped(Skipped),
}

impl Row {
    /// Bytes of its text.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        if let Self::Text(text) = self { text.len() } else { 0 }
    }
}

/// Why a row is left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Skipped {
    /// One of a few texts, to count by.
    pub why: String,
    /// Which row of the file, from 1.
    pub row: u64,
    /// What is there instead; may be empty.
    pub detail: String,
    /// Whether the row is damaged, and not left out on purpose.
    pub damaged: bool,
}

impl Skipped {
    fn damaged(why: impl Into<String>, row: u64, detail: impl Into<String>) -> Row {
        Row::Skipped(Self { why: why.into(), row, detail: detail.into(), damaged: true })
    }

    fn on_purpose(why: impl Into<String>, row: u64) -> Row {
        Row::Skipped(Self { why: why.into(), row, detail: String::new(), damaged: false })
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}: {}", self.row, self.why)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, " ({})", self.detail) }
    }
}

/// What a reader gives out at a time.
#[derive(Debug)]
pub enum Piece {
    /// JSON values, one a line, for [`rows_of`] to parse.
    Lines {
        /// The lines.
        bytes: Vec<u8>,
        /// Row of the first, from 1.
        first: u64,
    },
    /// Rows as they are.
    Rows(Vec<Row>),
    /// Part of a document that is longer than a piece: the parts' ids, one after the other, are those of the
    /// whole ([`Tokenizer::safe_cut`]).
    Part {
        /// The part.
        text: String,
        /// Whether the document begins here.
        first: bool,
        /// Whether it ends here.
        last: bool,
        /// Checksum of the first part, the same in all of them: it decides where the document goes.
        key: u32,
    },
}

/// How the files of a corpus are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// A file is a document.
    Text,
    /// One JSON object a line; in a file named `.json` also an array of objects.
    Json,
    /// A first line with the names of the columns, then a row a line.
    Csv,
    /// Columns.
    Parquet,
    /// JSON lines of SlimPajama: `{"text", "meta": {"redpajama_set_name"}}`; `RedPajamaGithub` is dropped.
    SlimPajama,
    /// JSON lines of RedPajama: `{"text", "meta"}`, a folder a subset.
    RedPajama,
    /// Parquet of StarCoderData: column `content`, a folder a language.
    StarCoder,
    /// Conversations as JSON: `text` as it is, or `messages`, `conversations`, `instruction` as a chat.
    Sft,
}

/// Name of each kind of corpus, as `prepare` takes it.
const KINDS: [(&str, Schema); 8] = [
    ("text", Schema::Text),
    ("jsonl", Schema::Json),
    ("csv", Schema::Csv),
    ("parquet", Schema::Parquet),
    ("slimpajama", Schema::SlimPajama),
    ("redpajama", Schema::RedPajama),
    ("starcoder", Schema::StarCoder),
    ("sft", Schema::Sft),
];

/// How one file is laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
    JsonValues,
    Csv,
    Parquet,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        Some(match extension(path).as_str() {
            "txt" | "text" | "md" => Self::Text,
            "jsonl" | "ndjson" => Self::JsonLines,
            "json" => Self::JsonValues,
            "csv" => Self::Csv,
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }
}

impl Schema {
    /// By the name that `prepare` takes.
    pub fn from_name(name: &str) -> Result<Self> {
        match KINDS.iter().find(|(kind, _)| *kind == name) {
            Some((_, schema)) => Ok(*schema),
            None => {
                let kinds = KINDS.map(|(kind, _)| format!("`{kind}`")).join(", ");
                Err(anyhow!("`{name}` is no kind of corpus"))
                    .usage(format!("choose one of {kinds}"))
            }
        }
    }

    /// The name that `prepare` takes.
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, schema)| *schema == self).map_or("", |(kind, _)| kind)
    }

    /// The schema that a file's name suggests; plain text where it suggests nothing.
    pub fn of_file(path: &Path) -> Self {
        match Format::of(path) {
            Some(Format::JsonLines | Format::JsonValues) => Self::Json,
            Some(Format::Csv) => Self::Csv,
            Some(Format::Parquet) => Self::Parquet,
            Some(Format::Text) | None => Self::Text,
        }
    }

    /// Fields of the text, unless another is asked for: the first that is there.
    fn default_fields(self) -> &'static [&'static str] {
        match self {
            Self::Parquet => &["content", "text"],
            Self::StarCoder => &["content"],
            _ => &["text"],
        }
    }

    /// Whether a file of a folder belongs to a corpus of this kind, by its name.
    pub(super) fn takes(self, path: &Path) -> bool {
        let is_json = |f| matches!(f, Format::JsonLines | Format::JsonValues);
        Format::of(path).is_some_and(|format| match self {
            Self::Text => extension(path) == "txt",
            Self::Json | Self::Sft => is_json(format),
            Self::SlimPajama | Self::RedPajama => format == Format::JsonLines,
            Self::Csv => format == Format::Csv,
            Self::Parquet | Self::StarCoder => format == Format::Parquet,
        })
    }

    /// How a file of this corpus is read.
    fn format(self, path: &Path) -> Format {
        match (self, Format::of(path)) {
            (Self::Text, _) => Format::Text,
            (Self::Csv, _) => Format::Csv,
            (Self::Sft, Some(Format::Parquet)) => Format::Parquet,
            (Self::Parquet | Self::StarCoder, _) => Format::Parquet,
            (_, Some(Format::JsonValues)) => Format::JsonValues,
            _ => Format::JsonLines,
        }
    }
}

/// Extension in lower case, without `.gz` or `.zst` after it.
fn extension(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let plain = name.trim_end_matches(".zst").trim_end_matches(".gz");
    plain.rsplit_once('.').map_or("", |(_, extension)| extension).to_owned()
}

/// Which rows are documents, and where their text is.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Layout of the files.
    pub schema: Schema,
    /// Key or column of the text; `None`: the schema's.
    pub field: Option<String>,
    /// Only these subsets; none: all.
    pub subsets: Vec<String>,
    /// Without these.
    pub exclude_subsets: Vec<String>,
}

impl Selection {
    /// Everything in files of a schema.
    pub fn all(schema: Schema, field: Option<&str>) -> Self {
        let field = field.map(str::to_owned);
        Self { schema, field, subsets: Vec::new(), exclude_subsets: Vec::new() }
    }

    fn fields(&self) -> Vec<&str> {
        match &self.field {
            Some(field) => vec![field],
            None => self.schema.default_fields().to_vec(),
        }
    }

    /// Whether rows of a subset are taken.
    fn takes(&self, subset: &str) -> bool {
        let is = |name: &String| name == subset;
        (self.subsets.is_empty() || self.subsets.iter().any(is))
            && !self.exclude_subsets.iter().any(is)
    }

    /// Whether a file is read: a corpus whose rows do not tell their subset has a folder for each.
    pub(super) fn takes_file(&self, root: &Path, path: &Path) -> bool {
        if self.schema == Schema::SlimPajama {
            return true;
        }
        let inside = path.strip_prefix(root).unwrap_or(path).parent().unwrap_or(Path::new(""));
        let folders = || inside.iter().map(|name| name.to_string_lossy());
        let named = |list: &[String]| folders().any(|name| list.iter().any(|s| *s == name));
        (self.subsets.is_empty() || named(&self.subsets)) && !named(&self.exclude_subsets)
    }
}

/// The files of a source, sorted: a file, a folder (with the folders in it; files of this kind, none
/// hidden), or a pattern with `*`.
///
/// SlimPajama lies in folders `train`, `validation` and `test`: where the source is the folder above them,
/// only the files of `split` are taken, which must be one of them.
pub fn files(source: &str, selection: &Selection, split: &str) -> Result<Vec<PathBuf>> {
    let (path, schema) = (Path::new(source), selection.schema);
    let mut found = Vec::new();
    if path.is_file() {
        found.push(path.to_owned());
    } else if path.is_dir() {
        let of_split = path.join(split);
        let whole = schema != Schema::SlimPajama || !of_split.is_dir();
        let splits =
            ["train", "validation", "test"].into_iter().filter(|name| path.join(name).is_dir());
        let splits: Vec<&str> = splits.filter(|_| whole && schema == Schema::SlimPajama).collect();
        if !splits.is_empty() {
            return Err(anyhow!(
                "no folder `{split}` in `{source}`, which has {}",
                splits.join(", ")
            ))
            .usage(
                "name one of them with `--split` (in YAML `split`), or its folder as the source",
            );
        }
        walk(if whole { path } else { &of_split }, &mut found)?;
        found.retain(|p| schema.takes(p) && selection.takes_file(path, p));
    } else if source.contains('*') {
        let fixed = source.split('*').next().unwrap_or("");
        let root =
            fixed.rsplit_once('/').map_or(".", |(dir, _)| if dir.is_empty() { "/" } else { dir });
        if Path::new(root).is_dir() {
            walk(Path::new(root), &mut found)?;
        }
        found.retain(|p| matches(source, &p.to_string_lossy()));
        found.retain(|p| selection.takes_file(Path::new(root), p));
    }
    found.sort();
    if found.is_empty() {
        let there = match path.exists() || source.contains('*') {
            true => "",
            false => "the path does not exist: ",
        };
        let subsets = match selection.subsets.is_empty() {
            true => String::new(),
            false => format!(" of the subsets `{}`", selection.subsets.join("`, `")),
        };
        return Err(anyhow!("no {} files at `{source}`{subsets}", schema.name())).usage(format!(
            "{there}name a file, a folder or a pattern such as 'corpus/*.jsonl.zst'"
        ));
    }
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read the folder `{}`", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read `{}`", dir.display()))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        if path.is_dir() { walk(&path, found)? } else { found.push(path) }
    }
    Ok(())
}

/// Whether a path matches a pattern in which `*` stands for any run of characters.
fn matches(pattern: &str, path: &str) -> bool {
    let (pattern, path) = (pattern.trim_start_matches("./"), path.trim_start_matches("./"));
    let mut pieces = pattern.split('*');
    let Some(mut rest) = path.strip_prefix(pieces.next().unwrap_or("")) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    for (i, piece) in pieces.iter().enumerate() {
        if i + 1 == pieces.len() {
            return rest.ends_with(piece);
        }
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

/// Reads one file, piece by piece.
pub struct Reader<'a> {
    source: Source,
    pieces: Box<dyn Iterator<Item = Result<Piece>> + Send + 'a>,
}

impl<'a> Reader<'a> {
    /// Opens a file. `tokenizer` says where a long text may be cut; without one a text is one piece.
    ///
    /// # Errors
    /// An unreadable file; a Parquet or CSV file without the column (its columns are named).
    pub fn open(
        source: Source,
        selection: &Selection,
        tokenizer: Option<&'a Tokenizer>,
    ) -> Result<Self> {
        let pieces: Box<dyn Iterator<Item = _> + Send> =
            match selection.schema.format(source.path()) {
                Format::Text => Box::new(text::Parts::open(&source, tokenizer)?),
                Format::JsonLines => Box::new(json::Lines::open(&source)?),
                Format::JsonValues => Box::new(json::Values::open(&source)?),
                Format::Csv => Box::new(text::Csv::open(&source, selection)?),
                Format::Parquet => Box::new(parquet::Column::open(&source, selection)?),
            };
        Ok(Self { source, pieces })
    }

    /// What was read, when all pieces are out.
    pub fn finish(self) -> Result<SourceSum> {
        drop(self.pieces);
        self.source.finish()
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pieces.next()
    }
}

/// The rows of a piece, each by `take`; of a [`Piece::Part`] there are none.
pub fn rows_of(piece: Piece, selection: &Selection, mut take: impl FnMut(Row)) {
    match piece {
        Piece::Rows(rows) => rows.into_iter().for_each(take),
        Piece::Lines { bytes, first } => {
            for (line, row) in bytes.split(|&b| b == b'\n').zip(first..) {
                if !line.iter().all(u8::is_ascii_whitespace) {
                    take(json::row(line, row, selection));
                }
            }
        }
        Piece::Part { .. } => {}
    }
}

/// All rows of one file, a long text as one; a piece at a time is in memory.
///
/// # Errors
/// As [`Reader::open`]; a damaged file. A row without a text - broken JSON, another type, no UTF-8 - is a
/// skipped row.
pub fn rows(
    path: &Path,
    schema: Schema,
    field: Option<&str>,
) -> Result<impl Iterator<Item = Result<Row>> + use<>> {
    let selection = Selection::all(schema, field);
    let reader = Reader::open(Source::new(path), &selection, None)?;
    Ok(reader.flat_map(move |piece| {
        let mut rows = Vec::new();
        match piece {
            Ok(piece) => rows_of(piece, &selection, |row| rows.push(Ok(row))),
            Err(e) => rows.push(Err(e)),
        }
        rows
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        for (pattern, path, want) in [
            ("a/*.jsonl", "a/b.jsonl", true),
            ("a/*.jsonl", "a/b.json", false),
            ("a/*/c*.zst", "./a/x/y/c1.zst", true),
            ("./a*", "ab", true),
            ("a*", "b", false),
        ] {
            assert_eq!(matches(pattern, path), want, "{pattern} {path}");
        }
    }

    #[test]
    fn a_folder_above_a_file_is_its_subset() {
        let mut selection = Selection::all(Schema::StarCoder, None);
        let takes = |s: &Selection, path: &str| s.takes_file(Path::new("root"), Path::new(path));
        assert!(takes(&selection, "root/rust/a.parquet"));
        selection.subsets = vec!["rust".into(), "root".into()];
        assert!(takes(&selection, "root/rust/a.parquet"));
        assert!(!takes(&selection, "root/rust.parquet"));
        assert!(!takes(&selection, "root/java/a.parquet"));
        selection.exclude_subsets = vec!["rust".into()];
        assert!(!takes(&selection, "root/rust/a.parquet"));
    }
}
