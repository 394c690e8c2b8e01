//! Conversations side by side in rows of tokens.

use super::Encoded;
use std::collections::BTreeMap;

/// Which conversations a row holds, in order.
pub(super) type Row = Vec<usize>;

/// Fills rows of `t` tokens with conversations, the longest first, each into the fullest row that still has room.
/// A conversation is never cut; none is longer than a row.
pub(super) fn pack(conversations: &[Encoded], t: usize) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new(); // free tokens -> rows
    for i in by_length(conversations) {
        let n = conversations[i].ids.len();
        let found = room.range(n..).next().map(|(free, _)| *free);
        let (row, free) = match found {
            Some(free) => {
                let rows = room.entry(free).or_default();
                let row = rows.pop().unwrap_or_default();
                if rows.is_empty() {
                    room.remove(&free);
                }
                (row, free)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, t)
            }
        };
        rows[row].push(i);
        room.entry(free - n).or_default().push(row);
    }
    rows
}

/// Groups of `b` conversations of like length, a row each; the last group may have fewer.
pub(super) fn group(conversations: &[Encoded], b: usize) -> Vec<Row> {
    by_length(conversations).chunks(b).map(<[usize]>::to_vec).collect()
}

/// Groups of the rows of `b` pairs of like length. Conversation 2i is the chosen one of pair i, 2i + 1 the rejected one.
pub(super) fn group_pairs(conversations: &[Encoded], b: usize) -> Vec<Row> {
    let longer = |i: usize| conversations[2 * i].ids.len().max(conversations[2 * i + 1].ids.len());
    let mut order: Vec<usize> = (0..conversations.len() / 2).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(longer(i)));
    let rows = |pairs: &[usize]| pairs.iter().flat_map(|&i| [2 * i, 2 * i + 1]).collect();
    order.chunks(b).map(rows).collect()
}

fn by_length(conversations: &[Encoded]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..conversations.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(conversations[i].ids.len()));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_lengths(lengths: &[usize]) -> Vec<Encoded> {
        lengths.iter().map(|&n| Encoded { ids: vec![1; n], trained: vec![true; n] }).collect()
    }

    #[test]
    fn rows_are_filled_and_hold_each_conversation_once() {
        let lengths = [3, 10, 4, 6, 1, 7, 2, 9, 5];
        let talks = of_lengths(&lengths);
        let rows = pack(&talks, 10);
        let tokens = |row: &Row| row.iter().map(|&i| lengths[i]).sum::<usize>();
        assert!(rows.iter().all(|row| tokens(row) <= 10), "{rows:?}");
        assert_eq!(rows.len(), 5, "47 tokens in rows of 10: {rows:?}");
        let mut all: Vec<usize> = rows.concat();
        all.sort();
        assert_eq!(all, (0..9).collect::<Vec<_>>());
    }

    #[test]
    fn groups_are_of_like_length() {
        let groups = group(&of_lengths(&[3, 10, 4, 6, 1]), 2);
        assert_eq!(groups, [vec![1, 3], vec![2, 0], vec![4]]);
    }
}
