//! Activation checkpointing: memory for time.

use super::or_panic;
use crate::ffi;
use tch::Tensor;

/// `part(inputs)`, of which autograd keeps the inputs alone; the backward pass runs the part again with them.
///
/// Parameters that the part holds (as shallow clones: the same leaves) get their gradients as ever. Where no
/// input requires a gradient there is nothing to hang the second run on, and the part runs plainly.
///
/// # Numerics
/// The second run repeats the first, so nothing changes by a bit where the part's operations repeat; test
/// `recomputed_blocks_change_no_bit_of_loss_and_gradients`.
///
/// # Source
/// arXiv 1604.06174; `torch.utils.checkpoint.checkpoint(part, *inputs, use_reentrant=True)`.
pub fn recompute<const N: usize>(
    inputs: &[&Tensor],
    part: impl Fn(&[Tensor]) -> [Tensor; N] + Send + 'static,
) -> [Tensor; N] {
    if !inputs.iter().any(|t| t.requires_grad()) {
        return part(&inputs.iter().map(|t| t.shallow_clone()).collect::<Vec<_>>());
    }
    let values: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let results = {
        let _guard = tch::no_grad_guard(); // which a panic ends too, unlike `tch::no_grad`
        part(&values)
    };
    let part = Box::new(move |inputs: &[Tensor]| part(inputs).into());
    let results = or_panic(ffi::recompute(part, inputs, &results));
    results.try_into().expect("as many tensors as the part made")
}
