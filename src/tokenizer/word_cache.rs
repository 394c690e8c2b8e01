//! Words and their ids, as far as memory allows: most words of a text have been seen before.
//!
//! Two tables. Words of up to 15 bytes and 4 ids, nearly all, sit in slots of 32 bytes that hold
//! key and ids, so that a word costs one cache line and no pointer is followed. The rest are in
//! arenas. A full table forgets; what it forgot is merged again. Nothing here changes an id.

/// Slots of the table of short words: 4 MiB.
const SHORT_BITS: u32 = 17;
const SHORT_BYTES: usize = 15;
const SHORT_IDS: usize = 4;
/// Slots of the table of longer words: 1 MiB.
const LONG_BITS: u32 = 16;
/// Longer words are merged each time.
const LONG_BYTES: usize = 256;
/// Arenas of the longer words, bytes and ids: 4 MiB each.
const ARENA_BYTES: usize = 4 << 20;
const ARENA_IDS: usize = 1 << 20;
/// Ids are below 2^24 in every tokenizer that is cached: the count of a short word's ids sits above.
pub(super) const MAX_ID: u32 = (1 << 24) - 1;

/// Multipliers of the hashes; any odd numbers of mixed bits.
const MIX: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93];

/// Ids that are being written: a vector that is longer than its contents, so that four ids are
/// stored at once whatever their number.
pub(super) struct Ids<'a> {
    ids: &'a mut Vec<u32>,
    len: usize,
}

impl<'a> Ids<'a> {
    /// Appends to `ids`. Without [`Ids::end`] its tail is zeros.
    pub(super) fn new(ids: &'a mut Vec<u32>) -> Self {
        let len = ids.len();
        Self { ids, len }
    }

    #[inline]
    fn push_short(&mut self, ids: [u32; SHORT_IDS], count: usize) {
        if self.len + SHORT_IDS > self.ids.len() {
            self.grow(SHORT_IDS);
        }
        self.ids[self.len..self.len + SHORT_IDS].copy_from_slice(&ids);
        self.len += count;
    }

    #[cold]
    fn grow(&mut self, more: usize) {
        let spare = (self.ids.len() / 2).clamp(1 << 10, 1 << 20);
        self.ids.resize(self.ids.len() + more + spare, 0);
    }

    /// Appends any number of ids.
    pub(super) fn extend(&mut self, ids: &[u32]) {
        if self.len + ids.len() > self.ids.len() {
            self.grow(ids.len());
        }
        self.ids[self.len..self.len + ids.len()].copy_from_slice(ids);
        self.len += ids.len();
    }

    /// Cuts off the zeros behind the last id.
    pub(super) fn end(self) {
        self.ids.truncate(self.len);
    }
}

/// The cache; empty until its first word.
#[derive(Default)]
pub(super) struct WordCache {
    /// Two slots a cache line: [key, key, ids, ids]. The key is the word's bytes and, last, their
    /// number; so no word's key is 0.
    short: Vec<u64>,
    /// Where the first cache line of `short` starts.
    first: usize,
    long: Vec<Long>,
    long_count: usize,
    bytes: Vec<u8>,
    ids: Vec<u32>,
}

/// A word in the arenas; `len` 0 is an empty slot.
#[derive(Clone, Copy, Default)]
struct Long {
    hash: u32,
    bytes: u32,
    ids: u32,
    len: u16,
    count: u16,
}

impl WordCache {
    /// Gets memory, zeroed by the system page by page as it is touched.
    pub(super) fn warm_up(&mut self) {
        if self.short.is_empty() {
            self.short = vec![0; (4 << SHORT_BITS) + 8];
            self.first = self.short.as_ptr().align_offset(64).min(7);
            self.long = vec![Long::default(); 1 << LONG_BITS];
        }
    }

    /// Appends the ids of the word `text[start..end]`, one byte or more; where it is new, `merge`
    /// tells them.
    #[inline]
    pub(super) fn encode<'m>(
        &mut self,
        (text, start, end): (&[u8], usize, usize),
        out: &mut Ids<'_>,
        merge: impl FnOnce() -> &'m [u32],
    ) {
        let word = || &text[start..end];
        if end - start > SHORT_BYTES {
            return self.encode_long(None, word(), out, merge);
        }
        let key = short_key(text, start, end);
        let line = self.line(key);
        let slots = &self.short[line..line + 8];
        let slot = if slots[..2] == key {
            0
        } else if slots[4..6] == key {
            4
        } else {
            return self.encode_long(Some(key), word(), out, merge);
        };
        let (a, b) = (slots[slot + 2], slots[slot + 3]);
        let ids = [a as u32 & MAX_ID, (a >> 32) as u32, b as u32, (b >> 32) as u32];
        out.push_short(ids, (a as u32 >> 24) as usize);
    }

    /// Where the two slots of a key start.
    #[inline]
    fn line(&self, key: [u64; 2]) -> usize {
        let mixed = u128::from(key[0] ^ MIX[0]) * u128::from(key[1] ^ MIX[1]);
        let mixed = (mixed as u64 ^ (mixed >> 64) as u64).wrapping_mul(MIX[0]);
        self.first + 8 * (mixed >> (64 - (SHORT_BITS - 1))) as usize
    }

    /// A word that is not in the short table; `key` if it is short.
    #[inline(never)]
    fn encode_long<'m>(
        &mut self,
        key: Option<[u64; 2]>,
        word: &[u8],
        out: &mut Ids<'_>,
        merge: impl FnOnce() -> &'m [u32],
    ) {
        if word.len() > LONG_BYTES {
            return out.extend(merge());
        }
        let hash = hash(word);
        let slot = self.long_slot(hash, word);
        let found = self.long[slot];
        if found.len > 0 {
            let ids = found.ids as usize;
            return out.extend(&self.ids[ids..ids + usize::from(found.count)]);
        }
        let ids = merge();
        out.extend(ids);
        match key {
            Some(key) if ids.len() <= SHORT_IDS => self.keep_short(key, ids),
            _ => self.keep_long(slot, hash, word, ids),
        }
    }

    /// The newer word of a line stays, the older one goes.
    fn keep_short(&mut self, key: [u64; 2], ids: &[u32]) {
        let line = self.line(key);
        let mut four = [0; SHORT_IDS];
        four[..ids.len()].copy_from_slice(ids);
        let pair = |a: u32, b: u32| u64::from(a) | u64::from(b) << 32;
        let count = (ids.len() as u32) << 24;
        let slots = &mut self.short[line..line + 8];
        slots.copy_within(0..4, 4);
        slots[..4].copy_from_slice(&[
            key[0],
            key[1],
            pair(four[0] | count, four[1]),
            pair(four[2], four[3]),
        ]);
    }

    /// The slot of a longer word, or the empty one where it would be.
    fn long_slot(&self, hash: u32, word: &[u8]) -> usize {
        let mut at = (hash >> (32 - LONG_BITS)) as usize;
        loop {
            let slot = self.long[at];
            let bytes = slot.bytes as usize;
            let same = slot.hash == hash && usize::from(slot.len) == word.len();
            if slot.len == 0 || same && self.bytes[bytes..bytes + word.len()] == *word {
                return at;
            }
            at = (at + 1) % self.long.len();
        }
    }

    fn keep_long(&mut self, slot: usize, hash: u32, word: &[u8], ids: &[u32]) {
        let full = self.long_count >= self.long.len() / 2
            || self.bytes.len() + word.len() > ARENA_BYTES
            || self.ids.len() + ids.len() > ARENA_IDS;
        if full {
            self.long.fill(Long::default());
            self.long_count = 0;
            self.bytes.clear();
            self.ids.clear();
            return;
        }
        self.long_count += 1;
        self.long[slot] = Long {
            hash,
            bytes: self.bytes.len() as u32,
            ids: self.ids.len() as u32,
            len: word.len() as u16,
            count: ids.len() as u16,
        };
        self.bytes.extend_from_slice(word);
        self.ids.extend_from_slice(ids);
    }
}

fn hash(word: &[u8]) -> u32 {
    let (eights, rest) = word.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let mut state = word.len() as u64;
    for eight in eights.iter().chain([&last]) {
        let wide = u128::from(state ^ u64::from_le_bytes(*eight) ^ MIX[0]) * u128::from(MIX[1]);
        state = wide as u64 ^ (wide >> 64) as u64;
    }
    (state.wrapping_mul(MIX[0]) >> 32) as u32
}

/// The bytes of a word of at most 15 bytes and their number.
#[inline]
fn short_key(text: &[u8], start: usize, end: usize) -> [u64; 2] {
    let len = end - start;
    let bytes = match text.get(start..start + 16) {
        Some(bytes) => <[u8; 16]>::try_from(bytes).unwrap_or_default(),
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[start..end]);
            bytes
        }
    };
    let whole = u128::from_le_bytes(bytes) & !(u128::MAX << (8 * len));
    [whole as u64, (whole >> 64) as u64 | (len as u64) << 56]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids of a word: its bytes, or one number for all of it.
    fn ids_of(word: &[u8]) -> Vec<u32> {
        match word.len() % 3 {
            0 => vec![word.len() as u32],
            _ => word.iter().map(|&byte| u32::from(byte)).collect(),
        }
    }

    #[test]
    fn a_full_cache_forgets_and_gives_the_same_ids() {
        let mut cache = WordCache::default();
        cache.warm_up();
        let (mut got, mut expected) = (Vec::new(), Vec::<u32>::new());
        for round in 0..3 {
            let mut out = Ids::new(&mut got);
            for number in 0..40_000u64 {
                let len = 1 + (number * 7 + number / 300) as usize % 300;
                let word: Vec<u8> = (0..len)
                    .map(|i| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 56)) as u8)
                    .collect();
                let ids = ids_of(&word);
                cache.encode((&word, 0, len), &mut out, || &ids);
                expected.extend(&ids);
            }
            out.end();
            assert!(got == expected, "round {round}");
        }
        assert!(cache.bytes.len() <= ARENA_BYTES && cache.ids.len() <= ARENA_IDS);
    }

    #[test]
    fn words_that_differ_in_zeros_or_length_alone_are_told_apart() {
        let mut cache = WordCache::default();
        cache.warm_up();
        let words: [&[u8]; 5] = [b"\0", b"\0\0", b"a\0", b"a", b"\0a"];
        for _ in 0..2 {
            for (word, id) in words.iter().zip(0..) {
                let mut got = Vec::new();
                let mut out = Ids::new(&mut got);
                cache.encode((word, 0, word.len()), &mut out, || {
                    [&[0], &[1], &[2], &[3], &[4u32]][id as usize]
                });
                out.end();
                assert_eq!(got, [id]);
            }
        }
    }
}
