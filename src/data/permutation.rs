//! A seeded permutation of 0..n that gives any element in constant time and memory.

/// Pseudo-random order of `n` items: a four-round Feistel network over the next even power of two, walked
/// until it lands below n (at most four tries on average). So the order of an epoch of any size needs no
/// table, and resume no replay.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The order that belongs to a key.
    pub fn new(n: u64, key: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self { n, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// Where item `i` < n goes.
    pub fn at(&self, i: u64) -> u64 {
        let mut x = i;
        loop {
            x = self.round_trip(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn round_trip(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..4 {
            let f = mix(right ^ mix(self.key ^ round)) & mask;
            (left, right) = (right, left ^ f);
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64: a good 64-bit hash.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_comes_once_and_another_key_gives_another_order() {
        for n in [1, 2, 3, 7, 64, 1000, 4097] {
            let order = |key| (0..n).map(|i| Permutation::new(n, key).at(i)).collect::<Vec<_>>();
            let mut sorted = order(1);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            if n > 8 {
                assert_ne!(order(1), order(2));
                let fixed = order(1).iter().enumerate().filter(|(i, x)| *i as u64 == **x).count();
                assert!(fixed < 12, "{fixed} of {n} stay in place");
            }
        }
    }
}
