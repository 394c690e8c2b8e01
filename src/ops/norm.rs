//! Normalisation.

use super::{fused_here, or_panic, say_once};
use crate::ffi;
use tch::{Kind, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
///
/// `fused` uses `csrc/rmsnorm.cu` on a GPU where C is a multiple of 16 bytes; otherwise
/// [`rms_norm_reference`].
///
/// # Shapes
/// x (.., C); weight (C,) -> (.., C), dtype of x.
///
/// # Numerics
/// Statistics and product in fp32, rounded once at the end; test `rms_norm_agrees_with_its_reference`.
///
/// # Source
/// arXiv 1910.07467; `torch.nn.RMSNorm`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, fused: bool) -> Tensor {
    if fused && kernel_takes(x, weight) {
        return or_panic(ffi::rms_norm(&x.contiguous(), weight, eps));
    }
    rms_norm_reference(x, weight, eps)
}

/// The residual addition and the norm after it in one pass: `(rms_norm(sum), sum)`, `sum = x + residual`.
///
/// # Shapes
/// x, residual (.., C); weight (C,) -> (.., C) twice, dtype of x.
///
/// # Numerics
/// The sum is rounded to x's dtype before it is normalised, as two operations would do.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
    fused: bool,
) -> (Tensor, Tensor) {
    if fused && kernel_takes(x, weight) {
        return or_panic(ffi::add_rms_norm(&x.contiguous(), &residual.contiguous(), weight, eps));
    }
    let sum = x + residual;
    (rms_norm_reference(&sum, weight, eps), sum)
}

/// Whether the kernel covers this C: it holds a row in registers, in 16-byte pieces. Says so where it does not.
pub(super) fn kernel_takes(x: &Tensor, weight: &Tensor) -> bool {
    if !fused_here(x) || weight.kind() != x.kind() {
        return false;
    }
    let c = weight.numel() as i64;
    let (vector, max) = if x.kind() == Kind::Float { (4, 8192) } else { (8, 16_384) };
    let covered = c % vector == 0 && c <= max;
    if !covered {
        say_once(format!(
            "rms_norm    plain operations: the kernel covers multiples of {vector} up to {max}, not {c}"
        ));
    }
    covered
}

/// The plain formula of [`rms_norm`]; also in fp64.
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let wide = x.to_kind(kind);
    let mean = wide.square().mean_dim([-1].as_slice(), true, kind); // (.., 1)
    ((&wide * (mean + eps).rsqrt()) * weight.to_kind(kind)).to_kind(x.kind())
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.
///
/// # Shapes
/// x (.., C); weight, bias (C,) -> (.., C), dtype of x; statistics in fp32.
///
/// # Source
/// `torch.nn.LayerNorm`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    x.layer_norm(weight.size(), Some(weight), Some(bias), eps, true)
}
