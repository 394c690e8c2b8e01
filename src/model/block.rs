//! One transformer block.

use super::attention::{CausalSelfAttention, Positions};
use super::config::ModelConfig;
use super::mlp::Mlp;
use super::norm::Norm;
use super::paged_cache::LayerOf;
use crate::ops;
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
    /// The residual stream x comes and goes as two summands, so that each addition is fused with the norm
    /// after it: x = `x + delta`, and the next x is the sum of the two results.
    ///
    /// # Shapes
    /// x, delta (B, T, C) -> (B, T, C) x2.
    pub fn forward(
        &self,
        x: &Tensor,
        delta: Option<&Tensor>,
        at: &Positions,
        cache: Option<LayerOf>,
    ) -> (Tensor, Tensor) {
        let with = &at.kernels;
        let (qkv, x) = self.attn.qkv.after(&self.norm_1, x, delta, with); // (B, T, (H+2G)*D), (B, T, C)
        let attn = self.attn.forward(&qkv, at, cache); // (B, T, C)
        if self.parallel_residual {
            let (mlp, x) = self.mlp.after(&self.norm_2, &x, None, with); // (B, T, C) x2
            return (x, mlp + attn);
        }
        let (mlp, x) = self.mlp.after(&self.norm_2, &x, Some(&attn), with); // (B, T, C) x2
        (x, mlp)
    }

    /// [`Block::forward`], of which only x and delta are kept; the backward pass runs the block again.
    /// 4 C bytes a token in bf16 instead of TinyLlama's 24 C, for a third more arithmetic.
    ///
    /// # Shapes
    /// x, delta (B, T, C) -> (B, T, C) x2.
    pub fn forward_recomputed(
        &self,
        x: &Tensor,
        delta: Option<&Tensor>,
        at: &Positions,
    ) -> (Tensor, Tensor) {
        let (block, at) = (self.shallow_clone(), at.shallow_clone()); // outlive this call in the graph
        let inputs: Vec<&Tensor> = [x].into_iter().chain(delta).collect();
        let [x, delta] = ops::recompute(&inputs, move |inputs| {
            let (x, delta) = block.forward(&inputs[0], inputs.get(1), &at, None);
            [x, delta] // (B, T, C) x2
        });
        (x, delta)
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        Self {
            norm_1: self.norm_1.shallow_clone(),
            attn: self.attn.shallow_clone(),
            norm_2: self.norm_2.shallow_clone(),
            mlp: self.mlp.shallow_clone(),
            parallel_residual: self.parallel_residual,
        }
    }
}
