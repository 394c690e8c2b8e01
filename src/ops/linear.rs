//! `y = x W^T`, alone and behind a norm.

use super::{add_rms_norm, fused_here, mlp, norm as norms, or_panic, rms_norm, swiglu_mlp};
use crate::ffi::{self, Fp8Linear};
use tch::{Kind, Tensor};

/// `y = x W^T`, or `x W^T + b`.
///
/// `fused`, without a bias and on a GPU, is `csrc/torch_cuda/linear.cpp`: libtorch's or cuBLASLt's product, as
/// [`ffi::set_matmul`] says, whose backward pass adds the weight's gradient to a persistent fp32 `.grad`
/// (see [`crate::train::optimizer`]) by the product itself. Otherwise `torch.nn.functional.linear`. With `fp8` the
/// products, forward and backward, are of e4m3 casts of x, W and the gradient ([`fp8_reference`]).
///
/// # Shapes
/// x (.., C); weight (O, C); bias (O,) -> (.., O).
///
/// # Numerics
/// fp32 sums, rounded once to the dtype of x; tests `linear_agrees_with_libtorchs`,
/// `fp8_layers_agree_with_products_of_rounded_matrices`.
pub fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    fp8: Option<&Fp8Linear>,
    fused: bool,
) -> Tensor {
    if fused && bias.is_none() && fused_here(x) && weight.kind() == x.kind() {
        return or_panic(ffi::linear(&x.contiguous(), weight, fp8));
    }
    x.linear(weight, bias)
}

/// `(rms_norm(sum) W^T, sum)` with `sum = x + residual`. On a GPU only the sum is kept for the backward pass, which
/// computes the norm's output again: 2 C bytes a token less. Where a kernel does not cover the sizes, the two apart.
///
/// # Shapes
/// x, residual (.., C); norm (C,); weight (O, C) -> (.., O), (.., C).
///
/// # Numerics
/// As of [`add_rms_norm`] and [`linear`]; test `layers_behind_a_norm_agree_with_the_two_apart`.
pub fn norm_linear(
    x: &Tensor,
    residual: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weight: &Tensor,
    fp8: Option<&Fp8Linear>,
) -> (Tensor, Tensor) {
    if norms::kernel_takes(x, norm) && weight.kind() == x.kind() {
        let (x, residual) = (x.contiguous(), residual.map(Tensor::contiguous));
        let (y, sum) = or_panic(ffi::norm_linear(&x, residual.as_ref(), norm, eps, weight, fp8));
        return (y, sum.unwrap_or(x));
    }
    let (normed, sum) = norm_of_sum(x, residual, norm, eps);
    (linear(&normed, weight, None, None, true), sum)
}

/// `(swiglu_mlp(rms_norm(sum)), sum)` with `sum = x + residual`, likewise. `fp8`: of `[W1; W2]` and of W3.
///
/// # Shapes
/// x, residual (.., C); norm (C,); weights (F, C), (F, C), (C, F) -> (.., C) x2.
///
/// # Numerics
/// As of [`add_rms_norm`] and [`swiglu_mlp`]; test `layers_behind_a_norm_agree_with_the_two_apart`.
pub fn norm_mlp(
    x: &Tensor,
    residual: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weights: [&Tensor; 3],
    fp8: Option<(&Fp8Linear, &Fp8Linear)>,
) -> (Tensor, Tensor) {
    if norms::kernel_takes(x, norm) && mlp::kernel_takes(x, weights[0].size()[0]) {
        let (x, residual) = (x.contiguous(), residual.map(Tensor::contiguous));
        let fp8 = fp8.map(|(gate_up, down)| [gate_up, down]);
        let (y, sum) = or_panic(ffi::norm_mlp(&x, residual.as_ref(), norm, eps, weights, fp8));
        return (y, sum.unwrap_or(x));
    }
    let (normed, sum) = norm_of_sum(x, residual, norm, eps);
    (swiglu_mlp(&normed, weights[0], weights[1], weights[2], true), sum)
}

fn norm_of_sum(x: &Tensor, residual: Option<&Tensor>, norm: &Tensor, eps: f64) -> (Tensor, Tensor) {
    match residual {
        Some(residual) => add_rms_norm(x, residual, norm, eps, true),
        None => (rms_norm(x, norm, eps, true), x.shallow_clone()),
    }
}

/// What an e4m3 cast with this scale makes of x: the nearest of 448 / scale, .., in fp32.
///
/// # Source
/// arXiv 2209.05433; `torch.Tensor.to(torch.float8_e4m3fn)` after saturation.
pub fn fp8_reference(x: &Tensor, scale: f64) -> Tensor {
    let scaled = (x.to_kind(Kind::Float) * scale).clamp(-448.0, 448.0);
    scaled.to_kind(Kind::Float8e4m3fn).to_kind(Kind::Float) / scale
}
