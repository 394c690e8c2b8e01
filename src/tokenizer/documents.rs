//! Texts of a corpus file, for training a tokenizer.

use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::RowAccessor;
use parquet::schema::types::Type;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

/// Plain text is read in pieces of whole lines of about this many bytes.
const CHUNK: usize = 1 << 16;

/// Texts, one at a time.
pub type Texts = Box<dyn Iterator<Item = Result<String>>>;

/// The texts of one file, told apart by its name: `.jsonl` and `.jsonl.zst` (one object a line, the
/// text in `field`, default `text`), `.parquet` (column `field`, default `content`), else plain
/// text.
pub fn documents(path: &Path, field: Option<&str>) -> Result<Texts> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let file = File::open(path)
        .with_context(|| format!("cannot open {}", path.display()))
        .hint("name a file of text, .jsonl, .jsonl.zst or .parquet")?;
    let field_or = |default: &str| field.unwrap_or(default).to_string();
    if name.ends_with(".parquet") {
        return parquet_texts(path, file, &field_or("content"));
    }
    let plain: Box<dyn Read> = match name.ends_with(".zst") {
        true => Box::new(zstd::stream::read::Decoder::new(file)?),
        false => Box::new(file),
    };
    let reader = BufReader::with_capacity(CHUNK, plain);
    let json = [".jsonl", ".jsonl.zst", ".ndjson"]
        .iter()
        .any(|end| name.ends_with(end));
    match json {
        true => Ok(Box::new(json_texts(path, reader, field_or("text")))),
        false => Ok(Box::new(text_chunks(path, reader))),
    }
}

fn json_texts<R: BufRead>(
    path: &Path,
    reader: R,
    field: String,
) -> impl Iterator<Item = Result<String>> + use<R> {
    let path = path.to_path_buf();
    reader.lines().enumerate().filter_map(move |(i, line)| {
        let place = || format!("{} line {}", path.display(), i + 1);
        let line = match line.with_context(place) {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => line,
            Err(e) => return Some(Err(e)),
        };
        let value: Result<serde_json::Value> =
            serde_json::from_str(&line).with_context(|| format!("{} is no JSON", place()));
        Some(value.and_then(|value| {
            match value[&field].as_str() {
                Some(text) => Ok(text.to_string()),
                None => Err(anyhow!("{} has no text under {field:?}", place()))
                    .usage("name the key that holds the text with `--text-field`"),
            }
        }))
    })
}

fn text_chunks<R: BufRead>(
    path: &Path,
    mut reader: R,
) -> impl Iterator<Item = Result<String>> + use<R> {
    let path = path.to_path_buf();
    std::iter::from_fn(move || {
        let mut chunk = String::new();
        while chunk.len() < CHUNK {
            match reader.read_line(&mut chunk) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) => {
                    return Some(Err(e).with_context(|| format!("cannot read {}", path.display())));
                }
            }
        }
        (!chunk.is_empty()).then_some(Ok(chunk))
    })
}

fn parquet_texts(path: &Path, file: File, column: &str) -> Result<Texts> {
    let name = path.display().to_string();
    let reader = SerializedFileReader::new(file).with_context(|| format!("cannot read {name}"))?;
    let schema = reader.metadata().file_metadata().schema();
    let fields = schema.get_fields();
    let names = || {
        fields
            .iter()
            .map(|f| f.name())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let field = fields
        .iter()
        .find(|f| f.name() == column)
        .ok_or_else(|| anyhow!("{name} has no column {column:?}; it has {}", names()))
        .usage("name the column that holds the text with `--text-field`")?;
    let only = Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(field)])
        .build()?;
    let rows = reader.into_iter().project(Some(only))?;
    Ok(Box::new(rows.filter_map(move |row| match row {
        Ok(row) if matches!(row.is_null(0), Ok(true)) => None,
        Ok(row) => Some(row.get_string(0).cloned().with_context(|| name.clone())),
        Err(e) => Some(Err(e).with_context(|| format!("cannot read {name}"))),
    })))
}
