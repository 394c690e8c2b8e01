//! Keys and values of many sequences in blocks of [`BLOCK`] tokens.
//!
//! A sequence's *table* lists its blocks: position p lies in block `table[p / BLOCK]` at `p % BLOCK`. Blocks need not be
//! neighbours, so memory is given out as sequences grow, and sequences that begin alike share blocks.
//!
//! # Source
//! PagedAttention (arXiv 2309.06180).

use super::attention::Positions;
use super::config::ModelConfig;
use super::kv_cache::{KvCache, LayerCache};
use crate::config::AttentionBackend;
use crate::ffi::{self, DecodeState, KeysAndValues, LayerMemory};
use crate::ops::{self, Documents, Mask, or_panic};
use tch::{Device, Kind, Tensor};

/// Tokens in a block.
pub const BLOCK: usize = 16;

/// Blocks of all layers.
#[derive(Debug)]
pub struct PagedCache {
    layers: Vec<PagedLayer>,
}

/// Blocks of one layer. Slot `b * BLOCK + i` is token i of block b.
#[derive(Debug)]
pub struct PagedLayer {
    /// (slots, G, D), rotated
    k: Tensor,
    /// (slots, G, D)
    v: Tensor,
    /// Of an int8 cache: (slots, G) of fp32 for k and v, `x = scale q`.
    scales: Option<(Tensor, Tensor)>,
}

/// The new tokens of one sequence in a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Row of its first token.
    pub start: i64,
    /// Number of tokens, T.
    pub tokens: i64,
    /// Tokens before them, which the cache has.
    pub past: i64,
}

/// What one pass through the model reads: new tokens of several sequences, behind each other.
#[derive(Debug)]
pub struct Batch {
    /// (1, N) of i64
    pub ids: Tensor,
    /// One a sequence; together they are the N rows.
    pub spans: Vec<Span>,
    /// (N,) of i64: where each token stands in its sequence.
    pub positions: Tensor,
    /// (N,) of i64: where the cache keeps each token.
    slots: Tensor,
    /// Where the tokens of each sequence lie, the new ones included.
    places: Vec<Place>,
    /// From this sequence on all are new, and attend as documents of one packed row.
    fresh_from: usize,
    /// Where these lie in their row.
    fresh: Option<Documents>,
    /// The same in plain numbers.
    pub host: Vec<HostSpan>,
}

/// A sequence of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSpan {
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Tokens before them, which the cache has.
    pub past: usize,
    /// Its blocks.
    pub table: Vec<u32>,
}

/// Slots of a sequence's S tokens.
#[derive(Debug)]
enum Place {
    /// Neighbours, from this one on: a view of the cache serves.
    From(i64),
    /// (S,) of i64
    At(Tensor),
}

impl Batch {
    /// From `(new tokens, tokens before them, table)` of each sequence.
    ///
    /// # Panics
    /// Where a sequence has no new token, or its table no block for one.
    pub fn new(sequences: &[(&[u32], usize, &[u32])], device: Device) -> Self {
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut spans, mut places) = (Vec::new(), Vec::new());
        for (tokens, past, table) in sequences {
            assert!(!tokens.is_empty(), "a sequence without new tokens");
            let all = past + tokens.len();
            assert!(all <= table.len() * BLOCK, "{all} tokens in {} blocks", table.len());
            let (start, new) = (ids.len() as i64, tokens.len() as i64);
            spans.push(Span { start, tokens: new, past: *past as i64 });
            ids.extend(tokens.iter().map(|&id| id as i64));
            positions.extend((*past..all).map(|p| p as i64));
            slots.extend((*past..all).map(|p| slot(table, p)));
            places.push(Place::of(table, all, device));
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let (positions, slots) = (tensor(&positions), tensor(&slots));
        let host_span = |(tokens, past, table): &(&[u32], usize, &[u32])| HostSpan {
            tokens: tokens.to_vec(),
            past: *past,
            table: table.to_vec(),
        };
        let host = sequences.iter().map(host_span).collect();
        let (fresh_from, fresh) = fresh(&spans, device);
        let ids = tensor(&ids).unsqueeze(0);
        Self { ids, spans, positions, slots, places, fresh_from, fresh, host }
    }

    /// The longest of the sequences, in tokens.
    pub fn longest(&self) -> i64 {
        self.spans.iter().map(|span| span.past + span.tokens).max().unwrap_or(0)
    }

    /// N.
    pub fn tokens(&self) -> i64 {
        self.ids.size()[1]
    }
}

/// The sequences at the end that have no token in the cache, if there are two or more: from which one on, and where they
/// lie in the row of their tokens. Only on a card, whose kernels skip what lies outside of a document.
fn fresh(spans: &[Span], device: Device) -> (usize, Option<Documents>) {
    let fresh = spans.iter().rev().take_while(|span| span.past == 0).count();
    if fresh < 2 || !device.is_cuda() {
        return (spans.len(), None);
    }
    let from = spans.len() - fresh;
    let lengths = spans[from..].iter().map(|span| span.tokens).collect();
    (from, Some(Documents::from_lengths(&[lengths], device)))
}

/// Where a sequence's cache keeps the token at this position.
pub fn slot(table: &[u32], position: usize) -> i64 {
    table[position / BLOCK] as i64 * BLOCK as i64 + (position % BLOCK) as i64
}

impl Place {
    fn of(table: &[u32], tokens: usize, device: Device) -> Self {
        let blocks = &table[..tokens.div_ceil(BLOCK)];
        if blocks.windows(2).all(|pair| pair[1] == pair[0] + 1) {
            return Self::From(slot(table, 0));
        }
        let slots: Vec<i64> = (0..tokens).map(|p| slot(table, p)).collect();
        Self::At(Tensor::from_slice(&slots).to_device(device))
    }

    /// The rows of x (slots, G, D) as (1, G, S, D) of this dtype; of int8 with scales (slots, G).
    fn rows(&self, x: &Tensor, scales: Option<&Tensor>, s: i64, kind: Kind) -> Tensor {
        let rows = |x: &Tensor| match self {
            Self::From(first) => x.narrow(0, *first, s), // (S, ..)
            Self::At(slots) => x.index_select(0, slots), // (S, ..)
        };
        let own = match scales {
            Some(scales) => (rows(x) * rows(scales).unsqueeze(-1)).to_kind(kind), // (S, G, D)
            None => rows(x),
        };
        own.transpose(0, 1).unsqueeze(0)
    }
}

impl PagedCache {
    /// Room for `blocks` blocks of keys and values of dtype `kind`: fp32, bf16, fp16, or int8 with scales.
    pub fn new(config: &ModelConfig, blocks: usize, kind: Kind, device: Device) -> Self {
        let slots = (blocks * BLOCK) as i64;
        let (g, d) = (config.n_query_groups, config.head_size);
        // All memory now, or an error now.
        let zeros = || Tensor::zeros([slots, g, d], (kind, device));
        let scales = || Tensor::zeros([slots, g], (Kind::Float, device));
        let layer = || PagedLayer {
            k: zeros(),
            v: zeros(),
            scales: (kind == Kind::Int8).then(|| (scales(), scales())),
        };
        Self { layers: (0..config.n_layer).map(|_| layer()).collect() }
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(config: &ModelConfig, kind: Kind) -> u64 {
        let scales = (2 * config.n_layer * config.n_query_groups) as u64 * BLOCK as u64 * 4;
        KvCache::bytes(config, BLOCK, kind) + if kind == Kind::Int8 { scales } else { 0 }
    }

    /// Keys and values of a layer of a cache on the CPU.
    ///
    /// # Panics
    /// Where the cache is elsewhere.
    pub fn memory_mut(&mut self, layer: usize) -> KeysAndValues<'_> {
        let PagedLayer { k, v, scales } = &mut self.layers[layer];
        let scales = scales.as_mut().and_then(|(k_scale, v_scale)| {
            ffi::floats_of_mut(k_scale).zip(ffi::floats_of_mut(v_scale))
        });
        let memory = match (k.kind(), scales) {
            (Kind::Int8, Some((k_scale, v_scale))) => ffi::int8s_of_mut(k)
                .zip(ffi::int8s_of_mut(v))
                .map(|(k, v)| KeysAndValues::Int8 { k, v, k_scale, v_scale }),
            (Kind::Half, _) => ffi::halves_of_mut(k)
                .zip(ffi::halves_of_mut(v))
                .map(|(k, v)| KeysAndValues::F16 { k, v }),
            (Kind::BFloat16, _) => ffi::halves_of_mut(k)
                .zip(ffi::halves_of_mut(v))
                .map(|(k, v)| KeysAndValues::Bf16 { k, v }),
            _ => ffi::floats_of_mut(k)
                .zip(ffi::floats_of_mut(v))
                .map(|(k, v)| KeysAndValues::F32 { k, v }),
        };
        memory.expect("a cache on the CPU")
    }

    /// Keys and values of layer i, for the decode kernels.
    pub fn memory(&self, i: usize) -> LayerMemory<'_> {
        self.layers[i].memory()
    }

    /// Copies what blocks `from` hold to blocks `to`, pair by pair, in every layer.
    pub fn copy_blocks(&mut self, pairs: &[(u32, u32)]) {
        if pairs.is_empty() {
            return;
        }
        let slots = |blocks: &mut dyn Iterator<Item = u32>| {
            let first = |block: u32| block as i64 * BLOCK as i64;
            let slots: Vec<i64> = blocks.flat_map(|b| first(b)..first(b) + BLOCK as i64).collect();
            Tensor::from_slice(&slots).to_device(self.layers[0].k.device())
        };
        let from = slots(&mut pairs.iter().map(|pair| pair.0)); // (slots,)
        let to = slots(&mut pairs.iter().map(|pair| pair.1)); // (slots,)
        for layer in &mut self.layers {
            let scales = layer.scales.iter_mut().flat_map(|(k, v)| [k, v]);
            for x in [&mut layer.k, &mut layer.v].into_iter().chain(scales) {
                let rows = x.index_select(0, &from);
                let _ = x.index_copy_(0, &to, &rows);
            }
        }
    }
}

impl PagedLayer {
    fn memory(&self) -> LayerMemory<'_> {
        let scales = self.scales.as_ref().map(|(k, v)| (k, v));
        LayerMemory { k: &self.k, v: &self.v, scales }
    }

    /// Puts k, v (1, G, N, D) into these slots (N,).
    fn keep(&mut self, k: &Tensor, v: &Tensor, slots: &Tensor) {
        let by_token = |x: &Tensor| x.squeeze_dim(0).transpose(0, 1); // (N, G, D)
        let (k, v) = (by_token(k), by_token(v));
        let Some((k_scale, v_scale)) = &mut self.scales else {
            let _ = self.k.index_copy_(0, slots, &k);
            let _ = self.v.index_copy_(0, slots, &v);
            return;
        };
        for (memory, scales, x) in [(&mut self.k, k_scale, k), (&mut self.v, v_scale, v)] {
            let (codes, scale) = to_int8(&x); // (N, G, D), (N, G)
            let _ = memory.index_copy_(0, slots, &codes);
            let _ = scales.index_copy_(0, slots, &scale);
        }
    }

    /// Attention of a batch's tokens, each to those of its own sequence up to itself. Their keys and values are kept.
    ///
    /// # Shapes
    /// q (1, H, N, D), k, v (1, G, N, D) -> (1, H, N, D).
    pub fn attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        batch: &Batch,
        backend: AttentionBackend,
    ) -> Tensor {
        self.keep(k, v, &batch.slots);
        let scales = self.scales.as_ref().map_or((None, None), |(k, v)| (Some(k), Some(v)));
        let of_span = |(span, place): (&Span, &Place)| {
            let s = span.past + span.tokens;
            let q = q.narrow(2, span.start, span.tokens); // (1, H, T, D)
            let k = place.rows(&self.k, scales.0, s, q.kind()); // (1, G, S, D)
            let v = place.rows(&self.v, scales.1, s, q.kind()); // (1, G, S, D)
            ops::attention(&q, &k, &v, Mask::CAUSAL, backend) // (1, H, T, D)
        };
        // Kernels that know no documents would need a matrix of (N', N').
        let d = q.size()[3];
        let packed = backend != AttentionBackend::Math && ops::flash_covers(q.kind(), 2, d);
        let fresh_from = if packed { batch.fresh_from } else { batch.spans.len() };
        let alone = batch.spans.iter().zip(&batch.places).take(fresh_from);
        let mut parts: Vec<Tensor> = alone.map(of_span).collect();
        if let Some(first) = batch.spans.get(fresh_from) {
            let n = batch.tokens() - first.start;
            let [q, k, v] = [q, k, v].map(|x| x.narrow(2, first.start, n)); // (1, H or G, N', D)
            let mask = Mask { causal: true, documents: batch.fresh.as_ref() };
            parts.push(ops::attention(&q, &k, &v, mask, backend)); // (1, H, N', D)
        }
        match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(&parts, 2), // (1, H, N, D)
        }
    }
}

/// Codes (N, G, D) of int8 and scales (N, G) of fp32, `x = scale q`, scale = max |x| / 127 of each head.
fn to_int8(x: &Tensor) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let scale = x.abs().amax([-1], false) / 127.0; // (N, G)
    let codes = (x / scale.unsqueeze(-1).clamp_min(1e-30)).round().clamp(-127.0, 127.0);
    (codes.to_kind(Kind::Int8), scale)
}

/// The cache of a pass through the model.
#[derive(Debug)]
pub enum Cache<'a> {
    /// Sequences of equal length, each in one piece.
    Whole(&'a mut KvCache),
    /// Sequences of any length in blocks.
    Paged(&'a mut PagedCache, &'a Batch),
    /// One new token of each of several sequences, whose places are known on the card alone.
    Step(&'a mut PagedCache, &'a DecodeState),
}

/// One layer of it.
#[derive(Debug)]
pub enum LayerOf<'a> {
    /// See [`Cache::Whole`].
    Whole(&'a mut LayerCache),
    /// See [`Cache::Paged`].
    Paged(&'a mut PagedLayer, &'a Batch),
    /// See [`Cache::Step`].
    Step(&'a mut PagedLayer, &'a DecodeState),
}

impl Cache<'_> {
    /// Layer i.
    pub fn layer(&mut self, i: usize) -> LayerOf<'_> {
        match self {
            Self::Whole(cache) => LayerOf::Whole(&mut cache.layers[i]),
            Self::Paged(cache, batch) => LayerOf::Paged(&mut cache.layers[i], batch),
            Self::Step(cache, state) => LayerOf::Step(&mut cache.layers[i], state),
        }
    }
}

impl LayerOf<'_> {
    /// Rotary positions and attention of new tokens, to themselves and to those before them. Their keys and values are
    /// kept.
    ///
    /// # Shapes
    /// qkv (B, T, (H+2G)*D), H = n_head, G = n_query_groups -> (B, T, H*D).
    pub fn attend(self, qkv: &Tensor, at: &Positions, (h, g): (i64, i64)) -> Tensor {
        let (b, t, width) = qkv.size3().expect("qkv is (B, T, (H+2G)*D)");
        if let Self::Step(layer, state) = self {
            let y = or_panic(ffi::decode_attention(&qkv.squeeze_dim(0), layer.memory(), state)); // (T, H*D)
            return y.unsqueeze(0);
        }
        let d = width / (h + 2 * g);
        let (fused, backend) = (at.kernels.fused, at.kernels.attention);
        let qkv = ops::rope_qkv(qkv, &at.cos, &at.sin, h + g, d, fused); // (B, T, (H+2G)*D)
        let qkv = qkv.view([b, t, h + 2 * g, d]); // (B, T, H+2G, D)
        let (q, k, v) = ops::split_heads(&qkv, h, g); // (B, H, T, D), (B, G, T, D) x2
        let y = match self {
            Self::Whole(layer) => layer.attend(&q, &k, &v, backend), // (B, H, T, D)
            Self::Paged(layer, batch) => layer.attend(&q, &k, &v, batch, backend), // (B, H, T, D)
            Self::Step(..) => unreachable!("returned above"),
        };
        y.transpose(1, 2).reshape([b, t, h * d]) // (B, T, H*D)
    }
}
