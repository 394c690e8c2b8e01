//! The folder of a dataset in the cache, laid out as `huggingface_hub` does.
//!
//! ```text
//! $HF_HUB_CACHE, or $HF_HOME/hub, or ~/.cache/huggingface/hub
//!   .locks/datasets--OWNER--NAME/ETAG.lock      held by who downloads
//!   datasets--OWNER--NAME/
//!     blobs/ETAG                                a file's bytes, by their hash
//!     blobs/ETAG.incomplete                     the same while it is downloaded
//!     refs/main                                 the commit of a branch, when it was last asked for
//!     snapshots/COMMIT/PATH                     links into blobs: what is read
//! ```

use super::listing::HubFile;
use crate::error::WithHint;
use anyhow::{Context, Result};
use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// Where a dataset's files are kept.
pub struct Cache {
    /// `datasets--OWNER--NAME`.
    pub root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// The dataset's folder below the Hub's cache.
    pub fn new(folder: &Path, repository: &str) -> Self {
        let name = format!("datasets--{}", repository.replace('/', "--"));
        Self { root: folder.join(&name), locks: folder.join(".locks").join(name) }
    }

    /// A file's bytes.
    pub fn blob(&self, file: &HubFile) -> PathBuf {
        self.root.join("blobs").join(&file.etag)
    }

    /// What came of it so far.
    pub fn part(&self, file: &HubFile) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", file.etag))
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Whether all bytes are there: only whole files that were checked get their name.
    pub fn has(&self, file: &HubFile, commit: &str) -> bool {
        let whole = |path: PathBuf| path.metadata().is_ok_and(|found| found.len() == file.bytes);
        whole(self.blob(file)) || whole(self.snapshot(commit).join(&file.path))
    }

    /// Waits for other processes that download the same bytes, and keeps them waiting while the result lives.
    pub fn lock(&self, file: &HubFile) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", file.etag));
        make_folder(&path)?;
        make_folder(&self.blob(file))?;
        let lock =
            File::create(&path).with_context(|| format!("cannot write `{}`", path.display()))?;
        // A file system without locks: no guard.
        if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            lock.lock().with_context(|| format!("cannot lock `{}`", path.display()))?;
        }
        Ok(lock)
    }

    /// Gives a file whose bytes are there its name in a commit; returns its path.
    pub fn link(&self, file: &HubFile, commit: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(&file.path);
        if path.metadata().is_ok_and(|found| found.len() == file.bytes) {
            return Ok(path);
        }
        make_folder(&path)?;
        let depth = 2 + file.path.matches('/').count();
        let target = "../".repeat(depth) + "blobs/" + &file.etag;
        let _ = fs::remove_file(&path); // what it says fails below too
        let linked = std::os::unix::fs::symlink(target, &path)
            .or_else(|_| fs::hard_link(self.blob(file), &path)); // a file system without symbolic links
        match linked {
            Err(_) if path.exists() => Ok(path), // by another process
            linked => linked
                .map(|()| path.clone())
                .with_context(|| format!("cannot link `{}`", path.display())),
        }
    }

    /// Notes where a branch or tag is, for programs that read the cache without network.
    pub fn note(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        make_folder(&path)?;
        fs::write(&path, commit).with_context(|| format!("cannot write `{}`", path.display()))
    }
}

fn make_folder(of: &Path) -> Result<()> {
    let folder = of.parent().unwrap_or(of);
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make `{}`", folder.display()))
        .hint("set `HF_HOME` to a folder that can be written")
}

/// `$HF_HOME`, where the token and the cache are.
fn home() -> Result<PathBuf> {
    let from = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("HF_HOME")
        .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
        .or_else(|| from("HOME").map(|home| home.join(".cache/huggingface")))
        .context("no place for downloads: neither HF_HOME, XDG_CACHE_HOME nor HOME is set")
        .hint("set `HF_HOME` to a folder that can be written")
}

/// The cache of all datasets and models.
pub fn folder() -> Result<PathBuf> {
    match env::var_os("HF_HUB_CACHE").filter(|value| !value.is_empty()) {
        Some(folder) => Ok(folder.into()),
        None => Ok(home()?.join("hub")),
    }
}

/// The file that `hf auth login` leaves a token in.
pub fn token_file() -> Result<PathBuf> {
    match env::var_os("HF_TOKEN_PATH").filter(|value| !value.is_empty()) {
        Some(file) => Ok(file.into()),
        None => Ok(home()?.join("token")),
    }
}
