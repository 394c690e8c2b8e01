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
    eps: f64,
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

    /// # Shapes
    /// x (.., C) -> (.., C), dtype of x.
    pub fn forward(&self, x: &Tensor, fused: bool) -> Tensor {
        match &self.bias {
            None => ops::rms_norm(x, &self.weight, self.eps, fused),
            Some(bias) => ops::layer_norm(x, &self.weight, bias, self.eps),
        }
    }
}
