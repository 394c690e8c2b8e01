//! The rows of an evaluation set: JSON lines, Parquet or Arrow, below the data folder.

use crate::bail_hint;
use crate::data::documents::objects;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, FieldRef};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// A row.
pub type Row = Map<String, Value>;

/// All rows of a split: of the files in `DIR/SPLIT/`, or of those beside it whose names begin so (`DIR/SPLIT.jsonl.gz`,
/// `DIR/SPLIT-00000-of-00002.parquet`), in the order of their names. `None` where there are no such files.
///
/// # Errors
/// A file that cannot be read, or that holds something else than rows; one that is there plain and compressed.
pub fn read(dir: &Path, split: &str) -> Result<Option<Vec<Row>>> {
    let files = files(dir, split)?;
    if files.is_empty() {
        return Ok(None);
    }
    let mut rows = Vec::new();
    for file in files {
        match file.extension().is_some_and(|extension| extension == "arrow") {
            true => rows.extend(of_arrow(&file)?),
            false => {
                for object in objects(&file)? {
                    let row = object.map_err(|skipped| {
                        anyhow!("row {} of `{}`: {}", skipped.row, file.display(), skipped.why)
                    });
                    rows.push(row?);
                }
            }
        }
    }
    Ok(Some(rows))
}

fn files(dir: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let inside = dir.join(split);
    let (folder, begins) = match inside.is_dir() {
        true => (inside.as_path(), ""),
        false => (dir, split),
    };
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let cannot = || format!("cannot list `{}`", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let rest = name.strip_prefix(begins);
        let is_split = rest.is_some_and(|r| begins.is_empty() || r.starts_with(['.', '-']));
        let kinds = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"];
        if is_split && kinds.iter().any(|kind| name.ends_with(kind)) {
            found.push(path);
        }
    }
    found.sort();
    refuse_twice(&found)?;
    Ok(found)
}

/// Refuses a file that is there both plain and compressed: its rows would count twice.
fn refuse_twice(files: &[PathBuf]) -> Result<()> {
    let mut plain: BTreeMap<PathBuf, &PathBuf> = BTreeMap::new();
    for file in files {
        let is_compressed = file.extension().is_some_and(|end| end == "gz" || end == "zst");
        let name = if is_compressed { file.with_extension("") } else { file.clone() };
        if let Some(other) = plain.insert(name, file) {
            bail_hint!(
                "delete one of the two, or move it out of the folder";
                "expected a set plain or compressed, got `{}` and `{}`, whose rows would count twice",
                other.display(), file.display()
            );
        }
    }
    Ok(())
}

/// Rows of an Arrow IPC file, of the stream that `datasets` saves or of the random-access kind.
fn of_arrow(path: &Path) -> Result<Vec<Row>> {
    let open = || File::open(path).map(BufReader::new);
    let cannot = || format!("cannot read `{}` as Arrow", path.display());
    let batches: Vec<RecordBatch> = match FileReader::try_new(open().with_context(cannot)?, None) {
        Ok(reader) => reader.collect::<Result<_, _>>(),
        Err(_) => StreamReader::try_new(open().with_context(cannot)?, None)
            .and_then(|reader| reader.collect()),
    }
    .with_context(cannot)
    .hint("copy the file again")?;
    let mut rows = Vec::new();
    for batch in &batches {
        let schema = batch.schema();
        for i in 0..batch.num_rows() {
            let fields = schema.fields().iter().zip(batch.columns());
            let field = |(field, column): (&FieldRef, &ArrayRef)| {
                Some((field.name().clone(), value(column, i)?))
            };
            rows.push(fields.filter_map(field).collect());
        }
    }
    Ok(rows)
}

/// Value `i` of a column; `None` of a type that is not read: a task that names such a column is told that there is none,
/// which a null would not.
fn value(column: &dyn Array, i: usize) -> Option<Value> {
    if column.is_null(i) {
        return Some(Value::Null);
    }
    let list =
        |items: &dyn Array| (0..items.len()).map(|i| value(items, i)).collect::<Option<Vec<_>>>();
    Some(match column.data_type() {
        DataType::Boolean => column.as_boolean().value(i).into(),
        DataType::Int8 => column.as_primitive::<Int8Type>().value(i).into(),
        DataType::Int16 => column.as_primitive::<Int16Type>().value(i).into(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(i).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(i).into(),
        DataType::UInt8 => column.as_primitive::<UInt8Type>().value(i).into(),
        DataType::UInt16 => column.as_primitive::<UInt16Type>().value(i).into(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().value(i).into(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(i).into(),
        DataType::Float32 => column.as_primitive::<Float32Type>().value(i).into(),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(i).into(),
        DataType::Utf8 => column.as_string::<i32>().value(i).into(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(i).into(),
        DataType::Utf8View => column.as_string_view().value(i).into(),
        DataType::Dictionary(..) => {
            let dictionary = column.as_any_dictionary();
            return value(dictionary.values(), dictionary.normalized_keys()[i]);
        }
        DataType::List(_) => Value::Array(list(&column.as_list::<i32>().value(i))?),
        DataType::LargeList(_) => Value::Array(list(&column.as_list::<i64>().value(i))?),
        DataType::FixedSizeList(..) => Value::Array(list(&column.as_fixed_size_list().value(i))?),
        DataType::Struct(fields) => {
            let columns = column.as_struct().columns();
            let pair = |(field, column): (&FieldRef, &ArrayRef)| {
                Some((field.name().clone(), value(column, i)?))
            };
            Value::Object(fields.iter().zip(columns).filter_map(pair).collect())
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_that_is_there_plain_and_compressed_is_refused_with_both_names() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(dir.path().join(name), "{}\n").unwrap();
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        for name in
            ["test.jsonl", "test-1.jsonl.gz", "train.jsonl.gz", "dev/a.jsonl", "dev/b.jsonl.gz"]
        {
            write(name);
        }
        let names = |split: &str| files(dir.path(), split).map(|files| files.len());
        assert_eq!(["test", "train", "dev"].map(|split| names(split).unwrap()), [2, 1, 2]);
        for (name, split, other) in [
            ("test.jsonl.gz", "test", "test.jsonl`"),
            ("train.jsonl.zst", "train", "train.jsonl.gz`"),
            ("dev/a.jsonl.zst", "dev", "a.jsonl`"),
        ] {
            write(name);
            let error = read(dir.path(), split).unwrap_err();
            let told = error.to_string();
            assert!(told.contains(other) && told.contains(&format!("{name}`")), "{told}");
            assert!(crate::error::hint(&error).is_some());
        }
    }
}
