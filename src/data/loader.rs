//! Training batches: a weighted mixture of packed sets, shuffled, sharded, read ahead.
//!
//! Global sample k is a function of the seed and k alone: a hash of (seed, k) draws the source by weight; the
//! j-th sample of a source is block `permutation(seed, source, epoch)(j mod n)` of epoch `j / n`. Rank r of W
//! takes the samples k = r mod W, so every world size trains on the same sequences in each step, and no two
//! ranks on the same one. The cursor is k and one counter a source: restored in constant time.

use super::Batch;
use super::packed::{self, PackedSet};
use super::permutation::{Permutation, mix};
use crate::bail_hint;
use crate::config::DataSource;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
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

/// Where a loader stands: after the last batch that `next` gave out. Every rank's is the same, and it holds
/// for any world size and micro-batch.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct DataState {
    /// Global samples consumed by all ranks.
    pub sample: u64,
    /// Samples drawn from each source.
    pub drawn: Vec<u64>,
    /// Blocks of each source, to notice that the data changed.
    pub blocks: Vec<u64>,
    /// T, which the blocks depend on.
    pub block_size: usize,
    /// Seed of the order.
    pub seed: u64,
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
    ahead: ReadAhead,
}

impl DataLoader {
    /// Opens the sources and starts reading ahead.
    ///
    /// # Errors
    /// A missing or damaged file; a source shorter than one block of T+1 tokens; weights that are no shares.
    pub fn train(options: LoaderOptions) -> Result<Self> {
        let o = &options;
        ensure!(o.micro_batch_size > 0 && o.block_size > 0, "a batch of no tokens: {o:?}");
        ensure!(o.rank < o.world, "rank {} of {} ranks", o.rank, o.world);
        let sources = open_sources(o)?;
        let state = DataState {
            sample: 0,
            drawn: vec![0; sources.len()],
            blocks: sources.iter().map(|s| s.blocks).collect(),
            block_size: o.block_size,
            seed: o.seed,
        };
        let shared = Arc::new(Shared { sources, options });
        let ahead = ReadAhead::start(shared.clone(), state.clone());
        Ok(Self { shared, state, ahead })
    }

    /// The next micro-batch of this rank. Never ends: epoch follows epoch, each in an order of its own.
    ///
    /// # Errors
    /// A file that went away or was cut; an id outside the vocabulary. No batch follows an error.
    #[allow(clippy::should_implement_trait)] // endless and fallible: `Option` would say nothing
    pub fn next(&mut self) -> Result<Batch> {
        let read = self.ahead.batches.as_ref().and_then(|batches| batches.recv().ok());
        let (batch, state) =
            read.context("the data thread ended, after the error it reported")??;
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
    /// The sources, the sequence length or the seed are not those of the cursor: it would point elsewhere.
    pub fn restore(&mut self, state: &DataState) -> Result<()> {
        let identity = |s: &DataState| (s.blocks.clone(), s.block_size, s.seed);
        if identity(state) != identity(&self.state) || state.drawn.len() != state.blocks.len() {
            let show = |s: &DataState| {
                let (blocks, block_size, seed) = identity(s);
                format!("{blocks:?} blocks of {block_size} by source, seed {seed}")
            };
            return Err(anyhow!(
                "the training data changed: expected {}, got {}",
                show(state),
                show(&self.state)
            ))
            .hint(
                "resume with the run's data, `max_seq_length` and `seed`, or start a new run from \
                 its weights",
            );
        }
        self.state = state.clone();
        self.ahead = ReadAhead::start(self.shared.clone(), state.clone());
        Ok(())
    }
}

fn open_sources(o: &LoaderOptions) -> Result<Vec<Source>> {
    let total: f64 = o.sources.iter().map(|s| s.weight).sum();
    let are_shares = o.sources.iter().all(|s| s.weight >= 0.0) && total > 0.0 && total.is_finite();
    ensure!(are_shares, "weights must be 0 or more and some above: {:?}", o.sources);
    let mut sources = Vec::new();
    for source in &o.sources {
        let set = packed::explain(PackedSet::open(&source.path))?;
        let blocks = set.len() / (o.block_size as u64 + 1);
        if blocks == 0 {
            bail_hint!(
                "prepare more text, or lower `train.max_seq_length`";
                "`{}` has {} tokens, a training sequence needs {}",
                source.path.display(), set.len(), o.block_size + 1
            );
        }
        sources.push(Source { set, weight: source.weight / total, blocks });
    }
    Ok(sources)
}

/// A thread that reads batches until its receiver is gone or one fails.
struct ReadAhead {
    batches: Option<Receiver<Result<(Batch, DataState)>>>,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    fn start(shared: Arc<Shared>, mut state: DataState) -> Self {
        let (sender, receiver) = sync_channel(shared.options.prefetch.max(1));
        let thread = std::thread::spawn(move || {
            loop {
                let batch = shared.read_batch(&mut state);
                let failed = batch.is_err();
                if sender.send(batch.map(|b| (b, state.clone()))).is_err() || failed {
                    return;
                }
            }
        });
        Self { batches: Some(receiver), thread: Some(thread) }
    }
}

impl Drop for ReadAhead {
    /// Waits for the thread, one batch at most: it must not use libtorch while the process exits.
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
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
        packed::explain(s.set.read(block * size, size, o.vocab_size))
    }
}
