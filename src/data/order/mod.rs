//! In which order the samples of a run come: [`Global`], or [`LitGpt`], the original's.

mod global;
mod lit_gpt;
mod mixture;
mod numpy_random;
mod python_random;

use super::packed::PackedSet;
use super::{DataState, LoaderOptions};
use crate::config::DataOrder;
use anyhow::Result;
pub use global::Global;
pub use lit_gpt::LitGpt;
pub use mixture::Mixture;
pub use python_random::PythonRng;

/// What `data.order` says, for the sets that are there.
#[derive(Debug)]
pub enum Order {
    /// One order over all blocks, the same for any number of ranks.
    Global(Global),
    /// The original's.
    LitGpt(LitGpt),
}

/// Where the epochs that a run may read end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Global samples before the first source would begin another epoch.
    pub samples: u64,
    /// That source.
    pub source: usize,
}

impl Order {
    /// The order of these options over their sources' sets.
    ///
    /// # Errors
    /// Sets that it cannot read.
    pub fn new(o: &LoaderOptions, sets: &[PackedSet]) -> Result<Self> {
        Ok(match o.order {
            DataOrder::Global => Self::Global(Global::new(o, sets)?),
            DataOrder::LitGpt => Self::LitGpt(LitGpt::new(o, sets)?),
        })
    }

    /// Blocks of an epoch over all ranks, by source.
    pub fn blocks(&self) -> Vec<u64> {
        match self {
            Self::Global(order) => order.blocks.clone(),
            Self::LitGpt(order) => order.blocks(),
        }
    }

    /// Files that are never read and all files, of a source.
    pub fn unread(&self, source: usize) -> Option<(usize, usize)> {
        match self {
            Self::Global(_) => None,
            Self::LitGpt(order) => Some(order.unread(source)),
        }
    }

    /// Where some source would begin epoch `epochs + 1`; `None`: not within `at_most` samples.
    pub fn end(&self, epochs: u64, at_most: u64) -> Option<End> {
        match self {
            Self::Global(order) => order.end(epochs, at_most),
            Self::LitGpt(order) => order.end(epochs, at_most),
        }
    }

    /// From a cursor on.
    pub fn walk(&self, state: &DataState) -> Walk<'_> {
        match self {
            Self::Global(order) => Walk::Global(order),
            Self::LitGpt(order) => Walk::LitGpt(Box::new(lit_gpt::Walk::new(order, state))),
        }
    }
}

/// A rank on its way through an order.
#[derive(Debug)]
pub enum Walk<'a> {
    /// Knows where it is from the cursor alone.
    Global(&'a Global),
    /// Carries the original's generators.
    LitGpt(Box<lit_gpt::Walk<'a>>),
}

impl Walk<'_> {
    /// This rank's sample among the next W global ones: its source, and the token of that source's stream at which its
    /// block begins. Moves the cursor past all W.
    pub fn next(&mut self, state: &mut DataState) -> (usize, u64) {
        match self {
            Self::Global(order) => order.next(state),
            Self::LitGpt(walk) => walk.next(state),
        }
    }
}
