//! How the next token is chosen: litgpt's order of warpers, and an own random generator.
//!
//! logits -> repetition penalty -> top-k mask -> / temperature -> top-p mask -> softmax -> draw.
//! The draws depend on nothing but the seed, the probabilities and their order: no state of
//! libtorch's global generators, no other request.

use crate::error::WithHint;
use anyhow::{Result, anyhow, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

/// How to choose tokens. Defaults are litgpt's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 (anything below 1e-6) is greedy.
    pub temperature: f64,
    /// Only the k most likely tokens (and those equal to the k-th); `None`: all.
    pub top_k: Option<i64>,
    /// Only the most likely tokens that together reach this probability; 1: all, 0: greedy.
    pub top_p: f64,
    /// Divides positive and multiplies negative logits of tokens in prompt and output; 1: off.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: Some(50), top_p: 1.0, repetition_penalty: 1.0, seed: 1234 }
    }
}

impl SamplingParams {
    /// The most likely token at each step.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the most likely token is taken instead of a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature < 1e-6 || self.top_p == 0.0
    }

    /// # Errors
    /// All values out of range, in one usage error.
    pub fn validate(&self) -> Result<()> {
        let mut problems = Vec::new();
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            problems.push(format!("`temperature`: must be 0 or more, got {}", self.temperature));
        }
        if let Some(k) = self.top_k.filter(|&k| k < 1) {
            problems.push(format!("`top_k`: must be 1 or more, got {k}"));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            problems.push(format!("`top_p`: must be between 0 and 1, got {}", self.top_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let got = self.repetition_penalty;
            problems.push(format!("`repetition_penalty`: must be above 0, got {got}"));
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(anyhow!("{}", problems.join("; ")))
            .usage("defaults: temperature 0.8, top_k 50, top_p 1, repetition_penalty 1")
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    vocab_size: i64,
    rng: ChaCha8Rng,
    /// (V,) of bool: ids in prompt and output so far; kept only for the repetition penalty.
    seen: Option<Tensor>,
}

impl Sampler {
    /// A sampler over `vocab_size` ids for the sequence that starts with `prompt`.
    ///
    /// # Errors
    /// Parameters out of range.
    pub fn new(
        params: &SamplingParams,
        prompt: &[u32],
        vocab_size: i64,
        device: Device,
    ) -> Result<Self> {
        params.validate()?;
        let seen = (params.repetition_penalty != 1.0)
            .then(|| Tensor::zeros([vocab_size], (Kind::Bool, device)));
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        let mut sampler = Self { params: params.clone(), vocab_size, rng, seen };
        sampler.see(prompt);
        Ok(sampler)
    }

    /// For sample `index` of the same prompt, before the first draw: the seed is `index` more.
    pub fn sibling(&self, index: u64) -> Self {
        let seed = self.params.seed.wrapping_add(index);
        let params = SamplingParams { seed, ..self.params.clone() };
        let seen = self.seen.as_ref().map(Tensor::copy);
        Self { params, vocab_size: self.vocab_size, rng: ChaCha8Rng::seed_from_u64(seed), seen }
    }

    /// How it chooses.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Goes on behind tokens that were chosen elsewhere by the same seed: each counts as seen and as a draw.
    pub fn follow(&mut self, ids: &[u32]) {
        self.see(ids);
        if !self.params.is_greedy() {
            ids.iter().for_each(|_| {
                self.uniform();
            });
        }
    }

    /// Ids that it chooses from.
    pub fn vocab_size(&self) -> i64 {
        self.vocab_size
    }

    /// Notes tokens of the sequence that this sampler did not choose itself.
    pub fn see(&mut self, ids: &[u32]) {
        if let Some(seen) = &mut self.seen {
            let vocab_size = seen.numel() as i64;
            let ids: Vec<i64> =
                ids.iter().map(|&id| id as i64).filter(|&i| i < vocab_size).collect();
            let ids = Tensor::from_slice(&ids).to_device(seen.device());
            let _ = seen.index_fill_(0, &ids, 1);
        }
    }

    /// What the next token is drawn from: a [`Sampler::sample`] that stops before the draw.
    ///
    /// # Shapes
    /// logits (V,), any float dtype.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn distribution(&self, logits: &Tensor) -> Result<Distribution> {
        let mut logits = logits.to_kind(Kind::Float); // (V,)
        if let Some(seen) = &self.seen {
            logits = repetition_penalty(&logits, seen, self.params.repetition_penalty);
        }
        if self.params.is_greedy() {
            return Ok(Distribution::Certain(argmax(&logits)?));
        }
        let probs = warp(&logits, &self.params).softmax(-1, Kind::Float);
        Ok(Distribution::Spread(Vec::try_from(&probs.to_device(Device::Cpu))?))
    }

    /// The next number in [0, 1) of this sampler's draws.
    pub fn uniform(&mut self) -> f64 {
        uniform(&mut self.rng)
    }

    /// The next token.
    ///
    /// # Shapes
    /// logits (V,), any float dtype.
    ///
    /// # Sync
    /// Waits for the id (greedy) or for V probabilities, which are drawn from on the CPU.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        let id = match self.distribution(logits)? {
            Distribution::Certain(id) => id,
            spread => spread.draw(self.uniform())?,
        };
        self.see(&[id]);
        Ok(id)
    }
}

/// Probabilities of all ids.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    /// One id has probability 1.
    Certain(u32),
    /// (V,), in order of ids; their sum need not be 1.
    Spread(Vec<f32>),
}

impl Distribution {
    /// Probability of an id.
    pub fn of(&self, id: u32) -> f64 {
        match self {
            Self::Certain(certain) => f64::from(u8::from(*certain == id)),
            Self::Spread(probs) => probs.get(id as usize).map_or(0.0, |&p| p as f64),
        }
    }

    /// max(0, self - other), where self is not other.
    pub fn without(&self, other: &Self) -> Self {
        let Self::Spread(probs) = self else { return self.clone() };
        let rest = |(id, &p): (usize, &f32)| (p as f64 - other.of(id as u32)).max(0.0) as f32;
        let rest: Vec<f32> = probs.iter().enumerate().map(rest).collect();
        // Equal up to rounding: any draw from either is right.
        if rest.iter().all(|&p| p == 0.0) { self.clone() } else { Self::Spread(rest) }
    }

    /// The id at `u` in [0, 1); certain ids need none.
    ///
    /// # Errors
    /// Probabilities that are not finite.
    pub fn draw(&self, u: f64) -> Result<u32> {
        match self {
            Self::Certain(id) => Ok(*id),
            Self::Spread(probs) => draw(probs, u),
        }
    }
}

/// top-k mask, temperature, top-p mask: what is left of the logits before the softmax.
///
/// # Shapes
/// logits (.., V) of fp32 -> (.., V), masked entries -inf.
pub fn warp(logits: &Tensor, params: &SamplingParams) -> Tensor {
    let mut logits = logits.shallow_clone();
    if let Some(k) = params.top_k {
        logits = top_k(&logits, k);
    }
    let warm = &logits / params.temperature; // not in place: other samples may need the same logits
    if params.top_p < 1.0 { top_p(&warm, params.top_p) } else { warm }
}

/// Keeps the k largest logits and all that equal the k-th; the rest become -inf.
///
/// # Shapes
/// (.., V) -> (.., V).
///
/// # Source
/// `TopKLogitsWarper` of transformers.
pub fn top_k(logits: &Tensor, k: i64) -> Tensor {
    let vocab_size = logits.size().last().copied().unwrap_or(0);
    let (largest, _) = logits.topk(k.min(vocab_size), -1, true, true); // (.., k), descending
    let kth = largest.narrow(-1, largest.size().last().copied().unwrap_or(1) - 1, 1); // (.., 1)
    logits.masked_fill(&logits.lt_tensor(&kth), f64::NEG_INFINITY)
}

/// Keeps the smallest set of most likely tokens whose probability reaches `p`, at least one: sorted
/// ascending, tokens with a cumulative probability <= 1 - p become -inf.
///
/// # Shapes
/// (.., V) -> (.., V).
///
/// # Numerics
/// The sum runs in fp64: CUDA's fp32 scan may round differently from run to run, and a token on the
/// border would come and go.
///
/// # Source
/// Nucleus sampling (arXiv 1904.09751); `TopPLogitsWarper` of transformers.
pub fn top_p(logits: &Tensor, p: f64) -> Tensor {
    let (sorted, order) = logits.sort_stable(true, -1, false); // (.., V) x2, ascending
    let cumulative = sorted.softmax(-1, Kind::Double).cumsum(-1, Kind::Double);
    let remove = cumulative.le(1.0 - p); // (.., V), in sorted order
    let last = remove.size().last().copied().unwrap_or(1) - 1;
    let _ = remove.narrow(-1, last, 1).fill_(0); // the most likely token stays
    let remove = remove.scatter(-1, &order, &remove); // (.., V), in order of ids
    logits.masked_fill(&remove, f64::NEG_INFINITY)
}

/// Makes tokens that were seen less likely: positive logits are divided by `penalty`, others
/// multiplied.
///
/// # Shapes
/// logits (.., V), seen (V,) of bool -> (.., V).
///
/// # Source
/// CTRL (arXiv 1909.05858); `RepetitionPenaltyLogitsProcessor` of transformers.
pub fn repetition_penalty(logits: &Tensor, seen: &Tensor, penalty: f64) -> Tensor {
    let penalised = (logits / penalty).where_self(&logits.gt(0.0), &(logits * penalty));
    penalised.where_self(seen, logits)
}

/// Index of the largest logit, the first of equal ones. Waits for the GPU.
fn argmax(logits: &Tensor) -> Result<u32> {
    let (largest, id) = logits.max_dim(-1, false); // () x2; NaN counts as the largest
    if !largest.double_value(&[]).is_finite() {
        return not_finite();
    }
    Ok(id.int64_value(&[]) as u32)
}

/// 53 random bits as a number in [0, 1).
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Inverse of the cumulative distribution at `u` in [0, 1), in order of ids: the first id whose
/// cumulative probability (fp64) exceeds u times the total. An id of probability 0 is never drawn.
fn draw(probs: &[f32], u: f64) -> Result<u32> {
    let total: f64 = probs.iter().map(|&p| p as f64).sum();
    if !total.is_finite() || total <= 0.0 {
        return not_finite();
    }
    let mut cumulative = 0.0;
    for (id, &p) in probs.iter().enumerate() {
        cumulative += p as f64;
        if cumulative > u * total {
            return Ok(id as u32);
        }
    }
    bail!("probabilities sum to {total}, less than the draw {u}") // u < 1: cannot be reached
}

/// The error for such logits.
///
/// # Errors
/// Always.
pub(super) fn not_finite<T>() -> Result<T> {
    Err(anyhow!("the model's logits are not finite"))
        .hint("weights that hold NaN or infinity give this; try `--precision 32-true`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(&params, &[], 4, Device::Cpu).unwrap()
    }

    #[test]
    fn a_draw_is_the_inverse_of_the_cumulative_distribution() {
        let probs = [0.0, 0.5, 0.0, 0.25, 0.25, 0.0];
        let at = |u| draw(&probs, u).unwrap();
        assert_eq!([0.0, 0.499, 0.5, 0.749, 0.75, 0.999_999].map(at), [1, 1, 3, 3, 4, 4]);
        let largest = 1.0 - 1.0 / (1u64 << 53) as f64;
        assert_eq!(at(largest), 4, "an id of probability 0 is never drawn");
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = Tensor::from_slice(&[0.1f32, 0.2, 0.3, 0.4]).log();
        let params = SamplingParams { temperature: 1.0, top_k: None, ..Default::default() };
        let mut sampler = sampler(params);
        let mut counts = [0i32; 4];
        for _ in 0..4000 {
            counts[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([400, 800, 1200, 1600]) {
            // Five standard deviations of a binomial of 4000.
            assert!((count - expected).abs() < 150, "{counts:?}");
        }
    }

    #[test]
    fn the_draws_of_a_seed_are_the_same_in_every_version() {
        let mut rng = ChaCha8Rng::seed_from_u64(1234);
        let first: [u64; 3] = std::array::from_fn(|_| rng.next_u64());
        let pinned = [7127326097029154973, 18378963773416072022, 11010510810188365853];
        assert_eq!(first, pinned, "a new version of rand_chacha would change every seed's output");
    }

    #[test]
    fn libtorchs_generator_is_neither_read_nor_moved() {
        let logits = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let run = |torch_seed| {
            tch::manual_seed(torch_seed);
            let mut sampler = sampler(SamplingParams::default());
            (0..20).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn temperature_zero_and_top_p_zero_take_the_most_likely_token() {
        let logits = Tensor::from_slice(&[0.0f32, 3.0, 3.0, 1.0]);
        for params in
            [SamplingParams::greedy(), SamplingParams { top_p: 0.0, ..Default::default() }]
        {
            assert_eq!(sampler(params).sample(&logits).unwrap(), 1);
        }
    }

    #[test]
    fn a_seen_token_loses_to_its_rival_under_the_penalty() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
        let logits = Tensor::from_slice(&[1.0f32, 1.5, -0.1, -9.0]);
        let mut sampler = sampler(params);
        let ids: Vec<u32> = (0..3).map(|_| sampler.sample(&logits).unwrap()).collect();
        assert_eq!(ids, [1, 0, 1], "1.5, then 1.0 > 0.75, then 0.75 > 0.5");
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        for params in [SamplingParams::default(), SamplingParams::greedy()] {
            let logits = Tensor::from_slice(&[0.0f32, f32::NAN, 0.0, 0.0]);
            let error = sampler(params).sample(&logits).unwrap_err().to_string();
            assert_eq!(error, "the model's logits are not finite");
        }
    }

    #[test]
    fn parameters_out_of_range_are_all_named_at_once() {
        let params = SamplingParams {
            temperature: -1.0,
            top_k: Some(0),
            top_p: 1.5,
            repetition_penalty: 0.0,
            seed: 0,
        };
        let error = params.validate().unwrap_err();
        for key in ["temperature", "top_k", "top_p", "repetition_penalty"] {
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
        }
        assert_eq!(crate::error::exit_code(&error), 2);
        assert!(SamplingParams { temperature: f64::NAN, ..Default::default() }.validate().is_err());
    }
}
