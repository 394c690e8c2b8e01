//! A source file while it is read: decompressed, counted, hashed.

use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use flate2::read::MultiGzDecoder;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

/// What was read of a source file.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct SourceSum {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hexadecimal; as model and data hubs give it.
    pub sha256: String,
    /// When it was changed, in nanoseconds since 1970.
    pub modified: u64,
}

impl SourceSum {
    /// Of a whole file, which is read once.
    pub fn of(path: &Path) -> Result<Self> {
        Source::new(path).finish()
    }

    /// Size and time of change of a file, without reading it.
    pub fn stat(path: &Path) -> Result<(u64, u64)> {
        let read = || format!("cannot read `{}`", path.display());
        let metadata = path.metadata().with_context(read)?;
        let modified = metadata.modified().with_context(read)?;
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok((metadata.len(), since.as_nanos() as u64))
    }
}

/// A file that is about to be read or is being read.
#[derive(Clone)]
pub struct Source {
    path: PathBuf,
    bar: ProgressBar,
    hash: Arc<Mutex<Hash>>,
}

#[derive(Default)]
struct Hash {
    sha256: Sha256,
    bytes: u64,
    /// Size and time of change when reading began.
    stat: Option<(u64, u64)>,
}

impl Source {
    /// A file.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), bar: ProgressBar::hidden(), hash: Arc::default() }
    }

    /// The same; the bar counts the bytes that are read of it.
    pub fn with_bar(path: &Path, bar: ProgressBar) -> Self {
        Self { bar, ..Self::new(path) }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself, for formats that are not read from front to end.
    pub(super) fn file(&self) -> Result<File> {
        let file = File::open(&self.path).with_context(|| self.cannot("open"))?;
        self.hash().stat = Some(SourceSum::stat(&self.path)?);
        Ok(file)
    }

    /// Its bytes without compression: hashed and counted as they are read.
    pub(super) fn bytes(&self) -> Result<Box<dyn Read + Send>> {
        let file = self.file()?;
        decompress(Hashing { file, source: self.clone() }).with_context(|| self.cannot("read"))
    }

    /// The same for a first look: not counted, not hashed.
    pub(super) fn bytes_unseen(&self) -> Result<Box<dyn Read + Send>> {
        let file = File::open(&self.path).with_context(|| self.cannot("open"))?;
        decompress(file).with_context(|| self.cannot("read"))
    }

    /// Advances the bar, for readers that do not go through [`Source::bytes`].
    pub(super) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// `cannot read FILE`.
    pub(super) fn cannot(&self, what: &str) -> String {
        format!("cannot {what} `{}`", self.path.display())
    }

    /// Hash and size, once all is read. Bytes that no reader asked for are read here.
    ///
    /// # Errors
    /// The file changed meanwhile.
    pub fn finish(self) -> Result<SourceSum> {
        let stat = SourceSum::stat(&self.path)?;
        let Hash { mut sha256, bytes, stat: before } = std::mem::take(&mut *self.hash());
        if before.is_some_and(|before| before != stat) {
            return Err(anyhow!("`{}` changed while it was read", self.path.display()))
                .hint("prepare again when nothing writes to the corpus");
        }
        if bytes != stat.0 {
            sha256 = Sha256::new();
            let mut file = File::open(&self.path).with_context(|| self.cannot("open"))?;
            io::copy(&mut file, &mut sha256).with_context(|| self.cannot("read"))?;
        }
        let sha256 = format!("{:x}", sha256.finalize());
        Ok(SourceSum { bytes: stat.0, sha256, modified: stat.1 })
    }

    fn hash(&self) -> MutexGuard<'_, Hash> {
        self.hash.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Hashing {
    file: File,
    source: Source,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        let mut hash = self.source.hash();
        hash.sha256.update(&buffer[..n]);
        hash.bytes += n as u64;
        self.source.bar.inc(n as u64);
        Ok(n)
    }
}

/// Undoes the compression that the first bytes tell of; all members and frames of a file are read.
fn decompress(file: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let mut file = BufReader::with_capacity(1 << 16, file);
    Ok(match file.fill_buf()? {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
            decoder.window_log_max(31)?; // `zstd --long=31`; the memory is taken only where it was used
            Box::new(decoder)
        }
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        _ => Box::new(file),
    })
}
