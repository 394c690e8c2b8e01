//! Texts of a corpus file, for training a tokenizer.

use crate::data::documents::{Row, Schema, rows};
use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::path::Path;

/// Texts, one at a time.
pub type Texts = Box<dyn Iterator<Item = Result<String>>>;

/// The texts of one file, told apart by its name: `.jsonl` (one object a line, the text in `field`, default
/// `text`), `.parquet` (column `field`, default `content`), else plain text; plain, `.gz` or `.zst`.
///
/// # Errors
/// Unlike in preparation, a JSON row without a text is an error: a tokenizer is trained once.
pub fn documents(path: &Path, field: Option<&str>) -> Result<Texts> {
    let name = path.display().to_string();
    let schema = Schema::of_file(path);
    let rows =
        rows(path, schema, field).hint("name a file of text, .jsonl, .jsonl.zst or .parquet")?;
    Ok(Box::new(rows.filter_map(move |row| {
        match row {
            Ok(Row::Text(text)) => Some(Ok(text)),
            Ok(Row::Skipped(_)) if schema == Schema::Parquet => None, // a null
            Ok(Row::Skipped(skipped)) => Some(
                Err(anyhow!("{name}: {skipped}"))
                    .usage("name the key that holds the text with `--text-field`"),
            ),
            Err(e) => Some(Err(e)),
        }
    })))
}
