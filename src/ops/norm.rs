//! Normalisation.

use tch::{Kind, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
///
/// `fused` calls libtorch's `_fused_rms_norm` on a GPU; otherwise [`rms_norm_reference`].
///
/// # Shapes
/// x (.., C); weight (C,) -> (.., C), dtype of x.
///
/// # Numerics
/// Statistics and product in fp32, rounded once at the end.
///
/// # Source
/// arXiv 1910.07467; `torch.nn.RMSNorm`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, fused: bool) -> Tensor {
    if fused && x.device().is_cuda() {
        let c = weight.size();
        return Tensor::internal_fused_rms_norm(x, c, Some(weight), eps).0;
    }
    rms_norm_reference(x, weight, eps)
}

/// The plain formula of [`rms_norm`].
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let x32 = x.to_kind(Kind::Float);
    let mean = x32.square().mean_dim([-1].as_slice(), true, Kind::Float); // (.., 1)
    ((&x32 * (mean + eps).rsqrt()) * weight.to_kind(Kind::Float)).to_kind(x.kind())
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
