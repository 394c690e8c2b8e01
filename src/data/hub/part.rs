//! The beginning of a file, on its way.

use super::client::with_hint;
use super::listing::HubFile;
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const ROOM: &str =
    "free space or set `HF_HOME` to a larger disk, then start again: what was downloaded is kept";

/// Bytes on the disk, in `ETAG.incomplete`.
pub struct Part<'a> {
    /// What is to become of it.
    pub of: &'a HubFile,
    /// How many there are.
    pub bytes: u64,
    sha256: Sha256,
    file: File,
    path: PathBuf,
}

impl<'a> Part<'a> {
    /// Takes up what an interrupted download left, which is read once for its hash. Where the Hub tells no SHA-256, and
    /// nothing could say in the end whether it is right, it is downloaded anew; those are small files.
    pub fn open(path: &Path, of: &'a HubFile) -> Result<Self> {
        let named = || format!("cannot write `{}`", path.display());
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).append(true).create(true).open(path).with_context(named)?;
        let mut sha256 = Sha256::new();
        let mut bytes = file.metadata().with_context(named)?.len();
        if !of.is_sha256 || bytes > of.bytes {
            file.set_len(0).with_context(named)?;
            bytes = 0;
        }
        if bytes > 0 {
            bytes = io::copy(&mut file, &mut sha256).with_context(named)?;
        }
        Ok(Self { of, bytes, sha256, file, path: path.into() })
    }

    /// Appends.
    pub fn add(&mut self, bytes: &[u8], bar: &ProgressBar) -> Result<()> {
        let written = self.file.write_all(bytes);
        self.explain(written)?;
        self.sha256.update(bytes);
        self.bytes += bytes.len() as u64;
        bar.inc(bytes.len() as u64);
        Ok(())
    }

    /// Begins again.
    pub fn clear(&mut self, bar: &ProgressBar) -> Result<()> {
        self.explain(self.file.set_len(0))?;
        bar.dec(self.bytes);
        self.bytes = 0;
        self.sha256 = Sha256::new();
        Ok(())
    }

    /// Why these are not the bytes that the Hub lists.
    pub fn problem(&self) -> Option<String> {
        if self.bytes != self.of.bytes {
            return Some(format!("expected {} bytes, got {}", self.of.bytes, self.bytes));
        }
        let got = format!("{:x}", self.sha256.clone().finalize());
        let wrong = self.of.is_sha256 && got != self.of.etag;
        wrong.then(|| format!("expected bytes of SHA-256 {}, got {got}", self.of.etag))
    }

    /// Gives the whole file its name.
    pub fn finish(self, path: &Path) -> Result<()> {
        self.explain(self.file.sync_all())?;
        self.explain(fs::rename(&self.path, path))
    }

    fn explain(&self, result: io::Result<()>) -> Result<()> {
        let named = || format!("cannot write `{}`", self.path.display());
        result.with_context(named).map_err(|error| with_hint(error, ROOM))
    }
}
