//! What a set of packed files holds, and whether it is still what it was.

mod manifest;
mod scan;

use super::packed::{self, Access, PackedSet, find_files};
use super::permutation::mix;
use crate::bail_hint;
use crate::tokenizer::Tokenizer;
use crate::train::progress::{Progress, bytes};
use anyhow::{Context, Result};
use manifest::Manifests;
use rayon::prelude::*;
use scan::{Scan, scan};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Sets up to this size are read for the count of documents; larger ones only where they are verified.
const COUNTED: u64 = 4 << 30;
/// Tokens of a sample that are shown.
const SHOWN: usize = 64;

/// What to look at.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Folder, or prefix of files.
    pub path: &'a Path,
    /// T
    pub block_size: u64,
    /// Decodes samples; its end-of-text id counts documents.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Blocks to show.
    pub samples: usize,
    /// Picks them.
    pub seed: u64,
    /// Read every file wholly.
    pub verify: bool,
    /// Show how far that is, on a terminal.
    pub progress: bool,
}

/// What there is.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Folder or prefix.
    pub path: PathBuf,
    /// Files of the set, bad ones among them.
    pub files: usize,
    /// Of all files.
    pub bytes: u64,
    /// In the files that are good.
    pub tokens: u64,
    /// Of the tokens.
    pub dtypes: Vec<String>,
    /// Tokens of the smallest and of the largest good file.
    pub file_tokens: [u64; 2],
    /// T
    pub block_size: u64,
    /// Blocks of T+1 tokens in the stream of all files.
    pub blocks: u64,
    /// Documents, where they are known.
    pub documents: Option<u64>,
    /// How: `manifest`, or `eos` or `bos` for the tokens that end or begin a text.
    pub documents_by: Option<&'static str>,
    /// Tokens in runs of one id that fill the ends of files.
    pub fill_tokens: u64,
    /// Those files.
    pub filled_files: usize,
    /// Share of tokens that are no such fill.
    pub filled: f64,
    /// What `manifest.json` says of each folder that has one.
    pub manifests: Vec<manifest::Facts>,
    /// Blocks at random places.
    pub samples: Vec<Sample>,
    /// What was verified; `None`: headers and sizes alone.
    pub verified: Option<Verified>,
    /// Files that are not as they should be.
    pub bad: Vec<Bad>,
}

/// The beginning of a block.
#[derive(Debug, Serialize)]
pub struct Sample {
    /// Block of the stream.
    pub block: u64,
    /// Its first ids.
    pub ids: Vec<i64>,
    /// Their text.
    pub text: Option<String>,
}

/// What was compared.
#[derive(Debug, Serialize)]
pub struct Verified {
    /// Files that are as they should be.
    pub files: usize,
    /// Ids must be below this; `None`: nobody says.
    pub vocab_size: Option<usize>,
    /// Files whose checksum the manifest knows.
    pub checksums: usize,
}

/// A file that cannot be used.
#[derive(Debug, Serialize)]
pub struct Bad {
    /// Where it is, or should be.
    pub path: PathBuf,
    /// Expected and got.
    pub problem: String,
}

/// Whether `path` names packed files: some `.bin` file there begins as one.
pub fn is_dataset(path: &Path) -> Result<bool> {
    match find_files(path) {
        Ok(files) => Ok(files.iter().any(|file| scan::begins_as_packed(file))),
        Err(packed::PackedError::NoFiles { .. }) => Ok(false),
        Err(e) => packed::explain(Err(e)),
    }
}

/// Looks at every file's header and end; at all of it where that is asked for or cheap.
///
/// # Errors
/// A folder that cannot be read. Bad files are part of the report.
pub fn inspect(o: Options) -> Result<Report> {
    let files = packed::explain(find_files(o.path))?;
    let manifests = Manifests::of(&files);
    let on_disk: u64 = files.iter().map(|f| f.metadata().map_or(0, |m| m.len())).sum();
    let border =
        o.tokenizer.and_then(|t| match (manifests.option("eos"), manifests.option("bos")) {
            (Some(false), Some(true)) => Some((t.bos_id()?, "bos")),
            (Some(false), _) => None, // nothing between documents
            _ => Some((t.eos_id()?, "eos")),
        });
    let border_id = border.map(|(id, _)| i64::from(id));
    let counts = border.is_some() && on_disk <= COUNTED;
    let vocab_size = o.tokenizer.map(Tokenizer::vocab_size).or(manifests.vocab_size());
    let whole = o.verify || counts;
    let ids_below = if o.verify { vocab_size } else { None };

    let progress = Progress::new(Some(on_disk), !(o.progress && whole));
    let done = AtomicU64::new(0);
    let look = |path: &PathBuf| {
        let scan = scan(path, whole, border_id, ids_below);
        let size = scan.as_ref().map_or(0, |s| s.bytes);
        let done = done.fetch_add(size, Ordering::Relaxed) + size;
        progress.set(done, bytes(done));
        scan
    };
    let scans: Vec<_> = files.par_iter().map(look).collect();
    progress.clear();

    let mut bad = Vec::new();
    let mut good: Vec<Scan> = Vec::new();
    let mut checksums = 0;
    for (path, scan) in files.iter().zip(scans) {
        let problem = match scan {
            Ok(scan) => {
                let problem = manifests.problem(path, &scan, &mut checksums);
                good.push(scan);
                problem
            }
            Err(e) => {
                let told = format!("{:#}", anyhow::Error::from(e));
                Some(told.replace(&format!("`{}`: ", path.display()), ""))
            }
        };
        bad.extend(problem.map(|problem| Bad { path: path.clone(), problem }));
    }
    let as_they_should = files.len() - bad.len();
    if o.path.is_dir() {
        bad.extend(manifests.missing());
    }

    let tokens: u64 = good.iter().map(|s| s.tokens).sum();
    let fill_tokens = good.iter().map(|s| s.fill).sum();
    let counted = || good.iter().map(|s| s.documents).sum();
    let documents = match (border, manifests.documents()) {
        (Some((_, by)), _) if whole => Some((counted(), by)),
        (_, known) => known.map(|n| (n, "manifest")),
    };
    let mut dtypes: Vec<String> = good.iter().map(|s| s.dtype.to_string()).collect();
    dtypes.sort();
    dtypes.dedup();
    let sizes = || good.iter().map(|s| s.tokens);
    Ok(Report {
        path: o.path.to_owned(),
        files: files.len(),
        bytes: on_disk,
        tokens,
        dtypes,
        file_tokens: [sizes().min().unwrap_or(0), sizes().max().unwrap_or(0)],
        block_size: o.block_size,
        blocks: tokens / (o.block_size + 1),
        documents: documents.map(|d| d.0),
        documents_by: documents.map(|d| d.1),
        fill_tokens,
        filled_files: good.iter().filter(|s| s.fill > 0).count(),
        filled: if tokens > 0 { 1.0 - fill_tokens as f64 / tokens as f64 } else { 1.0 },
        samples: if good.len() == files.len() { samples(o)? } else { Vec::new() },
        manifests: manifests.facts(),
        verified: o.verify.then_some(Verified { files: as_they_should, vocab_size, checksums }),
        bad,
    })
}

/// Blocks that the seed picks.
fn samples(o: Options) -> Result<Vec<Sample>> {
    if o.samples == 0 {
        return Ok(Vec::new());
    }
    let set = packed::explain(PackedSet::open_by(o.path, Access::Opened))?;
    let (block, blocks) = (o.block_size + 1, set.len() / (o.block_size + 1));
    if blocks == 0 {
        bail_hint!(
            "give a smaller `--block-size`";
            "`{}` has {} tokens, a block has {block}", o.path.display(), set.len()
        );
    }
    let sample = |i: usize| {
        let at = mix(mix(o.seed) ^ i as u64) % blocks;
        let shown = block.min(SHOWN as u64);
        let ids = packed::explain(set.read(at * block, shown, 1 << 62))?;
        let text = o.tokenizer.map(|tokenizer| {
            let known: Option<Vec<u32>> = ids.iter().map(|&id| u32::try_from(id).ok()).collect();
            tokenizer.decode(&known.context("an id beyond 32 bits")?)
        });
        // Ids of another tokenizer have no text; that is worth seeing, not worth failing.
        let text = text.map(|t| t.unwrap_or_else(|e| format!("no text: {e}")));
        Ok(Sample { block: at, ids, text })
    };
    (0..o.samples).map(sample).collect()
}
