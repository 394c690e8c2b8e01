//! Rows of a corpus as JSON objects: of `.jsonl`, `.json` and `.parquet`, nested columns included.

use super::json::{Lines, Values};
use super::source::Source;
use super::{Format, Piece, Skipped};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::path::Path;

/// A row, or why it is none.
pub type Object = Result<Map<String, Value>, Skipped>;

/// All rows of a file, which is held in memory: conversations are few.
///
/// # Errors
/// A file of another kind; one that cannot be read to its end. A row that is no object is a skipped one.
pub fn objects(path: &Path) -> Result<Vec<Object>> {
    let source = Source::new(path);
    match Format::of(path) {
        Some(Format::JsonLines) => of_pieces(Lines::open(&source)?),
        Some(Format::JsonValues) => of_pieces(Values::open(&source)?),
        Some(Format::Parquet) => of_parquet(&source),
        _ => Err(anyhow!("`{}` is no file of conversations", path.display()))
            .usage("expected `.jsonl`, `.json` or `.parquet`, perhaps with `.gz` or `.zst` behind"),
    }
}

fn of_pieces(pieces: impl Iterator<Item = Result<Piece>>) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for piece in pieces {
        let Piece::Lines { bytes, first } = piece? else { continue };
        for (line, row) in bytes.split(|&b| b == b'\n').zip(first..) {
            if !line.iter().all(u8::is_ascii_whitespace) {
                objects.push(of_line(line, row));
            }
        }
    }
    Ok(objects)
}

fn of_line(line: &[u8], row: u64) -> Object {
    let skipped =
        |why: &str, detail: String| Skipped { why: why.into(), row, detail, damaged: true };
    match serde_json::from_slice::<Value>(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(skipped("no JSON object", String::new())),
        Err(e) if std::str::from_utf8(line).is_err() => Err(skipped("not UTF-8", e.to_string())),
        Err(e) => Err(skipped("no JSON", e.to_string())),
    }
}

fn of_parquet(source: &Source) -> Result<Vec<Object>> {
    let file = SerializedFileReader::new(source.file()?)
        .with_context(|| format!("{} as Parquet", source.cannot("read")))
        .hint("a file cut short has no footer: copy it again, or leave it out")?;
    let rows = file.get_row_iter(None).with_context(|| source.cannot("read"))?;
    rows.map(|row| Ok(Ok(of_row(&row.with_context(|| source.cannot("read"))?)))).collect()
}

fn of_row(row: &Row) -> Map<String, Value> {
    row.get_column_iter()
        .filter_map(|(name, field)| Some((name.clone(), of_field(field)?)))
        .collect()
}

/// `None`: dates, decimals, maps and bytes that are no text, which are not read: the row has no such column then.
fn of_field(field: &Field) -> Option<Value> {
    Some(match field {
        Field::Null => Value::Null,
        Field::Str(text) => Value::String(text.clone()),
        Field::Bool(on) => Value::Bool(*on),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float(x) => (*x).into(),
        Field::Double(x) => (*x).into(),
        // Text of writers that do not mark it as such.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok()?.into(),
        Field::Group(row) => Value::Object(of_row(row)),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(of_field).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}
