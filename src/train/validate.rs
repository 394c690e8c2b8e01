//! Validation loss.

use super::objective::Objective;
use super::step::Coming;
use crate::data::ValidationSet;
use crate::distributed::Ranks;
use crate::model::GPT;
use crate::ops::LossScalars;
use anyhow::Result;
use tch::{Kind, Tensor};

/// Mean loss over the targets (or pairs) of the first `max_iters` batches of the set (`None`: all of it). The set is
/// read in order, so two calls see the same tokens. Several ranks share the batches; where they do not come out even,
/// some run one that does not count, since all must go through the model together. `goes_on(i)` is asked on every rank
/// before its i-th batch: where it says no, on all ranks at the same one, there is no loss.
///
/// # Sync
/// The CPU waits once, at the end.
pub fn validate(
    model: &GPT,
    objective: &Objective,
    set: &ValidationSet,
    max_iters: Option<u64>,
    ranks: Option<&Ranks>,
    goes_on: &dyn Fn(u64) -> bool,
) -> Result<Option<f64>> {
    let _guard = tch::no_grad_guard();
    let was_training = model.training.replace(false);
    let (rank, size) = ranks.map_or((0, 1), |ranks| (ranks.rank() as u64, ranks.size() as u64));
    let n_batches = max_iters.map_or(set.n_batches(), |n| n.min(set.n_batches()));
    let sums = Tensor::zeros([2], (Kind::Double, model.device())); // loss, targets
    let mut goes_through = true;
    for own in 0..n_batches.div_ceil(size) {
        goes_through = goes_on(own);
        if !goes_through {
            break;
        }
        let i = own * size + rank;
        let counts = f64::from(u8::from(i < n_batches));
        let batch = set.batch(i.min(n_batches - 1))?;
        let on_device = Coming::new(&batch, model.device())?.take()?; // (B, T) x2
        let loss = objective.loss(model, &on_device, LossScalars::SUM).to_kind(Kind::Double);
        let _ = sums.get(0).g_add_(&(loss * counts));
        let _ = sums.get(1).g_add_scalar_(batch.n_targets as f64 * counts);
    }
    model.training.set(was_training);
    let _ = objective.take(); // of training alone
    if !goes_through {
        return Ok(None);
    }
    if let Some(ranks) = ranks {
        ranks.sum(&sums)?;
    }
    let loss = sums.double_value(&[0]) / sums.double_value(&[1]).max(1.0);
    ranks.map_or(Ok(()), Ranks::check)?; // what a failed collective left is garbage
    Ok(Some(loss))
}
