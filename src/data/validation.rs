//! Validation batches: the whole set in order, the same every time.

use super::packed::{self, PackedSet};
use super::{Batch, Borders};
use crate::bail_hint;
use anyhow::Result;
use std::path::Path;
use tch::Tensor;

/// A packed set cut into rows of T inputs; each token but the first is a target exactly once.
pub struct ValidationSet {
    set: PackedSet,
    block_size: u64,
    micro_batch_size: u64,
    vocab_size: usize,
    /// What batches tell the borders of documents by; `None`: they do not.
    pub borders: Option<Borders>,
}

impl ValidationSet {
    /// Opens a folder or prefix of packed files.
    pub fn open(
        path: &Path,
        block_size: usize,
        micro_batch_size: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        let set = packed::explain(PackedSet::open(path))?;
        if set.len() < 2 {
            bail_hint!(
                "prepare a larger validation set, or leave `data.val` out";
                "`{}` has {} tokens, validation needs at least 2", path.display(), set.len()
            );
        }
        let (block_size, micro_batch_size) = (block_size as u64, micro_batch_size as u64);
        Ok(Self { set, block_size, micro_batch_size, vocab_size, borders: None })
    }

    /// Targets in the set.
    pub fn n_targets(&self) -> u64 {
        self.set.len() - 1
    }

    /// All batches in order. The last may have fewer rows; its last row is padded with targets of -100.
    pub fn batches(&self) -> impl Iterator<Item = Result<Batch>> + '_ {
        (0..self.n_batches()).map(|i| self.batch(i))
    }

    /// How many those are.
    pub fn n_batches(&self) -> u64 {
        self.rows().div_ceil(self.micro_batch_size)
    }

    /// The i-th of [`ValidationSet::batches`].
    pub fn batch(&self, i: u64) -> Result<Batch> {
        let first = i * self.micro_batch_size;
        self.read(first, self.rows().min(first + self.micro_batch_size))
    }

    fn rows(&self) -> u64 {
        self.n_targets().div_ceil(self.block_size)
    }

    fn read(&self, first: u64, end: u64) -> Result<Batch> {
        let (b, t) = ((end - first) as i64, self.block_size as i64);
        let (mut input, mut target, mut n_targets) = (Vec::new(), Vec::new(), 0);
        let mut tokens = Vec::new();
        for row in first..end {
            let from = row * self.block_size;
            let n = (self.n_targets() - from).min(self.block_size);
            tokens.clear();
            packed::explain(self.set.read_into(from, n + 1, self.vocab_size, &mut tokens))?;
            let padding = (self.block_size - n) as usize;
            input.extend(&tokens[..n as usize]);
            input.extend(std::iter::repeat_n(0, padding));
            target.extend(&tokens[1..]);
            target.extend(std::iter::repeat_n(-100, padding));
            n_targets += n as i64;
        }
        Ok(Batch {
            input: Tensor::from_slice(&input).view([b, t]), // (B, T)
            target: Tensor::from_slice(&target).view([b, t]), // (B, T)
            documents: self.borders.map(|borders| borders.documents(&input, t as usize)), // (B, T)
            n_targets,
        })
    }
}
