//! An output folder while it is written: all or nothing.

use super::journal;
use super::manifest::{self, Manifest};
use crate::bail_hint;
use crate::data::packed::{UNFINISHED, explain};
use crate::data::writer::{OutputFile, PackedWriter, TokenFormat};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";
/// The manifest of a preparation that has begun.
pub(super) const BEGUN: &str = "begun.json";

/// A folder beside the output, renamed to it by [`Output::commit`]: at any moment the output is absent or
/// complete. What an interrupted preparation left is there for the next to go on with.
pub(super) struct Output {
    out: PathBuf,
    /// `OUT.unfinished`.
    pub(super) temporary: PathBuf,
    /// Held while writing: a second preparation into the same folder is refused.
    _lock: File,
    /// The files.
    pub(super) writer: PackedWriter,
    /// Packed files that are whole.
    pub(super) files: BTreeMap<String, OutputFile>,
}

impl Output {
    /// Begins a folder of files `prefix_*.bin`, or takes an unfinished one up as it is. With `take_back` also
    /// a finished one: of two folders the second may have been left unfinished.
    ///
    /// # Errors
    /// The folder holds something else; another process is writing it.
    pub(super) fn begin(
        out: &Path,
        prefix: &str,
        manifest: &Manifest,
        format: TokenFormat,
        take_back: bool,
    ) -> Result<Self> {
        check_free(out, &manifest.options.out)?;
        let temporary = unfinished(out);
        if take_back && !temporary.exists() && Manifest::read(out)?.is_some() {
            fs::rename(out, &temporary)
                .with_context(|| format!("cannot rename `{}`", out.display()))?;
        }
        let lock = fs::create_dir_all(&temporary)
            .and_then(|()| File::create(temporary.join(LOCK)))
            .with_context(|| format!("cannot write into `{}`", temporary.display()))?;
        // A file system without locks: no guard.
        if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            bail_hint!(
                "wait for it, or choose another folder";
                "another process is preparing into `{}`", temporary.display()
            );
        }
        let chunk = manifest.options.chunk_tokens;
        let writer = PackedWriter::with_format(&temporary, prefix, chunk, format);
        Ok(Self { out: out.into(), temporary, _lock: lock, writer, files: BTreeMap::new() })
    }

    /// Writes the last file.
    pub(super) fn finish(&mut self) -> Result<()> {
        explain(self.writer.finish())?;
        self.files.extend(self.writer.take_files());
        Ok(())
    }

    /// Puts the folder in its place.
    pub(super) fn commit(self, manifest: &Manifest) -> Result<()> {
        manifest.write(&self.temporary.join(manifest::FILE_NAME))?;
        remove_own(&self.out)?;
        fs::rename(&self.temporary, &self.out).with_context(|| {
            format!("cannot rename `{}` to `{}`", self.temporary.display(), self.out.display())
        })?;
        tidy(&self.out);
        Ok(())
    }

    /// Removes the unfinished folder.
    pub(super) fn discard(self) {
        fs::remove_dir_all(&self.temporary).ok();
    }
}

/// `OUT.unfinished`.
fn unfinished(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(UNFINISHED);
    out.with_file_name(name)
}

/// Where the manifest of a preparation that has begun is.
pub(super) fn begun(out: &Path) -> PathBuf {
    unfinished(out).join(BEGUN)
}

/// Removes from a finished folder what only an unfinished one needs.
pub(super) fn tidy(out: &Path) {
    for name in [LOCK, BEGUN, journal::FILE_NAME] {
        fs::remove_file(out.join(name)).ok();
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
            "`{}` is not empty and has no `{}`", out.display(), manifest::FILE_NAME
        ),
    }
}

/// Removes what a preparation wrote into a folder, and the folder if nothing else is in it.
fn remove_own(out: &Path) -> Result<()> {
    if let Some(found) = Manifest::read(out)? {
        let files = found.outputs.keys().chain(found.validation_outputs.keys());
        files.for_each(|name| drop(fs::remove_file(out.join(name))));
        fs::remove_file(out.join(manifest::FILE_NAME)).ok();
        tidy(out);
    }
    if out.exists() {
        fs::remove_dir(out).with_context(|| format!("cannot replace `{}`", out.display()))?;
    }
    Ok(())
}
