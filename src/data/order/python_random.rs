//! Python's `random.Random(seed)`: `shuffle`, `sample` and weighted `choices`, number for number.
//!
//! The generator is MT19937, seeded with the 32-bit words of the seed.

use rand_mt::Mt;

/// `random.Random(seed)`.
#[derive(Clone, Debug)]
pub struct PythonRng(Mt);

impl PythonRng {
    /// The generator that belongs to a seed.
    pub fn new(seed: u64) -> Self {
        let words = [seed as u32, (seed >> 32) as u32];
        let used = if words[1] == 0 { 1 } else { 2 };
        Self(Mt::new_with_key(words.into_iter().take(used)))
    }

    /// `random()`: 53 bits in [0, 1).
    pub fn random(&mut self) -> f64 {
        let (high, low) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// Draws `n` times what [`PythonRng::random`] draws, and drops it.
    pub fn skip(&mut self, n: u64) {
        for _ in 0..2 * n {
            self.0.next_u32();
        }
    }

    /// `shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u32 + 1);
            items.swap(i, j as usize);
        }
    }

    /// Positions that `sample(items, k)` takes, of `n` items, k at most n: from a pool of those that are left, or where that
    /// would be larger than a set of those taken, again until one is new.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let set_size = match k > 5 {
            true => 21 + 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32),
            false => 21,
        };
        let mut taken = Vec::with_capacity(k);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below((n - i) as u32) as usize;
                taken.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
            return taken;
        }
        while taken.len() < k {
            let j = self.below(n as u32) as usize;
            if !taken.contains(&j) {
                taken.push(j);
            }
        }
        taken
    }

    /// Position that `choices(items, weights)` takes, from the running sums of the weights.
    pub fn choice(&mut self, sums: &[f64]) -> usize {
        let last = sums.len() - 1;
        let x = self.random() * sums[last];
        sums[..last].partition_point(|sum| *sum <= x)
    }

    /// A number below n: as many bits as n has, until they are below it.
    fn below(&mut self, n: u32) -> u32 {
        let spare = n.leading_zeros();
        loop {
            let bits = self.0.next_u32() >> spare;
            if bits < n {
                return bits;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shuffled(seed: u64) -> Vec<u32> {
        let mut items: Vec<u32> = (0..16).collect();
        PythonRng::new(seed).shuffle(&mut items);
        items
    }

    /// Golden vectors of Python 3.11.
    #[test]
    fn shuffles_and_choices_are_pythons() {
        assert_eq!(shuffled(3407), [0, 15, 13, 8, 9, 7, 10, 11, 12, 4, 14, 3, 5, 2, 6, 1]);
        assert_eq!(shuffled(12345), [10, 8, 7, 9, 15, 2, 1, 6, 14, 3, 5, 4, 12, 0, 11, 13]);
        assert_eq!(PythonRng::new(1 << 40).random(), 0.1036394562812375);
        let mut rng = PythonRng::new(3407);
        let first: Vec<f64> = (0..4).map(|_| rng.random()).collect();
        assert_eq!(
            first,
            [0.056836637998436745, 0.13270277776504658, 0.21491599383387472, 0.30476402183804263]
        );
        let mut rng = PythonRng::new(3407);
        let chosen: String =
            (0..64).map(|_| ['S', 'C'][rng.choice(&[0.693584, 0.693584 + 0.306416])]).collect();
        assert_eq!(chosen, "SSSSCSCCSSSSCSCSSSSCCSCCSSCCCSSSSSSSSSSCCCSSSSSSSCSCSSSSSCSSCSSC");
    }

    #[test]
    fn samples_are_pythons() {
        let mut rng = PythonRng::new(1234);
        assert_eq!(rng.sample(10, 3), [7, 1, 0]);
        assert_eq!(rng.sample(1000, 6), [92, 932, 965, 961, 826, 596]);
        assert_eq!(rng.sample(22, 6), [1, 2, 3, 11, 7, 0]);
        assert_eq!(rng.sample(100, 6), [3, 2, 44, 82, 79, 61]);
    }

    #[test]
    fn skipping_draws_what_random_draws() {
        let (mut drawn, mut skipped) = (PythonRng::new(1 << 40), PythonRng::new(1 << 40));
        (0..1000).for_each(|_| {
            drawn.random();
        });
        skipped.skip(1000);
        assert_eq!(drawn.random(), skipped.random());
    }
}
