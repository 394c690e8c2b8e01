//! Any bytes as a PyTorch file: refused, or read with every value of it, every tensor's bytes and the checksums.
//!
//!     cd fuzz && cargo +nightly fuzz run --fuzz-dir . torch_file -- -max_len=16384 -dict=torch_file.dict

#![no_main]
#![allow(dead_code, unused_imports, unused_macros)]

#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/ffi/mmap.rs"]
mod mmap;
#[path = "../../src/checkpoint/torch_file/mod.rs"]
mod torch_file;
mod ffi {
    pub use crate::mmap::map_file;
}
mod config {
    /// Stands for the crate's own, which `error.rs` names.
    #[derive(Debug, thiserror::Error)]
    #[error("configuration")]
    pub struct ConfigError;
}

use libfuzzer_sys::fuzz_target;
use torch_file::{TorchFile, TorchFileError, Value, is_torch_file};

fuzz_target!(|bytes: &[u8]| {
    let recognised = is_torch_file(bytes);
    let file = match TorchFile::parse(bytes.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            assert!(error.chain().any(|cause| cause.is::<TorchFileError>()), "{error:#}");
            return;
        }
    };
    assert!(recognised);
    let mut visited = 0;
    walk(file.root(), 0, &mut visited);
    // The promise of `Value`, and a key beside each value.
    assert!(visited <= 2 * (16 * bytes.len() + 1000), "{visited} values in {} bytes", bytes.len());
    let mut copied = 0;
    for (_, tensor) in file.tensors() {
        // A tensor may be there many times; each is cheap to describe and costs its bytes to read.
        if copied <= 1 << 20 {
            let elements = file.bytes(tensor).expect("a tensor of this file");
            assert_eq!(elements.len() as u64, tensor.byte_len());
            copied += elements.len();
        }
    }
    _ = file.verify();
});

/// Asks a value, and all below it, for everything that it may be.
fn walk(value: Value, depth: usize, visited: &mut usize) {
    assert!(depth <= 128);
    *visited += 1;
    _ = (value.kind(), value.is_none(), value.is_empty(), value.as_bool(), value.as_i64());
    _ = (value.as_u64(), value.as_f64(), value.as_str(), value.as_bytes(), value.as_tensor());
    _ = format!("{value:?}");
    _ = (value.get("0"), value.get("state_dict"));
    for item in value.items() {
        walk(item, depth + 1, visited);
    }
    for (key, item) in value.entries() {
        walk(key, depth + 1, visited);
        walk(item, depth + 1, visited);
    }
    if let Some((args, state)) = value.parts() {
        walk(args, depth + 1, visited);
        if let Some(state) = state {
            walk(state, depth + 1, visited);
        }
    }
}
