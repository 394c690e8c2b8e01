//! Checkpoint folders of a run: written whole or not at all, found by integer step, pruned.
//!
//! ```text
//! out_dir/step-00005000/        complete: it got its name after every byte was on disk
//! out_dir/final/                the same, at the end of a run
//! out_dir/.tmp-NAME-PID/        being written, or left by a process that died: ignored, swept
//! out_dir/aside-NAME/           later than the step from which the run was gone on from: no part of it any more
//! out_dir/.old-NAME/            moved aside while a folder of the same name takes its place
//! ```

use super::adapter;
use super::disk::explain_full_disk;
use super::formats::{is_checkpoint_file, is_checkpoint_folder};
use super::hf::weights_files;
use super::litgpt;
use super::train_state::load_counters;
use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const TEMPORARY: &str = ".tmp-";
const OLD: &str = ".old-";
const FINAL: &str = "final";
const STEP: &str = "step-";
const ASIDE: &str = "aside-";
/// Files that say what the weights beside them are.
const DESCRIBE: [&str; 4] =
    ["config.json", "adapter_config.json", "params.json", "lit_config.json"];

/// Fills a temporary folder beside the target, syncs every file and folder, then renames it into
/// place. A crash at any moment leaves what was there before.
///
/// # Errors
/// Whatever `write` fails with (a full disk is told as such); the temporary folder is removed.
pub fn save_atomically(
    out_dir: &Path,
    name: &str,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let target = out_dir.join(name);
    let temporary = temporary_folder(out_dir, name, std::process::id());
    fs::create_dir_all(out_dir)
        .with_context(|| format!("cannot create `{}`", out_dir.display()))?;
    sweep(out_dir)?;
    let _lock = fill(&temporary, write).map_err(|error| {
        let explained = explain_full_disk(error, &temporary);
        let _ = fs::remove_dir_all(&temporary);
        explained
    })?;
    // A folder cannot be renamed over another: the old one steps aside. Dying in between is safe,
    // because `list` reads the one that stepped aside and `sweep` puts it back.
    let old = out_dir.join(format!("{OLD}{name}"));
    if target.exists() {
        rename(&target, &old)?;
    }
    rename(&temporary, &target)?;
    sync(out_dir)?;
    if old.exists() {
        let _ = fs::remove_dir_all(&old); // the next sweep tries again
    }
    Ok(target)
}

/// Fills a temporary folder beside `target`, which must not exist, syncs it and gives it that name.
///
/// # Errors
/// Whatever `write` fails with (a full disk is told as such); nothing is left.
pub fn create_atomically(target: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).with_context(|| format!("cannot create `{}`", parent.display()))?;
    let temporary = temporary_folder(parent, &name_of(target), std::process::id());
    let filled = fill(&temporary, write).and_then(|_lock| rename(&temporary, target));
    filled.and_then(|()| sync(parent)).map_err(|error| {
        let explained = explain_full_disk(error, &temporary);
        let _ = fs::remove_dir_all(&temporary);
        explained
    })
}

/// Writes a file under a temporary name beside `target`, which must not exist, syncs it and gives it that name.
///
/// # Errors
/// Whatever `write` fails with (a full disk is told as such); nothing is left.
pub fn create_file_atomically(
    target: &Path,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).with_context(|| format!("cannot create `{}`", parent.display()))?;
    let temporary = temporary_folder(parent, &name_of(target), std::process::id());
    let written = write(&temporary).and_then(|()| sync(&temporary));
    let named = written.and_then(|()| rename(&temporary, target)).and_then(|()| sync(parent));
    named.map_err(|error| {
        let explained = explain_full_disk(error, &temporary);
        let _ = fs::remove_file(&temporary);
        explained
    })
}

/// Where the process of this id fills the folder `name`.
pub fn temporary_folder(out_dir: &Path, name: &str, process: u32) -> PathBuf {
    out_dir.join(format!("{TEMPORARY}{name}-{process}"))
}

/// Creates and fills a folder. While the returned file is open, other processes see that its writer
/// lives.
fn fill(dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    let lock = File::open(dir).with_context(|| format!("cannot open `{}`", dir.display()))?;
    let _ = lock.try_lock(); // file systems without locks: two runs must not share a folder anyway
    write(dir)?;
    sync_tree(dir)?;
    Ok(lock)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("cannot rename `{}` to `{}`", from.display(), to.display()))
}

/// Removes what a process that died left unfinished, and puts back a folder that had stepped aside.
/// Each save begins with it.
pub fn sweep(out_dir: &Path) -> Result<()> {
    for (name, path) in entries(out_dir) {
        let aside = name.strip_prefix(OLD).map(|name| out_dir.join(name));
        match aside {
            Some(original) if !original.exists() => rename(&path, &original)?,
            None if !name.starts_with(TEMPORARY) || is_being_written(&path) => {}
            _ => remove(&path)?,
        }
    }
    Ok(())
}

fn is_being_written(dir: &Path) -> bool {
    File::open(dir).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove `{}`", dir.display()))
}

/// Names and paths of the folders in `dir`; none where it does not exist.
fn entries(dir: &Path) -> Vec<(String, PathBuf)> {
    let entry = |e: fs::DirEntry| (e.file_name().to_string_lossy().into_owned(), e.path());
    let all = fs::read_dir(dir).into_iter().flatten().flatten().map(entry);
    all.filter(|(_, path)| path.is_dir()).collect()
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

/// Complete checkpoints of a run with their steps, oldest first: `step-*` by the number in the
/// name, `final` by its `state.json` (after a `step-*` of the same step). Unfinished folders are no
/// checkpoints.
pub fn list(out_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for (name, path) in entries(out_dir) {
        let name = match name.strip_prefix(OLD) {
            Some(aside) if !out_dir.join(aside).exists() => aside,
            _ => &name,
        };
        let step = match name.strip_prefix(STEP) {
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
            None if name == FINAL => load_counters(&path).ok().map(|state| state.step),
            _ => None,
        };
        if let Some(step) = step
            && is_complete(&path)
        {
            found.push((step, name == FINAL, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(step, _, path)| (step, path)).collect())
}

/// Whether a folder has a configuration and all its weights files.
fn is_complete(dir: &Path) -> bool {
    adapter::is_one(dir) || dir.join("config.json").is_file() && weights_files(dir, false).is_ok()
}

/// Refuses a run whose `final` cannot be gone on from: it may be the newest, and a run that goes on from another
/// checkpoint, or begins anew, would end by taking its place.
///
/// # Errors
/// `final` holds weights, but no `train_state/` that can be read.
pub fn check_final(out_dir: &Path) -> Result<()> {
    let last = out_dir.join(FINAL);
    if !is_complete(&last) {
        return Ok(());
    }
    let told =
        || format!("`{}` cannot be gone on from, and this run would replace it", last.display());
    load_counters(&last).map(drop).with_context(told).hint(
        "give it another name first, or choose another `out_dir`; its weights alone are a start with \
         `initial_checkpoint_dir`, an earlier checkpoint is one with `--resume PATH`",
    )
}

/// Renames the checkpoints of a run that are later than `step`, from which it now goes on another way: they would count
/// as the newest, and outlive those to come; a `final` of an unknown step too, which the run would replace. Their new
/// names.
///
/// # Errors
/// A folder that cannot be renamed.
pub fn set_aside_later(out_dir: &Path, step: u64) -> Result<Vec<PathBuf>> {
    let later = list(out_dir)?.into_iter().filter(|(at, _)| *at > step).map(|(_, path)| path);
    let unknown = check_final(out_dir).is_err().then(|| out_dir.join(FINAL));
    let mut aside = Vec::new();
    for path in later.chain(unknown) {
        let name = format!("{ASIDE}{}", name_of(&path).trim_start_matches(OLD));
        let free = |n: u32| out_dir.join(if n == 0 { name.clone() } else { format!("{name}-{n}") });
        let Some(to) = (0..1000).map(free).find(|to| !to.exists()) else {
            bail_hint!("remove some of them"; "too many folders like `{}`", free(0).display());
        };
        rename(&path, &to)?;
        aside.push(to);
    }
    Ok(aside)
}

/// The checkpoint of the highest step, counted as an integer.
pub fn latest(out_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(out_dir)?.pop().map(|(_, path)| path))
}

/// Removes all but the newest `keep` of the `step-*` checkpoints, at least one is kept; `final`
/// stays. Each is renamed first, so that a crash leaves no half of one under its name.
pub fn prune(out_dir: &Path, keep: usize) -> Result<()> {
    let mut steps = list(out_dir)?;
    steps.retain(|(_, path)| name_of(path).starts_with(STEP));
    for (_, path) in steps.iter().rev().skip(keep.max(1)) {
        let doomed = out_dir.join(format!("{TEMPORARY}pruned-{}", name_of(path)));
        rename(path, &doomed)?;
        remove(&doomed)?;
    }
    Ok(())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A checkpoint folder: from itself, from a run's `out_dir` (the newest, which is `final` where the
/// run ended), or from a safetensors file or `config.json` in it.
///
/// # Errors
/// Says what was looked for.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    const HINT: &str = "name a checkpoint folder, a run's `out_dir`, or a `.safetensors`, `.gguf`, `.pth` or llama2.c \
                        `.bin` file";
    if !path.exists() {
        bail_hint!(HINT; "no checkpoint at `{}`: it does not exist", path.display());
    }
    if path.is_file() {
        let name = name_of(path);
        if name.ends_with(".safetensors") || name.ends_with(".json") {
            return resolve_file(path);
        }
        if !is_checkpoint_file(path) {
            bail_hint!(HINT; "`{}` is no checkpoint of a format that is known here", path.display());
        }
        // One of several that belong together, or beside its own configuration.
        let shard = name.starts_with("pytorch_model") || name.starts_with("consolidated.");
        let folder = path.parent().filter(|dir| shard && is_checkpoint_folder(dir));
        return Ok(folder.unwrap_or(path).to_owned());
    }
    if is_checkpoint_folder(path) {
        return Ok(path.to_owned());
    }
    if let Some(found) = latest(path)? {
        return Ok(found);
    }
    // Without `train_state/` its step is unknown, but its weights are as good as any.
    if is_complete(&path.join(FINAL)) {
        return Ok(path.join(FINAL));
    }
    bail_hint!(
        HINT;
        "no checkpoint in `{0}`: looked for `{0}/config.json`, `{0}/final/` and `{0}/step-*/` with \
         `config.json` and `model.safetensors` in them",
        path.display()
    )
}

/// The folder of a file, of whose weights or configuration it is a part: its own, or the one above where the file is
/// part of `train_state/`.
fn resolve_file(file: &Path) -> Result<PathBuf> {
    let folder = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let above = folder.parent().filter(|_| folder.ends_with("train_state"));
    if let Some(above) = above.filter(|above| is_checkpoint_folder(above)) {
        return Ok(above.to_owned());
    }
    if is_checkpoint_folder(folder) {
        let kinds = [weights_files(folder, false), weights_files(folder, true)];
        let mut parts: Vec<PathBuf> = kinds.into_iter().filter_map(Result::ok).flatten().collect();
        parts.extend(litgpt::weights_file(folder));
        let name = name_of(file);
        let describes = DESCRIBE.contains(&&name[..]) || name.ends_with(".index.json");
        if describes || adapter::is_one(folder) || parts.iter().any(|part| name_of(part) == name) {
            return Ok(folder.to_owned());
        }
        let those = match parts.as_slice() {
            [] => "there are no weights under a known name".to_owned(),
            [one] => format!("they are in `{}`", name_of(one)),
            [one, ..] => format!("they are in {} files, `{}` first", parts.len(), name_of(one)),
        };
        bail_hint!(
            "name the folder for its weights; a file by itself goes into a folder of its own, as \
             `model.safetensors` beside its `config.json`";
            "`{}` is no part of the weights of its folder: {those}", file.display()
        );
    }
    bail_hint!(
        "the folder of the weights must hold their `config.json`";
        "no `config.json` beside `{}`", file.display()
    )
}

/// Copies files into a folder under their names; one that lies there already stays.
pub fn copy_files(files: &[PathBuf], dir: &Path) -> Result<()> {
    for file in files {
        let target = dir.join(file.file_name().unwrap_or_default());
        // Copying a file onto itself would empty it.
        if target.exists() && target.canonicalize().ok() == file.canonicalize().ok() {
            continue;
        }
        fs::copy(file, &target)
            .with_context(|| format!("cannot copy `{}` to `{}`", file.display(), dir.display()))?;
    }
    Ok(())
}
