//! How large an engine is.

use crate::generate::network::NetworkRef;
use crate::model::PagedCache;
use crate::model::paged_cache::BLOCK;

/// Sizes of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Blocks of [`BLOCK`] tokens in the cache.
    pub blocks: usize,
    /// Sequences that run at a time.
    pub max_sequences: usize,
    /// Tokens of a step: a prompt that has more is read in pieces.
    pub max_step_tokens: usize,
    /// Sequences that begin alike share what the cache has of it.
    pub share_prefixes: bool,
    /// Decode by the card's kernels, where they cover the model.
    pub decode_kernels: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            blocks: 1024,
            max_sequences: 64,
            max_step_tokens: 512,
            share_prefixes: true,
            decode_kernels: true,
        }
    }
}

impl EngineOptions {
    /// For these requests and no others, as `(prompt tokens, new tokens, samples)`: room for all of them, or for as many
    /// as run at a time.
    pub fn for_requests(model: NetworkRef, requests: &[(usize, usize, usize)]) -> Self {
        let most = if model.device().is_cuda() { 1024 } else { 64 };
        let blocks_of = |&(prompt, new, samples): &(usize, usize, usize)| {
            let room = (model.config().max_length() as usize).saturating_sub(prompt);
            let (shared, all) = (prompt / BLOCK, (prompt + new.min(room)).div_ceil(BLOCK));
            shared + samples.min(most) * (all - shared)
        };
        let mut needs: Vec<usize> = requests.iter().map(blocks_of).collect();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        let blocks = needs.iter().take(most).sum();
        let share_prefixes = requests.len() > 1;
        let sequences = requests.iter().map(|&(_, _, samples)| samples).sum::<usize>().max(1);
        let max_step_tokens = if model.device().is_cuda() { 4096 } else { 512 };
        Self {
            blocks,
            max_sequences: most.min(sequences),
            max_step_tokens,
            share_prefixes,
            ..Self::default()
        }
    }

    /// Tokens that a sequence can have: those of the model's context, or of the whole cache where that holds fewer.
    pub fn context(&self, model: NetworkRef) -> usize {
        (model.config().max_length() as usize).min(self.blocks * BLOCK)
    }

    /// For requests that are not known yet, within so many bytes of cache: at most what all sequences can use.
    pub fn within(model: NetworkRef, cache_bytes: u64, max_sequences: usize) -> Self {
        let longest = (model.config().max_length() as usize).div_ceil(BLOCK);
        let fit = cache_bytes / PagedCache::block_bytes(model.config(), model.kind()).max(1);
        let blocks = (fit as usize).min(longest * max_sequences);
        let max_step_tokens = if model.device().is_cuda() { 4096 } else { 256 };
        Self { blocks, max_sequences, max_step_tokens, ..Self::default() }
    }

    /// Bytes of the cache for this model.
    pub fn cache_bytes(&self, model: NetworkRef) -> u64 {
        self.blocks as u64 * PagedCache::block_bytes(model.config(), model.kind())
    }
}
