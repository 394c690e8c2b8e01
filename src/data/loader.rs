//! Training batches: a weighted mixture of packed sets, in the order that `data.order` says ([`order`]), read ahead.

use super::chat::ChatSet;
use super::order::{End, Global, Order, Walk};
use super::packed::{self, Access, PackedSet};
use super::{Batch, Borders};
use crate::config::{DataOrder, DataSource, with_commas};
use crate::error::WithHint;
use crate::train::progress::count;
use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use tch::Tensor;

/// What to read and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Weighted sources.
    pub sources: Vec<DataSource>,
    /// In which order their samples come.
    pub order: DataOrder,
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
    /// How files are read.
    pub access: Access,
    /// What batches tell the borders of documents by; `None`: they do not.
    pub borders: Option<Borders>,
}

/// Where a loader stands: after the last batch that `next` gave out. Every rank's is the same. In the order `global` it
/// holds for any world size and micro-batch, in `lit-gpt` for any micro-batch.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct DataState {
    /// Global samples consumed by all ranks.
    pub sample: u64,
    /// Samples drawn from each source.
    pub drawn: Vec<u64>,
    /// Blocks of an epoch of each source, to notice that the data changed.
    pub blocks: Vec<u64>,
    /// T, which the blocks depend on.
    pub block_size: usize,
    /// Seed of the order.
    pub seed: u64,
    /// The order.
    #[serde(default)]
    pub order: DataOrder,
    /// W, where the order depends on it.
    #[serde(default)]
    pub world: Option<usize>,
}

struct Shared {
    sets: Sets,
    order: Order,
    options: LoaderOptions,
}

/// What the samples are of.
enum Sets {
    /// Blocks of T+1 tokens.
    Packed(Vec<PackedSet>),
    /// Units of conversations: the only source.
    Chat(ChatSet),
}

impl Sets {
    /// Of a sample.
    fn rows(&self) -> u64 {
        match self {
            Self::Packed(_) => 1,
            Self::Chat(set) => set.rows() as u64,
        }
    }
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
    /// A missing or damaged file; a source that has too little for the order; weights that are no shares.
    pub fn train(options: LoaderOptions) -> Result<Self> {
        let o = &options;
        ensure!(o.micro_batch_size > 0 && o.block_size > 0, "a batch of no tokens: {o:?}");
        ensure!(o.rank < o.world, "rank {} of {} ranks", o.rank, o.world);
        let open = |s: &DataSource| packed::explain(PackedSet::open_by(&s.path, o.access));
        let sets = o.sources.iter().map(open).collect::<Result<Vec<_>>>()?;
        let order = Order::new(o, &sets)?;
        Ok(Self::start(Sets::Packed(sets), order, options))
    }

    /// A reader of conversations, with the one source that names them. A sample is a unit of the set.
    ///
    /// # Errors
    /// A weight that is no share.
    pub fn chat(options: LoaderOptions, set: ChatSet) -> Result<Self> {
        let order = Order::Global(Global::of_blocks(&options, vec![set.len()])?);
        Ok(Self::start(Sets::Chat(set), order, options))
    }

    fn start(sets: Sets, order: Order, options: LoaderOptions) -> Self {
        let o = &options;
        let state = DataState {
            sample: 0,
            drawn: vec![0; o.sources.len()],
            blocks: order.blocks(),
            block_size: o.block_size,
            seed: o.seed,
            order: o.order,
            world: (o.order == DataOrder::LitGpt).then_some(o.world),
        };
        let shared = Arc::new(Shared { sets, order, options });
        let ahead = ReadAhead::start(shared.clone(), state.clone());
        Self { shared, state, ahead }
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

    /// The epoch of each source that its last sample was of, from 1; 0 before its first sample.
    pub fn epochs(&self) -> Vec<u64> {
        let drawn_and_blocks = self.state.drawn.iter().zip(&self.state.blocks);
        drawn_and_blocks.map(|(drawn, blocks)| drawn.div_ceil(*blocks)).collect()
    }

    /// Where some source would begin epoch `epochs + 1`, in rows; `None`: not within `at_most` rows over all ranks.
    pub fn end(&self, epochs: u64, at_most: u64) -> Option<End> {
        let rows = self.shared.sets.rows();
        let end = self.shared.order.end(epochs, at_most.div_ceil(rows))?;
        Some(End { samples: end.samples * rows, ..end })
    }

    /// Rows that all ranks have read up to the cursor.
    pub fn consumed(&self) -> u64 {
        self.state.sample * self.shared.sets.rows()
    }

    /// A source by name: the last part of its path.
    pub fn name(&self, source: usize) -> String {
        let path: &Path = &self.shared.options.sources[source].path;
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
    }

    /// A line for each source, and one for what its order leaves out.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let Sets::Packed(sets) = &self.shared.sets else { return lines };
        for (i, (set, source)) in sets.iter().zip(&self.shared.options.sources).enumerate() {
            let name = self.name(i);
            lines.push(format!(
                "{name}: {} file(s), {} tokens, {} blocks of {}, weight {}{}",
                with_commas(set.n_files() as u64),
                count(set.len() as f64),
                with_commas(self.state.blocks[i]),
                with_commas(self.state.block_size as u64 + 1),
                source.weight,
                match set.access() {
                    Access::Mapped => "",
                    Access::Opened => "; too many files to map, opened for each block",
                }
            ));
            if let Some(borders) = self.shared.options.borders
                && let Ok(false) = borders.are_in(set, self.shared.options.vocab_size)
            {
                lines.push(format!(
                    "{name}: no document ends or begins in the first million tokens by `tokenizer_dir`'s end-of-text and \
                     beginning-of-text tokens: `document_mask` takes each block as one"
                ));
            }
            if let Some((unread, all)) = self.shared.order.unread(i)
                && unread > 0
            {
                lines.push(format!(
                    "{name}: {unread} of {all} files are never read, as lit-gpt never read them"
                ));
            }
        }
        lines
    }

    /// Goes to a cursor: in constant time in the order `global`, by replaying draws alone in `lit-gpt`
    /// (a second for 1e8 samples of a rank).
    ///
    /// # Errors
    /// The sources, the sequence length, the seed or the order are not those of the cursor: it would point elsewhere.
    pub fn restore(&mut self, state: &DataState) -> Result<()> {
        let identity = |s: &DataState| (s.blocks.clone(), s.block_size, s.seed, s.order, s.world);
        if identity(state) != identity(&self.state) || state.drawn.len() != state.blocks.len() {
            let show = |s: &DataState| {
                let ranks = s.world.map_or(String::new(), |n| format!(" on {n} rank(s)"));
                let order = match s.order {
                    DataOrder::Global => String::new(),
                    DataOrder::LitGpt => format!(", order lit-gpt{ranks}"),
                };
                let (blocks, t, seed) = (&s.blocks, s.block_size, s.seed);
                format!("{blocks:?} blocks of {t} by source, seed {seed}{order}")
            };
            return Err(anyhow!(
                "the training data changed: expected {}, got {}",
                show(state),
                show(&self.state)
            ))
            .hint(
                "resume with the run's data, `data.order`, `max_seq_length` and `seed` (and ranks, in the order \
                 `lit-gpt`; of conversations without `packing` the `micro_batch_size`), or start a new run from its weights; other versions \
                 of this program may leave other conversations out",
            );
        }
        self.state = state.clone();
        self.ahead = ReadAhead::start(self.shared.clone(), state.clone());
        Ok(())
    }
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
            let mut walk = shared.order.walk(&state);
            let mut rows = Rows::default();
            loop {
                let batch = shared.read_batch(&mut walk, &mut state, &mut rows);
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

/// Memory that batches are put together in, kept from batch to batch.
#[derive(Default)]
struct Rows {
    /// Source and first token of each row.
    places: Vec<(usize, u64)>,
    /// T+1 tokens
    block: Vec<i64>,
    /// B x T
    input: Vec<i64>,
    /// B x T
    target: Vec<i64>,
}

impl Shared {
    /// Walks B x W global samples and reads this rank's B.
    fn read_batch(&self, walk: &mut Walk, state: &mut DataState, rows: &mut Rows) -> Result<Batch> {
        let o = &self.options;
        let (b, t) = (o.micro_batch_size, o.block_size);
        let sets = match &self.sets {
            Sets::Packed(sets) => sets,
            Sets::Chat(set) => {
                let unit = |_| walk.next(state).1 / (t as u64 + 1);
                return Ok(set.batch(&(0..set.units_of(b)).map(unit).collect::<Vec<_>>()));
            }
        };
        rows.input.clear();
        rows.target.clear();
        rows.places.clear();
        rows.places.extend((0..b).map(|_| walk.next(state)));
        // The disk gets all of a batch's blocks at once.
        for &(source, from) in &rows.places {
            sets[source].prefetch(from, t as u64 + 1);
        }
        for &(source, from) in &rows.places {
            rows.block.clear();
            let set = &sets[source];
            packed::explain(set.read_into(from, t as u64 + 1, o.vocab_size, &mut rows.block))?;
            rows.input.extend_from_slice(&rows.block[..t]);
            rows.target.extend_from_slice(&rows.block[1..]);
        }
        let documents = o.borders.map(|borders| borders.documents(&rows.input, t));
        let (b, t) = (b as i64, t as i64);
        Ok(Batch {
            documents,
            input: Tensor::from_slice(&rows.input).view([b, t]), // (B, T)
            target: Tensor::from_slice(&rows.target).view([b, t]), // (B, T)
            n_targets: b * t,
        })
    }
}
