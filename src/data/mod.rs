//! Data: corpora to packed files ([`prepare`]), also from the Hub ([`hub`]), packed files to batches ([`loader`],
//! [`validation`]).
//!
//! Packed files are `LITPKDS` v1, byte for byte the original's ([`packed`]). A set is its files in sorted
//! order, read as one stream of tokens and cut into blocks of T+1: files of 2049 * 1024 tokens give the
//! original's very blocks at T = 2048. What the original loses is read here: it cuts within each file and
//! drops the rest of it, shuffles within windows of 8 files, never reads the files after the last whole
//! window, and fails on fewer than 8 a rank. Here an epoch of a set is all its blocks in one seeded order,
//! and at most T tokens at the end of the stream stay out. The original's order can be had too ([`order`]).

pub mod borders;
pub mod chat;
pub mod documents;
pub mod hub;
pub mod inspect;
pub mod loader;
pub mod order;
pub mod packed;
mod permutation;
pub mod prepare;
pub mod validation;
pub mod writer;

pub use borders::Borders;
pub use loader::{DataLoader, DataState, LoaderOptions};
pub use validation::ValidationSet;

use crate::ops::Documents;
use tch::Tensor;

/// One micro-batch, on the CPU or on its way through a model.
#[derive(Debug)]
pub struct Batch {
    /// (B, T) of i64
    pub input: Tensor,
    /// (B, T) of i64: the next token of each input; -100 where there is none
    pub target: Tensor,
    /// Where documents lie in the rows, for `data.document_mask`; `None`: attention goes across them.
    pub documents: Option<Documents>,
    /// Targets that are not -100.
    pub n_targets: i64,
}
