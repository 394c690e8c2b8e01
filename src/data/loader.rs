//! Training batches: a weighted mixture of packed sets, shuffled, sharded, read ahead.
//!
//! Global sample k is a function of the seed and k alone: a hash of (seed, k) draws the source by weight; the
//! j-th sample of a source is block `permutation(seed, source, epoch)(j mod n)` of epoch `j / n`. Rank r of W
//! takes the samples k = r mod W, so every world size trains on the same sequences in each step, and no two
//! ranks on the same one. The cursor is k and one counter a source: restored in constant time.

use super::Batch;
use super::packed::PackedSet;
use super::permutation::{Permutation, mix};
use crate::bail_hint;
use crate::config::DataSource;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use tch::Tensor;

/// What to read and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Weighted sources.
    pub sources: Vec<DataSource>,
    /// B
    pub micro_batch_size: usize,
    /// T
    pub block_size: usize,
    /// This process, from 0.
    pub rank: usize,
    /// W
    pub world: usize,
    /// Seed of the order.
    pub seed: u64,
    /// V: an id outside is an error.
    pub vocab_size: usize,
    /// Batches read ahead.
    pub prefetch: usize,
}

/// Where a loader stands: after the last batch that `next` gave out.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct DataState {
    /// Global samples consumed by all ranks.
    pub sample: u64,
    /// Samples drawn from each source.
    pub drawn: Vec<u64>,
    /// Blocks of each source, to notice that the data changed.
    pub blocks: Vec<u64>,
}

/// One source: its blocks of T+1 tokens.
struct Source {
    set: PackedSet,
    weight: f64,
    blocks: u64,
}

struct Shared {
    sources: Vec<Source>,
    options: LoaderOptions,
}

/// An endless reader of training batches.
pub struct DataLoader {
    shared: Arc<Shared>,
    state: DataState,
    batches: Receiver<Result<(Batch, DataState)>>,
}

impl DataLoader {
    /// Opens the sources and starts reading ahead.
    ///
    /// # Errors
    /// A missing or damaged file; a source shorter than one block of T+1 tokens.
    pub fn train(options: LoaderOptions) -> Result<Self> {
        let total: f64 = options.sources.iter().map(|s| s.weight).sum();
        let mut sources = Vec::new();
        for source in &options.sources {
            let set = PackedSet::open(&source.path)?;
            let blocks = set.len() / (options.block_size as u64 + 1);
            if blocks == 0 {
                bail_hint!(
                    "prepare more text, or lower `train.max_seq_length`";
                    "`{}` has {} tokens, a training sequence needs {}",
                    source.path.display(), set.len(), options.block_size + 1
                );
            }
            sources.push(Source { set, weight: source.weight / total, blocks });
        }
        let state = DataState {
            sample: 0,
            drawn: vec![0; sources.len()],
            blocks: sources.iter().map(|s| s.blocks).collect(),
        };
        let shared = Arc::new(Shared { sources, options });
        let batches = read_ahead(shared.clone(), state.clone());
        Ok(Self { shared, state, batches })
    }

    /// The next micro-batch of this rank.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Batch> {
        let (batch, state) = self.batches.recv().context("the data thread ended")??;
        self.state = state;
        Ok(batch)
    }

    /// The cursor after the last batch given out, whatever was read ahead.
    pub fn state(&self) -> DataState {
        self.state.clone()
    }

    /// Goes to a cursor in constant time.
    ///
    /// # Errors
    /// The sources changed since.
    pub fn restore(&mut self, state: &DataState) -> Result<()> {
        if state.blocks != self.state.blocks {
            return Err(anyhow!(
                "the training data changed: expected {:?} blocks a source, got {:?}",
                state.blocks,
                self.state.blocks
            ))
            .hint("resume with the data and `max_seq_length` of the run, or start a new one from its weights");
        }
        self.state = state.clone();
        self.batches = read_ahead(self.shared.clone(), state.clone());
        Ok(())
    }
}

/// A thread that reads from `state` on, until its receiver is gone.
fn read_ahead(shared: Arc<Shared>, mut state: DataState) -> Receiver<Result<(Batch, DataState)>> {
    let (sender, receiver) = sync_channel(shared.options.prefetch.max(1));
    std::thread::spawn(move || {
        loop {
            let batch = shared.read_batch(&mut state);
            let failed = batch.is_err();
            if sender.send(batch.map(|b| (b, state.clone()))).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

impl Shared {
    /// Walks B x W global samples and reads this rank's B.
    fn read_batch(&self, state: &mut DataState) -> Result<Batch> {
        let o = &self.options;
        let (b, t) = (o.micro_batch_size, o.block_size);
        let mut tokens = Vec::with_capacity(b * (t + 1));
        for i in 0..b * o.world {
            let source = self.draw(state.sample);
            if i % o.world == o.rank {
                tokens.extend(self.read_block(source, state.drawn[source])?);
            }
            state.sample += 1;
            state.drawn[source] += 1;
        }
        let (b, t) = (b as i64, t as i64);
        let tokens = Tensor::from_slice(&tokens).view([b, t + 1]); // (B, T+1)
        Ok(Batch {
            input: tokens.narrow(1, 0, t).contiguous(),  // (B, T)
            target: tokens.narrow(1, 1, t).contiguous(), // (B, T)
            n_targets: b * t,
        })
    }

    /// The source of global sample k.
    fn draw(&self, k: u64) -> usize {
        let hash = mix(mix(self.options.seed) ^ mix(k));
        let mut x = (hash >> 11) as f64 / (1u64 << 53) as f64; // uniform in [0, 1)
        for (i, source) in self.sources.iter().enumerate() {
            if x < source.weight {
                return i;
            }
            x -= source.weight;
        }
        self.sources.len() - 1
    }

    /// The T+1 tokens of the j-th sample of a source.
    fn read_block(&self, source: usize, j: u64) -> Result<Vec<i64>> {
        let (o, s) = (&self.options, &self.sources[source]);
        let (epoch, i) = (j / s.blocks, j % s.blocks);
        let key = mix(mix(mix(o.seed) ^ source as u64) ^ epoch);
        let block = Permutation::new(s.blocks, key).at(i);
        let size = o.block_size as u64 + 1;
        s.set.read(block * size, size, o.vocab_size)
    }
}
