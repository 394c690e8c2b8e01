//! `manifest.json`: what a folder of packed files was made from, and whether it is still that.

use super::journal::Entry;
use crate::config::PrepareConfig;
use crate::data::documents::{Skipped, SourceSum};
use crate::data::writer::OutputFile;
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
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
    /// SHA-256 of the tokenizer: its tokens by id, and the ids that it gives a fixed text.
    pub tokenizer: String,
    /// Commit of the source, where that is a dataset on the Hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Source files.
    pub sources: BTreeMap<String, SourceRecord>,
    /// Packed files in `out`.
    pub outputs: BTreeMap<String, OutputFile>,
    /// Packed files in `validation_out`.
    pub validation_outputs: BTreeMap<String, OutputFile>,
    /// Documents, tokens, rows left out.
    #[serde(flatten)]
    pub counts: Counts,
}

/// One source file.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct SourceRecord {
    /// Size, hash, time of change; the hash is empty until the file is read.
    #[serde(flatten)]
    pub sum: SourceSum,
    /// Documents in it, of both splits.
    pub documents: u64,
    /// Tokens of these.
    pub tokens: u64,
}

/// What was found so far.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Counts {
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

impl Counts {
    /// Documents and tokens of both splits.
    pub fn totals(&self) -> (u64, u64) {
        (self.documents + self.validation_documents, self.tokens + self.validation_tokens)
    }

    /// Counts a row left out.
    pub fn skip(&mut self, skipped: &Skipped, path: &Path) {
        let count = self.skipped.entry(skipped.why.clone()).or_default();
        *count += 1;
        if *count == 1 {
            let mut place = path.display().to_string();
            if skipped.row > 0 {
                place += &format!(", row {}", skipped.row);
            }
            if !skipped.detail.is_empty() {
                place += &format!(": {}", skipped.detail);
            }
            self.first_skipped.insert(skipped.why.clone(), place);
        }
    }
}

impl Manifest {
    /// Of a preparation that begins: sources known, nothing counted.
    pub fn begin(options: &PrepareConfig, files: &[PathBuf], t: &Tokenizer) -> Result<Self> {
        let record = |path: &PathBuf| {
            let (bytes, modified) = SourceSum::stat(path)?;
            let sum = SourceSum { bytes, modified, sha256: String::new() };
            let record = SourceRecord { sum, documents: 0, tokens: 0 };
            anyhow::Ok((path.display().to_string(), record))
        };
        Ok(Self {
            options: options.clone(),
            vocab_size: t.vocab_size(),
            tokenizer: fingerprint(t)?,
            commit: None,
            sources: files.iter().map(record).collect::<Result<_>>()?,
            outputs: BTreeMap::new(),
            validation_outputs: BTreeMap::new(),
            counts: Counts::default(),
        })
    }

    /// The manifest of a folder, if it has one.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        Self::read_file(&dir.join(FILE_NAME))
    }

    /// The same by the file's own path.
    pub fn read_file(path: &Path) -> Result<Option<Self>> {
        let Ok(text) = fs::read_to_string(path) else { return Ok(None) };
        let found = serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no manifest of a preparation", path.display()))
            .hint("choose another `out`, or remove the folder to prepare again")?;
        Ok(Some(found))
    }

    /// Writes it; a file of this name is complete.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write = || {
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, serde_json::to_string_pretty(self)? + "\n")?;
            fs::File::open(&temporary)?.sync_all()?;
            anyhow::Ok(fs::rename(&temporary, path)?)
        };
        write()
            .with_context(|| format!("cannot write `{}`", path.display()))
            .hint("check that the disk is there and not full")
    }

    /// What the output folder holds already, where the same options made it from the same files.
    ///
    /// # Errors
    /// It was made otherwise, or packed files are missing or of another size; the message lists which.
    pub fn find_prepared(&self) -> Result<Option<Self>> {
        let out = &self.options.out;
        let Some(found) = Self::read(out)? else { return Ok(None) };
        let mut differences = self.differences(&found)?;
        differences.extend(damage(out, &found.outputs));
        if let Some(out) = &self.options.validation_out {
            differences.extend(damage(out, &found.validation_outputs));
        }
        refuse(&format!("`{}` was prepared otherwise", out.display()), differences)?;
        Ok(Some(found))
    }

    /// Refuses to go on with what another preparation began. A source that is not through may change: the
    /// copy of a damaged file, for one.
    ///
    /// # Errors
    /// Other options, another tokenizer or other sources; the message lists which.
    pub(super) fn must_continue(&self, mut begun: Self, done: &[Entry], at: &Path) -> Result<()> {
        for (name, record) in &mut begun.sources {
            if let Some(now) = self.sources.get(name) {
                *record = now.clone();
            }
        }
        begun.sources.extend(done.iter().map(|e| (e.source.clone(), e.record.clone())));
        let differences = self.differences(&begun)?;
        refuse(&format!("`{}` was begun otherwise", at.display()), differences)
    }

    /// Options, tokenizer and sources that are not `found`'s, one line each. A source whose time of change is
    /// another is read and its hash compared.
    fn differences(&self, found: &Self) -> Result<Vec<String>> {
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
        let names = self.sources.keys().filter(|name| !found.sources.contains_key(*name));
        for name in found.sources.keys().chain(names) {
            match (found.sources.get(name), self.sources.get(name)) {
                (Some(was), Some(now)) if was.sum.bytes == now.sum.bytes => {
                    let same_time = was.sum.modified == now.sum.modified;
                    let unread = was.sum.sha256.is_empty();
                    if !(same_time || unread)
                        && SourceSum::of(Path::new(name))?.sha256 != was.sum.sha256
                    {
                        lines.push(format!("source `{name}`: has changed, at the same size"));
                    }
                }
                (was, now) => {
                    let show = |record: Option<&SourceRecord>| match record {
                        Some(record) => format!("{} bytes", record.sum.bytes),
                        None => "absent".into(),
                    };
                    lines.push(format!("source `{name}`: was {}, now {}", show(was), show(now)));
                }
            }
        }
        if lines.len() > 12 {
            let rest = lines.split_off(10).len();
            lines.push(format!("and {rest} more"));
        }
        Ok(lines)
    }
}

fn refuse(what: &str, differences: Vec<String>) -> Result<()> {
    if differences.is_empty() {
        return Ok(());
    }
    Err(anyhow!("{what}:\n  {}", differences.join("\n  ")))
        .hint("choose another `out`, or remove the folder to prepare again")
}

/// Packed files that are not there as the manifest says.
fn damage(dir: &Path, outputs: &BTreeMap<String, OutputFile>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, OutputFile { bytes, .. }) in outputs {
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

/// Hash of every token by its id and of the ids of a fixed text with prose, code, digits and several scripts.
pub(super) fn fingerprint(tokenizer: &Tokenizer) -> Result<String> {
    const PROBE: &str = "The quick brown foxes weren't jumping over 1,234.5 lazy dogs in 1999. \
        My fellow citizens: the government recommends further international legislation.\n\n\
        def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    raise NotImplementedError\n\
        \tfor (int i = 0; i < 10; ++i) { x[i] += 3.14e-5; }\n\
        \u{fc}ber \u{e9}t\u{e9} \u{4f60}\u{597d}\u{4e16}\u{754c} \u{41f}\u{440}\u{438} \u{1f999}";
    let mut sha256 = Sha256::new();
    for id in 0..tokenizer.vocab_size() as u32 {
        sha256.update(tokenizer.token(id).unwrap_or_default());
        sha256.update([0]);
    }
    let ids = tokenizer.encode(PROBE, false, false).context("cannot tokenize a sample text")?;
    ids.iter().for_each(|id| sha256.update(id.to_le_bytes()));
    Ok(format!("{:x}", sha256.finalize()))
}
