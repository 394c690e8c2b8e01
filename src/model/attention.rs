//! Causal self-attention with grouped queries and rotary positions.

use super::config::ModelConfig;
use super::kv_cache::LayerCache;
use super::linear::Linear;
use crate::config::AttentionBackend;
use crate::ops::{self, Mask};
use tch::{Device, Tensor};

/// What all blocks share: where they are in the sequence, and which kernels they use.
pub struct Positions {
    /// (T, n_elem) fp32
    pub cos: Tensor,
    /// (T, n_elem) fp32
    pub sin: Tensor,
    /// Kernels of attention.
    pub backend: AttentionBackend,
    /// Fused kernels, or their plain references.
    pub fused: bool,
}

impl Positions {
    /// Another handle on the same tables.
    pub fn shallow_clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone(), ..*self }
    }
}

/// `proj(attention(rope(q), rope(k), v))` over one packed QKV projection.
#[derive(Debug)]
pub struct CausalSelfAttention {
    /// ((H + 2G) D, C), rows ordered `[Q; K; V]`
    pub qkv: Linear,
    /// (C, H D)
    pub proj: Linear,
    n_head: i64,
    n_query_groups: i64,
    head_size: i64,
}

impl CausalSelfAttention {
    /// An uninitialised layer.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let (c, width) = (config.n_embd, config.n_head * config.head_size);
        Self {
            qkv: Linear::new(c, config.qkv_rows(), config.attn_bias, device),
            proj: Linear::new(width, c, config.bias, device),
            n_head: config.n_head,
            n_query_groups: config.n_query_groups,
            head_size: config.head_size,
        }
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        Self { qkv: self.qkv.shallow_clone(), proj: self.proj.shallow_clone(), ..*self }
    }

    /// With a cache, x continues the cached sequence: keys and values are appended to it.
    ///
    /// # Shapes
    /// x (B, T, C) -> (B, T, C).
    pub fn forward(&self, x: &Tensor, at: &Positions, cache: Option<&mut LayerCache>) -> Tensor {
        let (b, t, _) = x.size3().expect("x is (B, T, C)");
        let (h, g, d) = (self.n_head, self.n_query_groups, self.head_size);

        let qkv = self.qkv.forward(x, at.fused); // (B, T, (H+2G)*D)
        let qkv = ops::rope_qkv(&qkv, &at.cos, &at.sin, h + g, d, at.fused); // unchanged
        let qkv = qkv.view([b, t, h + 2 * g, d]); // (B, T, H+2G, D)

        let y = match cache {
            None => ops::attention_qkv(&qkv, h, g, Mask::CAUSAL, at.backend), // (B, H, T, D)
            Some(cache) => {
                let (q, k, v) = ops::split_heads(&qkv, h, g); // (B, H, T, D), (B, G, T, D) x2
                let (k, v) = cache.append(&k, &v); // (B, G, S, D) x2, S = cached + T
                ops::attention(&q, &k, &v, Mask::CAUSAL, at.backend) // (B, H, T, D)
            }
        };
        let y = y.transpose(1, 2).reshape([b, t, h * d]); // (B, T, H*D)
        self.proj.forward(&y, at.fused) // (B, T, C)
    }
}
