//! Rotary position embedding.

use tch::{Kind, Tensor};

/// Rotates the first n of each head's D dimensions: `x cos + rotate_half(x) sin`, where
/// `rotate_half([x1, x2]) = [-x2, x1]`; the rest passes through.
///
/// # Shapes
/// x (B, H, T, D); cos, sin (T, n) fp32, n <= D -> (B, H, T, D), dtype of x.
///
/// # Numerics
/// fp32 inside, rounded once.
///
/// # Source
/// `apply_rope` of litgpt; `apply_rotary_pos_emb` of transformers.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (d, n) = (x.size()[3], cos.size()[1]);
    let rotated = x.narrow(3, 0, n).to_kind(Kind::Float); // (B, H, T, n)
    let halves = rotated.chunk(2, 3); // (B, H, T, n/2) x2
    let half_turn = Tensor::cat(&[&halves[1].neg(), &halves[0]], 3); // (B, H, T, n)
    let rotated = (&rotated * cos + half_turn * sin).to_kind(x.kind()); // (B, H, T, n)
    if n == d {
        return rotated;
    }
    Tensor::cat(&[&rotated, &x.narrow(3, n, d - n)], 3) // (B, H, T, D)
}
