//! Checkpoint folders of a run: written whole or not at all, found by integer step, pruned.

use super::train_state::load_counters;
use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Prefix of folders that are being written, or were when a process died.
const TEMPORARY: &str = ".tmp-";

/// Fills a temporary folder beside the target, syncs every file, then renames it into place. A crash at
/// any moment leaves what was there before; the unfinished folder is ignored and swept by the next save.
///
/// # Errors
/// Whatever `write` fails with (a full disk is told as such); the temporary folder is removed.
pub fn save_atomically(
    out_dir: &Path,
    name: &str,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let (target, temporary) = (out_dir.join(name), out_dir.join(format!("{TEMPORARY}{name}")));
    let old = out_dir.join(format!("{TEMPORARY}old-{name}"));
    sweep(out_dir)?;
    let written = fs::create_dir_all(&temporary)
        .with_context(|| format!("cannot create `{}`", temporary.display()))
        .and_then(|()| write(&temporary))
        .and_then(|()| sync_tree(&temporary));
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&temporary);
        return Err(explain_full_disk(error, out_dir));
    }
    // A folder cannot be renamed over another: move the old one aside, then remove it.
    if target.exists() {
        rename(&target, &old)?;
    }
    rename(&temporary, &target)?;
    sync(out_dir)?;
    if old.exists() {
        let _ = fs::remove_dir_all(&old);
    }
    Ok(target)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("cannot rename `{}` to `{}`", from.display(), to.display()))
}

/// Removes what an earlier process left unfinished. A folder that was moved aside when the process died
/// between the two renames is put back.
fn sweep(out_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(out_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(TEMPORARY) else { continue };
        match rest.strip_prefix("old-").map(|original| out_dir.join(original)) {
            Some(original) if !original.exists() => rename(&entry.path(), &original)?,
            _ => fs::remove_dir_all(entry.path())
                .with_context(|| format!("cannot remove `{}`", entry.path().display()))?,
        }
    }
    Ok(())
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { sync_tree(&path)? } else { sync(&path)? }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<()> {
    let sync = File::open(path).and_then(|file| file.sync_all());
    sync.with_context(|| format!("cannot sync `{}`", path.display()))
}

/// Adds the next action where an error is a full disk.
fn explain_full_disk(error: anyhow::Error, out_dir: &Path) -> anyhow::Error {
    let full =
        |e: &std::io::Error| matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    if !error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(full)) {
        return error;
    }
    let free = free_bytes(out_dir).map_or("unknown".into(), gib);
    let told = error.context(format!("out of disk while saving a checkpoint ({free} free)"));
    let hint = "earlier checkpoints are intact; free space or set `train.keep_last`, then resume";
    match Err::<(), _>(told).hint(hint) {
        Err(error) => error,
        Ok(()) => anyhow!("out of disk"),
    }
}

fn gib(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 30) as f64 {
        n if n >= 0.1 => format!("{n:.1} GiB"),
        n => format!("{:.1} MiB", n * 1024.0),
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// Bytes that these tensors take on disk, with a margin for headers and small files.
pub fn required_bytes<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> u64 {
    let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
    tensors.map(bytes).sum::<u64>() + (1 << 20)
}

/// Refuses to start writing what cannot fit.
///
/// # Errors
/// Needed and free space, and what to do.
pub fn check_space(dir: &Path, needed: u64) -> Result<()> {
    match free_bytes(dir) {
        Some(free) if free < needed => bail_hint!(
            "earlier checkpoints are intact; free space or set `train.keep_last`, then resume";
            "out of disk: a checkpoint needs {}, `{}` has {} free",
            gib(needed), dir.display(), gib(free)
        ),
        _ => Ok(()),
    }
}

/// Complete checkpoints of a run with their steps, oldest first: `step-*` and `final`.
pub fn list(out_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(out_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let step = match name.strip_prefix("step-").map(str::parse) {
            Some(Ok(step)) => step,
            None if name == "final" && path.join("train_state/state.json").is_file() => {
                load_counters(&path)?.step
            }
            _ => continue,
        };
        if path.join("config.json").is_file() {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The checkpoint of the highest step, counted as an integer.
pub fn latest(out_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(out_dir)?.pop().map(|(_, path)| path))
}

/// Removes all but the newest `keep` of the `step-*` checkpoints; `final` stays.
pub fn prune(out_dir: &Path, keep: usize) -> Result<()> {
    let mut steps = list(out_dir)?;
    steps.retain(|(_, path)| !path.ends_with("final"));
    for (_, path) in steps.iter().rev().skip(keep) {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove `{}`", path.display()))?;
    }
    Ok(())
}

/// A checkpoint folder, from itself, from a run's folder (its newest), or from a file in it.
///
/// # Errors
/// Says what was looked for.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.is_file()
        && let Some(parent) = path.parent()
    {
        return Ok(parent.to_owned());
    }
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    match latest(path)? {
        Some(found) => Ok(found),
        None if path.exists() => bail_hint!(
            "name a checkpoint folder, or a run's `out_dir`";
            "no checkpoint in `{0}`: looked for `{0}/config.json`, `{0}/final` and `{0}/step-*`",
            path.display()
        ),
        None => bail_hint!(
            "name a checkpoint folder, or a run's `out_dir`";
            "no checkpoint at `{}`: it does not exist", path.display()
        ),
    }
}

/// Copies files into a folder under their names.
pub fn copy_files(files: &[PathBuf], dir: &Path) -> Result<()> {
    for file in files {
        let name = file.file_name().unwrap_or_default();
        fs::copy(file, dir.join(name))
            .with_context(|| format!("cannot copy `{}` to `{}`", file.display(), dir.display()))?;
    }
    Ok(())
}
