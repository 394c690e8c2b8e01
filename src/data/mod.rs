//! Data: corpora to packed files ([`prepare`]), packed files to batches ([`loader`], [`validation`]).
//!
//! Packed files are `LITPKDS` v1, byte for byte the original's ([`packed`]). A set is its files in sorted
//! order, read as one stream of tokens and cut into blocks of T+1, so that no file and no tail is lost; files
//! of 2049 * 1024 tokens give the original's very blocks at T = 2048.

pub mod documents;
pub mod loader;
pub mod packed;
mod permutation;
pub mod prepare;
pub mod validation;

pub use loader::{DataLoader, DataState, LoaderOptions};
pub use validation::ValidationSet;

use tch::Tensor;

/// One micro-batch, on the CPU.
#[derive(Debug)]
pub struct Batch {
    /// (B, T) of i64
    pub input: Tensor,
    /// (B, T) of i64: the next token of each input; -100 where there is none
    pub target: Tensor,
    /// Targets that are not -100.
    pub n_targets: i64,
}
