//! The order `global`: one seeded order over all blocks of all files of a source, epoch by epoch.
//!
//! Global sample k is a function of the seed and k alone: a hash of (seed, k) draws the source by weight; the
//! j-th sample of a source is block `permutation(seed, source, epoch)(j mod n)` of epoch `j / n`. Rank r of W
//! takes the samples k = r mod W, so every world size trains on the same sequences in each step, and no two
//! ranks on the same one. The cursor is k and one counter a source: restored in constant time.

use super::super::packed::PackedSet;
use super::super::permutation::{Permutation, mix};
use super::super::{DataState, LoaderOptions};
use super::{End, Mixture};
use crate::bail_hint;
use anyhow::Result;

/// What the order follows from.
#[derive(Debug)]
pub struct Global {
    mixture: Mixture,
    /// Of an epoch, by source.
    pub(super) blocks: Vec<u64>,
    /// T
    block_size: u64,
    seed: u64,
    rank: usize,
    world: usize,
}

impl Global {
    /// # Errors
    /// A source shorter than one block of T+1 tokens.
    pub fn new(o: &LoaderOptions, sets: &[PackedSet]) -> Result<Self> {
        let mut blocks = Vec::new();
        for (source, set) in o.sources.iter().zip(sets) {
            let n = set.len() / (o.block_size as u64 + 1);
            if n == 0 {
                bail_hint!(
                    "prepare more text, or lower `train.max_seq_length`";
                    "`{}` has {} tokens, a training sequence needs {}",
                    source.path.display(), set.len(), o.block_size + 1
                );
            }
            blocks.push(n);
        }
        Self::of_blocks(o, blocks)
    }

    /// The order of sources that have these many blocks.
    pub fn of_blocks(o: &LoaderOptions, blocks: Vec<u64>) -> Result<Self> {
        Ok(Self {
            mixture: Mixture::new(&o.sources)?,
            blocks,
            block_size: o.block_size as u64,
            seed: o.seed,
            rank: o.rank,
            world: o.world,
        })
    }

    /// This rank's sample among the next W: its source, and where its block begins in that.
    pub(super) fn next(&self, state: &mut DataState) -> (usize, u64) {
        let mut mine = (0, 0);
        for i in 0..self.world {
            let source = self.draw(state.sample);
            if i == self.rank {
                mine = (source, self.block(source, state.drawn[source]) * (self.block_size + 1));
            }
            state.sample += 1;
            state.drawn[source] += 1;
        }
        mine
    }

    fn draw(&self, k: u64) -> usize {
        self.mixture.draw(self.seed, k, k.saturating_mul(self.block_size))
    }

    /// Block of the j-th sample of a source.
    fn block(&self, source: usize, j: u64) -> u64 {
        let n = self.blocks[source];
        let (epoch, i) = (j / n, j % n);
        let key = mix(mix(mix(self.seed) ^ source as u64) ^ epoch);
        Permutation::new(n, key).at(i)
    }

    /// [`super::Order::end`]: walks the draws, 10 ns each with fixed weights: 14 s for three epochs of the published corpus.
    pub(super) fn end(&self, epochs: u64, at_most: u64) -> Option<End> {
        let mut left: Vec<u64> = self.blocks.iter().map(|n| n.saturating_mul(epochs)).collect();
        for samples in 0..at_most {
            let source = self.draw(samples);
            if left[source] == 0 {
                return Some(End { samples, source });
            }
            left[source] -= 1;
        }
        None
    }
}
