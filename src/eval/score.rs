//! Log-likelihoods of continuations. Texts that begin alike are computed together: each distinct beginning is computed once.
//!
//! ```text
//! requests     Q a b     row   Q a b c d e
//!              Q a c           0 1 2 2 1 2    positions
//!              Q d e           Q sees Q; a: Q a; b: Q a b; c: Q a c; d: Q d; e: Q d e
//! ```
//!
//! Sorted, requests are the paths of a tree. Tokens are laid out as the walk over the tree meets them, a matrix says which
//! are on whose path, and a token stands at the depth of its node. So the choices of a question share it, and the questions
//! of a task their examples. The head is computed only where a token of a continuation follows, and logits exist for some
//! rows at a time.

use super::prompt::Pair;
use crate::bail_hint;
use crate::generate::NetworkRef;
use crate::generate::score::score_tokens;
use crate::model::GPT;
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// What is known of a continuation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// Sum of its tokens' log-probabilities, in nats.
    pub log_likelihood: f64,
    /// Whether each token was the likeliest; not known of weights that are quantised on the CPU.
    pub is_greedy: Option<bool>,
}

/// Tokens of a row, one branch behind the other.
#[derive(Debug, Default)]
struct Row {
    ids: Vec<i64>,
    positions: Vec<i64>,
    /// (T, T), row by row: what a token sees. Rows end at the token itself; the rest is not seen.
    sees: Vec<Vec<bool>>,
    /// Where the head is computed, the token that follows there, and the request that asks.
    reads: Vec<(i64, i64, usize)>,
}

/// Tokens of a row, unless one request alone is longer: on the CPU, on a GPU, which wants many at a time. Attention of a row
/// costs its square.
const TOKENS: [usize; 2] = [512, 4096];

/// Rows are longer where the next request shares much with them, which another row would compute again: up to so many
/// times what it shares, and no longer than this.
const SHARED: (usize, usize) = (4, 2048);

/// Logits that exist at a time, in rows of the vocabulary.
const LOGITS: i64 = 512;

/// The likelihood of each pair's continuation, in the order of `pairs`, and how many contexts were cut from the left to fit
/// the model's. `batch_size`: requests of a row at most. `done` is called with the number of requests that are through.
///
/// # Sync
/// The CPU waits once a row.
///
/// # Errors
/// A continuation that is longer than the model's context.
pub fn log_likelihoods(
    network: NetworkRef,
    pairs: &[Pair],
    batch_size: Option<usize>,
    mut done: impl FnMut(usize),
) -> Result<(Vec<Likelihood>, usize)> {
    let _guard = tch::no_grad_guard();
    let limit = network.config().block_size as usize;
    let mut cut = 0;
    let mut inputs = Vec::with_capacity(pairs.len());
    for pair in pairs {
        if pair.continuation.len() > limit {
            bail_hint!(
                "evaluate a model with a longer context, or leave the sample out";
                "an answer of {} tokens does not fit the model's context of {limit}", pair.continuation.len()
            );
        }
        let whole: Vec<u32> = pair.context.iter().chain(&pair.continuation).copied().collect();
        let from = whole.len().saturating_sub(limit + 1);
        cut += usize::from(from > 0);
        inputs.push(whole[from..whole.len() - 1].to_vec()); // the last token predicts nothing
    }
    let model = match network {
        NetworkRef::Dense(model) => model,
        NetworkRef::Quantised(_) => return Ok((one_by_one(network, pairs, &inputs, done)?, cut)),
    };
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by(|&a, &b| inputs[a].cmp(&inputs[b]));

    let most = TOKENS[usize::from(model.device().is_cuda())];
    let mut all = vec![Likelihood { log_likelihood: 0.0, is_greedy: Some(true) }; pairs.len()];
    let (mut row, mut path, mut last): (Row, Vec<usize>, &[u32]) = (Row::default(), vec![], &[]);
    let (mut through, mut in_row) = (0, 0);
    for &i in &order {
        let input = &inputs[i];
        let mut shared = last.iter().zip(input).take_while(|(a, b)| a == b).count();
        let most = most.max((SHARED.0 * shared).min(SHARED.1));
        let full = in_row >= batch_size.unwrap_or(usize::MAX);
        if !row.ids.is_empty() && (full || row.ids.len() + input.len() - shared > most) {
            in_row = 0;
            through += run(model, &std::mem::take(&mut row), &mut all)?;
            done(through);
            (path, shared) = (Vec::new(), 0);
        }
        in_row += 1;
        path.truncate(shared);
        for &id in &input[shared..] {
            path.push(row.add(id, path.last().copied()));
        }
        let targets = &pairs[i].continuation;
        let from = input.len() - targets.len();
        for (&at, &target) in path[from..].iter().zip(targets) {
            row.reads.push((at as i64, i64::from(target), i));
        }
        last = input;
    }
    if !row.ids.is_empty() {
        through += run(model, &row, &mut all)?;
        done(through);
    }
    Ok((all, cut))
}

impl Row {
    /// Adds a token behind another; where it stands.
    fn add(&mut self, id: u32, behind: Option<usize>) -> usize {
        let at = self.ids.len();
        let mut sees = behind.map_or(Vec::new(), |before| self.sees[before].clone());
        sees.resize(at, false);
        sees.push(true);
        let position = behind.map_or(0, |before| self.positions[before] + 1);
        self.ids.push(i64::from(id));
        self.positions.push(position);
        self.sees.push(sees);
        at
    }

    /// 0 where a token sees another, else -inf.
    fn bias(&self, kind: Kind, device: Device) -> Tensor {
        let (t, n) = (self.ids.len(), self.ids.len() as i64);
        let mut seen = vec![false; t * t];
        for (whole, sees) in seen.chunks_exact_mut(t).zip(&self.sees) {
            whole[..sees.len()].copy_from_slice(sees);
        }
        let seen = Tensor::from_slice(&seen).to_device(device).view([1, 1, n, n]);
        Tensor::zeros([1, 1, n, n], (kind, device))
            .masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
    }
}

/// By a network that knows no branches: each text alone. It scores as many tokens as its context has, one less than fit
/// before and in an answer, so that a text that was cut loses one more of its beginning.
fn one_by_one(
    network: NetworkRef,
    pairs: &[Pair],
    inputs: &[Vec<u32>],
    mut done: impl FnMut(usize),
) -> Result<Vec<Likelihood>> {
    let mut all = Vec::with_capacity(pairs.len());
    for (i, (pair, input)) in pairs.iter().zip(inputs).enumerate() {
        let whole: Vec<u32> = input.iter().chain(pair.continuation.last()).copied().collect();
        let most = network.config().block_size as usize;
        let whole = &whole[whole.len().saturating_sub(most)..];
        if pair.continuation.len() >= whole.len() {
            bail_hint!(
                "evaluate a model with a longer context, or leave the sample out";
                "an answer of {} tokens leaves no room for its question in a context of {most}", pair.continuation.len()
            );
        }
        let logprobs = score_tokens(network, whole)?;
        let of_answer = &logprobs[whole.len() - pair.continuation.len()..];
        let log_likelihood = of_answer.iter().flatten().sum();
        all.push(Likelihood { log_likelihood, is_greedy: None });
        done(i + 1);
    }
    Ok(all)
}

/// Computes a row and adds to the likelihoods of its requests; how many those are.
fn run(model: &GPT, row: &Row, all: &mut [Likelihood]) -> Result<usize> {
    let device = model.device();
    let ids = Tensor::from_slice(&row.ids).unsqueeze(0).to_device(device); // (1, T)
    let positions = Tensor::from_slice(&row.positions).to_device(device); // (T,)
    let bias = row.bias(model.kind(), device); // (1, 1, T, T)
    let x = model.hidden_branches(&ids, &positions, &bias).squeeze_dim(0); // (T, C)
    let places: Vec<i64> = row.reads.iter().map(|(at, ..)| *at).collect();
    let targets: Vec<i64> = row.reads.iter().map(|(_, target, _)| *target).collect();
    let x = x.index_select(0, &Tensor::from_slice(&places).to_device(device)); // (N, C)
    let targets = Tensor::from_slice(&targets).to_device(device); // (N,)
    let (mut logprobs, mut greedy) = (Vec::new(), Vec::new());
    for (x, targets) in x.split(LOGITS, 0).iter().zip(targets.split(LOGITS, 0)) {
        let logits = model.head(x).to_kind(Kind::Float); // (n, V)
        // Six times as fast on the CPU as libtorch's logsumexp, which makes one value a row.
        let all = logits.log_softmax(1, Kind::Float); // (n, V)
        logprobs.push(all.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1)); // (n,)
        greedy.push(logits.argmax(1, false).eq_tensor(&targets));
    }
    let logprobs = Vec::<f64>::try_from(Tensor::cat(&logprobs, 0).to_kind(Kind::Double))?;
    let greedy = Vec::<bool>::try_from(Tensor::cat(&greedy, 0))?;
    let mut requests = 0;
    let mut before = None;
    for (&(_, _, request), (logprob, greedy)) in row.reads.iter().zip(logprobs.iter().zip(greedy)) {
        all[request].log_likelihood += logprob;
        all[request].is_greedy = all[request].is_greedy.map(|so_far| so_far && greedy);
        requests += usize::from(before != Some(request));
        before = Some(request);
    }
    Ok(requests)
}
