//! The loss.

use tch::{Kind, Reduction, Tensor};

/// Sum over the positions with target != -100 of `-log softmax(logits)[target]`.
///
/// The caller divides by the number of targets of the whole optimizer step, so that every token weighs the
/// same whatever the micro-batch.
///
/// # Shapes
/// logits (B, T, V); target (B, T) of i64 -> () fp32.
///
/// # Numerics
/// fp32 whatever the logits' dtype.
///
/// # Source
/// `torch.nn.functional.cross_entropy(reduction="sum", ignore_index=-100)`.
pub fn cross_entropy_sum(logits: &Tensor, target: &Tensor) -> Tensor {
    let v = *logits.size().last().expect("logits are (.., V)");
    let logits = logits.reshape([-1, v]).to_kind(Kind::Float); // (N, V)
    logits.cross_entropy_loss(&target.reshape([-1]), None::<Tensor>, Reduction::Sum, -100, 0.0)
}
