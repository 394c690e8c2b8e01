//! The decode kernels: one new token for each of several sequences, without a CPU wait.

use super::{Handle, check, cuda_functions, handle};
use anyhow::Result;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use tch::Tensor;

cuda_functions! {
    fn tl_dequantize(weight: *const RawWeight, out: *mut Handle) -> c_int;
    fn tl_decode_attention(
        state: *const RawState,
        layer: *const RawPagedLayer,
        qkv: Handle,
        out: *mut Handle,
    ) -> c_int;
    fn tl_decoder_new(decoder: *const RawDecoder, out: *mut *mut c_void) -> c_int;
    fn tl_decoder_run(decoder: *mut c_void, x: Handle, logits: Handle, rows: c_int) -> c_int;
    fn tl_decoder_free(decoder: *mut c_void);
    fn tl_sample(sample: *const RawSample) -> c_int;
}

/// Most sequences of a [`Decoder`].
pub const DECODER_ROWS: usize = 8;

/// A weight (N, K) of int8 or int4 on the card, as `csrc/decode/weights.cuh` lays it out.
#[derive(Debug)]
pub struct PackedWeight {
    /// (bytes,) of u8: codes and scales
    pub data: Tensor,
    /// 4 or 8.
    pub bits: u32,
    /// Columns that share a scale: 32, 64 or 128.
    pub group: i64,
    /// N
    pub rows: i64,
    /// K
    pub columns: i64,
}

impl PackedWeight {
    /// The weight it stands for, (N, K) of bf16.
    pub fn dequantize(&self) -> Result<Tensor> {
        let mut out: Handle = null_mut();
        // SAFETY: the tensor outlives the call; on success `out` is a new tensor of this side's.
        check(unsafe { tl_dequantize(&DecodeWeight::Packed(self).raw(), &mut out) })?;
        Ok(unsafe { Tensor::from_ptr(out) })
    }

    /// Another handle on the same bytes.
    pub fn shallow_clone(&self) -> Self {
        Self { data: self.data.shallow_clone(), ..*self }
    }
}

/// A weight (N, K).
#[derive(Clone, Copy, Debug)]
pub enum DecodeWeight<'a> {
    /// bf16
    Plain(&'a Tensor),
    /// 4 or 8 bits
    Packed(&'a PackedWeight),
}

impl DecodeWeight<'_> {
    fn raw(&self) -> RawWeight {
        match self {
            Self::Plain(data) => {
                let (rows, columns) = data.size2().unwrap_or_default(); // refused by name on the other side
                RawWeight { data: handle(data), format: 0, group: 128, rows, columns }
            }
            Self::Packed(w) => RawWeight {
                data: handle(&w.data),
                format: if w.bits == 8 { 1 } else { 2 },
                group: w.group as c_int,
                rows: w.rows,
                columns: w.columns,
            },
        }
    }
}

/// Keys and values of a layer in blocks of slots.
#[derive(Clone, Copy, Debug)]
pub struct LayerMemory<'a> {
    /// (slots, G, D) of bf16 or int8
    pub k: &'a Tensor,
    /// (slots, G, D)
    pub v: &'a Tensor,
    /// (slots, G) fp32 of keys and of values, where they are int8
    pub scales: Option<(&'a Tensor, &'a Tensor)>,
}

impl LayerMemory<'_> {
    fn raw(&self) -> RawPagedLayer {
        let (k_scale, v_scale) =
            self.scales.map_or((null_mut(), null_mut()), |(k, v)| (handle(k), handle(v)));
        RawPagedLayer { k: handle(self.k), v: handle(self.v), k_scale, v_scale }
    }
}

/// Where the sequences of a step lie in the cache; on the card.
#[derive(Debug)]
pub struct DecodeState {
    /// (B, blocks) i32
    pub table: Tensor,
    /// (B,) i32 of the new tokens; below 0: nothing is done
    pub positions: Tensor,
    /// (positions, n) fp32
    pub cos: Tensor,
    /// (positions, n) fp32
    pub sin: Tensor,
    /// i32 zeros, B G ceil(H/G/8)
    pub arrived: Tensor,
    /// Tokens in a block.
    pub block_size: i64,
    /// No sequence is longer.
    pub longest: i64,
}

impl DecodeState {
    fn raw(&self) -> RawState {
        RawState {
            table: handle(&self.table),
            positions: handle(&self.positions),
            cos: handle(&self.cos),
            sin: handle(&self.sin),
            arrived: handle(&self.arrived),
            block_size: self.block_size as c_int,
            longest: self.longest as c_int,
        }
    }
}

/// Attention of one new token a sequence: turns queries and keys of qkv (B, (H+2G) D), appends keys and values to the
/// cache -> (B, H D).
pub fn decode_attention(qkv: &Tensor, memory: LayerMemory, state: &DecodeState) -> Result<Tensor> {
    let mut out: Handle = null_mut();
    // SAFETY: the tensors outlive the call; on success `out` is a new tensor of this side's.
    check(unsafe { tl_decode_attention(&state.raw(), &memory.raw(), handle(qkv), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Weights and cache of a layer.
#[derive(Debug)]
pub struct DecodeLayer<'a> {
    /// (C,)
    pub norm_1: &'a Tensor,
    /// (C,)
    pub norm_2: &'a Tensor,
    /// ((H+2G) D, C)
    pub qkv: DecodeWeight<'a>,
    /// (C, H D)
    pub proj: DecodeWeight<'a>,
    /// (2F, C)
    pub gate_up: DecodeWeight<'a>,
    /// (C, F)
    pub mlp_proj: DecodeWeight<'a>,
    /// Keys and values.
    pub memory: LayerMemory<'a>,
}

/// What a [`Decoder`] is made of.
#[derive(Debug)]
pub struct DecoderParts<'a> {
    /// Layers.
    pub layers: &'a [DecodeLayer<'a>],
    /// (C,)
    pub norm: &'a Tensor,
    /// (V, C)
    pub head: DecodeWeight<'a>,
    /// Where the sequences are.
    pub state: &'a DecodeState,
    /// H
    pub heads: i64,
    /// Of the norms.
    pub eps: f64,
}

/// All layers and the head for at most [`DECODER_ROWS`] sequences, by matrix-vector products.
#[derive(Debug)]
pub struct Decoder(*mut c_void);
// SAFETY: nothing of it belongs to a thread.
unsafe impl Send for Decoder {}

impl Decoder {
    /// Keeps handles on all tensors.
    ///
    /// # Errors
    /// Sizes that the kernels do not cover.
    pub fn new(parts: &DecoderParts) -> Result<Self> {
        let layer = |l: &DecodeLayer| RawLayer {
            norm_1: handle(l.norm_1),
            norm_2: handle(l.norm_2),
            qkv: l.qkv.raw(),
            proj: l.proj.raw(),
            gate_up: l.gate_up.raw(),
            mlp_proj: l.mlp_proj.raw(),
            cache: l.memory.raw(),
        };
        let layers: Vec<RawLayer> = parts.layers.iter().map(layer).collect();
        let raw = RawDecoder {
            n_layer: layers.len() as c_int,
            heads: parts.heads as c_int,
            layers: layers.as_ptr(),
            norm: handle(parts.norm),
            head: parts.head.raw(),
            state: parts.state.raw(),
            eps: parts.eps,
        };
        let mut decoder = null_mut();
        // SAFETY: all tensors and the array outlive the call; on success `decoder` is ours.
        check(unsafe { tl_decoder_new(&raw, &mut decoder) })?;
        Ok(Self(decoder))
    }

    /// The logits (B, V) fp32 behind the embeddings x (B, C), which are overwritten. Of the first `rows` sequences.
    ///
    /// # Errors
    /// Too few rows in x or in the logits; CUDA's own.
    pub fn run(&self, x: &Tensor, logits: &Tensor, rows: usize) -> Result<()> {
        // SAFETY: the decoder is live, the tensors outlive the call.
        check(unsafe { tl_decoder_run(self.0, handle(x), handle(logits), rows as c_int) })
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: made by `tl_decoder_new`, freed once.
        unsafe { tl_decoder_free(self.0) }
    }
}

/// What the sampler of each sequence knows; on the card. The new token's count and position move on by one.
#[derive(Debug)]
pub struct SampleState {
    /// (B,) fp32; 0: greedy
    pub temperature: Tensor,
    /// (B,) i32; 0: all
    pub top_k: Tensor,
    /// (B,) fp32; 1: all
    pub top_p: Tensor,
    /// (B,) fp32; 1: off
    pub repetition_penalty: Tensor,
    /// (B, ceil(vocab/32)) i32, a bit an id
    pub seen: Tensor,
    /// (B, 8) i32, the generator's key
    pub key: Tensor,
    /// (B,) i32, draws so far
    pub count: Tensor,
    /// (B,) i32
    pub positions: Tensor,
    /// (B,) i32, the new ids
    pub next: Tensor,
    /// (B,) fp32
    pub log_prob: Tensor,
    /// (B,) i32, 1 where a logit was not finite
    pub not_finite: Tensor,
    /// (B, n) i32, the last n ids
    pub ids: Tensor,
}

/// Chooses the next id of the first `rows` sequences from logits (B, V) among the first `vocab` ids; x (B, C) gets its
/// row of the embedding (V, C).
///
/// # Errors
/// Shapes and dtypes that do not fit; CUDA's own.
pub fn sample(
    logits: &Tensor,
    state: &SampleState,
    rows: usize,
    vocab: i64,
    embedding: &Tensor,
    x: &Tensor,
) -> Result<()> {
    let raw = RawSample {
        rows: rows as c_int,
        vocab: vocab as c_int,
        logits: handle(logits),
        temperature: handle(&state.temperature),
        top_k: handle(&state.top_k),
        top_p: handle(&state.top_p),
        repetition_penalty: handle(&state.repetition_penalty),
        seen: handle(&state.seen),
        key: handle(&state.key),
        count: handle(&state.count),
        positions: handle(&state.positions),
        next: handle(&state.next),
        log_prob: handle(&state.log_prob),
        not_finite: handle(&state.not_finite),
        ids: handle(&state.ids),
        embedding: handle(embedding),
        x: handle(x),
    };
    // SAFETY: the tensors outlive the call.
    check(unsafe { tl_sample(&raw) })
}

#[repr(C)]
struct RawWeight {
    data: Handle,
    format: c_int,
    group: c_int,
    rows: i64,
    columns: i64,
}

#[repr(C)]
struct RawPagedLayer {
    k: Handle,
    v: Handle,
    k_scale: Handle,
    v_scale: Handle,
}

#[repr(C)]
struct RawState {
    table: Handle,
    positions: Handle,
    cos: Handle,
    sin: Handle,
    arrived: Handle,
    block_size: c_int,
    longest: c_int,
}

#[repr(C)]
struct RawLayer {
    norm_1: Handle,
    norm_2: Handle,
    qkv: RawWeight,
    proj: RawWeight,
    gate_up: RawWeight,
    mlp_proj: RawWeight,
    cache: RawPagedLayer,
}

#[repr(C)]
struct RawDecoder {
    n_layer: c_int,
    heads: c_int,
    layers: *const RawLayer,
    norm: Handle,
    head: RawWeight,
    state: RawState,
    eps: f64,
}

#[repr(C)]
struct RawSample {
    rows: c_int,
    vocab: c_int,
    logits: Handle,
    temperature: Handle,
    top_k: Handle,
    top_p: Handle,
    repetition_penalty: Handle,
    seen: Handle,
    key: Handle,
    count: Handle,
    positions: Handle,
    next: Handle,
    log_prob: Handle,
    not_finite: Handle,
    ids: Handle,
    embedding: Handle,
    x: Handle,
}
