//! Free space: asked for before a checkpoint is written, explained where it runs out nevertheless.

use super::folder::sweep;
use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use tch::Tensor;

const HINT: &str =
    "earlier checkpoints are intact; free space, or lower `train.keep_last`, then `--resume auto`";

/// Room for `config.json`, `state.json` and the headers of tensor files.
const SMALL_FILES: u64 = 1 << 20;

/// Bytes that these tensors take on disk in their own dtype, with a margin for the small files.
pub fn required_bytes<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> u64 {
    let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
    tensors.map(bytes).sum::<u64>() + SMALL_FILES
}

/// Refuses to start writing into a run's `out_dir` what cannot fit. Where space is short, what an
/// earlier process left unfinished there goes first.
///
/// # Errors
/// Needed and free space, where, and what to do.
pub fn check_space(dir: &Path, needed: u64) -> Result<()> {
    if free_bytes(dir).is_some_and(|free| free < needed) {
        sweep(dir)?;
    }
    match free_bytes(dir) {
        Some(free) if free < needed => bail_hint!(
            HINT;
            "out of disk: a checkpoint needs {}, `{}` has {} free",
            size(needed), dir.display(), size(free)
        ),
        _ => Ok(()),
    }
}

/// Bytes that may be written below `path`, which need not exist yet; `None` where the system cannot
/// say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// Turns an error whose cause is a full disk into one that says how far writing `dir` came, what is
/// free and what to do; every other error passes unchanged.
pub(super) fn explain_full_disk(error: anyhow::Error, dir: &Path) -> anyhow::Error {
    let full =
        |e: &std::io::Error| matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    if !error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(full)) {
        return error;
    }
    let free = free_bytes(dir).map_or("an unknown amount".into(), size);
    let parent = dir.parent().unwrap_or(dir);
    let told = error.context(format!(
        "out of disk: a checkpoint needs more than the {} that were written, `{}` has {free} free",
        size(tree_bytes(dir)),
        parent.display(),
    ));
    Err::<(), _>(told).hint(HINT).err().unwrap_or_else(|| anyhow!("out of disk"))
}

fn tree_bytes(dir: &Path) -> u64 {
    let entry = |e: fs::DirEntry| match e.metadata() {
        Ok(meta) if meta.is_dir() => tree_bytes(&e.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    fs::read_dir(dir).into_iter().flatten().flatten().map(entry).sum()
}

fn size(bytes: u64) -> String {
    match bytes as f64 / 1024.0 {
        kib if kib >= 1024.0 * 1024.0 => format!("{:.1} GiB", kib / (1024.0 * 1024.0)),
        kib if kib >= 1024.0 => format!("{:.1} MiB", kib / 1024.0),
        kib => format!("{kib:.1} KiB"),
    }
}
