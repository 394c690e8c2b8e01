//! Attention with grouped queries: causal or full, within documents or across a whole row.

use super::{fused_here, or_panic, say_once};
use crate::config::AttentionBackend;
use crate::ffi::{self, FlashOptions};
use tch::{Device, Kind, Tensor};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// Only keys up to the query's own position.
    pub causal: bool,
    /// Only keys of the query's own document.
    pub documents: Option<&'a Documents>,
}

impl Mask<'_> {
    /// Keys up to the query's own position.
    pub const CAUSAL: Self = Self { causal: true, documents: None };
    /// All keys.
    pub const FULL: Self = Self { causal: false, documents: None };
}

/// Where documents lie in packed rows.
#[derive(Debug)]
pub struct Documents {
    /// (B, S) i32: for each position the first position of its document.
    pub start: Tensor,
    /// (B, S) i32: the position after the last one of its document.
    pub end: Tensor,
    /// (B, 1, S, S): 0 where a query sees a key, else -inf; for kernels that know no documents.
    bias: Option<Tensor>,
}

impl Documents {
    /// From both tables, (B, S) i32.
    pub fn new(start: Tensor, end: Tensor) -> Self {
        Self { start, end, bias: None }
    }

    /// Another handle on the same tables.
    pub fn shallow_clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { start: self.start.shallow_clone(), end: self.end.shallow_clone(), bias }
    }

    /// The tables in memory of their own.
    pub fn copy(&self) -> Self {
        Self::new(self.start.copy(), self.end.copy())
    }

    /// Takes over the values of tables of the same shape, and no matrix.
    pub fn copy_(&mut self, from: &Self) {
        self.start.copy_(&from.start);
        self.end.copy_(&from.end);
        self.bias = None;
    }

    /// For causal attention of whole rows by `backend` over heads of size `d`, with x's dtype and device: where that
    /// is libtorch's, all layers share one matrix.
    ///
    /// # Shapes
    /// x (B, S, C).
    pub fn ready_for(&self, x: &Tensor, d: i64, backend: AttentionBackend) -> Self {
        let (mut documents, s) = (self.shallow_clone(), x.size()[1]);
        if kernel(x, s, d, backend) == Kernel::Libtorch {
            let mask = Mask { causal: true, documents: Some(self) };
            let hidden = visible(s, s, mask, x).logical_not(); // (B, 1, S, S)
            let mut bias = Tensor::zeros(hidden.size(), (x.kind(), x.device()));
            documents.bias = Some(bias.masked_fill_(&hidden, f64::NEG_INFINITY));
        }
        documents
    }

    /// From the lengths of the documents of each row, which must fill rows of equal length.
    ///
    /// # Panics
    /// Where a length is not positive or rows differ in length.
    pub fn from_lengths(rows: &[Vec<i64>], device: Device) -> Self {
        let s: i64 = rows.first().map_or(0, |row| row.iter().sum());
        let (mut start, mut end) = (Vec::new(), Vec::new());
        for row in rows {
            let mut at = 0;
            for &length in row {
                assert!(length > 0, "a document of {length} tokens");
                start.extend((0..length).map(|_| at as i32));
                end.extend((0..length).map(|_| (at + length) as i32));
                at += length;
            }
            assert_eq!(
                at, s,
                "documents of a row sum to {at} tokens, those of the first row to {s}"
            );
        }
        let tensor = |values: &[i32]| {
            Tensor::from_slice(values).view([rows.len() as i64, s]).to_device(device) // (B, S)
        };
        Self::new(tensor(&start), tensor(&end))
    }
}

/// `softmax(q k^T / sqrt(D) + mask) v`; head h of q reads key/value head `h / (H/G)`.
///
/// The T queries are the last T of the S positions. `auto` and `flash` use the kernels of
/// `csrc/flash_attention` (bf16 and fp16, D 64 or 128) and libtorch's for what those do not cover; `cudnn`
/// is libtorch's, limited by [`crate::ffi::set_sdp_backends`]; `math` is [`attention_reference`].
///
/// # Shapes
/// q (B, H, T, D); k, v (B, G, S, D), S >= T where causal -> (B, H, T, D).
///
/// # Numerics
/// Scores and softmax in fp32 inside the kernels; result in q's dtype; test
/// `flash_attention_agrees_with_the_plain_formula`. Gradients repeat bit for bit where deterministic
/// algorithms are on.
///
/// # Source
/// FlashAttention-2 (arXiv 2307.08691), FlashAttention-3 (arXiv 2407.08608);
/// `torch.nn.functional.scaled_dot_product_attention`.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Mask,
    backend: AttentionBackend,
) -> Tensor {
    match kernel(q, q.size()[2], q.size()[3], backend) {
        Kernel::Own => or_panic(ffi::flash_attention(q, k, v, options(mask))).0,
        Kernel::Libtorch => libtorch_attention(q, k, v, mask),
        Kernel::Plain => attention_reference(q, k, v, mask),
    }
}

/// [`attention`] of a packed projection, where queries and keys are the same T positions; the gradient is
/// packed as well, without copies.
///
/// # Shapes
/// qkv (B, T, H+2G, D) -> (B, H, T, D).
pub fn attention_qkv(
    qkv: &Tensor,
    n_head: i64,
    n_query_groups: i64,
    mask: Mask,
    backend: AttentionBackend,
) -> Tensor {
    let (h, g) = (n_head, n_query_groups);
    if kernel(qkv, qkv.size()[1], qkv.size()[3], backend) == Kernel::Own {
        return or_panic(ffi::flash_attention_qkv(qkv, h, g, None, options(mask)));
    }
    let (q, k, v) = split_heads(qkv, h, g); // (B, H, T, D), (B, G, T, D) x2
    attention(&q, &k, &v, mask, backend)
}

/// [`attention_qkv`] of a packed projection whose queries and keys are turned first ([`super::rope_qkv`]).
///
/// `fused` with the kernels of `csrc/flash_attention` is one function: qkv is turned in place, so it must not be used
/// afterwards, and the queries' gradient is turned back while attention's backward pass rounds it, which spares RoPE's
/// own most of its bytes; elsewhere the two after each other.
///
/// # Shapes
/// qkv (B, T, (H+2G)*D); cos, sin (T, n) fp32, n <= D -> (B, H, T, D).
///
/// # Numerics
/// dQ is rounded once, after it was turned back; test `rope_and_attention_in_one_agree_with_the_two`.
pub fn rope_attention_qkv(
    qkv: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    (n_head, n_query_groups): (i64, i64),
    mask: Mask,
    backend: AttentionBackend,
    fused: bool,
) -> Tensor {
    let (h, g) = (n_head, n_query_groups);
    let (b, t, width) = qkv.size3().expect("qkv is (B, T, (H+2G)*D)");
    let d = width / (h + 2 * g);
    let heads = |x: &Tensor| x.view([b, t, h + 2 * g, d]); // (B, T, H+2G, D)
    if fused && kernel(qkv, t, d, backend) == Kernel::Own {
        let qkv = heads(qkv).contiguous();
        return or_panic(ffi::flash_attention_qkv(&qkv, h, g, Some((cos, sin)), options(mask)));
    }
    let qkv = super::rope_qkv(qkv, cos, sin, h + g, d, fused); // (B, T, (H+2G)*D)
    attention_qkv(&heads(&qkv), h, g, mask, backend)
}

/// A row of T tokens in S stretches of N, and what each sees: of K tokens, those on its own path. Short stretches are filled up
/// with any tokens, which nobody reads.
#[derive(Debug)]
pub struct Branches {
    /// (S * N,) i64: tokens of the row.
    pub queries: Tensor,
    /// (S * K,) i64: tokens of the row.
    pub keys: Tensor,
    /// (S, 1, N, K) in the dtype of the weights: 0 where one of the N sees one of the K, else -inf.
    pub bias: Tensor,
    /// (T,) i64: where a token of the row is among the S * N.
    pub back: Tensor,
}

impl Branches {
    /// Another handle on the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            queries: self.queries.shallow_clone(),
            keys: self.keys.shallow_clone(),
            bias: self.bias.shallow_clone(),
            back: self.back.shallow_clone(),
        }
    }
}

/// [`rope_attention_qkv`] by libtorch's kernels, where tokens see only some of those before them: stretch by stretch, so that
/// nothing is computed between stretches that do not see each other. The heads of a group are rows of one head.
///
/// # Shapes
/// qkv (1, T, (H+2G)*D); cos, sin (T, n) fp32 -> (1, H, T, D).
pub fn rope_attention_branches(
    qkv: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    (n_head, n_query_groups): (i64, i64),
    branches: &Branches,
    fused: bool,
) -> Tensor {
    let (h, g) = (n_head, n_query_groups);
    let (_, t, width) = qkv.size3().expect("qkv is (1, T, (H+2G)*D)");
    let (s, _, n, k) = branches.bias.size4().expect("a bias is (S, 1, N, K)");
    let (r, d) = (h / g, width / (h + 2 * g)); // heads of a group
    let x = super::rope_qkv(qkv, cos, sin, h + g, d, fused).view([t, h + 2 * g, d]);
    let q = x.narrow(1, 0, h).index_select(0, &branches.queries); // (S*N, H, D)
    let q = q.view([s, n, g, r, d]).permute([0, 2, 3, 1, 4]).reshape([s, g, r * n, d]);
    let seen = |from: i64| {
        let x = x.narrow(1, from, g).index_select(0, &branches.keys); // (S*K, G, D)
        x.view([s, k, g, d]).transpose(1, 2) // (S, G, K, D)
    };
    let bias = branches.bias.repeat([1, 1, r, 1]); // (S, 1, R*N, K)
    let (keys, values) = (seen(h), seen(h + g));
    let y = Tensor::scaled_dot_product_attention(
        &q,
        &keys,
        &values,
        Some(&bias),
        0.0,
        false,
        None,
        false,
    ); // (S, G, R*N, D)
    let y = y.view([s, g, r, n, d]).permute([1, 2, 0, 3, 4]).reshape([h, s * n, d]);
    y.index_select(1, &branches.back).unsqueeze(0) // (1, H, T, D)
}

/// Views of a packed projection.
///
/// # Shapes
/// qkv (B, T, H+2G, D) -> (B, H, T, D), (B, G, T, D) x2.
pub fn split_heads(qkv: &Tensor, n_head: i64, n_query_groups: i64) -> (Tensor, Tensor, Tensor) {
    let parts = qkv.split_with_sizes([n_head, n_query_groups, n_query_groups], 2); // (B, T, H | G | G, D)
    let heads_first = |i: usize| parts[i].transpose(1, 2);
    (heads_first(0), heads_first(1), heads_first(2))
}

#[derive(PartialEq)]
enum Kernel {
    /// `csrc/flash_attention`
    Own,
    /// `scaled_dot_product_attention`
    Libtorch,
    /// [`attention_reference`]
    Plain,
}

/// Which kernel computes attention of `t` queries of size `d` with x's dtype and device.
fn kernel(x: &Tensor, t: i64, d: i64, backend: AttentionBackend) -> Kernel {
    match backend {
        AttentionBackend::Math => return Kernel::Plain,
        AttentionBackend::Cudnn => return Kernel::Libtorch,
        AttentionBackend::Auto | AttentionBackend::Flash => {}
    }
    if fused_here(x) && flash_covers(x.kind(), t, d) {
        return Kernel::Own;
    }
    if fused_here(x) && flash_covers(x.kind(), t, 64) {
        say_once(format!(
            "attention   libtorch's kernels: ours cover head sizes 64 and 128, this model has {d}"
        ));
    }
    Kernel::Libtorch
}

/// Whether the kernels of `csrc/flash_attention` compute `t` queries of this dtype and head size. One query leaves
/// nothing to tile: a decoding step is libtorch's.
pub fn flash_covers(kind: Kind, t: i64, d: i64) -> bool {
    matches!(kind, Kind::BFloat16 | Kind::Half) && t > 1 && (d == 64 || d == 128)
}

fn options<'a>(mask: Mask<'a>) -> FlashOptions<'a> {
    FlashOptions {
        causal: mask.causal,
        documents: mask.documents.map(|d| (&d.start, &d.end)),
        deterministic: false, // or what libtorch's switch says
        arch: 0,
    }
}

fn libtorch_attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Tensor {
    let (t, s) = (q.size()[2], k.size()[2]);
    let grouped = q.size()[1] != k.size()[1];
    // libtorch's CPU kernel has no grouped form: repeat the heads there, which it would do anyway.
    let (k, v) = match grouped && !q.device().is_cuda() {
        true => (repeat_heads(k, q.size()[1]), repeat_heads(v, q.size()[1])), // (B, H, S, D)
        false => (k.shallow_clone(), v.shallow_clone()),
    };
    // `is_causal` aligns the diagonal to the first key, right for T == S only; one query sees every key.
    let plain_causal = mask.documents.is_none() && (t == s || t == 1);
    let ready = mask.documents.and_then(|documents| documents.bias.as_ref());
    let matrix = match ready.filter(|_| mask.causal && t == s) {
        Some(bias) => Some(bias.shallow_clone()), // (B, 1, T, S)
        None => (mask.documents.is_some() || (mask.causal && !plain_causal))
            .then(|| visible(t, s, mask, q)), // (B or 1, 1, T, S)
    };
    let causal = mask.causal && plain_causal && t > 1;
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, &k, &v, matrix, 0.0, causal, None, grouped)
}

/// The plain formula, with a (T, S) matrix a head in memory.
///
/// # Shapes
/// As [`attention`].
///
/// # Numerics
/// Scores, softmax and sums in fp32 (fp64 for fp64), result in q's dtype.
pub fn attention_reference(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Tensor {
    let (h, t, d) = (q.size()[1], q.size()[2], q.size()[3]);
    let s = k.size()[2];
    let kind = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let k = repeat_heads(k, h).to_kind(kind); // (B, H, S, D)
    let v = repeat_heads(v, h).to_kind(kind); // (B, H, S, D)
    let scores = q.to_kind(kind).matmul(&k.transpose(2, 3)) / (d as f64).sqrt(); // (B, H, T, S)
    let scores = scores.masked_fill(&visible(t, s, mask, q).logical_not(), f64::NEG_INFINITY);
    scores.softmax(-1, kind).matmul(&v).to_kind(q.kind()) // (B, H, T, D)
}

/// (B, G, S, D) -> (B, H, S, D), each head H/G times in a row.
fn repeat_heads(x: &Tensor, n_head: i64) -> Tensor {
    x.repeat_interleave_self_int(n_head / x.size()[1], 1, None)
}

/// (B, 1, T, S) or (1, 1, T, S) of bool: what each query, at position S - T + t, sees.
fn visible(t: i64, s: i64, mask: Mask, like: &Tensor) -> Tensor {
    let device = like.device();
    let mut seen = Tensor::ones([1, 1, t, s], (Kind::Bool, device));
    if mask.causal {
        seen = seen.tril(s - t);
    }
    if let Some(documents) = mask.documents {
        let key = Tensor::arange(s, (Kind::Int, device)); // (S,)
        let of_query = |x: &Tensor| x.narrow(1, s - t, t).view([-1, 1, t, 1]); // (B, 1, T, 1)
        let after_start = of_query(&documents.start).le_tensor(&key);
        let before_end = of_query(&documents.end).gt_tensor(&key);
        seen = seen.logical_and(&after_start).logical_and(&before_end); // (B, 1, T, S)
    }
    seen
}
