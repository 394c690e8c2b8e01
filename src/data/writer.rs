//! Writes packed files (`LITPKDS`, see [`super::packed`]), from any point on that was reached before.
//!
//! A file grows under the name `NAME.bin.part`, whose header is not filled in, and gets its own name when it is
//! whole: what ends in `.bin` can be read. [`PackedWriter::position`] says how far all is, and
//! [`PackedWriter::go_to`] takes everything after such a position back.

use super::packed::{HEADER, MAGIC, PackedError, Result, VERSION, io_error};
use crate::config::TokenDtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How ids are written: 2 bytes or 4, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenFormat {
    vocab_size: usize,
    wide: bool,
}

impl TokenFormat {
    /// Ids that 2 bytes hold.
    pub const NARROW_IDS: usize = 1 << 16;

    /// The original's choice: u16 where the vocabulary has fewer than 65,500 ids, else i32.
    pub fn for_vocab(vocab_size: usize) -> Self {
        Self { vocab_size, wide: vocab_size >= 65_500 }
    }

    /// Of a dtype; `None` where the vocabulary has more ids than it holds.
    pub fn new(vocab_size: usize, dtype: TokenDtype) -> Option<Self> {
        match dtype {
            TokenDtype::Auto => Some(Self::for_vocab(vocab_size)),
            TokenDtype::Uint16 if vocab_size > Self::NARROW_IDS => None,
            TokenDtype::Uint16 => Some(Self { vocab_size, wide: false }),
            TokenDtype::Int32 => Some(Self { vocab_size, wide: true }),
        }
    }

    /// Bytes an id.
    pub fn size(self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// Appends ids.
    ///
    /// # Errors
    /// The first id outside the vocabulary.
    pub fn encode(self, ids: &[u32], out: &mut Vec<u8>) -> std::result::Result<(), u32> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(id);
        }
        match self.wide {
            true => out.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
            false => out.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
        }
        Ok(())
    }

    fn header(self, tokens: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..7].copy_from_slice(MAGIC);
        header[7..15].copy_from_slice(&VERSION.to_le_bytes());
        header[15] = if self.wide { 4 } else { 8 };
        header[16..].copy_from_slice(&tokens.to_le_bytes());
        header
    }
}

/// Size and checksum of a packed file.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct OutputFile {
    /// Size in bytes.
    pub bytes: u64,
    /// CRC-32C of all its bytes.
    pub crc32c: u32,
}

/// How far a split is written.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct Position {
    /// Whole files.
    pub files: u64,
    /// Tokens in the file after them.
    pub tokens: u64,
    /// CRC-32C of those tokens' bytes.
    pub crc32c: u32,
}

/// Writes a split's tokens into files of `chunk` tokens, documents back to back.
pub struct PackedWriter {
    dir: PathBuf,
    prefix: String,
    chunk: u64,
    format: TokenFormat,
    /// The file that grows, unless nothing is in it.
    part: Option<BufWriter<File>>,
    at: Position,
    /// Whole files since [`PackedWriter::take_files`].
    whole: BTreeMap<String, OutputFile>,
    /// Tokens written.
    pub tokens: u64,
}

impl PackedWriter {
    /// Files `dir/prefix_0000000000.bin` and so on, in the [format of the vocabulary](TokenFormat::for_vocab).
    pub fn new(dir: &Path, prefix: &str, chunk: u64, vocab_size: usize) -> Self {
        Self::with_format(dir, prefix, chunk, TokenFormat::for_vocab(vocab_size))
    }

    /// The same in a certain format.
    pub fn with_format(dir: &Path, prefix: &str, chunk: u64, format: TokenFormat) -> Self {
        Self {
            dir: dir.to_owned(),
            prefix: prefix.to_owned(),
            chunk,
            format,
            part: None,
            at: Position::default(),
            whole: BTreeMap::new(),
            tokens: 0,
        }
    }

    /// Appends a document, whole; it may run on into the next file.
    pub fn add(&mut self, ids: &[u32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(ids.len() * self.format.size());
        match self.format.encode(ids, &mut bytes) {
            Ok(()) => self.add_bytes(&bytes),
            Err(got) => {
                let (path, vocab_size) = (self.path(), self.format.vocab_size);
                Err(PackedError::NewId { path, got, vocab_size })
            }
        }
    }

    /// Appends ids that are encoded already ([`TokenFormat::encode`]).
    pub fn add_bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        let size = self.format.size() as u64;
        while !bytes.is_empty() {
            let room = (self.chunk - self.at.tokens) * size;
            let (now, later) = bytes.split_at((room as usize).min(bytes.len()));
            let part = self.part_path();
            if self.part.is_none() {
                let file = File::create(&part).map_err(io_error("write", &part))?;
                let mut file = BufWriter::with_capacity(1 << 20, file);
                file.write_all(&[0; HEADER]).map_err(io_error("write", &part))?;
                self.part = Some(file);
            }
            if let Some(file) = &mut self.part {
                file.write_all(now).map_err(io_error("write", &part))?;
            }
            self.at.crc32c = crc32c::crc32c_append(self.at.crc32c, now);
            self.at.tokens += now.len() as u64 / size;
            self.tokens += now.len() as u64 / size;
            if self.at.tokens == self.chunk {
                self.close()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Ends the short last file, whose header says its true length.
    pub fn finish(&mut self) -> Result<()> {
        if self.at.tokens == 0 { Ok(()) } else { self.close() }
    }

    /// Hands everything to the system, with `sync` also to the disk; how far it is.
    pub fn position(&mut self, sync: bool) -> Result<Position> {
        let path = self.part_path();
        if let Some(file) = &mut self.part {
            let flushed = file.flush().and_then(|()| match sync {
                true => file.get_ref().sync_data(),
                false => Ok(()),
            });
            flushed.map_err(io_error("write", &path))?;
        }
        Ok(self.at)
    }

    /// The files that became whole since the last call, by name.
    pub fn take_files(&mut self) -> BTreeMap<String, OutputFile> {
        std::mem::take(&mut self.whole)
    }

    /// Goes on from a position that was reached earlier, after `tokens` in all; what was written after it is
    /// removed. `false`, and nothing removed, where the files do not hold what they held.
    pub fn go_to(&mut self, to: Position, tokens: u64) -> Result<bool> {
        (self.at, self.part) = (to, None);
        let (whole, part) = (self.path(), self.part_path());
        let bytes = to.tokens * self.format.size() as u64;
        if to.tokens > 0 {
            // The file may have become whole since: it is a part again.
            let there = if whole.exists() { &whole } else { &part };
            match checksum(there, bytes) {
                Ok(Some(crc32c)) if crc32c == to.crc32c => {}
                _ => return Ok(false),
            }
            if there == &whole {
                fs::rename(&whole, &part).map_err(io_error("write", &part))?;
            }
        }
        self.remove_after(to)?;
        if to.tokens > 0 {
            let open = || {
                let mut file = OpenOptions::new().read(true).write(true).open(&part)?;
                file.set_len(HEADER as u64 + bytes)?;
                file.seek(SeekFrom::End(0))?;
                Ok(BufWriter::with_capacity(1 << 20, file))
            };
            self.part = Some(open().map_err(io_error("write", &part))?);
        }
        self.tokens = tokens;
        Ok(true)
    }

    /// Removes this split's files that begin after a position.
    fn remove_after(&self, to: Position) -> Result<()> {
        let entries = fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))?;
        for entry in entries {
            let path = entry.map_err(io_error("read", &self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let number = name.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix('_'));
            let number = number.and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
            let kept = to.files + u64::from(to.tokens > 0);
            if number.is_some_and(|number| number >= kept) {
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.dir.join(format!("{}_{:010}.bin", self.prefix, self.at.files))
    }

    fn part_path(&self) -> PathBuf {
        self.path().with_extension("bin.part")
    }

    /// Fills the header in, syncs and renames: a file of the final name is complete.
    fn close(&mut self) -> Result<()> {
        let (path, part) = (self.path(), self.part_path());
        let Some(file) = self.part.take() else { return Ok(()) };
        let header = self.format.header(self.at.tokens);
        let close = || {
            let file = file.into_inner()?;
            file.write_all_at(&header, 0)?;
            file.sync_all()?;
            fs::rename(&part, &path)
        };
        close().map_err(io_error("write", &path))?;
        let bytes = self.at.tokens as usize * self.format.size();
        let crc32c = crc32c::crc32c_combine(crc32c::crc32c(&header), self.at.crc32c, bytes);
        let file = OutputFile { bytes: (HEADER + bytes) as u64, crc32c };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.whole.insert(name, file);
        self.at = Position { files: self.at.files + 1, tokens: 0, crc32c: 0 };
        Ok(())
    }
}

/// CRC-32C of the first `bytes` after the header; `None` where there are fewer.
fn checksum(path: &Path, bytes: u64) -> std::io::Result<Option<u32>> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    file.seek(SeekFrom::Start(HEADER as u64))?;
    let (mut buffer, mut left, mut sum) = (vec![0; 1 << 20], bytes, 0);
    while left > 0 {
        let want = (left as usize).min(buffer.len());
        let n = file.read(&mut buffer[..want])?;
        if n == 0 {
            return Ok(None);
        }
        sum = crc32c::crc32c_append(sum, &buffer[..n]);
        left -= n as u64;
    }
    Ok(Some(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(dir: &Path, vocab_size: usize) -> PackedWriter {
        PackedWriter::new(dir, "train", 8, vocab_size)
    }

    fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let name = |p: &Path| p.file_name().unwrap().to_str().unwrap().to_owned();
        entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
    }

    #[test]
    fn a_file_is_the_originals_byte_for_byte_and_its_checksum_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path(), 32_000);
        writer.add(&[5, 6, 7, 8, 2, 1, 1, 1]).unwrap();
        let bytes = fs::read(dir.path().join("train_0000000000.bin")).unwrap();
        let mut want = b"LITPKDS\x01\0\0\0\0\0\0\0\x08\x08\0\0\0\0\0\0\0".to_vec();
        want.extend([5, 0, 6, 0, 7, 0, 8, 0, 2, 0, 1, 0, 1, 0, 1, 0]);
        assert_eq!(bytes, want);
        let file = OutputFile { bytes: 40, crc32c: crc32c::crc32c(&want) };
        assert_eq!(writer.take_files()["train_0000000000.bin"], file);
        writer.finish().unwrap();
        assert_eq!(contents(dir.path()).len(), 1);
    }

    #[test]
    fn a_dtype_that_is_asked_for_is_written_up_to_its_last_id() {
        for (vocab_size, dtype, id, want) in [
            (300, TokenDtype::Int32, 299, &b"\x04\x01\0\0\0\0\0\0\0\x2b\x01\0\0"[..]),
            (65_536, TokenDtype::Uint16, 65_535, b"\x08\x01\0\0\0\0\0\0\0\xff\xff"),
            (65_499, TokenDtype::Auto, 65_498, b"\x08\x01\0\0\0\0\0\0\0\xda\xff"),
            (65_500, TokenDtype::Auto, 65_499, b"\x04\x01\0\0\0\0\0\0\0\xdb\xff\0\0"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let format = TokenFormat::new(vocab_size, dtype).unwrap();
            let mut writer = PackedWriter::with_format(dir.path(), "train", 8, format);
            writer.add(&[id]).unwrap();
            writer.finish().unwrap();
            let bytes = fs::read(dir.path().join("train_0000000000.bin")).unwrap();
            assert_eq!(&bytes[15..], want, "{vocab_size} {dtype:?}");
        }
        assert!(TokenFormat::new(65_537, TokenDtype::Uint16).is_none());
    }

    #[test]
    fn from_every_position_on_the_same_files_come_out() {
        for vocab_size in [300, 70_000] {
            let straight = tempfile::tempdir().unwrap();
            let documents: Vec<Vec<u32>> = (0..9).map(|i| (i..i + 5).collect()).collect();
            let mut w = writer(straight.path(), vocab_size);
            documents.iter().for_each(|d| w.add(d).unwrap());
            w.finish().unwrap();
            for stop in 0..9 {
                let dir = tempfile::tempdir().unwrap();
                let mut first = writer(dir.path(), vocab_size);
                documents[..stop].iter().for_each(|d| first.add(d).unwrap());
                let position = first.position(true).unwrap();
                documents[stop..].iter().for_each(|d| first.add(d).unwrap());
                drop(first);
                let mut second = writer(dir.path(), vocab_size);
                assert!(second.go_to(position, 5 * stop as u64).unwrap());
                documents[stop..].iter().for_each(|d| second.add(d).unwrap());
                second.finish().unwrap();
                assert_eq!(contents(dir.path()), contents(straight.path()));
                assert_eq!(second.tokens, 45);
            }
        }
    }

    #[test]
    fn a_position_whose_bytes_are_not_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = writer(dir.path(), 300);
        w.add(&[1, 2, 3]).unwrap();
        let position = w.position(false).unwrap();
        drop(w);
        let part = dir.path().join("train_0000000000.bin.part");
        let bytes = fs::read(&part).unwrap();
        fs::write(&part, &bytes[..bytes.len() - 1]).unwrap();
        assert!(!writer(dir.path(), 300).go_to(position, 3).unwrap());
        fs::remove_file(&part).unwrap();
        assert!(!writer(dir.path(), 300).go_to(position, 3).unwrap());
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = writer(dir.path(), 300).add(&[1, 300]).unwrap_err().to_string();
        assert!(error.contains("cannot write id 300"), "{error}");
    }
}
