//! Any bytes as a packed token file: refused, or read from a map, without one and as a whole, which all must agree.
//!
//!     cd fuzz && TMPDIR=/dev/shm cargo +nightly fuzz run --fuzz-dir . packed -- -max_len=256
//!
//! The reader takes a path, so the bytes go through a file; in memory (`/dev/shm`) that is quick.

#![no_main]
#![allow(dead_code, unused_imports, unused_macros)]

#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/ffi/mmap.rs"]
mod mmap;
#[path = "../../src/data"]
mod data {
    pub mod packed;
    pub mod writer {
        /// Stands for the crate's own.
        pub struct PackedWriter;
    }
}
mod ffi {
    pub use crate::mmap::map_file;
}
mod config {
    /// Stands for the crate's own, which `error.rs` names.
    #[derive(Debug, thiserror::Error)]
    #[error("configuration")]
    pub struct ConfigError;
}

use data::packed::{Access, Dtype, PackedFile, PackedSet};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("fuzz-packed-{}.bin", std::process::id()));
    fs::write(&path, bytes).expect("a place for temporary files");
    read(&path, bytes);
    fs::remove_file(&path).expect("the file just written");
});

fn read(path: &Path, bytes: &[u8]) {
    let (mapped, opened) = (PackedFile::open(path, true), PackedFile::open(path, false));
    let (Ok(mapped), Ok(opened)) = (mapped, opened) else {
        assert!(PackedSet::open(path).is_err());
        return;
    };
    assert_eq!(mapped.bytes(), bytes.len() as u64);
    let set = PackedSet::open(path).expect("a file that was read");
    assert_eq!((set.len(), set.access(), set.n_files()), (mapped.len, Access::Mapped, 1));
    set.prefetch(0, mapped.len);
    let (half, rest) = (mapped.len / 2, mapped.len - mapped.len / 2);
    for vocab_size in [300, 1 << 31, i64::MAX as usize] {
        let (mut one, mut two, mut all) = (Vec::new(), Vec::new(), Vec::new());
        let first = mapped.read(0, half, vocab_size, &mut one);
        let first = first.and_then(|()| mapped.read(half, rest, vocab_size, &mut one)).is_ok();
        let second = opened.read(0, mapped.len, vocab_size, &mut two).is_ok();
        let third = opened.read_all(vocab_size, &mut all).is_ok();
        let stream = set.read(0, set.len(), vocab_size);
        assert_eq!((first, second, third), (stream.is_ok(), stream.is_ok(), stream.is_ok()));
        if let Ok(stream) = stream {
            assert!(one == stream && two == stream && all == stream);
            assert!(stream.iter().all(|id| (0..vocab_size as i64).contains(id)));
        }
    }
}
