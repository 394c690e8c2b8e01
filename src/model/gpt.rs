//! The network: `GPT { wte, h, ln_f, lm_head }`.

use super::attention::{Kernels, Positions};
use super::block::Block;
use super::config::ModelConfig;
use super::fp8::Fp8;
use super::init;
use super::kv_cache::KvCache;
use super::linear::{Embedding, Linear};
use super::mlp::Mlp;
use super::norm::Norm;
use super::paged_cache::{Batch, Cache, PagedCache};
use super::rope::Rope;
use super::units::AtUnit;
use crate::config::AttentionBackend;
use crate::ffi::{DecodeState, PackedWeight};
use crate::ops::{self, Branches, Documents, LossScalars};
use std::cell::Cell;
use tch::{Device, Kind, Tensor};

/// A decoder-only transformer of the Llama or the GPT-NeoX family.
///
/// # Source
/// `lit_gpt/model.py` of lit-gpt and TinyLlama; the weights are those of
/// `transformers.LlamaForCausalLM` and `GPTNeoXForCausalLM`.
#[derive(Debug)]
pub struct GPT {
    /// Sizes and switches.
    pub config: ModelConfig,
    /// Token embedding.
    pub wte: Embedding,
    /// Blocks.
    pub h: Vec<Block>,
    /// Final norm.
    pub ln_f: Norm,
    /// Head; absent where it is tied to `wte`.
    pub lm_head: Option<Linear>,
    /// Kernels of attention.
    pub attention: AttentionBackend,
    /// Fused kernels (`true`) or their plain references.
    pub fused: bool,
    /// The backward pass computes the norms' outputs again instead of keeping them.
    pub recompute_norms: bool,
    /// Scales of the blocks' layers in e4m3, in `fp8-mixed`.
    pub fp8: Option<Fp8>,
    /// So many of the first blocks keep only their inputs; the backward pass runs them again.
    pub recomputed_blocks: usize,
    /// Dtype of keys and values in a paged cache: the weights' own, or int8.
    pub cache_kind: Option<Kind>,
    /// Adapters drop out: off while a model that is being trained is validated or asked.
    pub training: Cell<bool>,
    /// The model that the adapters began with.
    pub without_adapters: Cell<bool>,
    /// Called when a pass enters a unit ([`GPT::units`]).
    pub at_unit: Option<AtUnit>,
    /// Angles of positions.
    pub rope: Rope,
}

/// What a token sees of the others in its row.
enum Sees<'a> {
    /// Those before it.
    Before,
    /// Of those, the ones of its document.
    Documents(&'a Documents),
    /// Those on its own path.
    Branches(Branches),
}

impl GPT {
    /// An fp32 model with random weights (formulas in [`init`]) from libtorch's current generator.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let model = Self::empty(config, device);
        init::init_weights(&model);
        model
    }

    /// An fp32 model whose matrices are uninitialised, for loading a checkpoint into.
    pub fn empty(config: &ModelConfig, device: Device) -> Self {
        let mut model = Self::without_blocks(config, device);
        model.h = (0..config.n_layer).map(|_| Block::new(config, device)).collect();
        model
    }

    fn without_blocks(config: &ModelConfig, device: Device) -> Self {
        let (c, v) = (config.n_embd, config.padded_vocab_size);
        Self {
            wte: Embedding::new(v, c, device),
            h: Vec::new(),
            ln_f: Norm::new(config, device),
            lm_head: (!config.tie_embeddings).then(|| Linear::new(c, v, false, device)),
            attention: AttentionBackend::Auto,
            fused: true,
            recompute_norms: false,
            fp8: None,
            recomputed_blocks: 0,
            cache_kind: None,
            training: Cell::new(true),
            without_adapters: Cell::new(false),
            at_unit: None,
            rope: Rope::new(config, device),
            config: config.clone(),
        }
    }

    /// A model whose parameters have shapes and no memory: one value is seen everywhere in all of them. For who gives them
    /// memory one after another. Embedding and head, then one block after the other have memory for a moment.
    pub fn outline(config: &ModelConfig, device: Device) -> Self {
        let value = Tensor::zeros([1], (Kind::Float, device));
        let hollow = |model: &Self| {
            for (_, mut parameter) in model.named_parameters() {
                let shape = parameter.size();
                tch::no_grad(|| parameter.set_data(&value.expand(&shape, false)));
            }
        };
        let mut model = Self::without_blocks(config, device);
        hollow(&model);
        for _ in 0..config.n_layer {
            model.h.push(Block::new(config, device));
            hollow(&model);
        }
        model
    }

    /// Logits of the next token at each position. With a cache, `idx` continues the cached sequence.
    ///
    /// # Shapes
    /// idx (B, T) of i64 -> (B, T, V), dtype of the weights.
    pub fn forward(&self, idx: &Tensor, cache: Option<&mut KvCache>) -> Tensor {
        let x = self.hidden(idx, None, cache); // (B, T, C)
        self.head(&x) // (B, T, V)
    }

    /// The residual stream after the final norm. With `documents`, a token sees those of its own document alone, as
    /// if it had a row of its own: rotary positions are relative, so that they need not begin anew.
    ///
    /// # Shapes
    /// idx (B, T) of i64 -> (B, T, C).
    pub fn hidden(
        &self,
        idx: &Tensor,
        documents: Option<&Documents>,
        cache: Option<&mut KvCache>,
    ) -> Tensor {
        let (_, t) = idx.size2().expect("idx is (B, T)");
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let angles = self.rope.cos_sin(past, t); // (T, n_elem) x2
        let sees = documents.map_or(Sees::Before, Sees::Documents);
        self.run(idx, angles, sees, cache.map(Cache::Whole))
    }

    /// [`GPT::hidden`] of texts that share their beginnings: a token sees those on its own path, and stands at a position of its
    /// own.
    ///
    /// # Shapes
    /// idx (1, T) of i64; positions (T,) of i64, below `block_size` -> (1, T, C).
    pub fn hidden_branches(&self, idx: &Tensor, positions: &Tensor, branches: Branches) -> Tensor {
        let (cos, sin) = self.rope.tables();
        let angles = [cos, sin].map(|table| table.index_select(0, positions)); // (T, n_elem) x2
        self.run(idx, angles.into(), Sees::Branches(branches), None)
    }

    /// [`GPT::hidden`] of the new tokens of several sequences, which `batch` holds behind each other.
    ///
    /// # Shapes
    /// -> (N, C), N tokens in all.
    pub fn hidden_paged(&self, batch: &Batch, cache: &mut PagedCache) -> Tensor {
        let angles = self.rope.of_batch(batch); // (N, n_elem) x2
        self.run(&batch.ids, angles, Sees::Before, Some(Cache::Paged(cache, batch))).squeeze_dim(0)
    }

    /// [`GPT::hidden`] of one new token of each of N sequences, by the decode kernels; nothing waits, so that a CUDA
    /// graph can hold it.
    ///
    /// # Shapes
    /// ids (N,) of i64 -> (N, C).
    pub fn hidden_step(&self, ids: &Tensor, cache: &mut PagedCache, state: &DecodeState) -> Tensor {
        let (cos, sin) = self.rope.tables();
        let angles = (cos.shallow_clone(), sin.shallow_clone()); // the kernels take each row's own
        self.run(&ids.unsqueeze(0), angles, Sees::Before, Some(Cache::Step(cache, state)))
            .squeeze_dim(0)
    }

    /// # Shapes
    /// idx (B, T) of i64; cos, sin (T, n_elem) -> (B, T, C).
    fn run(
        &self,
        idx: &Tensor,
        (cos, sin): (Tensor, Tensor),
        sees: Sees,
        mut cache: Option<Cache>,
    ) -> Tensor {
        let kernels = Kernels {
            attention: self.attention,
            fused: self.fused,
            recompute_norms: self.recompute_norms && cache.is_none(),
            fp8: self.fp8.is_some() && cache.is_none() && !matches!(sees, Sees::Branches(_)),
            train: self.training.get() && cache.is_none(),
            lora: !self.without_adapters.get(),
        };
        self.enter(0);
        let mut x = self.wte.forward(idx); // (B, T, C)
        if self.recomputed_blocks > 0 && !x.requires_grad() && cache.is_none() {
            // A recomputed part has a backward pass where its inputs have one; adapters are none of them.
            x = x.set_requires_grad(true);
        }
        self.leave(0, &x);
        let d = self.config.head_size;
        let (documents, branches) = match sees {
            Sees::Before => (None, None),
            Sees::Documents(some) => (Some(some.ready_for(&x, d, self.attention)), None),
            Sees::Branches(branches) => (None, Some(branches)),
        };
        let at = Positions { cos, sin, documents, branches, kernels };
        let mut delta = None; // what the last block adds to x
        for (i, block) in self.h.iter().enumerate() {
            self.enter(i + 1);
            let layer = cache.as_mut().map(|cache| cache.layer(i));
            let (sum, added) = match layer {
                None if i < self.recomputed_blocks => {
                    block.forward_recomputed(&x, delta.as_ref(), &at) // (B, T, C) x2
                }
                layer => block.forward(&x, delta.as_ref(), &at, layer), // (B, T, C) x2
            };
            self.leave(i + 1, &added);
            (x, delta) = (sum, Some(added));
        }
        self.enter(self.h.len() + 1);
        self.ln_f.forward(&x, delta.as_ref(), self.fused).0 // (B, T, C)
    }

    /// The summed cross-entropy of the next tokens, with the terms of [`ops::cross_entropy`], without all logits
    /// in memory. Attention stays within `documents`, where they are given.
    ///
    /// # Shapes
    /// idx, target (B, T) of i64, target -100 where nothing is to be learned -> () fp32.
    pub fn loss(
        &self,
        idx: &Tensor,
        target: &Tensor,
        documents: Option<&Documents>,
        scalars: LossScalars,
    ) -> Tensor {
        let x = self.hidden(idx, documents, None).view([-1, self.config.n_embd]); // (N, C)
        let target = target.reshape([-1]); // (N,)
        let loss = ops::head_loss(&x, self.head_weight(), &target, scalars, self.fused); // ()
        self.leave(self.h.len() + 1, &loss);
        loss
    }

    /// The summed log-probability of the targets of each row.
    ///
    /// # Shapes
    /// idx, target (B, T) of i64, target -100 where nothing counts -> (B,) fp32.
    pub fn log_probabilities(&self, idx: &Tensor, target: &Tensor) -> Tensor {
        let x = self.hidden(idx, None, None); // (B, T, C)
        let row = |(x, target): (Tensor, Tensor)| {
            let (x, weight, fused) =
                (x.contiguous(), self.head_weight().shallow_clone(), self.fused);
            let trained = weight.requires_grad();
            let sum = move |x: &[Tensor]| {
                [-ops::head_loss(&x[0], &weight, &target, LossScalars::SUM, fused)] // ()
            };
            // A row's loss has the weight's gradient (V, C) with it: computed again, they come one after the other.
            let [sum] = if trained { ops::recompute(&[&x], sum) } else { sum(&[x]) };
            sum
        };
        let rows = x.unbind(0).into_iter().zip(target.unbind(0)).map(row);
        let sums = Tensor::stack(&rows.collect::<Vec<_>>(), 0); // (B,)
        self.leave(self.h.len() + 1, &sums);
        sums
    }

    /// A copy in memory of its own, in the given dtype, whose parameters have no gradients.
    pub fn frozen_copy(&self, kind: Kind) -> Self {
        let mut copy = Self::empty(&self.config, self.device());
        copy.reallocate(kind);
        (copy.attention, copy.fused) = (self.attention, self.fused);
        tch::no_grad(|| {
            for ((_, mut to), (_, from)) in
                copy.named_parameters().into_iter().zip(self.named_parameters())
            {
                to.copy_(&from);
            }
        });
        copy
    }

    /// Logits from the final hidden state.
    ///
    /// # Shapes
    /// x (.., C) -> (.., V).
    pub fn head(&self, x: &Tensor) -> Tensor {
        x.linear(&self.head_matrix(), None::<Tensor>)
    }

    /// (V, C): what [`GPT::head`] multiplies with.
    pub fn head_matrix(&self) -> Tensor {
        self.lm_head.as_ref().map_or_else(|| self.wte.weight.shallow_clone(), Linear::dense)
    }

    /// (V, C): the head's own matrix, or the embedding where they are tied.
    fn head_weight(&self) -> &Tensor {
        self.lm_head.as_ref().map_or(&self.wte.weight, |head| &head.weight)
    }

    /// Every parameter under its lit-gpt name, in a fixed order. The handles share storage with the
    /// model: writing into one in place changes the model.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let mut out = Vec::new();
        let mut add = |name: String, weight: &Tensor, bias: Option<&Tensor>| {
            out.push((format!("{name}.weight"), weight.shallow_clone()));
            if let Some(bias) = bias {
                out.push((format!("{name}.bias"), bias.shallow_clone()));
            }
        };
        add("transformer.wte".into(), &self.wte.weight, None);
        for (i, block) in self.h.iter().enumerate() {
            let mut layer = |name: &str, weight: &Tensor, bias: Option<&Tensor>| {
                add(format!("transformer.h.{i}.{name}"), weight, bias);
            };
            layer("norm_1", &block.norm_1.weight, block.norm_1.bias.as_ref());
            layer("attn.qkv", &block.attn.qkv.weight, block.attn.qkv.bias.as_ref());
            layer("attn.proj", &block.attn.proj.weight, block.attn.proj.bias.as_ref());
            layer("norm_2", &block.norm_2.weight, block.norm_2.bias.as_ref());
            match &block.mlp {
                Mlp::LLaMA(mlp) => {
                    layer("mlp.fc_1", &mlp.fc_1.weight, mlp.fc_1.bias.as_ref());
                    layer("mlp.fc_2", &mlp.fc_2.weight, mlp.fc_2.bias.as_ref());
                    layer("mlp.proj", &mlp.proj.weight, mlp.proj.bias.as_ref());
                }
                Mlp::GptNeox(mlp) => {
                    layer("mlp.fc", &mlp.fc.weight, mlp.fc.bias.as_ref());
                    layer("mlp.proj", &mlp.proj.weight, mlp.proj.bias.as_ref());
                }
            }
        }
        add("transformer.ln_f".into(), &self.ln_f.weight, self.ln_f.bias.as_ref());
        if let Some(head) = &self.lm_head {
            add("lm_head".into(), &head.weight, head.bias.as_ref());
        }
        out
    }

    /// Weights in 4 or 8 bits.
    pub fn packed(&self) -> impl Iterator<Item = &PackedWeight> {
        fn of_block(block: &Block) -> [Option<&PackedWeight>; 4] {
            let (gate_up, proj) = match &block.mlp {
                Mlp::LLaMA(mlp) => (mlp.gate_up_packed.as_ref(), mlp.proj.packed.as_ref()),
                Mlp::GptNeox(_) => (None, None),
            };
            [block.attn.qkv.packed.as_ref(), block.attn.proj.packed.as_ref(), gate_up, proj]
        }
        let head = self.lm_head.as_ref().and_then(|head| head.packed.as_ref());
        self.h.iter().flat_map(of_block).flatten().chain(head)
    }

    /// Number of parameters held; a tied head is counted once.
    pub fn n_params(&self) -> u64 {
        self.named_parameters().iter().map(|(_, p)| p.numel() as u64).sum()
    }

    /// Converts every parameter in place (`model.to(dtype)`).
    pub fn to_kind(&mut self, kind: Kind) {
        self.replace_parameters(|parameter| parameter.to_kind(kind), true);
        for (_, mut adapter) in self.adapters() {
            tch::no_grad(|| adapter.set_data(&adapter.to_kind(kind)));
        }
    }

    /// Gives every parameter uninitialised memory of another dtype, without reading the old one: on the CPU,
    /// memory that was never touched is never committed.
    pub fn reallocate(&mut self, kind: Kind) {
        let fresh = |p: &Tensor| Tensor::empty(p.size(), (kind, p.device()));
        self.replace_parameters(fresh, false);
    }

    fn replace_parameters(&mut self, new: impl Fn(&Tensor) -> Tensor, keep: bool) {
        tch::no_grad(|| {
            for (_, mut parameter) in self.named_parameters() {
                parameter.set_data(&new(&parameter));
            }
        });
        self.h.iter_mut().for_each(|block| block.mlp.join(keep));
    }

    /// Turns gradients of every parameter that is trained on or off; the weights beside adapters have none.
    pub fn requires_grad(&self, on: bool) {
        let adapters = self.adapters();
        for (_, parameter) in self.named_parameters() {
            let _ = parameter.set_requires_grad(on && adapters.is_empty());
        }
        for (_, adapter) in adapters {
            let _ = adapter.set_requires_grad(on);
        }
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.wte.weight.device()
    }

    /// Dtype of the weights.
    pub fn kind(&self) -> Kind {
        self.wte.weight.kind()
    }
}

/// Fills the rows of a matrix behind the first `have` with the mean of those.
///
/// # Shapes
/// weight (rows, C).
pub fn fill_new_rows(weight: &Tensor, have: i64) {
    let _guard = tch::no_grad_guard();
    let old = weight.narrow(0, 0, have); // (have, C)
    let mean = old.mean_dim(0, true, old.kind()); // (1, C)
    weight.narrow(0, have, weight.size()[0] - have).copy_(&mean);
}
