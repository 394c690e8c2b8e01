//! An output folder while it is written: all or nothing.

use super::manifest::{FILE_NAME, Manifest};
use crate::bail_hint;
use crate::data::packed::{PackedWriter, UNFINISHED, explain};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";

/// A folder beside the output, renamed to it by [`Output::commit`]: at any moment the output is absent or
/// complete. What an interrupted preparation left is removed by the next.
pub struct Output {
    out: PathBuf,
    temporary: PathBuf,
    /// Held while writing: a second preparation into the same folder is refused.
    _lock: File,
    /// The files.
    pub writer: PackedWriter,
}

impl Output {
    /// Begins a folder of files `prefix_*.bin`.
    ///
    /// # Errors
    /// The folder holds something else; another process is writing it.
    pub fn begin(out: &Path, prefix: &str, manifest: &Manifest) -> Result<Self> {
        check_free(out, &manifest.options.out)?;
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(UNFINISHED);
        let temporary = out.with_file_name(name);
        remove_leftovers(&temporary)?;
        let lock = fs::create_dir_all(&temporary)
            .and_then(|()| File::create(temporary.join(LOCK)))
            .with_context(|| format!("cannot write into `{}`", temporary.display()))?;
        lock.try_lock().ok(); // a file system without locks: no guard
        let chunk = manifest.options.chunk_tokens;
        let writer = PackedWriter::new(&temporary, prefix, chunk, manifest.vocab_size);
        Ok(Self { out: out.to_owned(), temporary, _lock: lock, writer })
    }

    /// Writes the last file; names and sizes of all.
    pub fn finish(&mut self) -> Result<BTreeMap<String, u64>> {
        explain(self.writer.finish())?;
        let mut files = BTreeMap::new();
        let read = || format!("cannot read `{}`", self.temporary.display());
        for entry in fs::read_dir(&self.temporary).with_context(read)? {
            let entry = entry.with_context(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != LOCK {
                files.insert(name, entry.metadata().with_context(read)?.len());
            }
        }
        Ok(files)
    }

    /// Puts the folder in its place.
    pub fn commit(self, manifest: &Manifest) -> Result<()> {
        manifest.write(&self.temporary)?;
        fs::remove_file(self.temporary.join(LOCK)).ok();
        remove_own(&self.out)?;
        fs::rename(&self.temporary, &self.out).with_context(|| {
            format!("cannot rename `{}` to `{}`", self.temporary.display(), self.out.display())
        })
    }
}

impl Drop for Output {
    /// A preparation that failed leaves nothing; one that was killed leaves this to the next.
    fn drop(&mut self) {
        fs::remove_dir_all(&self.temporary).ok();
    }
}

/// A folder is free if it is absent, empty, or was written by the preparation whose output is `owner`: one
/// that was stopped between its two folders, or whose training folder was removed to prepare again.
fn check_free(out: &Path, owner: &Path) -> Result<()> {
    let is_empty = fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    match Manifest::read(out)? {
        _ if is_empty => Ok(()),
        Some(found) if found.options.out == owner => Ok(()),
        Some(found) => bail_hint!(
            "choose another folder for each preparation, or remove it";
            "`{}` was prepared for `{}`", out.display(), found.options.out.display()
        ),
        None => bail_hint!(
            "choose another folder, or remove it";
            "`{}` is not empty and has no `{FILE_NAME}`", out.display()
        ),
    }
}

/// Removes what a preparation wrote into a folder, and the folder if nothing else is in it.
fn remove_own(out: &Path) -> Result<()> {
    if let Some(found) = Manifest::read(out)? {
        let files = found.outputs.keys().chain(found.validation_outputs.keys());
        files.for_each(|name| drop(fs::remove_file(out.join(name))));
        fs::remove_file(out.join(FILE_NAME)).ok();
    }
    if out.exists() {
        fs::remove_dir(out).with_context(|| format!("cannot replace `{}`", out.display()))?;
    }
    Ok(())
}

fn remove_leftovers(temporary: &Path) -> Result<()> {
    if !temporary.exists() {
        return Ok(());
    }
    let lock = File::open(temporary.join(LOCK));
    if lock.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock))) {
        bail_hint!(
            "wait for it, or choose another folder";
            "another process is preparing into `{}`", temporary.display()
        );
    }
    fs::remove_dir_all(temporary)
        .with_context(|| format!("cannot remove `{}`", temporary.display()))
}
