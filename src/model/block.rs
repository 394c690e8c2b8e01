//! One transformer block.

use super::attention::{CausalSelfAttention, Positions};
use super::config::ModelConfig;
use super::kv_cache::LayerCache;
use super::mlp::Mlp;
use super::norm::Norm;
use tch::{Device, Tensor};

/// Attention and MLP, each behind a norm, each added to the residual stream.
#[derive(Debug)]
pub struct Block {
    /// Before attention.
    pub norm_1: Norm,
    /// Attention.
    pub attn: CausalSelfAttention,
    /// Before the MLP.
    pub norm_2: Norm,
    /// Feed-forward.
    pub mlp: Mlp,
    parallel_residual: bool,
}

impl Block {
    /// An uninitialised block.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        Self {
            norm_1: Norm::new(config, device),
            attn: CausalSelfAttention::new(config, device),
            norm_2: Norm::new(config, device),
            mlp: Mlp::new(config, device),
            parallel_residual: config.parallel_residual,
        }
    }

    /// `x + attn(norm_1(x))`, then `x + mlp(norm_2(x))`; or both of the same x (parallel residual).
    ///
    /// # Shapes
    /// x (B, T, C) -> (B, T, C).
    pub fn forward(
        &self,
        x: &Tensor,
        at: &Positions,
        cache: Option<&mut LayerCache>,
        fused: bool,
    ) -> Tensor {
        let attn = self.attn.forward(&self.norm_1.forward(x, fused), at, cache); // (B, T, C)
        if self.parallel_residual {
            let mlp = self.mlp.forward(&self.norm_2.forward(x, fused)); // (B, T, C)
            return mlp + attn + x;
        }
        let x = attn + x;
        self.mlp.forward(&self.norm_2.forward(&x, fused)) + &x
    }
}
