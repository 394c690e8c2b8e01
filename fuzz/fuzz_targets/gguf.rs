//! Any bytes as a GGUF file: the header is refused or read, every tensor of it dequantised, and its tokenizer
//! and settings turned into those of Hugging Face.
//!
//!     cd fuzz && cargo +nightly fuzz run --fuzz-dir . gguf -- -max_len=8192

#![no_main]
#![allow(dead_code, unused_imports)]

#[path = "../../src/checkpoint/gguf/mod.rs"]
mod gguf;
#[path = "../../src/ffi/mmap.rs"]
mod mmap;
mod ffi {
    pub use crate::mmap::map_file;
}

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = gguf::GgufFile::parse(bytes) else { return };
    for tensor in &header.tensors {
        let raw = header.bytes(bytes, tensor).expect("a checked place");
        let values = tensor.values().expect("a checked shape");
        if values <= 1 << 20 {
            _ = gguf::quants::dequantize(tensor.kind, raw, &mut vec![0.0; values as usize]);
        }
        _ = gguf::llama::hf_name(&tensor.name);
    }
    let metadata = &header.metadata;
    _ = gguf::llama::config_json(metadata, &header.tensors, None);
    _ = gguf::vocab::bpe::tokenizer_json(metadata);
    _ = gguf::vocab::pieces::tokenizer_model(metadata);
    _ = gguf::vocab::tokenizer_config(metadata);
});
