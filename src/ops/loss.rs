//! The loss.

use super::{fused_here, or_panic};
use crate::ffi::{self, LossScalars};
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
    cross_entropy_reference(&logits.reshape([-1, v]), &target.reshape([-1]), LossScalars::SUM)
}

/// `scale * sum over targets of ((1 - e) (lse - x[target]) + e (lse - mean(x)) + z lse^2)`, where
/// `lse = log sum exp(x)`, e is `label_smoothing` and z `z_loss`.
///
/// `fused` uses `csrc/cross_entropy.cu` on a GPU: one pass that overwrites the logits with their gradient, so
/// they must not be used again, and backward can run once. Otherwise [`cross_entropy_reference`].
///
/// # Shapes
/// logits (N, V); target (N,) of i64, -100 to leave a row out -> () fp32.
///
/// # Numerics
/// fp32 inside; the gradient is rounded to the logits' dtype. A target outside 0..V gives NaN. Test
/// `cross_entropy_agrees_with_its_reference`.
pub fn cross_entropy(logits: &Tensor, target: &Tensor, s: LossScalars, fused: bool) -> Tensor {
    if fused && fused_here(logits) && logits.is_contiguous() {
        return or_panic(ffi::cross_entropy(logits, &target.contiguous(), s));
    }
    cross_entropy_reference(logits, target, s)
}

/// The plain formula of [`cross_entropy`]; also in fp64.
pub fn cross_entropy_reference(logits: &Tensor, target: &Tensor, s: LossScalars) -> Tensor {
    let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let logits = logits.to_kind(kind); // (N, V)
    let none = None::<Tensor>;
    let sum =
        logits.cross_entropy_loss(target, none, Reduction::Sum, -100, s.label_smoothing) * s.scale;
    if s.z_loss == 0.0 {
        return sum;
    }
    let lse = logits.logsumexp([-1].as_slice(), false); // (N,)
    let counted = target.ne(-100).to_kind(kind); // (N,)
    sum + (lse.square() * counted).sum(kind) * (s.z_loss * s.scale)
}

/// [`cross_entropy`] of `x weight^T`: the head and the loss in one.
///
/// `fused` works on a chunk of rows at a time, in the forward pass already: logits exist for one chunk and
/// only in the dtype of x, never in fp32. Otherwise all logits, then the reference.
///
/// # Shapes
/// x (N, C); weight (V, C); target (N,) of i64 -> () fp32.
///
/// # Numerics
/// Logits rounded to x's dtype, loss in fp32, the weight's gradient summed over chunks in fp32. Test
/// `the_fused_head_agrees_with_its_reference`.
///
/// # Source
/// Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989).
pub fn head_loss(
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
    s: LossScalars,
    fused: bool,
) -> Tensor {
    if fused && fused_here(x) && weight.kind() == x.kind() {
        let chunks =
            head_chunks(x.size()[0], weight.size()[0], x.kind().elt_size_in_bytes() as i64);
        return or_panic(ffi::head_loss(&x.contiguous(), weight, &target.contiguous(), chunks, s));
    }
    cross_entropy_reference(&x.linear(weight, None::<Tensor>), target, s)
}

/// As many chunks as keep the logits of one within 512 MiB: small beside the activations, large enough for
/// the matrix products.
fn head_chunks(n: i64, v: i64, bytes: i64) -> i64 {
    const MOST: i64 = 512 << 20;
    ((n * v * bytes + MOST - 1) / MOST).clamp(1, n.max(1))
}

/// Rows of logits that the fused [`head_loss`] of n rows holds at a time.
pub fn head_rows(n: i64, v: i64, bytes: i64) -> i64 {
    let chunks = head_chunks(n, v, bytes);
    (n + chunks - 1) / chunks
}
