//! Encoding speed on real files: the fast way beside the slow one that defines the ids.

use crate::error::WithHint;
use crate::tokenizer::documents::documents;
use crate::tokenizer::{Encoder, Tokenizer};
use anyhow::{Context, Result, anyhow};
use flate2::Crc;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// What is measured.
pub struct Options<'a> {
    /// Files of documents.
    pub inputs: &'a [PathBuf],
    /// Key or column of the text.
    pub field: Option<&'a str>,
    /// Encoders at work, each in a thread.
    pub threads: usize,
    /// Timed passes over each file, after one that fills the caches.
    pub passes: usize,
    /// Whether the slow way encodes each file once too.
    pub reference: bool,
}

/// What `bench tokenizer` measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// File format and model.
    pub tokenizer: String,
    /// Number of ids.
    pub vocab_size: usize,
    /// Encoders at work.
    pub threads: usize,
    /// Timed passes.
    pub passes: usize,
    /// One a file.
    pub files: Vec<FileReport>,
}

/// One file. Speeds are in documents that are in memory; reading the file is not in them.
#[derive(Debug, Serialize)]
pub struct FileReport {
    /// As given.
    pub file: PathBuf,
    /// Documents in it.
    pub documents: usize,
    /// Bytes of UTF-8 in them.
    pub bytes: usize,
    /// Ids of them, without bos and eos.
    pub tokens: usize,
    /// CRC-32 of all ids in order, each as four bytes, the lowest first.
    pub ids_crc32: String,
    /// Seconds of the first pass, with empty caches.
    pub first_pass_seconds: f64,
    /// Seconds of a pass, median.
    pub seconds: f64,
    /// 10^6 bytes a second and thread at the median pass.
    pub mb_per_sec_core: f64,
    /// Ids a second and thread at the median pass.
    pub tokens_per_sec_core: f64,
    /// The slow way, one pass on one thread.
    pub reference: Option<Reference>,
}

/// The slow way.
#[derive(Debug, Serialize)]
pub struct Reference {
    /// Seconds of its pass.
    pub seconds: f64,
    /// Ids a second.
    pub tokens_per_sec: f64,
    /// Documents whose ids differ from the fast way's: 0, or the fast way is wrong.
    pub documents_that_differ: usize,
}

/// Encodes every file.
///
/// # Errors
/// A file that cannot be read or holds no text; ids that cannot be told (a broken tokenizer).
pub fn run(tokenizer: &Tokenizer, options: &Options) -> Result<Report> {
    let files = options.inputs.iter().map(|file| {
        run_file(tokenizer, file, options)
            .with_context(|| format!("cannot measure `{}`", file.display()))
    });
    Ok(Report {
        tokenizer: tokenizer.describe().kind,
        vocab_size: tokenizer.vocab_size(),
        threads: options.threads,
        passes: options.passes,
        files: files.collect::<Result<_>>()?,
    })
}

fn run_file(tokenizer: &Tokenizer, file: &Path, options: &Options) -> Result<FileReport> {
    let texts: Vec<String> = documents(file, options.field)?.collect::<Result<_>>()?;
    let bytes = texts.iter().map(String::len).sum();
    if bytes == 0 {
        return Err(anyhow!("it holds no text")).hint("name files with text in them");
    }
    let mut encoders: Vec<Encoder> = (0..options.threads).map(|_| tokenizer.encoder()).collect();
    let first_pass_seconds = pass(&texts, &mut encoders)?;
    let mut seconds =
        (0..options.passes).map(|_| pass(&texts, &mut encoders)).collect::<Result<Vec<f64>>>()?;
    seconds.sort_by(f64::total_cmp);
    let seconds = seconds[seconds.len() / 2];

    let ids = |text: &String| tokenizer.encode(text, false, false);
    let ids = texts.iter().map(ids).collect::<Result<Vec<_>>>()?;
    let mut crc = Crc::new();
    for id in ids.iter().flatten() {
        crc.update(&id.to_le_bytes());
    }
    let tokens: usize = ids.iter().map(Vec::len).sum();
    let core_seconds = seconds * options.threads as f64;
    Ok(FileReport {
        file: file.to_path_buf(),
        documents: texts.len(),
        bytes,
        tokens,
        ids_crc32: format!("{:08x}", crc.sum()),
        first_pass_seconds,
        seconds,
        mb_per_sec_core: bytes as f64 / core_seconds / 1e6,
        tokens_per_sec_core: tokens as f64 / core_seconds,
        reference: options.reference.then(|| reference(tokenizer, &texts, &ids)).transpose()?,
    })
}

/// Seconds in which the encoders, each in a thread, encode all texts.
fn pass(texts: &[String], encoders: &mut [Encoder]) -> Result<f64> {
    let next = AtomicUsize::new(0);
    let work = |encoder: &mut Encoder| {
        let mut ids = Vec::new();
        while let Some(text) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
            ids.clear();
            encoder.encode_into(text, false, false, &mut ids)?;
        }
        Ok(())
    };
    let start = Instant::now();
    match encoders {
        [encoder] => work(encoder)?,
        _ => std::thread::scope(|scope| {
            let threads: Vec<_> =
                encoders.iter_mut().map(|encoder| scope.spawn(|| work(encoder))).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(anyhow!("an encoding thread panicked")))
            })
        })?,
    }
    Ok(start.elapsed().as_secs_f64())
}

fn reference(tokenizer: &Tokenizer, texts: &[String], ids: &[Vec<u32>]) -> Result<Reference> {
    let start = Instant::now();
    let slow = texts.iter().map(|text| tokenizer.encode_reference(text));
    let slow = slow.collect::<Result<Vec<_>>>()?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens: usize = slow.iter().map(Vec::len).sum();
    Ok(Reference {
        seconds,
        tokens_per_sec: tokens as f64 / seconds,
        documents_that_differ: slow.iter().zip(ids).filter(|(a, b)| a != b).count(),
    })
}
