//! `y = x W^T`.

use super::{fused_here, or_panic};
use crate::ffi;
use tch::Tensor;

/// `y = x W^T`, or `x W^T + b`.
///
/// `fused`, without a bias and on a GPU, is `csrc/torch/linear.cpp`: libtorch's or cuBLASLt's product, as
/// [`ffi::set_matmul`] says, whose backward pass adds the weight's gradient to a persistent fp32 `.grad`
/// (see [`crate::train::optimizer`]) by the product itself. Otherwise `torch.nn.functional.linear`.
///
/// # Shapes
/// x (.., C); weight (O, C); bias (O,) -> (.., O).
///
/// # Numerics
/// fp32 sums, rounded once to the dtype of x; test `linear_agrees_with_libtorchs`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, fused: bool) -> Tensor {
    if fused && bias.is_none() && fused_here(x) && weight.kind() == x.kind() {
        return or_panic(ffi::linear(&x.contiguous(), weight, None));
    }
    x.linear(weight, bias)
}
