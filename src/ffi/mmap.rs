//! Memory maps.

use memmap2::Mmap;
use std::fs::File;
use std::io;

/// Maps a file read-only. A part that goes away while it is mapped (the file cut short, the disk gone) ends the process
/// by SIGBUS when it is touched; callers compare sizes before.
pub fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only and private to us in Rust. Another process could change the file under it: bytes are
    // only ever read as numbers, all of whose patterns are valid, and cut files are what callers look for.
    unsafe { Mmap::map(file) }
}
