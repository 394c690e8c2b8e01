//! Causal self-attention with grouped queries and rotary positions.

use super::config::ModelConfig;
use super::linear::Linear;
use super::paged_cache::LayerOf;
use crate::config::AttentionBackend;
use crate::ops::{self, Branches, Documents, Mask};
use tch::{Device, Tensor};

/// What all blocks share: where they are in the sequence, and which kernels they use.
pub struct Positions {
    /// (T, n_elem) fp32
    pub cos: Tensor,
    /// (T, n_elem) fp32
    pub sin: Tensor,
    /// Where documents lie in the rows; `None`: each row is one.
    pub documents: Option<Documents>,
    /// What tokens see in place of what `documents` says.
    pub branches: Option<Branches>,
    /// How things are computed.
    pub kernels: Kernels,
}

/// Which kernels a pass through the model uses.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Kernels of attention.
    pub attention: AttentionBackend,
    /// Fused kernels, or their plain references.
    pub fused: bool,
    /// The output of each norm is computed again in the backward pass instead of being kept.
    pub recompute_norms: bool,
    /// Matrix products of the blocks in e4m3, where the layers have e4m3 weights.
    pub fp8: bool,
    /// Adapters drop out.
    pub train: bool,
    /// Adapters count.
    pub lora: bool,
}

impl Kernels {
    /// Whether norms and the layers behind them are one function.
    pub fn recomputes_norms(&self) -> bool {
        self.fused && (self.recompute_norms || self.fp8)
    }
}

impl Positions {
    /// Another handle on the same tables.
    pub fn shallow_clone(&self) -> Self {
        Self {
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            documents: self.documents.as_ref().map(Documents::shallow_clone),
            branches: self.branches.as_ref().map(Branches::shallow_clone),
            kernels: self.kernels,
        }
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

    /// `qkv` is the packed projection of the normed x. With a cache, x continues the cached sequence: keys and values
    /// are appended to it.
    ///
    /// # Shapes
    /// qkv (B, T, (H+2G)*D) -> (B, T, C).
    pub fn forward(&self, qkv: &Tensor, at: &Positions, cache: Option<LayerOf>) -> Tensor {
        let (b, t, _) = qkv.size3().expect("qkv is (B, T, (H+2G)*D)");
        let (h, g, d) = (self.n_head, self.n_query_groups, self.head_size);

        let with = &at.kernels;
        let y = match cache {
            Some(cache) => cache.attend(qkv, at, (h, g)), // (B, T, H*D)
            None => {
                let mask = Mask { causal: true, documents: at.documents.as_ref() };
                let (backend, angles) = (with.attention, (&at.cos, &at.sin));
                let y = match &at.branches {
                    Some(all) => ops::rope_attention_branches(qkv, angles, (h, g), all, with.fused),
                    None => ops::rope_attention_qkv(qkv, angles, (h, g), mask, backend, with.fused),
                }; // (B, H, T, D)
                y.transpose(1, 2).reshape([b, t, h * d]) // (B, T, H*D)
            }
        };
        self.proj.forward(&y, with) // (B, T, C)
    }
}
