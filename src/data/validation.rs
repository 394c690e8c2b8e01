//! Validation batches: the whole set in order, the same every time.

use super::chat::ChatSet;
use super::packed::{self, PackedSet};
use super::{Batch, Borders};
use crate::bail_hint;
use anyhow::Result;
use std::path::Path;
use tch::Tensor;

/// A packed set cut into rows of T inputs, each token but the first a target exactly once; or conversations.
pub struct ValidationSet {
    set: Set,
    block_size: u64,
    micro_batch_size: u64,
    vocab_size: usize,
    /// What batches tell the borders of documents by; `None`: they do not.
    pub borders: Option<Borders>,
}

enum Set {
    Packed(PackedSet),
    Chat(ChatSet),
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
        let set = Set::Packed(set);
        Ok(Self { set, block_size, micro_batch_size, vocab_size, borders: None })
    }

    /// Conversations, each once.
    pub fn chat(set: ChatSet, micro_batch_size: usize) -> Self {
        let micro_batch_size = micro_batch_size as u64;
        Self { set: Set::Chat(set), block_size: 0, micro_batch_size, vocab_size: 0, borders: None }
    }

    /// All batches in order. The last may have fewer rows; its last row is padded with targets of -100.
    pub fn batches(&self) -> impl Iterator<Item = Result<Batch>> + '_ {
        (0..self.n_batches()).map(|i| self.batch(i))
    }

    /// Targets in the set.
    pub fn n_targets(&self) -> u64 {
        match &self.set {
            Set::Packed(set) => set.len() - 1,
            Set::Chat(set) => set.n_targets(),
        }
    }

    /// How many those are.
    pub fn n_batches(&self) -> u64 {
        match &self.set {
            Set::Packed(set) => self.rows(set).div_ceil(self.micro_batch_size),
            Set::Chat(set) => set.len().div_ceil(self.units(set)),
        }
    }

    /// The i-th of [`ValidationSet::batches`].
    pub fn batch(&self, i: u64) -> Result<Batch> {
        match &self.set {
            Set::Packed(set) => {
                let first = i * self.micro_batch_size;
                self.read(set, first, self.rows(set).min(first + self.micro_batch_size))
            }
            Set::Chat(set) => {
                let first = i * self.units(set);
                let units: Vec<u64> = (first..set.len().min(first + self.units(set))).collect();
                Ok(set.batch(&units))
            }
        }
    }

    fn units(&self, set: &ChatSet) -> u64 {
        set.units_of(self.micro_batch_size as usize) as u64
    }

    fn rows(&self, set: &PackedSet) -> u64 {
        (set.len() - 1).div_ceil(self.block_size)
    }

    fn read(&self, set: &PackedSet, first: u64, end: u64) -> Result<Batch> {
        let (b, t) = ((end - first) as i64, self.block_size as i64);
        let (mut input, mut target, mut n_targets) = (Vec::new(), Vec::new(), 0);
        let mut tokens = Vec::new();
        for row in first..end {
            let from = row * self.block_size;
            let n = (set.len() - 1 - from).min(self.block_size);
            tokens.clear();
            packed::explain(set.read_into(from, n + 1, self.vocab_size, &mut tokens))?;
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
