//! Byte-pair merging of one word: join the best-ranked pair of neighbours until none can be joined.
//!
//! Lower rank first, then the leftmost: the rule of both formats. A `tokenizer.json` ranks pairs,
//! a `tokenizer.model` the pieces they make. Short words are scanned, long ones use a heap, so that
//! a word of n symbols costs O(n log n) at worst.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rank of a pair that does not merge.
const NEVER: u32 = u32::MAX;
/// Words of more symbols than this use the heap.
const SCANNED: usize = 48;
const NONE: u32 = u32::MAX;

/// A hash table from two numbers to two numbers, made once and then only read.
///
/// Open addressing, at most half full, 16 bytes a slot: a look-up mostly touches one cache line.
pub(super) struct Table {
    slots: Vec<[u32; 4]>, // two keys, two values
    shift: u32,
}

impl Table {
    const EMPTY: [u32; 4] = [u32::MAX; 4];

    /// Later entries replace earlier ones of the same key. No key may be two times `u32::MAX`.
    pub(super) fn new(entries: impl Iterator<Item = ([u32; 2], [u32; 2])>) -> Self {
        let entries: Vec<_> = entries.collect();
        let bits = (2 * entries.len()).next_power_of_two().max(2).ilog2();
        let mut table = Self { slots: vec![Self::EMPTY; 1 << bits], shift: 64 - bits };
        for (key, value) in entries {
            let slot = table.slot(key);
            table.slots[slot] = [key[0], key[1], value[0], value[1]];
        }
        table
    }

    /// The slot that holds `key`, or the empty one where it would be.
    #[inline]
    fn slot(&self, key: [u32; 2]) -> usize {
        let mixed =
            (u64::from(key[0]) << 32 | u64::from(key[1])).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut at = (mixed >> self.shift) as usize;
        loop {
            let [a, b, ..] = self.slots[at];
            if [a, b] == key || [a, b] == [u32::MAX; 2] {
                return at;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    /// The values of a key; two times `u32::MAX` where it has none.
    #[inline]
    pub(super) fn get(&self, a: u32, b: u32) -> [u32; 2] {
        let [.., x, y] = self.slots[self.slot([a, b])];
        [x, y]
    }

    /// Whether there is such a key.
    #[inline]
    pub(super) fn has(&self, a: u32, b: u32) -> bool {
        self.slots[self.slot([a, b])] != Self::EMPTY
    }
}

/// The merges of a vocabulary.
pub(super) struct Merges {
    /// (left id, right id) -> (rank, joined id)
    pairs: Table,
}

/// Buffers kept between words, so that a word costs no allocation.
#[derive(Default)]
pub(super) struct Work {
    /// The word: ids of its characters or bytes, then of its tokens.
    pub(super) symbols: Vec<u32>,
    /// rank << 32 | joined id of each symbol with its right neighbour
    joins: Vec<u64>,
    prev: Vec<u32>,
    next: Vec<u32>,
    /// rank << 32 | position of the left symbol
    queue: BinaryHeap<Reverse<u64>>,
}

impl Merges {
    /// From ((left id, right id), (rank, joined id)); of equal pairs the last counts.
    pub(super) fn new(pairs: impl Iterator<Item = ([u32; 2], [u32; 2])>) -> Self {
        Self { pairs: Table::new(pairs) }
    }

    /// Merges `work.symbols` in place.
    pub(super) fn merge(&self, work: &mut Work) {
        work.joins.clear();
        work.joins.extend(work.symbols.windows(2).map(|pair| self.join(pair[0], pair[1])));
        if work.symbols.len() > SCANNED {
            self.merge_by_heap(work);
        }
        self.merge_by_scan(work);
    }

    #[inline]
    fn join(&self, left: u32, right: u32) -> u64 {
        let [rank, joined] = self.pairs.get(left, right);
        u64::from(rank) << 32 | u64::from(joined)
    }

    fn merge_by_scan(&self, work: &mut Work) {
        let (symbols, joins) = (&mut work.symbols, &mut work.joins);
        while let Some((at, best)) = leftmost_best(joins) {
            symbols[at] = best as u32;
            symbols.remove(at + 1);
            joins.remove(at);
            if at > 0 {
                joins[at - 1] = self.join(symbols[at - 1], symbols[at]);
            }
            if at < joins.len() {
                joins[at] = self.join(symbols[at], symbols[at + 1]);
            }
        }
    }

    /// An entry of the heap counts if its symbol still has the rank it was queued with: a symbol
    /// that was merged away has none.
    fn merge_by_heap(&self, work: &mut Work) {
        let Work { symbols, joins, prev, next, queue } = work;
        let len = symbols.len() as u32;
        prev.clear();
        prev.extend((0..len).map(|at| at.wrapping_sub(1)));
        next.clear();
        next.extend((1..len).chain([NONE]));
        joins.push(u64::MAX);
        queue.clear();
        let rank = |join: u64| join & !u64::from(u32::MAX);
        let merging = |join: u64| (join >> 32) as u32 != NEVER;
        queue.extend(
            (joins.iter().zip(0u64..))
                .filter(|&(&join, _)| merging(join))
                .map(|(&join, at)| Reverse(rank(join) | at)),
        );
        while let Some(Reverse(entry)) = queue.pop() {
            let at = entry as u32 as usize;
            if rank(joins[at]) != rank(entry) {
                continue;
            }
            let gone = next[at] as usize;
            symbols[at] = joins[at] as u32;
            joins[gone] = u64::MAX;
            next[at] = next[gone];
            joins[at] = u64::MAX;
            if let Some(right) = symbols.get(next[at] as usize).copied() {
                prev[next[at] as usize] = at as u32;
                joins[at] = self.join(symbols[at], right);
                if merging(joins[at]) {
                    queue.push(Reverse(rank(joins[at]) | at as u64));
                }
            }
            if prev[at] != NONE {
                let left = prev[at] as usize;
                joins[left] = self.join(symbols[left], symbols[at]);
                if merging(joins[left]) {
                    queue.push(Reverse(rank(joins[left]) | left as u64));
                }
            }
        }
        let (mut at, mut kept) = (0, 0);
        while at != NONE {
            symbols[kept] = symbols[at as usize];
            (at, kept) = (next[at as usize], kept + 1);
        }
        symbols.truncate(kept);
        joins.clear(); // nothing is left to scan
    }
}

/// Position and value of the first of the lowest ranks, if any pair merges.
#[inline]
fn leftmost_best(joins: &[u64]) -> Option<(usize, u64)> {
    let mut best = (0, u64::MAX);
    for (at, &join) in joins.iter().enumerate() {
        if join >> 32 < best.1 >> 32 {
            best = (at, join);
        }
    }
    (best.1 != u64::MAX).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids 0 to 3 are characters; "aa" < "ab" < "aab" < "ba" by rank.
    fn merges() -> Merges {
        let pairs = [
            ([0, 0], [0, 4]),
            ([0, 1], [1, 5]),
            ([4, 1], [2, 6]),
            ([1, 0], [3, 7]),
            ([4, 4], [4, 8]),
            ([8, 8], [4, 9]),
        ];
        Merges::new(pairs.into_iter())
    }

    fn merged(symbols: &[u32], heap: bool) -> Vec<u32> {
        let (merges, mut work) = (merges(), Work::default());
        work.symbols.extend(symbols);
        work.joins.extend(symbols.windows(2).map(|pair| merges.join(pair[0], pair[1])));
        if heap {
            merges.merge_by_heap(&mut work);
        } else {
            merges.merge_by_scan(&mut work);
        }
        work.symbols
    }

    #[test]
    fn the_lowest_rank_merges_first_and_ties_go_left() {
        for heap in [false, true] {
            assert_eq!(merged(&[0, 0, 0], heap), [4, 0]);
            assert_eq!(merged(&[0, 0, 1], heap), [6]);
            assert_eq!(merged(&[1, 0, 1, 3], heap), [1, 5, 3]);
            assert_eq!(merged(&[2], heap), [2]);
        }
    }

    #[test]
    fn scan_and_heap_agree() {
        let mut seed = 1u64;
        for len in 1..200 {
            let symbols: Vec<u32> = (0..len)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    [0, 0, 0, 1, 3][(seed >> 33) as usize % 5]
                })
                .collect();
            assert_eq!(merged(&symbols, true), merged(&symbols, false), "{symbols:?}");
        }
    }

    #[test]
    fn a_long_run_is_quick() {
        let (merges, mut work) = (merges(), Work::default());
        work.symbols.resize(1_000_001, 0);
        merges.merge(&mut work);
        assert_eq!(work.symbols.len(), 125_001);
    }
}
