//! Learns BPE merges from counted words, the same on every run and machine.
//!
//! The trainer of the `tokenizers` crate walks randomly seeded hash maps and can queue one pair
//! twice; which of the two comes first then differs from run to run. Here a pair has one count, one
//! list of words, and ties are broken by ids.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

/// Pairs seen less often are noise: merging them would memorise the corpus.
const MIN_COUNT: u64 = 2;

/// A word as token ids, and how often it occurs.
pub(super) type Word = (Vec<u32>, u64);

#[derive(Default)]
struct Pair {
    count: u64,
    /// Indices of words that hold (or once held) the pair, ascending.
    words: Vec<usize>,
}

/// Grows `vocab` to `vocab_size` tokens (fewer if the words run out of pairs that occur twice);
/// returns the merges in order. No token gets longer than `max_chars` characters.
///
/// Ties go to the pair with the smaller ids. Cost: about one visit of a word per merge in it.
pub(super) fn learn(
    mut words: Vec<Word>,
    vocab: &mut Vec<String>,
    vocab_size: usize,
    max_chars: usize,
) -> Vec<(u32, u32)> {
    let mut chars: Vec<usize> = vocab.iter().map(|token| token.chars().count()).collect();
    let mut ids: HashMap<String, u32> = vocab.iter().cloned().zip(0..).collect();
    let mut pairs: HashMap<(u32, u32), Pair> = HashMap::new();
    for (index, (tokens, count)) in words.iter().enumerate() {
        for pair in
            windows(tokens).filter(|&(a, b)| chars[a as usize] + chars[b as usize] <= max_chars)
        {
            let entry = pairs.entry(pair).or_default();
            entry.count += count;
            if entry.words.last() != Some(&index) {
                entry.words.push(index);
            }
        }
    }
    let mut queue: BinaryHeap<(u64, Reverse<(u32, u32)>)> =
        pairs.iter().map(|(&pair, entry)| (entry.count, Reverse(pair))).collect();

    let mut merges = Vec::new();
    while vocab.len() < vocab_size {
        let Some((queued, Reverse(pair))) = queue.pop() else {
            break;
        };
        let Some(count) = pairs.get(&pair).map(|entry| entry.count) else {
            continue;
        };
        if count < MIN_COUNT {
            pairs.remove(&pair);
            continue;
        }
        if count != queued {
            queue.push((count, Reverse(pair))); // it has become rarer since
            continue;
        }
        let Some(Pair { words: holders, .. }) = pairs.remove(&pair) else {
            continue;
        };
        let joined = format!("{}{}", vocab[pair.0 as usize], vocab[pair.1 as usize]);
        let new = *ids.entry(joined.clone()).or_insert(vocab.len() as u32);
        if new as usize == vocab.len() {
            vocab.push(joined);
            chars.push(chars[pair.0 as usize] + chars[pair.1 as usize]);
        }
        merges.push(pair);

        let mut grown = BTreeSet::new();
        for index in holders {
            let (tokens, count) = &mut words[index];
            for old in windows(tokens) {
                if let Some(entry) = pairs.get_mut(&old) {
                    entry.count -= *count;
                }
            }
            merge(tokens, pair, new);
            for (a, b) in windows(tokens) {
                let is_new = a == new || b == new;
                if is_new && chars[a as usize] + chars[b as usize] > max_chars {
                    continue;
                }
                let entry = match is_new {
                    true => pairs.entry((a, b)).or_default(),
                    false => match pairs.get_mut(&(a, b)) {
                        Some(entry) => entry,
                        None => continue,
                    },
                };
                entry.count += *count;
                if is_new {
                    grown.insert((a, b));
                    if entry.words.last() != Some(&index) {
                        entry.words.push(index);
                    }
                }
            }
        }
        queue.extend(grown.into_iter().map(|pair| (pairs[&pair].count, Reverse(pair))));
    }
    merges
}

fn windows(tokens: &[u32]) -> impl Iterator<Item = (u32, u32)> + '_ {
    tokens.windows(2).map(|w| (w[0], w[1]))
}

/// Replaces each `pair` in `tokens` by `new`, from the left.
fn merge(tokens: &mut Vec<u32>, pair: (u32, u32), new: u32) {
    let (mut read, mut write) = (0, 0);
    while read < tokens.len() {
        if tokens[read] == pair.0 && tokens.get(read + 1) == Some(&pair.1) {
            tokens[write] = new;
            read += 2;
        } else {
            tokens[write] = tokens[read];
            read += 1;
        }
        write += 1;
    }
    tokens.truncate(write);
}
