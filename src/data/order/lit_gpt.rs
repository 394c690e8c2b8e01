//! The order `lit-gpt`: that of lit-gpt and TinyLlama to the sample, for reproducing their runs.
//!
//! - The sorted files of a source are shuffled by Python's `random.seed(seed); random.shuffle`; rank r of W takes those
//!   at r, r + W, .. up to the last multiple of W.
//! - It reads them in windows of 8. A window's blocks (files of N tokens have N / (T+1) each, the rest of a file is left
//!   out) come in the next `permutation` of numpy's `default_rng(seed + r)`. Where fewer than 8 files remain, the next
//!   window begins at the first file: the files after the last whole window are never read.
//! - Sources are drawn by Python's `random.Random(seed).choices`, one draw for a sample of each rank: all ranks read
//!   their n-th sample from the same source.
//!
//! The sequences of a step therefore depend on the number of ranks. Where the original fails (fewer than 8 files a rank)
//! or reads on by the first file's size (files that differ), this refuses.
//!
//! A position is restored by drawing what was drawn and dropping it, reading nothing: a second for 1e8 samples of a rank.

use super::super::packed::PackedSet;
use super::super::{DataState, LoaderOptions};
use super::numpy_random::NumpyRng;
use super::python_random::PythonRng;
use super::{End, Mixture};
use crate::bail_hint;
use anyhow::{Context, Result};
use std::path::Path;

/// Files that are read in one permutation.
const WINDOW: usize = 8;

/// What the order follows from.
#[derive(Debug)]
pub struct LitGpt {
    sources: Vec<Source>,
    /// Running sums of the shares.
    sums: Vec<f64>,
    seed: u64,
    rank: u64,
    world: u64,
    /// T+1
    block: u64,
}

/// A source as one rank sees it.
#[derive(Debug)]
struct Source {
    /// First token of each file, in the order of reading; whole windows.
    starts: Vec<u64>,
    /// Of one file.
    blocks: u32,
    /// Files that no rank reads, of all.
    unread: (usize, usize),
}

impl Source {
    /// Blocks of a window.
    fn window(&self) -> u32 {
        WINDOW as u32 * self.blocks
    }

    /// Of one rank.
    fn epoch(&self) -> u64 {
        self.starts.len() as u64 * u64::from(self.blocks)
    }
}

impl LitGpt {
    /// # Errors
    /// Fewer than 8 files a rank; files of unlike sizes; files shorter than a block; weights with a schedule.
    pub fn new(o: &LoaderOptions, sets: &[PackedSet]) -> Result<Self> {
        let mixture = Mixture::new(&o.sources)?;
        let shares = mixture.shares().context("`order: lit-gpt` knows fixed weights only")?;
        let mut sum = 0.0;
        let sums = shares.iter().map(|share| {
            sum += share;
            sum
        });
        let sources = o.sources.iter().zip(sets).map(|(s, set)| Source::new(&s.path, set, o));
        Ok(Self {
            sums: sums.collect(),
            sources: sources.collect::<Result<_>>()?,
            seed: o.seed,
            rank: o.rank as u64,
            world: o.world as u64,
            block: o.block_size as u64 + 1,
        })
    }

    /// Of an epoch over all ranks, by source.
    pub(super) fn blocks(&self) -> Vec<u64> {
        self.sources.iter().map(|s| s.epoch() * self.world).collect()
    }

    /// Files that no rank reads and all files, of a source.
    pub(super) fn unread(&self, source: usize) -> (usize, usize) {
        self.sources[source].unread
    }

    /// [`super::Order::end`]: walks the draws.
    pub(super) fn end(&self, epochs: u64, at_most: u64) -> Option<End> {
        let mut rng = PythonRng::new(self.seed);
        let mut left: Vec<u64> =
            self.sources.iter().map(|s| s.epoch().saturating_mul(epochs)).collect();
        for n in 0..at_most.div_ceil(self.world) {
            let source = rng.choice(&self.sums);
            if left[source] == 0 {
                return Some(End { samples: n * self.world, source });
            }
            left[source] -= 1;
        }
        None
    }
}

impl Source {
    fn new(path: &Path, set: &PackedSet, o: &LoaderOptions) -> Result<Self> {
        let (n, least) = (set.n_files(), WINDOW * o.world);
        if n < least {
            bail_hint!(
                "use `data.order: global`, which reads any number of files";
                "`{}` has {n} files; `data.order: lit-gpt` needs at least {WINDOW} a rank, {least} for {} rank(s)",
                path.display(), o.world
            );
        }
        let mut files: Vec<usize> = (0..n).collect();
        PythonRng::new(o.seed).shuffle(&mut files);
        let a_rank = n / o.world / WINDOW * WINDOW;
        let of = |rank: usize| files.iter().skip(rank).step_by(o.world).take(a_rank).copied();
        let blocks = same_blocks(path, set, (0..o.world).flat_map(of), o.block_size as u64 + 1)?;
        Ok(Self {
            starts: of(o.rank).map(|file| set.file(file).start).collect(),
            blocks,
            unread: (n - a_rank * o.world, n),
        })
    }
}

/// Blocks of one file, where all files that are read have as many.
fn same_blocks(
    path: &Path,
    set: &PackedSet,
    mut files: impl Iterator<Item = usize>,
    block: u64,
) -> Result<u32> {
    let first = set.file(files.next().context("a window of no files")?);
    for file in files {
        let other = set.file(file);
        if (other.len, other.dtype) != (first.len, first.dtype) {
            bail_hint!(
                "use `data.order: global`, which reads files of any size, or take the odd ones away";
                "`data.order: lit-gpt` reads files of one size and dtype: `{}` has {} tokens of {}, `{}` has {} of {}",
                first.path.display(), first.len, first.dtype,
                other.path.display(), other.len, other.dtype
            );
        }
    }
    let blocks = first.len / block;
    match u32::try_from(blocks * WINDOW as u64) {
        Ok(n) if n > 0 => Ok(blocks as u32),
        _ => bail_hint!(
            "prepare other files, or use `data.order: global`";
            "`{}` has files of {} tokens; `data.order: lit-gpt` needs 1 to 2^29 blocks of {block} in a file",
            path.display(), first.len
        ),
    }
}

/// A rank on its way through the order.
#[derive(Debug)]
pub struct Walk<'a> {
    order: &'a LitGpt,
    draws: PythonRng,
    sources: Vec<Cursor>,
}

/// Where a rank is in a source.
#[derive(Debug)]
struct Cursor {
    rng: NumpyRng,
    /// Windows before this one.
    window: u64,
    /// Blocks of this window in the order of reading; none: not drawn yet.
    blocks: Vec<u32>,
    /// The next of them.
    at: usize,
}

impl<'a> Walk<'a> {
    /// From a cursor on: draws and drops what was drawn before it.
    pub(super) fn new(order: &'a LitGpt, state: &DataState) -> Self {
        let mut draws = PythonRng::new(order.seed);
        draws.skip(state.sample / order.world);
        let cursor = |(source, drawn): (&Source, &u64)| {
            let (drawn, size) = (drawn / order.world, u64::from(source.window()));
            let mut rng = NumpyRng::new(order.seed.wrapping_add(order.rank));
            let window = drawn / size;
            (0..window).for_each(|_| rng.skip_permutation(source.window()));
            let blocks = rng.permutation(source.window());
            Cursor { rng, window, blocks, at: (drawn % size) as usize }
        };
        let sources = order.sources.iter().zip(&state.drawn).map(cursor).collect();
        Self { order, draws, sources }
    }

    /// This rank's next sample: its source, and where its block begins in that.
    pub(super) fn next(&mut self, state: &mut DataState) -> (usize, u64) {
        let source = self.draws.choice(&self.order.sums);
        let (cursor, plan) = (&mut self.sources[source], &self.order.sources[source]);
        if cursor.at == cursor.blocks.len() {
            cursor.blocks = cursor.rng.permutation(plan.window());
            cursor.window += 1;
            cursor.at = 0;
        }
        let block = cursor.blocks[cursor.at];
        cursor.at += 1;
        state.sample += self.order.world;
        state.drawn[source] += self.order.world;
        let windows = plan.starts.len() / WINDOW;
        let first = (cursor.window % windows as u64) as usize * WINDOW;
        let (file, block) = ((block / plan.blocks) as usize, u64::from(block % plan.blocks));
        (source, plan.starts[first + file] + block * self.order.block)
    }
}
