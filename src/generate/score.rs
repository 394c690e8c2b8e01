//! The probability of a given text: log p(token | the tokens before it).

use super::network::NetworkRef;
use super::request::{check_ids, ids_tensor};
use crate::error::WithHint;
use crate::model::PagedCache;
use crate::model::paged_cache::{BLOCK, Batch};
use anyhow::{Result, anyhow};
use serde::Serialize;
use tch::{Kind, Tensor};

/// Positions whose logits are in memory at a time: 256 x V values of fp32, 33 MB at V = 32,000.
const ROWS: i64 = 256;

/// Log-probabilities of a text. Its JSON form is what `tinyllama score --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// Ids.
    pub tokens: Vec<u32>,
    /// Natural log of each token's probability given its prefix; nothing for the first.
    pub logprobs: Vec<Option<f64>>,
    /// Mean of the negative log-probabilities, in nats a token.
    pub nll: f64,
    /// exp(nll).
    pub ppl: f64,
}

impl Score {
    /// Sums up.
    ///
    /// # Errors
    /// No token has a prefix; a log-probability that is not a number.
    pub fn new(tokens: Vec<u32>, logprobs: Vec<Option<f64>>) -> Result<Self> {
        let scored: Vec<f64> = logprobs.iter().flatten().copied().collect();
        if scored.is_empty() {
            return Err(anyhow!("nothing to score: {} tokens, none has a prefix", tokens.len()))
                .usage("give at least two tokens");
        }
        if let Some(at) = logprobs.iter().position(|p| p.is_some_and(|p| !p.is_finite())) {
            return Err(anyhow!(
                "the log-probability of token {} at {at} is not finite",
                tokens[at]
            ))
            .hint("weights that hold NaN or infinity give this; try `--precision 32-true`");
        }
        let nll = -scored.iter().sum::<f64>() / scored.len() as f64;
        Ok(Self { tokens, logprobs, nll, ppl: nll.exp() })
    }
}

/// `log_softmax(logits)[t-1, tokens[t]]` for each t from 1; `None` for the first token.
///
/// # Numerics
/// Log-softmax in fp32 from logits in the dtype of the weights. Held against one full forward by
/// the test `the_score_of_tokens_is_the_log_softmax_of_a_full_forward`.
///
/// # Errors
/// More tokens than the model's context, or one out of its vocabulary.
pub fn score_tokens<'m>(
    model: impl Into<NetworkRef<'m>>,
    tokens: &[u32],
) -> Result<Vec<Option<f64>>> {
    let model = model.into();
    check_ids(model, tokens)?;
    let context = model.config().max_length() as usize;
    if tokens.len() > context {
        return Err(anyhow!(
            "sequence longer than block_size: {} tokens, `block_size` is {context}",
            tokens.len()
        ))
        .usage(format!("shorten it, or score it in overlapping windows: `--window {context}`"));
    }
    if tokens.is_empty() {
        return Ok(Vec::new());
    }
    let logprobs = next_token_logprobs(model, tokens)?;
    Ok(std::iter::once(None).chain(logprobs.into_iter().map(Some)).collect())
}

/// [`score_tokens`] for any length: windows of `window` tokens that begin `stride` apart. Each
/// token is scored once, by the first window that holds it, so from the second window on with a
/// prefix of at least `window - stride` tokens. A smaller stride costs time (window / stride
/// forwards a token) and gives longer prefixes.
///
/// # Errors
/// As [`score_tokens`]; `window` beyond the context; `stride` not in `1 .. window`.
pub fn score_windows<'m>(
    model: impl Into<NetworkRef<'m>>,
    tokens: &[u32],
    window: usize,
    stride: usize,
) -> Result<Vec<Option<f64>>> {
    let model = model.into();
    let context = model.config().max_length() as usize;
    if !(2..=context).contains(&window) {
        return Err(anyhow!("`window` must be from 2 to `block_size` = {context}, got {window}"))
            .usage(format!("`--window {context}` gives each token the longest prefix"));
    }
    if !(1..window).contains(&stride) {
        return Err(anyhow!(
            "`stride` must be from 1 to `window` - 1 = {}, got {stride}",
            window - 1
        ))
        .usage(format!("`--stride {}` is the default, half the window", window / 2));
    }
    check_ids(model, tokens)?;
    let mut logprobs = Vec::with_capacity(tokens.len());
    let mut begin = 0;
    while logprobs.len() < tokens.len() {
        let end = (begin + window).min(tokens.len());
        let scores = score_tokens(model, &tokens[begin..end])?;
        logprobs.extend(&scores[logprobs.len() - begin..]);
        begin += stride;
    }
    Ok(logprobs)
}

/// log p of tokens 1.. given their prefixes.
fn next_token_logprobs(model: NetworkRef, tokens: &[u32]) -> Result<Vec<f64>> {
    let _no_grad = tch::no_grad_guard();
    let t = tokens.len() as i64 - 1; // the last token is read by nobody
    if t == 0 {
        return Ok(Vec::new());
    }
    let idx = ids_tensor(tokens, model.device()); // (1, T+1)
    let targets = idx.narrow(1, 1, t).view([t, 1]); // (T, 1)
    let x = match model {
        NetworkRef::Dense(model) => model.hidden(&idx.narrow(1, 0, t), None, None).squeeze_dim(0), // (T, C)
        NetworkRef::Quantised(_) => hidden_by_cache(model, &tokens[..t as usize]), // (T, C)
    };
    let mut parts = Vec::new();
    for first in (0..t).step_by(ROWS as usize) {
        let rows = ROWS.min(t - first);
        let logits = model.head(&x.narrow(0, first, rows)); // (rows, V)
        let logprobs = logits.log_softmax(-1, Kind::Float); // (rows, V)
        parts.push(logprobs.gather(1, &targets.narrow(0, first, rows), false)); // (rows, 1)
    }
    let logprobs = Tensor::cat(&parts, 0).view([t]).to_kind(Kind::Double); // (T,)
    Ok(Vec::try_from(&logprobs)?)
}

/// The residual stream of one sequence, by a cache that is dropped again.
///
/// # Shapes
/// -> (T, C).
fn hidden_by_cache(model: NetworkRef, tokens: &[u32]) -> Tensor {
    let table: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).collect();
    let mut cache = PagedCache::new(model.config(), table.len(), model.kind(), model.device());
    let batch = Batch::new(&[(tokens, 0, &table)], model.device());
    model.hidden(&batch, &mut cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nll_is_the_mean_over_scored_tokens_and_ppl_its_exponential() {
        let score = Score::new(vec![1, 2, 3], vec![None, Some(-1.0), Some(-2.0)]).unwrap();
        assert_eq!((score.nll, score.ppl), (1.5, 1.5f64.exp()));
        let json = serde_json::to_string(&score).unwrap();
        assert!(
            json.starts_with(r#"{"tokens":[1,2,3],"logprobs":[null,-1.0,-2.0],"nll":1.5,"ppl":"#)
        );
    }

    #[test]
    fn one_token_has_nothing_to_score() {
        let error = Score::new(vec![5], vec![None]).unwrap_err();
        assert!(error.to_string().starts_with("nothing to score: 1 token"), "{error}");
        assert!(Score::new(vec![5, 6], vec![None, Some(f64::NAN)]).is_err());
    }
}
