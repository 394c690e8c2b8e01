//! A corpus to packed files: read rows, tokenize in parallel, write in order.
//!
//! Whole documents are kept, each ended by the tokenizer's end-of-text id (unless told otherwise), back to
//! back. Output is byte-identical whatever the number of threads. It is written to a temporary folder and
//! renamed when complete, so an interrupted preparation leaves nothing behind that training would read.

use super::documents::{self, Row, Schema};
use super::packed::PackedWriter;
use crate::bail_hint;
use crate::config::PrepareConfig;
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Documents tokenized together; bounds the memory.
const BATCH: usize = 512;

/// What was prepared, in `manifest.json` beside the files.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Manifest {
    /// The options that made it; another preparation into the same folder must have the same.
    pub options: PrepareConfig,
    /// Ids of the tokenizer.
    pub vocab_size: usize,
    /// Source files with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
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
}

/// Runs those preparations of a configuration whose output is not there yet.
pub fn prepare_missing(list: &[PrepareConfig], tokenizer: Option<&Tokenizer>) -> Result<()> {
    for options in list {
        let tokenizer = tokenizer
            .ok_or_else(|| anyhow!("preparing `{}` needs a tokenizer", options.source))
            .usage("set `tokenizer_dir`")?;
        prepare(options, tokenizer)?;
    }
    Ok(())
}

/// Prepares a corpus, or finds it prepared already by the same options.
///
/// # Errors
/// No files, an unreadable file, no usable document; a folder that holds something else.
pub fn prepare(options: &PrepareConfig, tokenizer: &Tokenizer) -> Result<Manifest> {
    let schema = Schema::from_name(&options.kind)?;
    let files = documents::files(&options.source, schema)?;
    let sizes =
        files.iter().map(|p| (p.display().to_string(), p.metadata().map_or(0, |m| m.len())));
    let mut manifest = Manifest {
        options: options.clone(),
        vocab_size: tokenizer.vocab_size(),
        files: sizes.collect(),
        documents: 0,
        tokens: 0,
        validation_documents: 0,
        validation_tokens: 0,
        skipped: BTreeMap::new(),
    };
    if let Some(done) = already_prepared(&manifest)? {
        return Ok(done);
    }
    if options.eos && tokenizer.eos_id().is_none() {
        bail_hint!(
            "say `eos: false` (`--no-eos`), or give the tokenizer an end-of-text token";
            "documents end with the end-of-text id, but the tokenizer has none"
        );
    }

    let mut train = Split::new(&options.out, &options.split, &manifest)?;
    let mut validation = match &options.validation_out {
        Some(out) => Some(Split::new(out, "validation", &manifest)?),
        None => None,
    };
    let bar = progress_bar(manifest.files.values().sum());
    for path in &files {
        tokenize_file(
            path,
            schema,
            tokenizer,
            &mut manifest,
            &mut train,
            validation.as_mut(),
            &bar,
        )?;
        bar.inc(path.metadata().map_or(0, |m| m.len()));
    }
    bar.finish_and_clear();
    if manifest.documents == 0 {
        return Err(anyhow!(
            "no document in `{}`; skipped: {:?}",
            options.source,
            manifest.skipped
        ))
        .hint("check `--text-field` and the kind of the corpus");
    }
    manifest.tokens = train.writer.tokens;
    manifest.validation_tokens = validation.as_ref().map_or(0, |v| v.writer.tokens);
    // The training folder last: its manifest says that everything is there.
    if let Some(validation) = validation {
        validation.commit(&manifest)?;
    }
    train.commit(&manifest)?;
    announce(&manifest);
    Ok(manifest)
}

/// One output folder while it is being written.
struct Split {
    out: PathBuf,
    temporary: PathBuf,
    writer: PackedWriter,
}

impl Split {
    fn new(out: &Path, prefix: &str, manifest: &Manifest) -> Result<Self> {
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".unfinished");
        let temporary = out.with_file_name(name);
        if temporary.exists() {
            fs::remove_dir_all(&temporary)
                .with_context(|| format!("cannot remove `{}`", temporary.display()))?;
        }
        if out.exists() && fs::read_dir(out).is_ok_and(|mut d| d.next().is_some()) {
            bail_hint!(
                "choose another folder, or remove it";
                "`{}` is not empty and has no `manifest.json`", out.display()
            );
        }
        fs::create_dir_all(&temporary)
            .with_context(|| format!("cannot create `{}`", temporary.display()))?;
        let chunk = manifest.options.chunk_tokens;
        let writer = PackedWriter::new(&temporary, prefix, chunk, manifest.vocab_size);
        Ok(Self { out: out.to_owned(), temporary, writer })
    }

    fn commit(mut self, manifest: &Manifest) -> Result<()> {
        self.writer.finish()?;
        let path = self.temporary.join("manifest.json");
        fs::write(&path, serde_json::to_string_pretty(manifest)? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display()))?;
        if self.out.exists() {
            fs::remove_dir(&self.out).ok();
        }
        fs::rename(&self.temporary, &self.out).with_context(|| {
            format!("cannot rename `{}` to `{}`", self.temporary.display(), self.out.display())
        })
    }
}

/// The manifest in the output folder, where it was made by the same options from the same files.
fn already_prepared(wanted: &Manifest) -> Result<Option<Manifest>> {
    let path = wanted.options.out.join("manifest.json");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
    let found: Manifest = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is damaged", path.display()))
        .hint("remove the folder and prepare again")?;
    let mut differences = Vec::new();
    let tree = |options: &PrepareConfig| serde_json::to_value(options).unwrap_or_default();
    let (old, new) = (tree(&found.options), tree(&wanted.options));
    for (key, value) in new.as_object().into_iter().flatten() {
        if old.get(key) != Some(value) {
            let old = old.get(key).unwrap_or(&serde_json::Value::Null);
            differences.push(format!("`{key}`: was {old}, now {value}"));
        }
    }
    if found.vocab_size != wanted.vocab_size {
        differences
            .push(format!("tokenizer: had {} ids, now {}", found.vocab_size, wanted.vocab_size));
    }
    if found.files != wanted.files {
        differences.push("source files or their sizes changed".into());
    }
    if differences.is_empty() {
        return Ok(Some(found));
    }
    Err(anyhow!(
        "`{}` was prepared otherwise:\n  {}",
        wanted.options.out.display(),
        differences.join("\n  ")
    ))
    .hint("choose another `out`, or remove the folder to prepare again")
}

fn tokenize_file(
    path: &Path,
    schema: Schema,
    tokenizer: &Tokenizer,
    manifest: &mut Manifest,
    train: &mut Split,
    mut validation: Option<&mut Split>,
    bar: &ProgressBar,
) -> Result<()> {
    let options = manifest.options.clone();
    let mut rows = documents::rows(path, schema, options.text_field.as_deref())?;
    loop {
        let mut texts = Vec::with_capacity(BATCH);
        for row in rows.by_ref().take(BATCH) {
            match row? {
                Row::Text(text) => texts.push(text),
                Row::Skipped(why) => {
                    *manifest.skipped.entry(why).or_default() += 1;
                    continue;
                }
            }
        }
        if texts.is_empty() {
            // A batch of skipped rows only, or the end of the file.
            match rows.next() {
                None => return Ok(()),
                Some(Ok(Row::Text(text))) => texts.push(text),
                Some(Ok(Row::Skipped(why))) => *manifest.skipped.entry(why).or_default() += 1,
                Some(Err(e)) => return Err(e),
            }
        }
        let encode = |text: &String| tokenizer.encode(text, options.bos, options.eos);
        let tokens = texts.par_iter().map(encode).collect::<Result<Vec<_>>>()?;
        for (text, tokens) in texts.iter().zip(&tokens) {
            match &mut validation {
                Some(split) if goes_to_validation(text, options.validation_fraction) => {
                    manifest.validation_documents += 1;
                    split.writer.add(tokens)?;
                }
                _ => {
                    manifest.documents += 1;
                    train.writer.add(tokens)?;
                }
            }
        }
        bar.set_message(format!(
            "{} documents, {} tokens",
            manifest.documents, train.writer.tokens
        ));
    }
}

/// By a checksum of the text, so that a document stays on its side whatever its neighbours are.
fn goes_to_validation(text: &str, fraction: f64) -> bool {
    f64::from(crc32c::crc32c(text.as_bytes())) < fraction * (u32::MAX as f64 + 1.0)
}

fn progress_bar(bytes: u64) -> ProgressBar {
    let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} | {msg}";
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    bar.with_style(ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()))
}

fn announce(m: &Manifest) {
    eprintln!(
        "prepared    {}: {} documents, {} tokens{}",
        m.options.out.display(),
        m.documents,
        m.tokens,
        match m.validation_tokens {
            0 => String::new(),
            n => format!("; validation {} documents, {n} tokens", m.validation_documents),
        }
    );
    for (why, count) in &m.skipped {
        eprintln!("            {count} rows skipped: {why}");
    }
}
