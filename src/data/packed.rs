//! `LITPKDS` v1: the packed token files of lit-gpt and TinyLlama.
//!
//! | offset | size | content                                                         |
//! |--------|------|-----------------------------------------------------------------|
//! | 0      | 7    | `LITPKDS`                                                       |
//! | 7      | 8    | version, u64 little-endian, 1                                   |
//! | 15     | 1    | dtype: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f32, 7 f64, 8 u16     |
//! | 16     | 8    | tokens in the file, u64 little-endian                           |
//! | 24     |      | tokens, little-endian                                           |
//!
//! The original fills a short last chunk with a separator or drops it; here its true length is written.

use crate::error::WithHint;
use crate::ffi;
use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 7] = b"LITPKDS";
const VERSION: u64 = 1;
const HEADER: usize = 24;

/// What can be wrong with a packed file.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// Shorter than the header, or another format.
    #[error("`{path}`: expected a packed file that begins with `LITPKDS`, got {got}")]
    Magic {
        /// The file.
        path: PathBuf,
        /// What it begins with.
        got: String,
    },
    /// Another version.
    #[error("`{path}`: expected packed format version 1, got {got}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        got: u64,
    },
    /// A dtype code that holds no token ids.
    #[error("`{path}`: expected an integer dtype (code 1 to 5 or 8), got code {got}")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its code.
        got: u8,
    },
    /// Too few or too many bytes.
    #[error("`{path}`: expected {expected} bytes for {tokens} tokens, got {got}; truncated?")]
    Size {
        /// The file.
        path: PathBuf,
        /// Tokens by the header.
        tokens: u64,
        /// Bytes that these need.
        expected: u64,
        /// Bytes there are.
        got: u64,
    },
}

/// Integer dtypes of a packed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dtype {
    U8,
    I8,
    I16,
    I32,
    I64,
    U16,
}

impl Dtype {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::U8,
            2 => Self::I8,
            3 => Self::I16,
            4 => Self::I32,
            5 => Self::I64,
            8 => Self::U16,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    fn read(self, bytes: &[u8]) -> i64 {
        match (self, bytes) {
            (Self::U8, b) => b[0].into(),
            (Self::I8, b) => (b[0] as i8).into(),
            (Self::I16, b) => i16::from_le_bytes([b[0], b[1]]).into(),
            (Self::U16, b) => u16::from_le_bytes([b[0], b[1]]).into(),
            (Self::I32, b) => i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
            (Self::I64, b) => i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
        }
    }
}

/// One packed file, mapped into memory.
pub struct PackedFile {
    path: PathBuf,
    map: Mmap,
    dtype: Dtype,
    /// Tokens in the file.
    pub len: u64,
}

impl PackedFile {
    /// Maps a file and checks header and size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        let bytes = file.metadata().map_or(0, |m| m.len());
        if bytes < HEADER as u64 {
            let got = format!("{bytes} bytes");
            return Err(PackedError::Magic { path: path.into(), got }.into());
        }
        let map =
            ffi::map_file(&file).with_context(|| format!("cannot map `{}`", path.display()))?;
        let (dtype, len) = parse_header(path, &map)?;
        Ok(Self { path: path.to_owned(), map, dtype, len })
    }

    /// Appends tokens `from .. from + n` to `out`.
    ///
    /// # Errors
    /// An id outside the vocabulary, with its position.
    fn read(&self, from: u64, n: u64, vocab_size: usize, out: &mut Vec<i64>) -> Result<()> {
        let size = self.dtype.size();
        let start = HEADER + from as usize * size;
        let bytes = &self.map[start..start + n as usize * size];
        for (i, token) in bytes.chunks_exact(size).map(|b| self.dtype.read(b)).enumerate() {
            if token < 0 || token >= vocab_size as i64 {
                let place = from + i as u64;
                return Err(anyhow!(
                    "`{}`: token {place} has id {token}, outside the model's vocabulary of {vocab_size}",
                    self.path.display()
                ))
                .hint("prepare the data with the model's tokenizer, or enlarge `padded_vocab_size`");
            }
            out.push(token);
        }
        Ok(())
    }
}

fn parse_header(path: &Path, map: &[u8]) -> Result<(Dtype, u64), PackedError> {
    let u64_at = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&map[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if &map[..7] != MAGIC {
        let got = format!("`{}`", map[..7].escape_ascii());
        return Err(PackedError::Magic { path: path.into(), got });
    }
    if u64_at(7) != VERSION {
        return Err(PackedError::Version { path: path.into(), got: u64_at(7) });
    }
    let dtype =
        Dtype::from_code(map[15]).ok_or(PackedError::Dtype { path: path.into(), got: map[15] })?;
    let tokens = u64_at(16);
    let expected = (tokens.saturating_mul(dtype.size() as u64)).saturating_add(HEADER as u64);
    if map.len() as u64 != expected {
        let got = map.len() as u64;
        return Err(PackedError::Size { path: path.into(), tokens, expected, got });
    }
    Ok((dtype, tokens))
}

/// Packed files in sorted order, as one stream of tokens.
pub struct PackedSet {
    files: Vec<PackedFile>,
    /// First token of each file in the stream, and the total.
    starts: Vec<u64>,
}

impl PackedSet {
    /// Every `.bin` file in a folder (and the folders in it), or every file that begins with a prefix.
    pub fn open(path: &Path) -> Result<Self> {
        let paths = find_files(path)?;
        let files = paths.iter().map(|p| PackedFile::open(p)).collect::<Result<Vec<_>>>()?;
        let mut starts = vec![0];
        for file in &files {
            starts.push(starts[starts.len() - 1] + file.len);
        }
        Ok(Self { files, starts })
    }

    /// Tokens in all files.
    pub fn len(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens `from .. from + n` of the stream, across file borders.
    pub fn read(&self, from: u64, n: u64, vocab_size: usize) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(n as usize);
        let mut at = self.starts.partition_point(|&start| start <= from) - 1;
        let (mut from, end) = (from, from + n);
        while from < end {
            let stop = end.min(self.starts[at + 1]);
            let file_start = self.starts[at];
            self.files[at].read(from - file_start, stop - from, vocab_size, &mut out)?;
            from = stop;
            at += 1;
        }
        Ok(out)
    }
}

fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if path.is_dir() {
        collect(path, &mut found)?;
    } else if let (Some(dir), Some(prefix)) = (path.parent(), path.file_name()) {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let prefix = prefix.to_string_lossy();
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&*prefix) && entry.path().is_file() {
                found.push(entry.path());
            }
        }
    }
    found.retain(|p| p.extension().is_some_and(|e| e == "bin"));
    found.sort();
    if found.is_empty() {
        return Err(anyhow!("no packed `.bin` files at `{}`", path.display()))
            .hint("make them with `tinyllama prepare`, or correct the path");
    }
    Ok(found)
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot read `{}`", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() { collect(&path, found)? } else { found.push(path) }
    }
    Ok(())
}

/// Writes a split's tokens into files of `chunk` tokens, documents back to back.
pub struct PackedWriter {
    dir: PathBuf,
    prefix: String,
    chunk: usize,
    wide: bool,
    buffer: Vec<u32>,
    counter: u64,
    /// Tokens written or buffered.
    pub tokens: u64,
}

impl PackedWriter {
    /// Files `dir/prefix_0000000000.bin` and so on; u16 tokens where `vocab_size` < 65,500, else i32.
    pub fn new(dir: &Path, prefix: &str, chunk: u64, vocab_size: usize) -> Self {
        Self {
            dir: dir.to_owned(),
            prefix: prefix.to_owned(),
            chunk: chunk as usize,
            wide: vocab_size >= 65_500,
            buffer: Vec::new(),
            counter: 0,
            tokens: 0,
        }
    }

    /// Appends a document.
    pub fn add(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens += tokens.len() as u64;
        self.buffer.extend_from_slice(tokens);
        while self.buffer.len() >= self.chunk {
            self.write(self.chunk)?;
        }
        Ok(())
    }

    /// Writes the short last file.
    pub fn finish(&mut self) -> Result<()> {
        match self.buffer.len() {
            0 => Ok(()),
            rest => self.write(rest),
        }
    }

    fn write(&mut self, n: usize) -> Result<()> {
        let path = self.dir.join(format!("{}_{:010}.bin", self.prefix, self.counter));
        let result = (|| {
            let mut file = BufWriter::new(File::create(&path)?);
            file.write_all(MAGIC)?;
            file.write_all(&VERSION.to_le_bytes())?;
            file.write_all(&[if self.wide { 4 } else { 8 }])?;
            file.write_all(&(n as u64).to_le_bytes())?;
            for &token in &self.buffer[..n] {
                match self.wide {
                    true => file.write_all(&token.to_le_bytes())?,
                    false => file.write_all(&(token as u16).to_le_bytes())?,
                }
            }
            file.into_inner()?.sync_all()
        })();
        result.with_context(|| format!("cannot write `{}`", path.display()))?;
        self.buffer.drain(..n);
        self.counter += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_originals_very_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = PackedWriter::new(dir.path(), "train", 8, 32_000);
        writer.add(&[5, 6, 7]).unwrap();
        writer.add(&[8, 2, 1, 1, 1]).unwrap();
        writer.finish().unwrap();
        let bytes = std::fs::read(dir.path().join("train_0000000000.bin")).unwrap();
        let mut want = b"LITPKDS\x01\0\0\0\0\0\0\0\x08\x08\0\0\0\0\0\0\0".to_vec();
        want.extend([5, 0, 6, 0, 7, 0, 8, 0, 2, 0, 1, 0, 1, 0, 1, 0]);
        assert_eq!(bytes, want);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_stream_runs_across_files_of_any_length_and_width() {
        for vocab in [300, 70_000] {
            let dir = tempfile::tempdir().unwrap();
            let mut writer = PackedWriter::new(dir.path(), "x", 7, vocab);
            let tokens: Vec<u32> = (0..53).map(|i| i * 5 % 300).collect();
            for document in tokens.chunks(10) {
                writer.add(document).unwrap();
            }
            writer.finish().unwrap();
            let set = PackedSet::open(dir.path()).unwrap();
            assert_eq!(set.len(), 53);
            let all: Vec<i64> = tokens.iter().map(|&t| t.into()).collect();
            assert_eq!(set.read(0, 53, 300).unwrap(), all);
            assert_eq!(set.read(5, 20, 300).unwrap(), all[5..25]);
            assert_eq!(set.read(52, 1, 300).unwrap(), all[52..]);
        }
    }
}
