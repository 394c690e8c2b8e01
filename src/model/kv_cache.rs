//! Keys and values of the tokens seen so far, so that decoding reads each token once: the plain cache, in which a
//! sequence lies in one piece. Serving many sequences needs [`super::paged_cache`].

use super::config::ModelConfig;
use crate::config::AttentionBackend;
use crate::ops::{self, Mask};
use tch::{Device, Kind, Tensor};

/// Cache of one block.
#[derive(Debug)]
pub struct LayerCache {
    /// (B, G, S_max, D), rotated
    k: Tensor,
    /// (B, G, S_max, D)
    v: Tensor,
    len: i64,
}

impl LayerCache {
    /// Attention of T new tokens to themselves and to all before them, whose keys and values are kept.
    ///
    /// # Shapes
    /// q (B, H, T, D), k, v (B, G, T, D) -> (B, H, T, D).
    pub fn attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        backend: AttentionBackend,
    ) -> Tensor {
        let (k, v) = self.append(k, v); // (B, G, S, D) x2, S = cached + T
        ops::attention(q, &k, &v, Mask::CAUSAL, backend) // (B, H, T, D)
    }

    /// Appends T tokens and returns all S = old + T.
    ///
    /// # Shapes
    /// k, v (B, G, T, D) -> views (B, G, S, D) of the cache.
    ///
    /// # Panics
    /// Where the cache is full: callers limit the sequence to its length.
    fn append(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let t = k.size()[2];
        let (room, s) = (self.k.size()[2], self.len + t);
        assert!(s <= room, "KV cache of {room} tokens cannot take {s}");
        self.k.narrow(2, self.len, t).copy_(k);
        self.v.narrow(2, self.len, t).copy_(v);
        self.len = s;
        (self.k.narrow(2, 0, s), self.v.narrow(2, 0, s)) // (B, G, S, D) x2
    }
}

/// Cache of all blocks.
#[derive(Debug)]
pub struct KvCache {
    /// One a block.
    pub layers: Vec<LayerCache>,
}

impl KvCache {
    /// Room for `max_length` tokens of B sequences. Bytes: 2 L B G S D times the size of `kind`.
    pub fn new(
        config: &ModelConfig,
        batch: i64,
        max_length: i64,
        kind: Kind,
        device: Device,
    ) -> Self {
        let shape = [batch, config.n_query_groups, max_length, config.head_size];
        let layer = |_| LayerCache {
            k: Tensor::zeros(shape, (kind, device)),
            v: Tensor::zeros(shape, (kind, device)),
            len: 0,
        };
        Self { layers: (0..config.n_layer).map(layer).collect() }
    }

    /// Bytes for `tokens` tokens of one sequence: 2 L S G D times the size of `kind`.
    pub fn bytes(config: &ModelConfig, tokens: usize, kind: Kind) -> u64 {
        let values = 2 * config.n_layer * config.n_query_groups * config.head_size;
        values as u64 * tokens as u64 * kind.elt_size_in_bytes() as u64
    }

    /// Tokens held.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: i64) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }
}
