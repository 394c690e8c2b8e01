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

pub use super::writer::PackedWriter;
pub use error::{PackedError, Result, explain};
pub(crate) use read::PackedFile;
pub use read::{Access, Dtype, FileInfo, PackedSet, find_files};

pub(super) use error::io_error;

pub(super) const MAGIC: &[u8; 7] = b"LITPKDS";
pub(super) const VERSION: u64 = 1;
pub(super) const HEADER: usize = 24;
/// Folders of this ending hold an unfinished preparation; no reader enters them.
pub const UNFINISHED: &str = ".unfinished";

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
