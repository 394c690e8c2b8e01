//! RMSNorm of the Llama family, LayerNorm of the GPT-NeoX family.

use super::config::{ModelConfig, NormClass};
use crate::ops;
use tch::{Device, Kind, Tensor};

/// Either norm, chosen by `norm_class`; both keep their statistics in fp32.
#[derive(Debug)]
pub struct Norm {
    /// (C,), starts at 1
    pub weight: Tensor,
    /// (C,), LayerNorm only, starts at 0
    pub bias: Option<Tensor>,
    /// Added to the mean square, or to the variance.
    pub eps: f64,
}

impl Norm {
    /// A fresh norm over the last `n_embd` values.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let options = (Kind::Float, device);
        let with_bias = config.norm_class == NormClass::LayerNorm;
        Self {
            weight: Tensor::ones([config.n_embd], options),
            bias: with_bias.then(|| Tensor::zeros([config.n_embd], options)),
            eps: config.norm_eps,
        }
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight: self.weight.shallow_clone(), bias, eps: self.eps }
    }

    /// `(norm(sum), sum)`, where `sum` is `x + residual`, or x where there is no residual.
    ///
    /// # Shapes
    /// x, residual (.., C) -> (.., C) x2, dtype of x.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, fused: bool) -> (Tensor, Tensor) {
        let (weight, eps) = (&self.weight, self.eps);
        match (&self.bias, residual) {
            (None, Some(residual)) => ops::add_rms_norm(x, residual, weight, eps, fused),
            (None, None) => (ops::rms_norm(x, weight, eps, fused), x.shallow_clone()),
            (Some(bias), _) => {
                let sum = residual.map_or_else(|| x.shallow_clone(), |residual| x + residual);
                (ops::layer_norm(&sum, weight, bias, eps), sum)
            }
        }
    }
}
