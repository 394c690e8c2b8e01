//! A Llama of quantised matrices on the CPU: the forward pass of `src/model/gpt.rs` on plain slices of fp32.
//!
//! Decoding reads every weight once a token, so 4 bits a weight instead of 32 are the speed. All activations are fp32;
//! matrix products round them to 8 bits by blocks of 32 (`csrc/cpu/quant_matmul.h`), and give the same bits whatever
//! rows they are computed with: a sequence's output does not depend on what it is batched with.
//!
//! # Source
//! llama.cpp, llama2.c (the idea of it all); weights are those of `transformers.LlamaForCausalLM`.

use super::matrix::{Activations, QuantMatrix};
use crate::ffi;
use crate::model::paged_cache::{Batch, PagedCache};
use crate::model::rope::Rope;
use crate::model::{ModelConfig, NormClass};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// The network.
#[derive(Debug)]
pub struct QuantLlama {
    /// Sizes and switches.
    pub config: ModelConfig,
    /// (V, C): token embedding
    pub wte: QuantMatrix,
    /// Blocks.
    pub h: Vec<QuantBlock>,
    /// (C,): weight of the final norm
    pub ln_f: Vec<f32>,
    /// (V, C); absent where it is tied to `wte`
    pub lm_head: Option<QuantMatrix>,
    /// Angles of positions.
    pub rope: Rope,
    /// Dtype of keys and values in the cache: fp32, bf16, fp16 (at first), or int8 with a scale for each head of a token.
    pub cache_kind: Kind,
}

/// One block.
#[derive(Debug)]
pub struct QuantBlock {
    /// (C,)
    pub norm_1: Vec<f32>,
    /// ((H+2G) D, C), rows `[Q; K; V]`, in one or three parts
    pub qkv: Stack,
    /// (C, H D)
    pub proj: QuantMatrix,
    /// (C,)
    pub norm_2: Vec<f32>,
    /// (2F, C), rows `[gate; up]`, in one or two parts
    pub gate_up: Stack,
    /// (C, F)
    pub down: QuantMatrix,
}

/// Matrices over the same input, one below the other; files may store them in different formats.
#[derive(Debug)]
pub struct Stack(pub Vec<QuantMatrix>);

impl Stack {
    /// # Shapes
    /// x (M, K) -> y (M, N), N the sum of their rows.
    fn multiply(&self, x: &Activations, y: &mut [f32]) {
        let n: usize = self.0.iter().map(QuantMatrix::rows).sum();
        let mut first = 0;
        for matrix in &self.0 {
            matrix.multiply(x, &mut y[first..], n);
            first += matrix.rows();
        }
    }
}

/// What is wrong with an architecture for [`QuantLlama`].
pub fn obstacle(config: &ModelConfig) -> Option<String> {
    use crate::model::MlpClass;
    let llama = config.mlp_class == MlpClass::LLaMAMLP && config.norm_class == NormClass::RMSNorm;
    let odd = [config.n_embd, config.intermediate_size, config.n_head * config.head_size]
        .into_iter()
        .find(|n| n % 32 != 0);
    match odd {
        _ if !llama || config.parallel_residual || config.bias || config.attn_bias => {
            Some("only the Llama family without biases can be quantised".into())
        }
        Some(n) => Some(format!("a width of {n} is no multiple of 32")),
        None => None,
    }
}

impl QuantLlama {
    /// The residual stream after the final norm of the new tokens of several sequences.
    ///
    /// # Shapes
    /// -> (N, C) fp32, N tokens in all.
    pub fn hidden_paged(&self, batch: &Batch, cache: &mut PagedCache) -> Tensor {
        let (c, f) = (self.config.n_embd as usize, self.config.intermediate_size as usize);
        let (h, g, d) = self.heads();
        let n = batch.tokens() as usize;
        let (cos, sin) = self.rope.of_batch(batch); // (N, n_elem) x2
        let (cos, sin) = (values(&cos), values(&sin));
        let mut x = vec![0.0; n * c]; // (N, C)
        for (row, &id) in x.chunks_mut(c).zip(batch.host.iter().flat_map(|s| &s.tokens)) {
            self.wte.dequantise_row(id as usize, row);
        }
        let mut normed = vec![0.0; n * c]; // (N, C)
        let mut qkv = vec![0.0; n * (h + 2 * g) * d]; // (N, (H+2G)*D)
        let mut y = vec![0.0; n * h * d]; // (N, H*D)
        let mut gate_up = vec![0.0; n * 2 * f]; // (N, 2F)
        let mut delta = vec![0.0; n * c]; // (N, C)
        let mut input = Activations::default();
        for (i, block) in self.h.iter().enumerate() {
            self.norm(&x, &block.norm_1, &mut normed);
            input.quantise(&normed, c);
            block.qkv.multiply(&input, &mut qkv);
            rotate(&mut qkv, &cos, &sin, (h, g, d));
            super::attention::append_and_attend(&qkv, cache, i, batch, (h, g, d), &mut y);
            input.quantise(&y, h * d);
            block.proj.multiply(&input, &mut delta, c);
            add(&mut x, &delta);

            self.norm(&x, &block.norm_2, &mut normed);
            input.quantise(&normed, c);
            block.gate_up.multiply(&input, &mut gate_up);
            gate_up.par_chunks_mut(2 * f).for_each(ffi::swiglu_row);
            input.quantise_strided(&gate_up, f, 2 * f);
            block.down.multiply(&input, &mut delta, c);
            add(&mut x, &delta);
        }
        self.norm(&x, &self.ln_f, &mut normed);
        Tensor::from_slice(&normed).view([n as i64, c as i64])
    }

    /// Logits from the final hidden state.
    ///
    /// # Shapes
    /// x (N, C) of fp32 -> (N, V).
    pub fn head(&self, x: &Tensor) -> Tensor {
        let (n, c) = x.size2().expect("x is (N, C)");
        let head = self.lm_head.as_ref().unwrap_or(&self.wte);
        let mut input = Activations::default();
        input.quantise(&values(x), c as usize);
        let mut logits = vec![0.0; n as usize * head.rows()]; // (N, V)
        head.multiply(&input, &mut logits, head.rows());
        Tensor::from_slice(&logits).view([n, head.rows() as i64])
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        let block = |b: &QuantBlock| {
            let stacks = b.qkv.0.iter().chain(&b.gate_up.0).chain([&b.proj, &b.down]);
            stacks.map(QuantMatrix::bytes).sum::<u64>()
        };
        let ends = self.wte.bytes() + self.lm_head.as_ref().map_or(0, QuantMatrix::bytes);
        ends + self.h.iter().map(block).sum::<u64>()
    }

    /// H, G, D.
    fn heads(&self) -> (usize, usize, usize) {
        let c = &self.config;
        (c.n_head as usize, c.n_query_groups as usize, c.head_size as usize)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` of each row.
    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let (c, eps) = (weight.len(), self.config.norm_eps as f32);
        let rows = x.par_chunks(c).zip(out.par_chunks_mut(c));
        rows.for_each(|(x, out)| ffi::rms_norm_row(x, weight, eps, out));
    }
}

fn add(x: &mut [f32], other: &[f32]) {
    x.iter_mut().zip(other).for_each(|(x, other)| *x += other);
}

/// Turns queries and keys: `x cos + rotate_half(x) sin` of the first n dimensions of each head.
///
/// # Shapes
/// qkv (N, (H+2G)*D); cos, sin (N, n).
fn rotate(qkv: &mut [f32], cos: &[f32], sin: &[f32], (h, g, d): (usize, usize, usize)) {
    let width = (h + 2 * g) * d;
    let rows = qkv.len() / width;
    let n = cos.len() / rows.max(1);
    if n == 0 {
        return;
    }
    let angles = cos.par_chunks(n).zip(sin.par_chunks(n));
    qkv.par_chunks_mut(width).zip(angles).for_each(|(row, (cos, sin))| {
        ffi::rope_row(&mut row[..(h + g) * d], d, &cos[..n / 2], &sin[..n / 2]);
    });
}

fn values(x: &Tensor) -> Vec<f32> {
    Vec::try_from(&x.to_device(Device::Cpu).contiguous().view([-1])).expect("fp32 on the CPU")
}
