//! Documents of a corpus: plain text, JSON lines, Parquet; plain, `.gz` or `.zst`.

use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use flate2::read::MultiGzDecoder;
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
    /// A row left out, and why.
    Skipped(String),
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
            other => bail_hint!(
                "choose one of `text`, `jsonl`, `parquet`, `slimpajama`, `starcoder`";
                "`{other}` is no kind of corpus"
            ),
        })
    }

    /// The schema that a file's name suggests.
    pub fn of_file(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let plain = name.trim_end_matches(".zst").trim_end_matches(".gz");
        match plain.rsplit('.').next() {
            Some("jsonl" | "ndjson") => Self::JsonLines,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }

    /// The field of the text, unless another is asked for.
    fn default_field(self) -> &'static str {
        match self {
            Self::Parquet | Self::StarCoder => "content",
            _ => "text",
        }
    }

    /// Whether a file of a folder belongs to a corpus of this kind.
    fn takes(self, path: &Path) -> bool {
        let found = Self::of_file(path);
        match self {
            Self::JsonLines | Self::SlimPajama => found == Self::JsonLines,
            Self::Parquet | Self::StarCoder => found == Self::Parquet,
            Self::Text => found == Self::Text,
        }
    }
}

/// The files of a source, sorted: a file, a folder (with the folders in it), or a pattern with `*`.
pub fn files(source: &str, schema: Schema) -> Result<Vec<PathBuf>> {
    let path = Path::new(source);
    let mut found = Vec::new();
    if path.is_file() {
        found.push(path.to_owned());
    } else if path.is_dir() {
        walk(path, &mut found)?;
        found.retain(|p| schema.takes(p));
    } else if source.contains('*') {
        let fixed = source.split('*').next().unwrap_or("");
        let root = Path::new(fixed.rsplit_once('/').map_or(".", |(dir, _)| dir));
        walk(root, &mut found)?;
        found.retain(|p| matches(source.trim_start_matches("./"), &p.to_string_lossy()));
    }
    found.sort();
    if found.is_empty() {
        bail_hint!(
            "name a file, a folder or a pattern such as 'corpus/*.jsonl.zst'";
            "no {schema:?} files at `{source}`"
        );
    }
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read the folder `{}`", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() { walk(&path, found)? } else { found.push(path) }
    }
    Ok(())
}

/// Whether a path matches a pattern in which `*` stands for any run of characters.
fn matches(pattern: &str, path: &str) -> bool {
    let path = path.trim_start_matches("./");
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
/// An unreadable file, a Parquet file without the column (its columns are named), damaged compression. A
/// broken JSON line is a skipped row.
pub fn rows(path: &Path, schema: Schema, field: Option<&str>) -> Result<Rows> {
    let field = field.unwrap_or(schema.default_field()).to_owned();
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    match schema {
        Schema::Parquet | Schema::StarCoder => parquet_rows(path, file, &field),
        Schema::Text => {
            let mut text = String::new();
            let read = decompress(path, file)?.read_to_string(&mut text);
            read.with_context(|| format!("cannot read `{}` as UTF-8 text", path.display()))?;
            Ok(Box::new(std::iter::once(Ok(Row::Text(text)))))
        }
        Schema::JsonLines | Schema::SlimPajama => {
            let reader = BufReader::with_capacity(1 << 16, decompress(path, file)?);
            let slim = schema == Schema::SlimPajama;
            let path = path.to_owned();
            Ok(Box::new(reader.lines().enumerate().filter_map(move |(i, line)| match line {
                Ok(line) if line.trim().is_empty() => None,
                Ok(line) => Some(Ok(json_row(&line, i + 1, &field, slim))),
                Err(e) => Some(Err(e).with_context(|| format!("cannot read `{}`", path.display()))),
            })))
        }
    }
}

fn decompress(path: &Path, file: File) -> Result<Box<dyn Read>> {
    Ok(match path.extension().and_then(|e| e.to_str()) {
        Some("zst") => Box::new(
            zstd::stream::read::Decoder::new(file)
                .with_context(|| format!("cannot decompress `{}`", path.display()))?,
        ),
        Some("gz") => Box::new(MultiGzDecoder::new(file)),
        _ => Box::new(file),
    })
}

fn json_row(line: &str, number: usize, field: &str, slim: bool) -> Row {
    let Ok(value) = serde_json::from_str::<Value>(line) else {
        return Row::Skipped(format!("no JSON (first at line {number})"));
    };
    if slim && value.pointer("/meta/redpajama_set_name").is_some_and(|n| n == "RedPajamaGithub") {
        return Row::Skipped("RedPajamaGithub".into());
    }
    match value.get(field).and_then(Value::as_str) {
        Some(text) => Row::Text(text.to_owned()),
        None => Row::Skipped(format!("no text under `{field}` (first at line {number})")),
    }
}

fn parquet_rows(path: &Path, file: File, column: &str) -> Result<Rows> {
    let reader = SerializedFileReader::new(file)
        .with_context(|| format!("cannot read `{}` as Parquet", path.display()))?;
    let root = reader.metadata().file_metadata().schema_descr().root_schema_ptr();
    let fields = root.get_fields();
    let Some(field) = fields.iter().find(|f| f.name() == column) else {
        let names: Vec<&str> = fields.iter().map(|f| f.name()).collect();
        return Err(anyhow!("`{}` has no column `{column}`", path.display()))
            .hint(format!("its columns are {}; name one with `--text-field`", names.join(", ")));
    };
    // Only this column is decoded.
    let projection =
        Type::group_type_builder(root.name()).with_fields(vec![Arc::clone(field)]).build()?;
    let path = path.to_owned();
    let rows = reader.into_iter().project(Some(projection))?.map(move |row| {
        let row = row.with_context(|| format!("`{}` is damaged", path.display()))?;
        Ok(match row.get_string(0) {
            Ok(text) => Row::Text(text.clone()),
            Err(_) => Row::Skipped("no text in the column".into()),
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
            ("a*", "b", false),
        ] {
            assert_eq!(matches(pattern, path), want, "{pattern} {path}");
        }
    }

    #[test]
    fn github_rows_of_slimpajama_are_dropped_and_broken_ones_counted() {
        let github = r#"{"text": "x", "meta": {"redpajama_set_name": "RedPajamaGithub"}}"#;
        assert_eq!(json_row(github, 1, "text", true), Row::Skipped("RedPajamaGithub".into()));
        assert_eq!(json_row(github, 1, "text", false), Row::Text("x".into()));
        assert!(
            matches!(json_row("{", 4, "text", true), Row::Skipped(why) if why.contains("line 4"))
        );
    }
}
