//! A file that grows by whole records: a write that fails half-way leaves no half record behind.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

/// A file open for appending records.
pub(super) struct AppendFile {
    file: File,
    /// Bytes of whole records.
    len: u64,
    /// The last write failed, so bytes beyond `len` may lie in the file.
    torn: bool,
}

impl AppendFile {
    /// Opens or creates a file; records go behind what it holds.
    pub(super) fn open(path: &Path) -> io::Result<AppendFile> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let len = file.seek(SeekFrom::End(0))?;
        Ok(AppendFile { file, len, torn: false })
    }

    /// Appends one record and hands it to the system: it survives the death of this process.
    ///
    /// # Errors
    /// Where the disk is full, for one. The next call first takes back what the failed one left, so
    /// records lost while the disk was full are missing from the file but never damage it.
    pub(super) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.len)?;
            self.file.seek(SeekFrom::Start(self.len))?;
        }
        self.torn = true;
        self.file.write_all(record)?;
        self.torn = false;
        self.len += record.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_go_behind_what_the_file_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        AppendFile::open(&path).unwrap().append(b"one\n").unwrap();
        AppendFile::open(&path).unwrap().append(b"two\n").unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn a_torn_record_is_taken_back_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = AppendFile::open(&path).unwrap();
        file.append(b"one\n").unwrap();
        // What a disk that fills up in the middle of a record leaves:
        file.file.write_all(b"tw").unwrap();
        file.torn = true;
        file.append(b"three\n").unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"one\nthree\n");
    }
}
