//! A corpus to packed files: read rows, tokenize in parallel, write in order.
//!
//! Whole documents are kept, each ended by the tokenizer's end-of-text id (unless told otherwise), back to
//! back. Output is byte-identical whatever the number of threads. It is written to a temporary folder and
//! renamed when complete, so an interrupted preparation leaves nothing behind that training would read.
//!
//! Which documents go to validation, and which are used at all where `percentage` is below 1, is decided by a
//! checksum of the text: copies of a document stay together, and a document stays where it is when the corpus
//! grows. The original's `percentage` took the first files instead.

mod manifest;
mod output;
mod progress;

pub use manifest::Manifest;

use super::documents::{self, Row, Schema};
use super::packed::explain;
use super::permutation::mix;
use crate::bail_hint;
use crate::config::PrepareConfig;
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;
use output::Output;
use progress::Progress;
use rayon::prelude::*;
use std::path::PathBuf;

/// Documents, and bytes of text, tokenized together; bounds the memory.
const BATCH_DOCUMENTS: usize = 1024;
const BATCH_BYTES: usize = 16 << 20;
/// Bounds the writer's memory at 1 GiB.
const MAX_CHUNK_TOKENS: u64 = 1 << 28;

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
    check(options, tokenizer)?;
    let files = documents::files(&options.source, schema, &options.split)?;
    let mut manifest = Manifest::begin(options, &files, tokenizer)?;
    if let Some(done) = manifest.find_prepared()? {
        announce("already prepared", &done);
        return Ok(done);
    }
    let mut train = Output::begin(&options.out, &options.split, &manifest)?;
    let mut validation = match &options.validation_out {
        Some(out) => Some(Output::begin(out, "validation", &manifest)?),
        None => None,
    };

    let mut progress = Progress::new(manifest.files.values().sum());
    let mut rows = all_rows(&files, schema, options.text_field.as_deref(), progress.bar());
    loop {
        let texts = next_batch(&mut rows, &mut manifest)?;
        if texts.is_empty() {
            break;
        }
        let tokens = tokenize(&texts, tokenizer, options)?;
        for (text, tokens) in texts.iter().zip(&tokens) {
            match &mut validation {
                Some(out) if goes_to_validation(text, options.validation_fraction) => {
                    manifest.validation_documents += 1;
                    explain(out.writer.add(tokens))?;
                }
                _ => {
                    manifest.documents += 1;
                    explain(train.writer.add(tokens))?;
                }
            }
        }
        progress.add(&texts, &tokens);
    }
    progress.finish();

    check_counts(&manifest)?;
    manifest.outputs = train.finish()?;
    manifest.tokens = train.writer.tokens;
    // The training folder comes last: its manifest says that everything is there.
    if let Some(mut validation) = validation {
        manifest.validation_outputs = validation.finish()?;
        manifest.validation_tokens = validation.writer.tokens;
        validation.commit(&manifest)?;
    }
    train.commit(&manifest)?;
    announce("prepared", &manifest);
    Ok(manifest)
}

/// Options that cannot work, all at once, before anything is read.
fn check(o: &PrepareConfig, tokenizer: &Tokenizer) -> Result<()> {
    let mut problems = Vec::new();
    let mut require = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };
    require(
        (1..=MAX_CHUNK_TOKENS).contains(&o.chunk_tokens),
        format!("`chunk_tokens`: must be 1 to {MAX_CHUNK_TOKENS}, got {}", o.chunk_tokens),
    );
    require(
        o.percentage > 0.0 && o.percentage <= 1.0,
        format!("`percentage`: must be above 0 and at most 1.0 (all), got {}", o.percentage),
    );
    require(
        (0.0..1.0).contains(&o.validation_fraction),
        format!("`validation_fraction`: must be in [0, 1), got {}", o.validation_fraction),
    );
    require(
        (o.validation_fraction > 0.0) == o.validation_out.is_some(),
        "`validation_fraction` and `validation_out` go together".into(),
    );
    for out in std::iter::once(&o.out).chain(&o.validation_out) {
        require(out.file_name().is_some(), format!("`{}`: must name a folder", out.display()));
    }
    require(
        o.validation_out.as_ref() != Some(&o.out),
        "`validation_out`: must not be `out`".into(),
    );
    require(
        !o.split.is_empty() && !o.split.contains('/'),
        format!("`split`: must be a name such as `train`, got `{}`", o.split),
    );
    require(
        !o.eos || tokenizer.eos_id().is_some(),
        "`eos`: the tokenizer has no end-of-text token; say `eos: false` (`--no-eos`)".into(),
    );
    require(
        !o.bos || tokenizer.bos_id().is_some(),
        "`bos`: the tokenizer has no beginning-of-text token".into(),
    );
    if problems.is_empty() {
        return Ok(());
    }
    Err(anyhow!("cannot prepare `{}`:\n  {}", o.source, problems.join("\n  ")))
        .usage("`tinyllama prepare --help` explains each option")
}

/// Rows of all files, each opened when its turn comes, with the file's index.
fn all_rows<'a>(
    files: &'a [PathBuf],
    schema: Schema,
    field: Option<&'a str>,
    bar: ProgressBar,
) -> impl Iterator<Item = Result<(&'a PathBuf, Row)>> {
    files.iter().flat_map(move |path| {
        let rows = documents::rows_with_bar(path, schema, field, &bar);
        let rows = rows.unwrap_or_else(|e| Box::new(std::iter::once(Err(e))));
        rows.map(move |row| Ok((path, row?)))
    })
}

/// The next documents; none at the end. Rows left out are counted.
fn next_batch<'a>(
    rows: &mut impl Iterator<Item = Result<(&'a PathBuf, Row)>>,
    manifest: &mut Manifest,
) -> Result<Vec<String>> {
    let (percentage, seed) = (manifest.options.percentage, manifest.options.seed);
    let (mut texts, mut bytes) = (Vec::new(), 0);
    while texts.len() < BATCH_DOCUMENTS && bytes < BATCH_BYTES {
        let Some(row) = rows.next() else { break };
        match row? {
            (path, Row::Skipped { why, row }) => {
                manifest.skip(why, || format!("{}, row {row}", path.display()));
            }
            (path, Row::Text(text)) if text.is_empty() => {
                manifest.skip("empty".into(), || path.display().to_string());
            }
            (path, Row::Text(text)) if !is_used(&text, percentage, seed) => {
                manifest.skip("beyond `percentage`".into(), || path.display().to_string());
            }
            (_, Row::Text(text)) => {
                bytes += text.len();
                texts.push(text);
            }
        }
    }
    Ok(texts)
}

fn tokenize(texts: &[String], tokenizer: &Tokenizer, o: &PrepareConfig) -> Result<Vec<Vec<u32>>> {
    let encode = |text: &String| {
        tokenizer.encode(text, o.bos, o.eos).with_context(|| {
            let start: String = text.chars().take(40).collect();
            format!("cannot tokenize the document of {} bytes that begins {start:?}", text.len())
        })
    };
    texts.par_iter().map(encode).collect()
}

fn goes_to_validation(text: &str, fraction: f64) -> bool {
    f64::from(crc32c::crc32c(text.as_bytes())) < fraction * (u32::MAX as f64 + 1.0)
}

/// Whether a document is in the share that is used; independent of [`goes_to_validation`].
fn is_used(text: &str, percentage: f64, seed: u64) -> bool {
    let hash = || mix(u64::from(crc32c::crc32c(text.as_bytes())) ^ mix(seed));
    percentage >= 1.0 || (hash() as f64) < percentage * 2f64.powi(64)
}

/// Refuses an empty result, saying why it is empty.
fn check_counts(m: &Manifest) -> Result<()> {
    if m.documents == 0 {
        let reasons = m.skipped.iter().map(|(why, n)| {
            let first = m.first_skipped.get(why).map_or("", |place| place);
            format!("\n  {n} rows skipped: {why} (first: {first})")
        });
        let reasons = reasons.collect::<String>();
        return Err(anyhow!("no document in `{}`{reasons}", m.options.source))
            .hint("check the kind of the corpus and `--text-field`");
    }
    if m.options.validation_out.is_some() && m.validation_documents == 0 {
        bail_hint!(
            "raise `validation_fraction`, or prepare a validation set of its own";
            "none of {} documents went to validation with `validation_fraction` {}",
            m.documents, m.options.validation_fraction
        );
    }
    Ok(())
}

fn announce(what: &str, m: &Manifest) {
    let validation = match m.validation_documents {
        0 => String::new(),
        n => format!("; validation {n} documents, {} tokens", m.validation_tokens),
    };
    eprintln!(
        "{what:<12}{}{}: {} documents, {} tokens{validation}",
        if what.len() < 12 { "" } else { " " },
        m.options.out.display(),
        m.documents,
        m.tokens,
    );
    for (why, count) in &m.skipped {
        let first = m.first_skipped.get(why).map_or("", |place| place);
        eprintln!("            {count} rows skipped: {why} (first: {first})");
    }
}
