//! Shares of the sources: fixed, or changing with the tokens that a run has trained on.

use super::super::permutation::mix;
use crate::config::{DataSource, Weight};
use anyhow::{Result, ensure};

/// Draws sources by weight.
#[derive(Clone, Debug)]
pub struct Mixture {
    weights: Vec<Weight>,
    /// Where no weight changes: shares of sum 1.
    shares: Option<Vec<f64>>,
}

impl Mixture {
    /// Of the sources' weights.
    ///
    /// # Errors
    /// Weights that are no shares: below 0, not finite, or all 0 at some point.
    pub fn new(sources: &[DataSource]) -> Result<Self> {
        let weights: Vec<Weight> = sources.iter().map(|s| s.weight.clone()).collect();
        let problem = Weight::problem_together(&weights);
        ensure!(problem.is_none(), "{}", problem.unwrap_or_default());
        let fixed: Option<Vec<f64>> = weights.iter().map(Weight::constant).collect();
        let shares = fixed.map(|fixed| {
            let total: f64 = fixed.iter().sum();
            fixed.iter().map(|w| w / total).collect()
        });
        Ok(Self { weights, shares })
    }

    /// Shares that never change, of sum 1; `None` where a weight has a schedule.
    pub fn shares(&self) -> Option<&[f64]> {
        self.shares.as_deref()
    }

    /// The source of global sample k, which comes after `tokens` tokens of training: a hash of (seed, k) picks it.
    pub fn draw(&self, seed: u64, k: u64, tokens: u64) -> usize {
        let hash = mix(mix(seed) ^ mix(k));
        let x = (hash >> 11) as f64 / (1u64 << 53) as f64; // uniform in [0, 1)
        match &self.shares {
            Some(shares) => pick(x, shares.iter().copied()),
            None => {
                let weights = || self.weights.iter().map(|w| w.at(tokens));
                pick(x * weights().sum::<f64>(), weights())
            }
        }
    }
}

/// The source in whose part of the line x lies; the last one that has a part where rounding leaves x beyond it.
fn pick(mut x: f64, parts: impl Iterator<Item = f64>) -> usize {
    let mut last = 0;
    for (i, part) in parts.enumerate() {
        if x < part {
            return i;
        }
        x -= part;
        if part > 0.0 {
            last = i;
        }
    }
    last
}
