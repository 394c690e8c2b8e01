//! Log-likelihoods of continuations. Texts that begin alike are computed together: each distinct beginning is computed once.
//!
//! ```text
//! requests     Q a b     row   Q a b c d e
//!              Q a c           0 1 2 2 1 2    positions
//!              Q d e           Q sees Q; a: Q a; b: Q a b; c: Q a c; d: Q d; e: Q d e
//! ```
//!
//! Sorted, requests are the paths of a tree. Tokens are laid out as the walk over the tree meets them, matrices say which
//! are on whose path, and a token stands at the depth of its node. So the choices of a question share it, and the questions
//! of a task their examples. Attention is computed for a stretch of tokens at a time, with those on the path to it: what
//! questions do not share, they do not pay for; a text alone in its row goes through the plain causal pass. The head is
//! computed only where a token of a continuation follows, and on the CPU for some of the vocabulary at a time, so that
//! logits stay in the cache.

use super::prompt::Pair;
use crate::bail_hint;
use crate::ffi::{ProcessGroup, ReduceOp};
use crate::generate::NetworkRef;
use crate::generate::score::score_tokens;
use crate::model::GPT;
use crate::ops::Branches;
use anyhow::Result;
use std::ops::Range;
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
    /// The token before each one on its path.
    before: Vec<Option<usize>>,
    /// Where the head is computed, the token that follows there, and the request that asks.
    reads: Vec<(i64, i64, usize)>,
}

/// Tokens of a row from one on, which see each other and those on the path to the first.
#[derive(Debug)]
struct Part {
    first: usize,
    /// The path: its token `i` stands at position `i`.
    path: Vec<usize>,
    /// (N, up to K): what a token sees of the path and of the part. Rows end at the token itself; the rest is not seen.
    sees: Vec<Vec<bool>>,
}

/// What differs between devices: the CPU, a GPU, which wants much at a time.
struct Sizes {
    /// Tokens of a row, unless one request alone is longer.
    row: usize,
    /// Tokens of a stretch.
    stretch: usize,
    /// Rows of logits at a time, and columns.
    logits: (i64, i64),
}

const SIZES: [Sizes; 2] = [
    Sizes { row: 512, stretch: 64, logits: (512, 4096) },
    Sizes { row: 4096, stretch: 256, logits: (1024, i64::MAX) },
];

/// Rows are longer where the next request shares much with them, which another row would compute again: by a quarter where
/// half of the request is shared, and up to so many times what it shares, but no longer than this.
const SHARED: (usize, usize) = (4, 2048);

/// The likelihood of each pair's continuation, in the order of `pairs`, and how many contexts were cut from the left to fit
/// the model's. `batch_size`: requests of a row at most. `done` is called with the number of requests that are through.
///
/// `ranks`: a group on the CPU whose ranks all call this with the same pairs, and share them: each computes every W-th row.
/// They go through the model equally often, as those must that hold its weights together.
///
/// # Sync
/// The CPU waits once a row, and at the end for the other ranks.
///
/// # Errors
/// A continuation that is longer than the model's context.
pub fn log_likelihoods(
    network: NetworkRef,
    pairs: &[Pair],
    batch_size: Option<usize>,
    ranks: Option<&ProcessGroup>,
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

    let sizes = &SIZES[usize::from(model.device().is_cuda())];
    let rows = cut_into_rows(&order, &inputs, sizes, batch_size);
    let (rank, size) = ranks.map_or((0, 1), |group| (group.rank(), group.size()));
    let mut all = vec![Likelihood::default(); pairs.len()];
    let mut through = 0;
    for turn in rows.chunks(size) {
        // Where no row is left for this rank, one that another computes.
        let requests = &order[turn[rank.min(turn.len() - 1)].clone()];
        let row = Row::of(requests, &inputs, pairs);
        let found = run(model, &row, sizes)?;
        if rank < turn.len() {
            found.into_iter().for_each(|(request, likelihood)| all[request] = likelihood);
        }
        through += turn.iter().map(Range::len).sum::<usize>();
        done(through);
    }
    if let Some(group) = ranks {
        exchange(group, &mut all)?;
    }
    Ok((all, cut))
}

/// Which requests make a row, as ranges of `order`.
fn cut_into_rows(
    order: &[usize],
    inputs: &[Vec<u32>],
    sizes: &Sizes,
    batch_size: Option<usize>,
) -> Vec<Range<usize>> {
    let (mut rows, mut start, mut tokens) = (Vec::new(), 0, 0);
    for at in 0..order.len() {
        let input = &inputs[order[at]];
        let mut shared = if at == start { 0 } else { shared(&inputs[order[at - 1]], input) };
        let stretched = if 2 * shared >= input.len() { sizes.row * 5 / 4 } else { sizes.row };
        let most = stretched.max((SHARED.0 * shared).min(SHARED.1));
        let full = at - start >= batch_size.unwrap_or(usize::MAX);
        if at > start && (full || tokens + input.len() - shared > most) {
            rows.push(start..at);
            (start, tokens, shared) = (at, 0, 0);
        }
        tokens += input.len() - shared;
    }
    if start < order.len() {
        rows.push(start..order.len());
    }
    rows
}

/// With how many tokens both begin.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// What each rank found, to all of them; what others find is zero and false here.
///
/// # Sync
/// The CPU waits for the other ranks.
fn exchange(group: &ProcessGroup, all: &mut [Likelihood]) -> Result<()> {
    let greedy = |one: &Likelihood| f64::from(u8::from(one.is_greedy == Some(true)));
    let mine: Vec<f64> = all.iter().flat_map(|one| [one.log_likelihood, greedy(one)]).collect();
    let sums = Tensor::from_slice(&mine); // (2 N,)
    group.all_reduce(&sums, ReduceOp::Sum)?.wait()?;
    for (one, sum) in all.iter_mut().zip(Vec::<f64>::try_from(sums)?.chunks(2)) {
        *one = Likelihood { log_likelihood: sum[0], is_greedy: Some(sum[1] > 0.0) };
    }
    Ok(())
}

impl Row {
    /// Of requests in order.
    fn of(requests: &[usize], inputs: &[Vec<u32>], pairs: &[Pair]) -> Self {
        let (mut row, mut path, mut last): (Self, Vec<usize>, &[u32]) = Default::default();
        for &i in requests {
            let input = &inputs[i];
            let shared = shared(last, input);
            path.truncate(shared);
            for &id in &input[shared..] {
                row.before.push(path.last().copied());
                row.positions.push(path.len() as i64);
                path.push(row.ids.len());
                row.ids.push(i64::from(id));
            }
            let targets = &pairs[i].continuation;
            let from = input.len() - targets.len();
            for (&at, &target) in path[from..].iter().zip(targets) {
                row.reads.push((at as i64, i64::from(target), i));
            }
            last = input;
        }
        row
    }

    /// Whether each token sees all before it, as in a row of one text.
    fn is_one_path(&self) -> bool {
        self.positions.iter().zip(0..).all(|(&position, at)| position == at)
    }

    /// The row in parts of `stretch` tokens.
    fn parts(&self, stretch: usize) -> Vec<Part> {
        let part = |first: usize| {
            let before = |&token: &usize| self.before[token];
            let mut path: Vec<usize> = std::iter::successors(self.before[first], before).collect();
            path.reverse();
            let mut sees: Vec<Vec<bool>> = Vec::with_capacity(stretch);
            for token in first..self.ids.len().min(first + stretch) {
                let mut seen = match self.before[token] {
                    Some(before) if before >= first => sees[before - first].clone(),
                    _ => vec![true; self.positions[token] as usize], // all of its path is before the part
                };
                seen.resize(path.len() + token - first, false);
                seen.push(true);
                sees.push(seen);
            }
            Part { first, path, sees }
        };
        (0..self.ids.len()).step_by(stretch).map(part).collect()
    }

    /// What tokens see, for attention in stretches of so many.
    fn branches(&self, stretch: usize, kind: Kind, device: Device) -> Branches {
        let parts = self.parts(stretch);
        let n = parts.iter().map(|part| part.sees.len()).max().unwrap_or(0);
        let longest = parts.iter().map(|part| part.path.len() + part.sees.len()).max();
        let k = longest.unwrap_or(0).next_multiple_of(8); // as kernels of a GPU want a matrix
        let s = parts.len();
        let (mut queries, mut keys) = (vec![0i64; s * n], vec![0i64; s * k]);
        let mut seen = vec![false; s * n * k];
        let mut back = vec![0i64; self.ids.len()];
        for (i, part) in parts.iter().enumerate() {
            for (at, &key) in keys[i * k..].iter_mut().zip(&part.path) {
                *at = key as i64;
            }
            for (j, sees) in part.sees.iter().enumerate() {
                let token = part.first + j;
                keys[i * k + part.path.len() + j] = token as i64;
                queries[i * n + j] = token as i64;
                back[token] = (i * n + j) as i64;
                seen[(i * n + j) * k..][..sees.len()].copy_from_slice(sees);
            }
            for j in part.sees.len()..n {
                seen[(i * n + j) * k] = true; // no row without a key
            }
        }
        let there = |x: &[i64]| Tensor::from_slice(x).to_device(device);
        let shape = [s, 1, n, k].map(|x| x as i64);
        let seen = Tensor::from_slice(&seen).to_device(device).view(shape);
        let bias = Tensor::zeros(shape, (kind, device))
            .masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
        Branches { queries: there(&queries), keys: there(&keys), bias, back: there(&back) }
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

/// Computes a row: its requests, and their likelihoods.
fn run(model: &GPT, row: &Row, sizes: &Sizes) -> Result<Vec<(usize, Likelihood)>> {
    let device = model.device();
    let ids = Tensor::from_slice(&row.ids).unsqueeze(0).to_device(device); // (1, T)
    let x = match row.is_one_path() && model.fp8.is_none() {
        true => model.hidden(&ids, None, None), // (1, T, C)
        false => {
            let positions = Tensor::from_slice(&row.positions).to_device(device); // (T,)
            let branches = row.branches(sizes.stretch, model.kind(), device);
            model.hidden_branches(&ids, &positions, branches) // (1, T, C)
        }
    };
    let x = x.squeeze_dim(0); // (T, C)
    let (logprobs, greedy) = read(model, &x, &row.reads, sizes.logits)?;
    let mut found: Vec<(usize, Likelihood)> = Vec::new();
    for (&(_, _, request), (logprob, is_likeliest)) in
        row.reads.iter().zip(logprobs.iter().zip(greedy))
    {
        if found.last().is_none_or(|(last, _)| *last != request) {
            found.push((request, Likelihood { log_likelihood: 0.0, is_greedy: Some(true) }));
        }
        if let Some((_, one)) = found.last_mut() {
            one.log_likelihood += logprob;
            one.is_greedy = one.is_greedy.map(|so_far| so_far && is_likeliest);
        }
    }
    Ok(found)
}

/// Log-probability of each read, and whether its token is the likeliest. Several reads of a place share its logits.
///
/// # Shapes
/// x (T, C); `rows` places and `columns` of the vocabulary at a time.
fn read(
    model: &GPT,
    x: &Tensor,
    reads: &[(i64, i64, usize)],
    (rows, columns): (i64, i64),
) -> Result<(Vec<f64>, Vec<bool>)> {
    let device = x.device();
    let mut places: Vec<i64> = reads.iter().map(|&(at, ..)| at).collect();
    places.sort_unstable();
    places.dedup();
    let row_of = |at: i64| places.partition_point(|&place| place < at) as i64;
    let of_reads: Vec<i64> = reads.iter().map(|&(at, ..)| row_of(at)).collect();
    let targets: Vec<i64> = reads.iter().map(|&(_, target, _)| target).collect();
    let of_reads = Tensor::from_slice(&of_reads).to_device(device); // (N,)
    let targets = Tensor::from_slice(&targets).to_device(device); // (N,)

    let x = x.index_select(0, &Tensor::from_slice(&places).to_device(device)); // (P, C)
    let head = model.head_matrix(); // (V, C)
    let (mut largest, mut sums, mut logits) = (Vec::new(), Vec::new(), Vec::new());
    for (i, part) in x.split(rows, 0).iter().enumerate() {
        // A read of another part of the rows takes something, and is not counted.
        let (first, n) = (i as i64 * rows, part.size()[0]);
        let here = (&of_reads - first).clamp(0, n - 1); // (N,)
        let is_here = of_reads.ge(first).logical_and(&of_reads.lt(first + n)); // (N,)
        let (mut maxima, mut totals) = (Vec::new(), Vec::new());
        let mut from = 0;
        for weight in head.split(columns.min(head.size()[0]), 0) {
            let width = weight.size()[0];
            let z = part.matmul(&weight.tr()).to_kind(Kind::Float); // (P', V')
            let at = (&targets - from).clamp(0, width - 1); // (N,)
            let taken = z.view(-1).index_select(0, &(&here * width + at)); // (N,)
            let is_in =
                targets.ge(from).logical_and(&targets.lt(from + width)).logical_and(&is_here);
            logits.push(taken.where_scalarother(&is_in, f64::NEG_INFINITY)); // (N,)
            let most = z.amax(1, true); // (P', 1)
            totals.push((z - &most).exp_().sum_dim_intlist(1, true, Kind::Float)); // (P', 1)
            maxima.push(most);
            from += width;
        }
        let (maxima, totals) = (Tensor::cat(&maxima, 1), Tensor::cat(&totals, 1)); // (P', V / V')
        sums.push((&maxima + totals.log()).logsumexp(1, false)); // (P',)
        largest.push(maxima.amax(1, false)); // (P',)
    }
    let logits = Tensor::stack(&logits, 0).amax(0, false); // (N,)
    let of_read = |parts: &[Tensor]| Tensor::cat(parts, 0).index_select(0, &of_reads); // (N,)
    let greedy = logits.ge_tensor(&of_read(&largest));
    let logprobs = (logits - of_read(&sums)).to_kind(Kind::Double);
    Ok((Vec::try_from(logprobs)?, Vec::try_from(greedy)?))
}
