//! SentencePiece's merging: join the best-scored pair of neighbours until none is a known piece.
//!
//! The order is its own: higher score first, then the leftmost. A rank per *merge* (as in
//! `tokenizer.json`) cannot say "two splits of one piece are equal", which is why the pieces'
//! scores are used here as they are.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// A symbol no piece contains: nothing merges with it.
const UNKNOWN: u32 = u32::MAX;

/// One mergeable piece of a model.
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) id: u32,
    pub(super) score: f32,
    /// Takes part in merging, but is split again at the end (SentencePiece's `UNUSED`).
    pub(super) unused: bool,
}

/// Pair tables of a model.
pub(super) struct Merger {
    /// Character -> symbol. Symbols below `n_ids` are piece ids, those above are bare characters.
    chars: HashMap<char, u32>,
    /// (left symbol, right symbol) -> (rank of the joined piece, its id); rank 0 merges first.
    pairs: HashMap<(u32, u32), (u32, u32)>,
    unused: Vec<bool>,
    n_ids: u32,
}

/// A symbol in the text: a node of a doubly linked list.
#[derive(Clone, Copy)]
struct Node {
    symbol: u32,
    start: u32, // bytes
    len: u32,   // bytes; 0 once merged into its left neighbour
    prev: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

/// The two symbols an unused piece falls back into, and the length of the left one in bytes.
type Split = (u32, u32, u32);

/// (rank, left node, right node, joined length, joined id)
type Candidate = (u32, u32, u32, u32, u32);

/// Buffers kept between words, so that a word costs no allocation.
#[derive(Default)]
pub(super) struct Work {
    nodes: Vec<Node>,
    /// Joins that are possible, best first.
    queue: BinaryHeap<Reverse<Candidate>>,
    /// How an unused piece was last put together anywhere in this text.
    splits: HashMap<u32, Split>,
}

impl Merger {
    /// Tables for `pieces` of a model with `n_ids` ids.
    pub(super) fn new(pieces: &[Piece], n_ids: u32) -> Self {
        let mut symbols: HashMap<&str, u32> =
            pieces.iter().map(|p| (p.text.as_str(), p.id)).collect();
        let mut chars = HashMap::new();
        let mut next = n_ids;
        for piece in pieces {
            for (i, c) in piece.text.char_indices() {
                let text = &piece.text[i..i + c.len_utf8()];
                let symbol = *symbols.entry(text).or_insert_with(|| {
                    next += 1;
                    next - 1
                });
                chars.insert(c, symbol);
            }
        }
        let ranks = ranks(pieces);
        let mut pairs = HashMap::new();
        for (piece, &rank) in pieces.iter().zip(&ranks) {
            for (cut, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(cut);
                if let (Some(&left), Some(&right)) = (symbols.get(left), symbols.get(right)) {
                    pairs.insert((left, right), (rank, piece.id));
                }
            }
        }
        let mut unused = vec![false; n_ids as usize];
        for piece in pieces.iter().filter(|p| p.unused) {
            unused[piece.id as usize] = true;
        }
        Self { chars, pairs, unused, n_ids }
    }

    /// Calls `emit(Some(id), text)` for each piece of `text`, `emit(None, char)` for characters
    /// that are no piece. Cost: O(n log n) in the characters of `text`.
    pub(super) fn encode(
        &self,
        text: &str,
        work: &mut Work,
        mut emit: impl FnMut(Option<u32>, &str),
    ) {
        self.start(text, work);
        while let Some(Reverse((_, left, right, len, id))) = work.queue.pop() {
            let (l, r) = (work.nodes[left as usize], work.nodes[right as usize]);
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue; // one side has been merged away since
            }
            work.nodes[left as usize] = Node { symbol: id, len, next: r.next, ..l };
            work.nodes[right as usize].len = 0;
            if r.next != NONE {
                work.nodes[r.next as usize].prev = left;
            }
            self.propose(l.prev, left, work);
            self.propose(left, r.next, work);
        }
        let mut at = if work.nodes.is_empty() { NONE } else { 0 };
        while at != NONE {
            let node = work.nodes[at as usize];
            let piece = &text[node.start as usize..(node.start + node.len) as usize];
            self.emit(node.symbol, piece, &work.splits, &mut emit);
            at = node.next;
        }
    }

    fn start(&self, text: &str, work: &mut Work) {
        work.nodes.clear();
        work.queue.clear();
        work.splits.clear();
        for (i, c) in text.char_indices() {
            let at = work.nodes.len() as u32;
            work.nodes.push(Node {
                symbol: self.chars.get(&c).copied().unwrap_or(UNKNOWN),
                start: i as u32,
                len: c.len_utf8() as u32,
                prev: at.checked_sub(1).unwrap_or(NONE),
                next: at + 1,
            });
        }
        if let Some(last) = work.nodes.last_mut() {
            last.next = NONE;
        }
        for right in 1..work.nodes.len() as u32 {
            self.propose(right - 1, right, work);
        }
    }

    /// Queues the merge of two neighbours if they form a piece.
    fn propose(&self, left: u32, right: u32, work: &mut Work) {
        if left == NONE || right == NONE {
            return;
        }
        let (l, r) = (work.nodes[left as usize], work.nodes[right as usize]);
        if let Some(&(rank, id)) = self.pairs.get(&(l.symbol, r.symbol)) {
            work.queue.push(Reverse((rank, left, right, l.len + r.len, id)));
            if self.unused[id as usize] {
                work.splits.insert(id, (l.symbol, r.symbol, l.len));
            }
        }
    }

    fn emit(
        &self,
        symbol: u32,
        text: &str,
        splits: &HashMap<u32, Split>,
        emit: &mut impl FnMut(Option<u32>, &str),
    ) {
        if symbol >= self.n_ids {
            return emit(None, text);
        }
        match splits.get(&symbol).filter(|_| self.unused[symbol as usize]) {
            None => emit(Some(symbol), text),
            Some(&(left, right, cut)) => {
                let (head, tail) = text.split_at(cut as usize);
                self.emit(left, head, splits, emit);
                self.emit(right, tail, splits, emit);
            }
        }
    }
}

/// Rank of each piece: 0 for the highest score; equal scores share a rank.
pub(super) fn ranks(pieces: &[Piece]) -> Vec<u32> {
    let mut scores: Vec<f32> = pieces.iter().map(|p| p.score + 0.0).collect(); // -0.0 becomes 0.0
    scores.sort_by(|a, b| b.total_cmp(a));
    scores.dedup();
    let rank = |score: f32| scores.partition_point(|s| s.total_cmp(&score).is_gt()) as u32;
    pieces.iter().map(|p| rank(p.score + 0.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merger(pieces: &[(&str, f32, bool)]) -> Merger {
        let pieces: Vec<Piece> = (pieces.iter().zip(0..))
            .map(|(&(text, score, unused), id)| Piece { text: text.into(), id, score, unused })
            .collect();
        Merger::new(&pieces, pieces.len() as u32)
    }

    fn split(merger: &Merger, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        merger.encode(text, &mut Work::default(), |_, piece| out.push(piece.to_string()));
        out
    }

    #[test]
    fn the_best_score_merges_first_and_ties_go_left() {
        let m = merger(&[
            ("a", -9.0, false),
            ("b", -9.0, false),
            ("ab", -2.0, false),
            ("ba", -1.0, false),
        ]);
        assert_eq!(split(&m, "aba"), ["a", "ba"]);
        let m = merger(&[("a", -9.0, false), ("aa", -1.0, false), ("aaa", -1.0, false)]);
        assert_eq!(split(&m, "aaaaa"), ["aaa", "aa"]);
    }

    #[test]
    fn a_piece_may_hold_characters_that_are_no_piece_themselves() {
        let m = merger(&[("xy", -1.0, false)]);
        assert_eq!(split(&m, "xyx"), ["xy", "x"]);
    }

    #[test]
    fn an_unused_piece_falls_back_into_its_parts() {
        let m = merger(&[
            ("a", -9.0, false),
            ("b", -9.0, false),
            ("ab", -1.0, true),
            ("abb", -2.0, true),
        ]);
        assert_eq!(split(&m, "abab"), ["a", "b", "a", "b"]);
        assert_eq!(split(&m, "abb"), ["a", "b", "b"]);
    }

    #[test]
    fn long_runs_do_not_overflow_the_stack() {
        let m = merger(&[("a", -9.0, false), ("aa", -1.0, false)]);
        assert_eq!(split(&m, &"a".repeat(100_001)).len(), 50_001);
    }
}
