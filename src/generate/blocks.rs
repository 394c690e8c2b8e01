//! Which blocks of the cache are in use, by how many sequences, and which hold tokens that another sequence can use.
//!
//! A full block is known by the hash of all tokens up to its end. Once nobody uses it, it stays known until its memory
//! is needed for something else, oldest first; a later sequence that begins with the same tokens takes it up again.

use crate::model::paged_cache::BLOCK;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};

/// Hash of a sequence's tokens up to the end of a block.
pub type Prefix = [u8; 32];

/// A pool of blocks.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Blocks that nobody uses, by the time that they were given back.
    free: BTreeMap<u64, u32>,
    known: HashMap<Prefix, u32>,
    clock: u64,
    share: bool,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Sequences that use it.
    users: u32,
    /// What it holds, once it is full.
    prefix: Option<Prefix>,
    /// Its key in `free`.
    freed: u64,
}

impl BlockPool {
    /// `blocks` free blocks; `share`: sequences that begin alike may use the same ones.
    pub fn new(blocks: usize, share: bool) -> Self {
        let blocks: Vec<Block> =
            (0..blocks as u64).map(|freed| Block { freed, ..Block::default() }).collect();
        let free = (0..blocks.len() as u64).map(|i| (i, i as u32)).collect();
        let clock = blocks.len() as u64;
        Self { blocks, free, known: HashMap::new(), clock, share }
    }

    /// Blocks in all.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// A block for new tokens; what it held is forgotten. `None` where all are in use.
    pub fn take(&mut self) -> Option<u32> {
        let (_, id) = self.free.pop_first()?;
        let block = &mut self.blocks[id as usize];
        block.users = 1;
        if let Some(prefix) = block.prefix.take() {
            self.known.remove(&prefix);
        }
        Some(id)
    }

    /// One more sequence uses a block that is in use or still known.
    pub fn share(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if block.users == 0 {
            self.free.remove(&block.freed);
        }
        block.users += 1;
    }

    /// Whether sequences that begin alike use the same blocks.
    pub fn shares(&self) -> bool {
        self.share
    }

    /// A sequence needs these blocks no more. The last ones are forgotten first, since the first ones are of more use.
    pub fn give_back(&mut self, table: &[u32]) {
        for &id in table.iter().rev() {
            let block = &mut self.blocks[id as usize];
            block.users -= 1;
            if block.users == 0 {
                block.freed = self.clock;
                self.free.insert(self.clock, id);
                self.clock += 1;
            }
        }
    }

    /// Notes that a block is full and what it holds, unless another one is known for it.
    pub fn publish(&mut self, id: u32, prefix: Prefix) {
        if self.share && !self.known.contains_key(&prefix) {
            self.blocks[id as usize].prefix = Some(prefix);
            self.known.insert(prefix, id);
        }
    }

    /// Takes up the known blocks that hold the beginning of `tokens`, in order.
    pub fn take_known(&mut self, tokens: &[u32]) -> Vec<u32> {
        let mut table = Vec::new();
        let mut before = Prefix::default();
        for tokens in tokens.chunks_exact(BLOCK) {
            before = prefix(&before, tokens);
            let Some(&id) = self.known.get(&before) else { break };
            self.share(id);
            table.push(id);
        }
        table
    }
}

/// Hash of the tokens before a block and those in it.
pub fn prefix(before: &Prefix, tokens: &[u32]) -> Prefix {
    let mut hash = Sha256::new_with_prefix(before);
    tokens.iter().for_each(|id| hash.update(id.to_le_bytes()));
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills the blocks of a sequence and publishes them.
    fn fill(pool: &mut BlockPool, tokens: &[u32]) -> Vec<u32> {
        let mut table = pool.take_known(tokens);
        let mut before = Prefix::default();
        for (i, tokens) in tokens.chunks_exact(BLOCK).enumerate() {
            before = prefix(&before, tokens);
            if i == table.len() {
                let id = pool.take().unwrap();
                pool.publish(id, before);
                table.push(id);
            }
        }
        table
    }

    fn tokens(first: u32, n: usize) -> Vec<u32> {
        (0..n as u32).map(|i| first + i).collect()
    }

    #[test]
    fn blocks_are_given_out_once_and_come_back() {
        let mut pool = BlockPool::new(3, true);
        let table: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert_eq!((table.as_slice(), pool.take(), pool.free()), (&[0, 1, 2][..], None, 0));
        pool.give_back(&table[1..]);
        assert_eq!(pool.free(), 2);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(2), Some(1), None));
    }

    #[test]
    fn sequences_that_begin_alike_share_blocks_until_the_last_has_gone() {
        let mut pool = BlockPool::new(8, true);
        let a = fill(&mut pool, &tokens(0, 3 * BLOCK));
        let mut other = tokens(0, 3 * BLOCK);
        other[2 * BLOCK] = 999;
        let b = fill(&mut pool, &other);
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
        assert_eq!(pool.free(), 4);
        pool.give_back(&a);
        assert_eq!(pool.free(), 5, "the first two are still in use");
        pool.give_back(&b);
        assert_eq!(pool.free(), 8);
    }

    #[test]
    fn a_block_is_known_until_its_memory_is_needed_and_the_beginning_longest() {
        let mut pool = BlockPool::new(3, true);
        let text = tokens(0, 3 * BLOCK);
        let table = fill(&mut pool, &text);
        pool.give_back(&table);
        let again = pool.take_known(&text);
        assert_eq!(again, table, "nothing was needed in between");
        pool.give_back(&again);
        let other = pool.take().unwrap();
        assert_eq!(other, table[2], "the end of the text is forgotten first");
        assert_eq!(pool.take_known(&text), table[..2]);
    }

    #[test]
    fn a_block_is_found_by_all_tokens_before_it_too() {
        let mut pool = BlockPool::new(8, true);
        fill(&mut pool, &tokens(0, 2 * BLOCK));
        assert!(pool.take_known(&tokens(BLOCK as u32, BLOCK)).is_empty());
        assert_eq!(pool.take_known(&tokens(0, 2 * BLOCK - 1)).len(), 1, "whole blocks only");
        let mut apart = BlockPool::new(8, false);
        fill(&mut apart, &tokens(0, 2 * BLOCK));
        assert!(apart.take_known(&tokens(0, 2 * BLOCK)).is_empty(), "sharing is off");
    }
}
