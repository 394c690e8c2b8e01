//! Documents of a corpus: plain text, JSON lines, Parquet; plain, gzip or zstd, told by the first bytes.

use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use flate2::read::MultiGzDecoder;
use indicatif::ProgressBar;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use parquet::schema::types::Type;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One row of a source.
#[derive(Debug, PartialEq)]
pub enum Row {
    /// A document.
    Text(String),
    /// A row left out.
    Skipped {
        /// Why; one of a few texts, to count by.
        why: String,
        /// Which row of the file, from 1.
        row: usize,
    },
}

/// Rows, one at a time.
pub type Rows = Box<dyn Iterator<Item = Result<Row>>>;

/// How the files of a corpus are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// A file is a document.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// Columns.
    Parquet,
    /// JSON lines of SlimPajama: `{"text", "meta": {"redpajama_set_name"}}`; `RedPajamaGithub` is dropped.
    SlimPajama,
    /// Parquet of StarCoderData: column `content`.
    StarCoder,
}

impl Schema {
    /// By the name that `prepare` takes.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "text" => Self::Text,
            "jsonl" => Self::JsonLines,
            "parquet" => Self::Parquet,
            "slimpajama" => Self::SlimPajama,
            "starcoder" => Self::StarCoder,
            other => {
                return Err(anyhow!("`{other}` is no kind of corpus"))
                    .usage("choose one of `text`, `jsonl`, `parquet`, `slimpajama`, `starcoder`");
            }
        })
    }

    /// The schema that a file's name suggests; plain text where it suggests nothing.
    pub fn of_file(path: &Path) -> Self {
        match extension(path).as_str() {
            "jsonl" | "ndjson" => Self::JsonLines,
            "parquet" => Self::Parquet,
            _ => Self::Text,
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
    fn takes(self, path: &Path) -> bool {
        match self {
            Self::Text => extension(path) == "txt",
            Self::JsonLines | Self::SlimPajama => Self::of_file(path) == Self::JsonLines,
            Self::Parquet | Self::StarCoder => Self::of_file(path) == Self::Parquet,
        }
    }
}

/// Extension in lower case, without `.gz` or `.zst` after it.
fn extension(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let plain = name.trim_end_matches(".zst").trim_end_matches(".gz");
    plain.rsplit_once('.').map_or("", |(_, extension)| extension).to_owned()
}

/// The files of a source, sorted: a file, a folder (with the folders in it; files of this kind, none
/// hidden), or a pattern with `*`.
///
/// SlimPajama lies in folders `train`, `validation` and `test`: where the source is the folder above them,
/// only the files of `split` are taken.
pub fn files(source: &str, schema: Schema, split: &str) -> Result<Vec<PathBuf>> {
    let path = Path::new(source);
    let mut found = Vec::new();
    if path.is_file() {
        found.push(path.to_owned());
    } else if path.is_dir() {
        let of_split = path.join(split);
        let whole = schema != Schema::SlimPajama || !of_split.is_dir();
        walk(if whole { path } else { &of_split }, &mut found)?;
        found.retain(|p| schema.takes(p));
    } else if source.contains('*') {
        let fixed = source.split('*').next().unwrap_or("");
        let root =
            fixed.rsplit_once('/').map_or(".", |(dir, _)| if dir.is_empty() { "/" } else { dir });
        if Path::new(root).is_dir() {
            walk(Path::new(root), &mut found)?;
        }
        found.retain(|p| matches(source, &p.to_string_lossy()));
    }
    found.sort();
    if found.is_empty() {
        let there = match path.exists() || source.contains('*') {
            true => "",
            false => "the path does not exist: ",
        };
        return Err(anyhow!("no {schema:?} files at `{source}`")).usage(format!(
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

/// The rows of one file.
///
/// # Errors
/// An unreadable file, a Parquet file without the column (its columns are named), damaged compression. A row
/// without a text - broken JSON, another type, no UTF-8 - is a skipped row.
pub fn rows(path: &Path, schema: Schema, field: Option<&str>) -> Result<Rows> {
    rows_with_bar(path, schema, field, &ProgressBar::hidden())
}

/// The same; `bar` counts the bytes read of the file.
pub fn rows_with_bar(
    path: &Path,
    schema: Schema,
    field: Option<&str>,
    bar: &ProgressBar,
) -> Result<Rows> {
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    match schema {
        Schema::Parquet | Schema::StarCoder => parquet_rows(path, file, schema, field, bar.clone()),
        Schema::Text => {
            let mut bytes = Vec::new();
            let read = decompress(bar.wrap_read(file)).and_then(|mut f| f.read_to_end(&mut bytes));
            read.with_context(|| format!("cannot read `{}`", path.display()))?;
            let row = match String::from_utf8(bytes) {
                Ok(text) => Row::Text(text),
                Err(_) => skipped("not UTF-8", 1),
            };
            Ok(Box::new(std::iter::once(Ok(row))))
        }
        Schema::JsonLines | Schema::SlimPajama => {
            let field = field.unwrap_or(schema.default_fields()[0]);
            json_rows(path, bar.wrap_read(file), field.to_owned(), schema == Schema::SlimPajama)
        }
    }
}

fn skipped(why: impl Into<String>, row: usize) -> Row {
    Row::Skipped { why: why.into(), row }
}

/// Undoes the compression that the first bytes tell of; all members and frames of a file are read.
fn decompress(file: impl Read + 'static) -> std::io::Result<Box<dyn Read>> {
    let mut file = BufReader::with_capacity(1 << 16, file);
    Ok(match file.fill_buf()? {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
            decoder.window_log_max(31)?; // `zstd --long=31`; the memory is taken only where it was used
            Box::new(decoder)
        }
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        _ => Box::new(file),
    })
}

fn json_rows(path: &Path, file: impl Read + 'static, field: String, slim: bool) -> Result<Rows> {
    let path = path.to_owned();
    let reader = decompress(file).with_context(|| format!("cannot read `{}`", path.display()))?;
    let lines = BufReader::with_capacity(1 << 16, reader).split(b'\n').enumerate();
    Ok(Box::new(lines.filter_map(move |(i, line)| match line {
        Ok(line) if line.iter().all(u8::is_ascii_whitespace) => None,
        Ok(line) => Some(Ok(json_row(&line, i + 1, &field, slim))),
        Err(e) => {
            let place = format!("cannot read `{}` after line {i}", path.display());
            Some(Err(e).context(place).hint("copy the file again, or leave it out"))
        }
    })))
}

fn json_row(line: &[u8], row: usize, field: &str, slim: bool) -> Row {
    let Ok(mut value) = serde_json::from_slice::<Value>(line) else {
        return skipped("no JSON", row);
    };
    if slim && value.pointer("/meta/redpajama_set_name").is_some_and(|n| n == "RedPajamaGithub") {
        return skipped("RedPajamaGithub", row);
    }
    match value.get_mut(field).map(Value::take) {
        Some(Value::String(text)) => Row::Text(text),
        _ => skipped(format!("no text under `{field}`"), row),
    }
}

fn parquet_rows(
    path: &Path,
    file: File,
    schema: Schema,
    field: Option<&str>,
    bar: ProgressBar,
) -> Result<Rows> {
    let size = file.metadata().map_or(0, |m| m.len());
    let reader = SerializedFileReader::new(file)
        .with_context(|| format!("cannot read `{}` as Parquet", path.display()))?;
    let root = reader.metadata().file_metadata().schema_descr().root_schema_ptr();
    let fields = root.get_fields();
    let wanted = field.as_ref().map_or(schema.default_fields(), std::slice::from_ref);
    let find = |name: &&str| fields.iter().find(|f| f.name() == *name);
    let Some(column) = wanted.iter().find_map(find) else {
        let names: Vec<&str> = fields.iter().map(|f| f.name()).collect();
        return Err(anyhow!("`{}` has no column `{}`", path.display(), wanted.join("` or `")))
            .usage(format!("its columns are {}; name one with `--text-field`", names.join(", ")));
    };
    // Only this column is decoded.
    let projection =
        Type::group_type_builder(root.name()).with_fields(vec![Arc::clone(column)]).build()?;
    let name = column.name().to_owned();
    let path = path.to_owned();
    let n_rows = reader.metadata().file_metadata().num_rows().max(1) as u64;
    let bytes_before = move |row: u64| (size as u128 * row as u128 / n_rows as u128) as u64;
    let rows = reader.into_iter().project(Some(projection))?.enumerate().map(move |(i, row)| {
        let row = row
            .with_context(|| format!("cannot read `{}` after row {i}", path.display()))
            .hint("copy the file again, or leave it out")?;
        bar.inc(bytes_before(i as u64 + 1) - bytes_before(i as u64));
        // Strings without the UTF8 annotation come as bytes.
        Ok(match (row.get_string(0), row.get_bytes(0)) {
            (Ok(text), _) => Row::Text(text.clone()),
            (_, Ok(bytes)) => match String::from_utf8(bytes.data().to_vec()) {
                Ok(text) => Row::Text(text),
                Err(_) => skipped("not UTF-8", i + 1),
            },
            _ => skipped(format!("no text under `{name}`"), i + 1),
        })
    });
    Ok(Box::new(rows))
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
    fn github_rows_of_slimpajama_are_dropped_and_rows_without_text_say_why() {
        let github = br#"{"text": "x", "meta": {"redpajama_set_name": "RedPajamaGithub"}}"#;
        assert_eq!(json_row(github, 1, "text", true), skipped("RedPajamaGithub", 1));
        assert_eq!(json_row(github, 1, "text", false), Row::Text("x".into()));
        for (line, why) in [
            (&b"{"[..], "no JSON"),
            (b"{\"text\": \"\xff\"}", "no JSON"),
            (b"{\"text\": 3}", "no text under `text`"),
            (b"[1]", "no text under `text`"),
        ] {
            assert_eq!(json_row(line, 4, "text", true), skipped(why, 4));
        }
    }
}
