//! Rotary position embedding.

use super::{fused_here, or_panic};
use crate::ffi;
use tch::{Device, Kind, Tensor};

/// Rotates queries and keys of a packed projection `[Q; K; V]`: the first `heads` heads of each token.
///
/// `fused` turns them in place, by `csrc/rope.cu` on a GPU and on the CPU where nothing is differentiated, so `qkv` must not
/// be used afterwards; otherwise [`rope_reference`], and `qkv` is unchanged.
///
/// # Shapes
/// qkv (B, T, (H+2G)*D); cos, sin (T, n) fp32, n <= D -> (B, T, (H+2G)*D), dtype of qkv; heads = H + G.
///
/// # Numerics
/// fp32 inside, rounded once; test `rope_agrees_with_its_reference`.
///
/// # Source
/// `apply_rope` of litgpt; `apply_rotary_pos_emb` of transformers.
pub fn rope_qkv(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    head_size: i64,
    fused: bool,
) -> Tensor {
    if fused && fused_here(qkv) {
        return or_panic(ffi::rope(&qkv.contiguous(), cos, sin, heads, head_size));
    }
    let (b, t, width) = qkv.size3().expect("qkv is (B, T, (H+2G)*D)");
    let all = width / head_size;
    let x = qkv.view([b, t, all, head_size]); // (B, T, H+2G, D)
    let plain = qkv.device() == Device::Cpu && qkv.kind() == Kind::Float && !qkv.requires_grad();
    if fused && plain && qkv.is_contiguous() {
        turn(&x.narrow(2, 0, heads), cos, sin);
        return qkv.shallow_clone();
    }
    let rotated = rope_reference(&x.narrow(2, 0, heads).transpose(1, 2), cos, sin); // (B, H+G, T, D)
    let rest = x.narrow(2, heads, all - heads); // (B, T, G, D)
    Tensor::cat(&[&rotated.transpose(1, 2), &rest], 2).view([b, t, width]) // (B, T, (H+2G)*D)
}

/// [`rope_reference`] in place, to the same bits, with half of its passes over memory.
///
/// # Shapes
/// x (B, T, H, D); cos, sin (T, n) fp32, n <= D.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) {
    let half = cos.size()[1] / 2;
    let halves = |x: &Tensor| [0, half].map(|from| x.narrow(-1, from, half));
    let ([mut a, mut b], [cos_a, cos_b]) = (halves(x), halves(&cos.unsqueeze(1))); // (B, T, H, n/2), (T, 1, n/2)
    let [sin_a, sin_b] = halves(&sin.unsqueeze(1)); // (T, 1, n/2)
    let turned = &a * &cos_a - &b * &sin_a;
    let _ = b.g_mul_(&cos_b).g_add_(&(&a * &sin_b)); // no addcmul, which rounds otherwise
    a.copy_(&turned);
}

/// The plain formula: rotates the first n of each head's D dimensions: `x cos + rotate_half(x) sin`, where
/// `rotate_half([x1, x2]) = [-x2, x1]`; the rest passes through.
///
/// # Shapes
/// x (B, H, T, D); cos, sin (T, n) fp32, n <= D -> (B, H, T, D), dtype of x.
///
/// # Numerics
/// fp32 inside (fp64 for fp64), rounded once.
pub fn rope_reference(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (d, n) = (x.size()[3], cos.size()[1]);
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let rotated = x.narrow(3, 0, n).to_kind(kind); // (B, H, T, n)
    let halves = rotated.chunk(2, 3); // (B, H, T, n/2) x2
    let half_turn = Tensor::cat(&[&halves[1].neg(), &halves[0]], 3); // (B, H, T, n)
    let rotated = (&rotated * cos + half_turn * sin).to_kind(x.kind()); // (B, H, T, n)
    if n == d {
        return rotated;
    }
    Tensor::cat(&[&rotated, &x.narrow(3, n, d - n)], 3) // (B, H, T, D)
}
