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
//!
//! Reading maps the files of a set ([`Access::Mapped`]). Linux lets a process map 65,530 files, so sets of more than
//! 32,768 (the published corpus is some 450,000 files of 4 MB) are opened, read and closed for each block
//! ([`Access::Opened`]); `bench data` times both. In both ways a file that was cut short under a running job is an error
//! with its name: each read from a map asks for the file's size before (2 to 6 us). What remains: a file cut
//! in the microseconds after that, or a disk that fails, ends the process by SIGBUS where the file is mapped.

mod error;
mod read;

pub use error::{PackedError, Result, explain};
pub(crate) use read::PackedFile;
pub use read::{Access, Dtype, FileInfo, PackedSet, find_files};

use error::io_error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 7] = b"LITPKDS";
const VERSION: u64 = 1;
const HEADER: usize = 24;
/// Folders of this ending hold an unfinished preparation; no reader enters them.
pub const UNFINISHED: &str = ".unfinished";

/// Writes a split's tokens into files of `chunk` tokens, documents back to back.
pub struct PackedWriter {
    dir: PathBuf,
    prefix: String,
    chunk: usize,
    vocab_size: usize,
    buffer: Vec<u32>,
    counter: u64,
    /// Tokens written or buffered.
    pub tokens: u64,
}

impl PackedWriter {
    /// Files `dir/prefix_0000000000.bin` and so on; u16 tokens where `vocab_size` < 65,500, else i32. Holds
    /// one chunk in memory, 4 bytes a token.
    pub fn new(dir: &Path, prefix: &str, chunk: u64, vocab_size: usize) -> Self {
        Self {
            dir: dir.to_owned(),
            prefix: prefix.to_owned(),
            chunk: chunk as usize,
            vocab_size,
            buffer: Vec::new(),
            counter: 0,
            tokens: 0,
        }
    }

    /// Appends a document, whole; it may run on into the next file.
    pub fn add(&mut self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.vocab_size;
        if let Some(&got) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(PackedError::NewId { path: self.path(), got, vocab_size });
        }
        self.tokens += tokens.len() as u64;
        let mut rest = tokens;
        while self.buffer.len() + rest.len() >= self.chunk {
            let (now, later) = rest.split_at(self.chunk - self.buffer.len());
            self.buffer.extend_from_slice(now);
            rest = later;
            self.write()?;
        }
        self.buffer.extend_from_slice(rest);
        Ok(())
    }

    /// Writes the short last file, whose header says its true length.
    pub fn finish(&mut self) -> Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.write() }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(format!("{}_{:010}.bin", self.prefix, self.counter))
    }

    /// Writes the buffer to a temporary name, syncs, renames: a file of the final name is complete.
    fn write(&mut self) -> Result<()> {
        let path = self.path();
        let temporary = path.with_extension("bin.tmp");
        let result = (|| {
            let mut file = BufWriter::new(File::create(&temporary)?);
            let wide = self.vocab_size >= 65_500;
            file.write_all(MAGIC)?;
            file.write_all(&VERSION.to_le_bytes())?;
            file.write_all(&[if wide { 4 } else { 8 }])?;
            file.write_all(&(self.buffer.len() as u64).to_le_bytes())?;
            for &token in &self.buffer {
                match wide {
                    true => file.write_all(&token.to_le_bytes())?,
                    false => file.write_all(&(token as u16).to_le_bytes())?,
                }
            }
            file.into_inner()?.sync_all()?;
            std::fs::rename(&temporary, &path)
        })();
        result.map_err(io_error("write", &path))?;
        self.buffer.clear();
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
