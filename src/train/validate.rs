//! Validation loss.

use super::step::stage;
use crate::data::ValidationSet;
use crate::model::GPT;
use crate::ops::LossScalars;
use anyhow::Result;
use tch::{Kind, Tensor};

/// Mean loss over the targets of the first `max_iters` batches of the set (`None`: all of it). The set is
/// read in order, so two calls see the same tokens.
///
/// # Sync
/// The CPU waits once, at the end.
pub fn validate(model: &GPT, set: &ValidationSet, max_iters: Option<u64>) -> Result<f64> {
    let _guard = tch::no_grad_guard();
    let mut sum = Tensor::zeros([], (Kind::Double, model.device()));
    let mut n_targets = 0;
    let limit = max_iters.map_or(usize::MAX, |n| n as usize);
    for batch in set.batches().take(limit) {
        let batch = batch?;
        let [input, target] = stage(&batch, model.device())?;
        let (input, target) = (input.take()?, target.take()?); // (B, T) x2
        let _ = sum.g_add_(&model.loss(&input, &target, LossScalars::SUM).to_kind(Kind::Double));
        n_targets += batch.n_targets;
    }
    Ok(sum.double_value(&[]) / n_targets.max(1) as f64)
}
