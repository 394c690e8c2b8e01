//! numpy's `default_rng(seed).permutation(n)`, number for number.
//!
//! A seed goes through numpy's `SeedSequence` into a PCG64 generator (XSL-RR 128/64), whose numbers of 64 bits are
//! used by halves, the low one first.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;

/// `numpy.random.default_rng(seed)`.
#[derive(Clone, Debug)]
pub struct NumpyRng {
    pcg: Pcg64,
    /// High half of the last number, not used yet.
    half: Option<u32>,
}

impl NumpyRng {
    /// The generator that belongs to a seed.
    pub fn new(seed: u64) -> Self {
        let [a, b, c, d] = seed_sequence(seed);
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        Self { pcg: Pcg64::new(wide(a, b), wide(c, d)), half: None }
    }

    /// The next `permutation(n)`: 40 us for the 8,192 blocks of 8 files as published.
    pub fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut items: Vec<u32> = (0..n).collect();
        for i in (1..n).rev() {
            let j = self.below(i + 1);
            items.swap(i as usize, j as usize);
        }
        items
    }

    /// Draws what [`NumpyRng::permutation`] draws, and drops it. Their number is not known before: some are refused.
    pub fn skip_permutation(&mut self, n: u32) {
        let mut i = n.saturating_sub(1);
        while i > 0 {
            let mask = u32::MAX >> i.leading_zeros();
            // A third are refused, which no branch predictor foresees: so without a branch.
            i -= u32::from(self.next_u32() & mask <= i);
        }
    }

    /// A number below n: the low bits that n - 1 has, until they are below it.
    fn below(&mut self, n: u32) -> u32 {
        let mask = u32::MAX >> (n - 1).leading_zeros();
        loop {
            let bits = self.next_u32() & mask;
            if bits < n {
                return bits;
            }
        }
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.half.take() {
            return high;
        }
        let both = self.pcg.next_u64();
        self.half = Some((both >> 32) as u32);
        both as u32
    }
}

/// `SeedSequence(seed).generate_state(4, uint64)`: the seed's 32-bit words are hashed into a pool of 4, each of the pool
/// into each other, and the pool into the state.
fn seed_sequence(seed: u64) -> [u64; 4] {
    let mut constant = 0x43b0_d7e5u32;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ value >> 16
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hash);
    for from in 0..4 {
        for to in (0..4).filter(|to| *to != from) {
            let (x, y) = (pool[to], hash(pool[from]));
            let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
            pool[to] = mixed ^ mixed >> 16;
        }
    }
    let mut constant = 0x8b51_f9ddu32;
    let mut word = |i: usize| {
        let value = pool[i % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        u64::from(value ^ value >> 16)
    };
    [0, 2, 4, 6].map(|i| word(i) | word(i + 1) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden vectors of numpy 2.3.4 and 2.4.6, Python 3.11.
    #[test]
    fn permutations_are_numpys() {
        let first = |seed| NumpyRng::new(seed).permutation(16);
        assert_eq!(first(0), [2, 11, 3, 10, 0, 4, 7, 5, 14, 12, 6, 9, 13, 8, 1, 15]);
        assert_eq!(first(3408), [6, 15, 12, 4, 7, 14, 3, 11, 8, 9, 0, 5, 2, 13, 1, 10]);
        assert_eq!(NumpyRng::new(1 << 40).permutation(8), [3, 7, 0, 6, 4, 2, 5, 1]);
        let mut rng = NumpyRng::new(3407);
        assert_eq!(rng.permutation(16), [7, 0, 2, 5, 13, 14, 4, 9, 15, 3, 11, 8, 12, 1, 10, 6]);
        assert_eq!(rng.permutation(16), [10, 12, 4, 6, 7, 3, 8, 11, 5, 0, 14, 15, 13, 1, 2, 9]);
        let long = NumpyRng::new(3407).permutation(8192);
        assert_eq!(long[..8], [3913, 1058, 6720, 5045, 915, 1077, 1948, 6192]);
        assert_eq!(long[8188..], [1788, 449, 1546, 7414]);
    }

    #[test]
    fn skipping_draws_what_a_permutation_draws() {
        let (mut drawn, mut skipped) = (NumpyRng::new(7), NumpyRng::new(7));
        for n in [1, 2, 999, 3001, 40_000] {
            drawn.permutation(n);
            skipped.skip_permutation(n);
        }
        assert_eq!(drawn.permutation(100), skipped.permutation(100));
    }
}
