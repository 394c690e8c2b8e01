//! GGUF, the single-file format of llama.cpp: weights (often quantised), settings and tokenizer.
//!
//! A file is `GGUF`, a version, metadata (typed key-value pairs), one description a tensor, then the
//! tensors' bytes, each aligned. Everything is little-endian. Nothing here needs libtorch.
//!
//! Read first: [`read`] (what is checked), then [`quants`] (the blocks, with their formulas);
//! [`llama`] has the names of both worlds, [`mix`] which tensor gets which type.

mod error;
pub mod llama;
pub mod mix;
pub mod quants;
mod read;
mod types;
mod value;
pub mod vocab;
mod write;

pub use error::GgufError;
pub use read::{GgufFile, Header};
pub use types::{TensorInfo, Type};
pub use value::{Array, Metadata, Value};
pub use write::GgufWriter;

/// Alignment of tensors where `general.alignment` is not given, in bytes.
pub const ALIGNMENT: u64 = 32;
