//! Text, JSON lines, CSV or Parquet named where packed files are expected: prepared once, into a cache.
//!
//! The cache's folder is named by everything the ids depend on: names and SHA-256 of the files, the tokenizer, the
//! field. So a corpus that changes is prepared anew, and one that was renamed elsewhere or copied is too.

use super::manifest::fingerprint;
use super::prepare;
use crate::config::{DataConfig, PrepareConfig};
use crate::data::documents::{self, Schema, Selection, SourceSum};
use crate::data::hub::HubSource;
use crate::data::packed::{PackedError, find_files};
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// `data` with packed files in all places: raw sources are prepared first, where they are not in the cache.
///
/// Reads each raw file once to know whether it is as it was, about 1 GB/s a core; packed sources are not touched.
///
/// # Errors
/// As [`prepare`]; no tokenizer; a folder with files of several kinds.
pub fn with_raw_prepared(data: &DataConfig, tokenizer: Option<&Tokenizer>) -> Result<DataConfig> {
    let mut out = data.clone();
    let paths = out.train.iter_mut().map(|source| &mut source.path).chain(out.val.as_mut());
    for path in paths {
        if let Some(schema) = raw_schema(path)? {
            *path = prepared(path, schema, data, tokenizer)?;
        }
    }
    Ok(out)
}

/// The kind of raw corpus that `path` names; `None` where it names packed files, or nothing.
fn raw_schema(path: &Path) -> Result<Option<Schema>> {
    if !matches!(find_files(path), Err(PackedError::NoFiles { .. })) {
        return Ok(None);
    }
    let source = path.to_string_lossy();
    if HubSource::parse(&source)?.is_some() {
        return Err(anyhow!("`{source}` is a dataset on the Hub, and no folder of packed files"))
            .usage("name it as `source` under `prepare`, and its `out` here");
    }
    if path.is_file() {
        return Ok(Some(Schema::of_file(path)));
    }
    if !path.is_dir() && !source.contains('*') {
        return Ok(None); // opening it says what is missing
    }
    let kinds = [Schema::Text, Schema::Json, Schema::Csv, Schema::Parquet];
    let found: Vec<Schema> = kinds
        .into_iter()
        .filter(|schema| {
            let files = documents::files(&source, &Selection::all(*schema, None), "train");
            files.is_ok_and(|files| {
                files.iter().any(|f| path.is_dir() || Schema::of_file(f) == *schema)
            })
        })
        .collect();
    match found[..] {
        [] => Ok(None),
        [schema] => Ok(Some(schema)),
        _ => {
            let names: Vec<&str> = found.iter().map(|schema| schema.name()).collect();
            Err(anyhow!("`{source}` holds files of several kinds: {}", names.join(", ")))
                .usage("name one kind by a pattern such as 'corpus/*.jsonl.zst'")
        }
    }
}

/// The folder of packed files of a raw source.
fn prepared(
    path: &Path,
    schema: Schema,
    data: &DataConfig,
    tokenizer: Option<&Tokenizer>,
) -> Result<PathBuf> {
    let source = path.to_string_lossy().into_owned();
    let tokenizer = tokenizer
        .ok_or_else(|| anyhow!("`{source}` is {}: training on it needs a tokenizer", schema.name()))
        .usage("set `tokenizer_dir`")?;
    let selection = Selection::all(schema, data.text_field.as_deref());
    let files = documents::files(&source, &selection, "train")?;
    let hashes = files.par_iter().map(|file| Ok(SourceSum::of(file)?.sha256));
    let mut sha256 = Sha256::new();
    let mut add = |part: &str| sha256.update([part.as_bytes(), b"\0"].concat());
    add(schema.name());
    add(data.text_field.as_deref().unwrap_or_default());
    add(&fingerprint(tokenizer)?);
    for (file, hash) in files.iter().zip(hashes.collect::<Result<Vec<_>>>()?) {
        add(&file.to_string_lossy());
        add(&hash);
    }
    let key = format!("{:x}", sha256.finalize());
    let out = cache_dir(data)?.join(format!("{}-{}", name_of(path), &key[..16]));
    prepare(&options(schema, source, &out, data), tokenizer, None)?;
    Ok(out)
}

fn options(schema: Schema, source: String, out: &Path, data: &DataConfig) -> PrepareConfig {
    PrepareConfig {
        text_field: data.text_field.clone(),
        ..PrepareConfig::new(schema.name(), source, out)
    }
}

/// A name for people: of the file or folder, or what a pattern begins with.
fn name_of(path: &Path) -> String {
    let is_plain = |part: &str| !part.contains('*');
    let mut parts = path.iter().map(|part| part.to_string_lossy().into_owned());
    let last = parts.rfind(|part| is_plain(part) && part != "/").unwrap_or_default();
    last.split('.').next().unwrap_or_default().to_owned()
}

fn cache_dir(data: &DataConfig) -> Result<PathBuf> {
    let dir = match &data.cache_dir {
        Some(dir) => dir.clone(),
        None => crate::cache::folder()
            .context("no place for prepared data: neither HOME nor XDG_CACHE_HOME is set")
            .hint("set `data.cache_dir`")?
            .join("data"),
    };
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("cannot make `{}`", dir.display()))
        .hint("set `data.cache_dir` to a folder that can be written")?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_a_raw_source_is_told_by_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| std::fs::write(dir.path().join(name), "x").unwrap();
        assert_eq!(raw_schema(dir.path()).unwrap(), None);
        file("a.jsonl");
        assert_eq!(raw_schema(dir.path()).unwrap(), Some(Schema::Json));
        assert_eq!(raw_schema(&dir.path().join("a.jsonl")).unwrap(), Some(Schema::Json));
        file("b.txt");
        let error = raw_schema(dir.path()).unwrap_err().to_string();
        assert!(error.contains("several kinds: text, jsonl"), "{error}");
        assert_eq!(raw_schema(&dir.path().join("*.txt")).unwrap(), Some(Schema::Text));
        assert_eq!(raw_schema(&dir.path().join("none*")).unwrap(), None);
        assert_eq!(raw_schema(&dir.path().join("none")).unwrap(), None);
        file("train_0000000000.bin");
        assert_eq!(raw_schema(dir.path()).unwrap(), None, "packed files win");
    }

    #[test]
    fn a_cache_folder_has_a_name_for_people() {
        for (path, want) in [("/a/my.jsonl.zst", "my"), ("corpus/*.txt", "corpus"), ("/a/b", "b")] {
            assert_eq!(name_of(Path::new(path)), want);
        }
    }
}
