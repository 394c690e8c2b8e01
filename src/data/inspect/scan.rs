//! One packed file, looked at.

use crate::data::packed::{Dtype, PackedError, PackedFile};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Shorter runs of one id at the end of a file are ordinary text: line breaks, spaces.
const FILL: u64 = 16;

/// What a file holds.
#[derive(Debug)]
pub struct Scan {
    /// On disk.
    pub bytes: u64,
    /// In it.
    pub tokens: u64,
    /// Of its tokens.
    pub dtype: Dtype,
    /// Tokens in a run of one id at its end, 16 or more.
    pub fill: u64,
    /// Ids that end a text; 0 where it was not read wholly.
    pub documents: u64,
    /// CRC-32C of all bytes, where it was read wholly.
    pub crc32c: Option<u32>,
}

/// Whether a file begins as a packed file does.
pub fn begins_as_packed(path: &Path) -> bool {
    let mut start = [0; 7];
    File::open(path).is_ok_and(|mut f| f.read_exact(&mut start).is_ok()) && &start == b"LITPKDS"
}

/// Looks at a file's header, size and end; with `whole` at every token: ids below `vocab_size`, those that are `border`.
pub fn scan(
    path: &Path,
    whole: bool,
    border: Option<i64>,
    vocab_size: Option<usize>,
) -> Result<Scan, PackedError> {
    let file = PackedFile::open(path, false)?;
    let mut scan = Scan {
        bytes: file.bytes(),
        tokens: file.len,
        dtype: file.dtype,
        fill: 0,
        documents: 0,
        crc32c: None,
    };
    let mut ids = Vec::new();
    let mut run = 0;
    if whole {
        scan.crc32c = Some(file.read_all(vocab_size.unwrap_or(1 << 62), &mut ids)?);
        scan.documents = ids.iter().filter(|id| Some(**id) == border).count() as u64;
        run = run_at_end(&ids);
    } else {
        let mut n = 1024.min(file.len);
        while n > 0 {
            ids.clear();
            file.read(file.len - n, n, 1 << 62, &mut ids)?;
            run = run_at_end(&ids);
            if run < n || n == file.len {
                break;
            }
            n = (n * 64).min(file.len);
        }
    }
    scan.fill = if run >= FILL { run } else { 0 };
    Ok(scan)
}

/// How many equal ids end a list.
fn run_at_end(ids: &[i64]) -> u64 {
    ids.iter().rev().take_while(|id| Some(*id) == ids.last()).count() as u64
}
