//! `manifest.json`: what a folder of packed files was made from, and whether it is still that.

use crate::config::PrepareConfig;
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Its name in the folder.
pub const FILE_NAME: &str = "manifest.json";

/// What was prepared, in `manifest.json` beside the files.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Manifest {
    /// The options that made it; another preparation into the same folder must have the same.
    pub options: PrepareConfig,
    /// Ids of the tokenizer.
    pub vocab_size: usize,
    /// Checksum of the ids that the tokenizer gives a fixed text: tells tokenizers of one size apart.
    pub tokenizer: String,
    /// Source files with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
    /// Packed files in `out` with their sizes in bytes.
    pub outputs: BTreeMap<String, u64>,
    /// Packed files in `validation_out` with their sizes in bytes.
    pub validation_outputs: BTreeMap<String, u64>,
    /// Documents in the training split.
    pub documents: u64,
    /// Tokens in the training split.
    pub tokens: u64,
    /// Documents in the validation split.
    pub validation_documents: u64,
    /// Tokens in the validation split.
    pub validation_tokens: u64,
    /// Rows left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// File and row of the first one left out, by reason.
    pub first_skipped: BTreeMap<String, String>,
}

impl Manifest {
    /// Of a preparation that begins: sources known, nothing counted.
    pub fn begin(options: &PrepareConfig, files: &[PathBuf], t: &Tokenizer) -> Result<Self> {
        let size = |p: &PathBuf| (p.display().to_string(), p.metadata().map_or(0, |m| m.len()));
        Ok(Self {
            options: options.clone(),
            vocab_size: t.vocab_size(),
            tokenizer: fingerprint(t)?,
            files: files.iter().map(size).collect(),
            outputs: BTreeMap::new(),
            validation_outputs: BTreeMap::new(),
            documents: 0,
            tokens: 0,
            validation_documents: 0,
            validation_tokens: 0,
            skipped: BTreeMap::new(),
            first_skipped: BTreeMap::new(),
        })
    }

    /// The manifest of a folder, if it has one.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
        let found = serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no manifest of a preparation", path.display()))
            .hint("choose another `out`, or remove the folder to prepare again")?;
        Ok(Some(found))
    }

    /// Writes it into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE_NAME);
        fs::write(&path, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display()))
    }

    /// Counts a row left out.
    pub fn skip(&mut self, why: String, place: impl FnOnce() -> String) {
        let count = self.skipped.entry(why.clone()).or_default();
        *count += 1;
        if *count == 1 {
            self.first_skipped.insert(why, place());
        }
    }

    /// What the output folder holds already, where the same options made it from the same files.
    ///
    /// # Errors
    /// It was made otherwise, or packed files are missing or of another size; the message lists which.
    pub fn find_prepared(&self) -> Result<Option<Self>> {
        let out = &self.options.out;
        let Some(found) = Self::read(out)? else { return Ok(None) };
        let mut differences = self.differences(&found);
        differences.extend(damage(out, &found.outputs));
        if let Some(out) = &self.options.validation_out {
            differences.extend(damage(out, &found.validation_outputs));
        }
        if differences.is_empty() {
            return Ok(Some(found));
        }
        Err(anyhow!("`{}` was prepared otherwise:\n  {}", out.display(), differences.join("\n  ")))
            .hint("choose another `out`, or remove the folder to prepare again")
    }

    /// Options, tokenizer and sources that are not `found`'s, one line each.
    fn differences(&self, found: &Self) -> Vec<String> {
        let tree = |options: &PrepareConfig| serde_json::to_value(options).unwrap_or_default();
        let (old, new) = (tree(&found.options), tree(&self.options));
        let mut lines = Vec::new();
        for (key, value) in new.as_object().into_iter().flatten() {
            let was = old.get(key).unwrap_or(&Value::Null);
            // Where the folder lies may be said in several ways.
            if was != value && key != "out" {
                lines.push(format!("`{key}`: was {was}, now {value}"));
            }
        }
        if found.vocab_size != self.vocab_size {
            lines.push(format!("tokenizer: had {} ids, now {}", found.vocab_size, self.vocab_size));
        } else if found.tokenizer != self.tokenizer {
            lines.push("tokenizer: another of the same size".into());
        }
        for name in
            found.files.keys().chain(self.files.keys().filter(|n| !found.files.contains_key(*n)))
        {
            let show = |size: Option<&u64>| size.map_or("absent".into(), |n| format!("{n} bytes"));
            let (was, now) = (found.files.get(name), self.files.get(name));
            if was != now {
                lines.push(format!("source `{name}`: was {}, now {}", show(was), show(now)));
            }
        }
        if lines.len() > 12 {
            let rest = lines.split_off(10).len();
            lines.push(format!("and {rest} more"));
        }
        lines
    }
}

/// Packed files that are not there as the manifest says.
fn damage(dir: &Path, outputs: &BTreeMap<String, u64>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, bytes) in outputs {
        let path = dir.join(name);
        match path.metadata() {
            Ok(m) if m.len() == *bytes => {}
            Ok(m) => {
                lines.push(format!("`{}`: was {bytes} bytes, now {}", path.display(), m.len()))
            }
            Err(_) => lines.push(format!("`{}`: is missing", path.display())),
        }
    }
    lines
}

/// Checksum of the ids of a fixed text with prose, code, digits and several scripts.
fn fingerprint(tokenizer: &Tokenizer) -> Result<String> {
    const PROBE: &str = "The quick brown foxes weren't jumping over 1,234.5 lazy dogs in 1999. \
        My fellow citizens: the government recommends further international legislation.\n\n\
        def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    raise NotImplementedError\n\
        \tfor (int i = 0; i < 10; ++i) { x[i] += 3.14e-5; }\n\
        \u{fc}ber \u{e9}t\u{e9} \u{4f60}\u{597d}\u{4e16}\u{754c} \u{41f}\u{440}\u{438} \u{1f999}";
    let ids = tokenizer.encode(PROBE, false, false).context("cannot tokenize a sample text")?;
    let sum = ids.iter().fold(0, |sum, id| crc32c::crc32c_append(sum, &id.to_le_bytes()));
    Ok(format!("{sum:08x}"))
}
