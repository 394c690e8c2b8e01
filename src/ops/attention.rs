//! Causal attention with grouped queries.

use crate::config::AttentionBackend;
use tch::{Kind, Tensor};

/// `softmax(q k^T / sqrt(D) + causal mask) v`; head h of q reads key/value head `h / (H/G)`.
///
/// The T queries are the last T of the S positions. `math` is [`attention_reference`]; the others are
/// libtorch's `scaled_dot_product_attention`, whose kernels [`crate::ffi::set_sdp_backends`] limits.
///
/// # Shapes
/// q (B, H, T, D); k, v (B, G, S, D), S >= T -> (B, H, T, D).
///
/// # Numerics
/// Scores and softmax in fp32 inside the fused kernels; result in q's dtype.
///
/// # Source
/// FlashAttention-2 (arXiv 2307.08691); `torch.nn.functional.scaled_dot_product_attention`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, backend: AttentionBackend) -> Tensor {
    let (t, s) = (q.size()[2], k.size()[2]);
    let grouped = q.size()[1] != k.size()[1];
    if backend == AttentionBackend::Math {
        return attention_reference(q, k, v);
    }
    // libtorch's CPU kernel has no grouped form: repeat the heads there, which it would do anyway.
    let (k, v) = match grouped && !q.device().is_cuda() {
        true => (repeat_heads(k, q.size()[1]), repeat_heads(v, q.size()[1])), // (B, H, S, D)
        false => (k.shallow_clone(), v.shallow_clone()),
    };
    // `is_causal` aligns the diagonal to the first key, right for T == S only; one query sees every key.
    let mask = (t > 1 && t < s).then(|| causal_mask(t, s, q));
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, &k, &v, mask, 0.0, t == s && t > 1, None, grouped)
}

/// The plain formula, with a (T, S) matrix a head in memory.
///
/// # Shapes
/// As [`attention`].
///
/// # Numerics
/// Scores, softmax and sums in fp32, result in q's dtype. Held against the fused kernels by the test
/// `attention_kernels_agree_with_the_plain_formula`.
pub fn attention_reference(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (h, t, d) = (q.size()[1], q.size()[2], q.size()[3]);
    let s = k.size()[2];
    let k = repeat_heads(k, h).to_kind(Kind::Float); // (B, H, S, D)
    let v = repeat_heads(v, h).to_kind(Kind::Float); // (B, H, S, D)
    let scores = q.to_kind(Kind::Float).matmul(&k.transpose(2, 3)) / (d as f64).sqrt(); // (B, H, T, S)
    let scores = scores.masked_fill(&causal_mask(t, s, q).logical_not(), f64::NEG_INFINITY);
    scores.softmax(-1, Kind::Float).matmul(&v).to_kind(q.kind()) // (B, H, T, D)
}

/// (B, G, S, D) -> (B, H, S, D), each head H/G times in a row.
fn repeat_heads(x: &Tensor, n_head: i64) -> Tensor {
    x.repeat_interleave_self_int(n_head / x.size()[1], 1, None)
}

/// (T, S) of bool: query t, at position S - T + t, sees keys up to its own position.
fn causal_mask(t: i64, s: i64, like: &Tensor) -> Tensor {
    Tensor::ones([t, s], (Kind::Bool, like.device())).tril(s - t)
}
