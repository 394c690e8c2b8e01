//! How much GPU memory a run will need, before anything is allocated.
//!
//! The arithmetic of what the training step keeps (bytes; N tokens of a micro-batch, widths as in [`crate::model`]):
//!
//! - a parameter: 4 master + 8 moments + 4 gradient sum + 2 working copy in `bf16-mixed`, 2 more in `fp8-mixed`;
//!   2 weight + 2 gradient + 4 moments in `bf16-true`. In the first two, `optimizer.master: split` has 2 for the
//!   master and `bf16` none; `optimizer.state: bf16` has 4 for the moments, `int8` 2 + 8 / 256. With
//!   `optimizer.cpu_offload` master and moments are the host's, and the card has three groups of them;
//! - a Llama block a token: twice the residual sum and its norm (4 C; 2 C where norms are computed again), the packed
//!   QKV (H + 2G) D, the attention output H D, gate and up 2 F, each in bf16; log sum exp 4 H; 1/rms 8. The product
//!   silu(gate) up is computed again in the backward pass;
//! - a GPT-NeoX block a token: input and two norms 3 C, QKV 3 C, attention output C, the MLP's inner values
//!   before and after gelu 2 F;
//! - a block that is computed again: its two inputs 2 C, each in bf16. Where all are, one block's own values come
//!   back while its backward pass runs;
//! - the head: a chunk of logits, dx, and the weight's gradient in fp32, while all activations live; or,
//!   where that is more, the buffers of an MLP's backward pass;
//! - beside adapters: 2 a weight, in NF4 0.516; an adapter's parameter as one above. No input of a layer is kept for the
//!   weight's sake, but for the adapters': each of q|k|v, o, gate, up, down that has some its input in bf16, with dropout a
//!   copy of its own and a byte of mask a value;
//! - before that, all weights in fp32, but for NF4, which comes through the host; where ranks share them, one unit of them and
//!   what is kept besides.

use super::optimizer::{low_memory, offload};
use crate::checkpoint::adapter;
use crate::config::{
    ActivationCheckpointing, LoraConfig, MasterFormat, OptimizerConfig, Precision, RunConfig,
    StateFormat, Strategy,
};
use crate::error::WithHint;
use crate::model::{MlpClass, ModelConfig};
use crate::ops;
use anyhow::{Result, anyhow};

/// Memory that no plan sees: CUDA's context, workspaces of libraries, fragmentation.
pub const RESERVE: u64 = 3 << 29; // 1.5 GiB

/// What the backward pass computes again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recompute {
    /// So many of the first blocks as a whole.
    pub blocks: u64,
    /// The outputs of the norms.
    pub norms: bool,
}

impl Recompute {
    /// As a run's configuration says; in `fp8-mixed` norms are never kept.
    pub fn of(config: &RunConfig, n_layer: i64) -> Self {
        let selective = config.train.activation_checkpointing == ActivationCheckpointing::Selective;
        Self {
            blocks: config.train.recomputed_blocks(n_layer),
            norms: selective || config.precision == Precision::Fp8Mixed,
        }
    }
}

/// What a rank keeps of all that ranks share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Into so many parts the optimizer's state is cut.
    pub state: u64,
    /// Into so many parts weights and gradients are cut, beside which a rank has `slots` parameters.
    pub weights: u64,
    /// Parameters of the two units in use.
    pub slots: u64,
}

impl Share {
    /// All of it.
    pub const ALONE: Self = Self { state: 1, weights: 1, slots: 0 };

    /// That of one of `ranks`, `local` of them on each node.
    pub fn of(strategy: Strategy, ranks: u64, local: u64, model: &ModelConfig) -> Self {
        let slots = {
            let (ends, block) = unit_sizes(model);
            // A tied embedding has a buffer of its own beside those of two blocks.
            if model.tie_embeddings { ends + 2 * block } else { 2 * ends.max(block) }
        };
        let cut = |parts: u64| match parts {
            0 | 1 => Self::ALONE,
            _ => Self { state: parts, weights: parts, slots },
        };
        match strategy {
            Strategy::FullShard => cut(ranks),
            Strategy::HybridShard => cut(local.min(ranks)),
            Strategy::ShardGradOp => Self { state: ranks.max(1), ..Self::ALONE },
            Strategy::Ddp => Self::ALONE,
        }
    }
}

/// Adapters that are trained beside a Llama's weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapters {
    /// Hugging Face's names of the matrices that have one.
    pub targets: Vec<&'static str>,
    /// Their rank.
    pub rank: u64,
    /// Whether their inputs are dropped out.
    pub dropout: bool,
    /// Whether the blocks' matrices are in NF4.
    pub nf4: bool,
}

impl Adapters {
    fn of(lora: &LoraConfig, nf4: bool) -> Result<Self> {
        let targets = adapter::targets(&lora.targets)?;
        Ok(Self { targets, rank: lora.r as u64, dropout: lora.dropout > 0.0, nf4 })
    }

    /// How many of these matrices have one.
    fn among(&self, names: &[&str]) -> u64 {
        self.targets.iter().filter(|target| names.contains(target)).count() as u64
    }

    /// Parameters of A (r, in) and B (out, r), over all blocks.
    fn n_params(&self, model: &ModelConfig) -> u64 {
        let [c, f, h, g, d] = sizes(model);
        let ends = |target: &&str| match *target {
            "q_proj" | "o_proj" => c + h * d,
            "k_proj" | "v_proj" => c + g * d,
            _ => c + f,
        };
        model.n_layer as u64 * self.rank * self.targets.iter().map(ends).sum::<u64>()
    }

    /// Bytes that a block keeps for a token's sake of theirs.
    fn bytes(&self, model: &ModelConfig) -> u64 {
        let [c, f, h, _, d] = sizes(model);
        let low = 2 * self.rank * self.targets.len() as u64; // A x
        let (qkv, o) =
            (self.among(&["q_proj", "k_proj", "v_proj"]).min(1), self.among(&["o_proj"]));
        let (gate_up, down) = (self.among(&["gate_proj", "up_proj"]), self.among(&["down_proj"]));
        match self.dropout {
            // A copy in bf16 and its mask; q, k and v share one.
            true => low + 3 * (qkv * c + o * h * d + gate_up * c + down * f),
            // The input itself; o's is attention's output, which is kept anyway.
            false => low + 2 * (qkv * c + gate_up.min(1) * c + down * f),
        }
    }
}

/// Parameters of the embedding, and of a block.
fn unit_sizes(model: &ModelConfig) -> (u64, u64) {
    let ends = model.padded_vocab_size as u64 * model.n_embd as u64;
    let heads = if model.tie_embeddings { 1 } else { 2 };
    (ends, (model.n_params() - heads * ends) / model.n_layer as u64)
}

/// C, F, H, G, D of [`crate::model`].
fn sizes(model: &ModelConfig) -> [u64; 5] {
    let ModelConfig { n_embd, intermediate_size, n_head, n_query_groups, head_size, .. } = *model;
    [n_embd, intermediate_size, n_head, n_query_groups, head_size].map(|n| n as u64)
}

/// Bytes by part.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// What, and how many bytes of the card.
    pub parts: Vec<(String, u64)>,
    /// The same of page-locked memory on the host.
    pub host: Vec<(String, u64)>,
    /// Bytes of the card that are taken while the weights are read, before there are moments and activations.
    pub reading: u64,
}

/// What decides the memory of a run with fused kernels on a GPU, beside the size of its micro-batch.
#[derive(Clone, Debug)]
pub struct Planner<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// The run's.
    pub precision: Precision,
    /// The run's.
    pub optimizer: &'a OptimizerConfig,
    /// What the backward pass computes again.
    pub recomputed: Recompute,
    /// What the rank keeps.
    pub share: Share,
    /// What is trained instead of the weights.
    pub adapters: Option<Adapters>,
}

impl<'a> Planner<'a> {
    /// Of a run on a rank that keeps its `share`; `None` where no arithmetic is known: `32-true`, plain references,
    /// head sizes without a kernel, preferences.
    ///
    /// # Errors
    /// Adapters of matrices that there are not.
    pub fn of(config: &'a RunConfig, model: &'a ModelConfig, share: Share) -> Result<Option<Self>> {
        let known = config.fused
            && config.precision != Precision::Fp32True
            && matches!(model.head_size, 64 | 128)
            && config.dpo().is_none();
        let adapters =
            config.lora().map(|lora| Adapters::of(lora, config.is_qlora())).transpose()?;
        Ok(known.then_some(Self {
            model,
            precision: config.precision,
            optimizer: &config.optimizer,
            recomputed: Recompute::of(config, model.n_layer),
            share,
            adapters,
        }))
    }

    /// The plan of a micro-batch of this many sequences.
    pub fn plan(&self, micro_batch: u64, sequence: u64) -> MemoryPlan {
        let Self { model, optimizer, recomputed, share, .. } = *self;
        let per_parameter: &[(&str, u64)] = match self.precision {
            Precision::Fp8Mixed => &[
                ("gradient sums, fp32", 4),
                ("weights, bf16", 2),
                ("weights, e4m3 in both orientations", 2),
            ],
            Precision::Bf16True => &[("weights, bf16", 2), ("gradients, bf16", 2)],
            _ => &[("gradient sums, fp32", 4), ("weights, bf16", 2)],
        };
        let n_trained = self.adapters.as_ref().map_or(model.n_params(), |a| a.n_params(model));
        let n_updated = n_trained / share.state;
        let mut parts = match self.precision {
            Precision::Bf16True => vec![("AdamW moments, bf16".to_owned(), 4 * n_updated)],
            _ => optimizer_parts(optimizer, n_updated),
        };
        let mut host = Vec::new();
        if optimizer.cpu_offload {
            let staging = offload::staging_bytes(optimizer, n_updated);
            host = std::mem::replace(
                &mut parts,
                vec![("staging of the host's state".into(), staging)],
            );
        }
        let n_kept = n_trained / share.weights + share.slots;
        parts.extend(per_parameter.iter().map(|&(name, bytes)| (name.to_owned(), bytes * n_kept)));
        if self.adapters.is_some() {
            let bytes = parts.iter().map(|(_, bytes)| bytes).sum();
            parts = vec![("adapters, their gradients and AdamW's state".into(), bytes)];
        }
        // Alone, all weights in fp32. A rank that shares them has its buffers, its part in fp32 and a unit; moments come last.
        let master = match (self.precision, optimizer.cpu_offload) {
            (Precision::Bf16True, _) | (_, true) => 0,
            _ => 4, // narrowed in the end, as `optimizer.master` says
        };
        let buffers: u64 = per_parameter.iter().map(|(_, bytes)| bytes * n_kept).sum();
        let mut reading = match share.state {
            1 => 4 * model.n_params(),
            _ => {
                let (ends, block) = unit_sizes(model);
                buffers + master * n_updated + 4 * ends.max(block)
            }
        };
        match &self.adapters {
            Some(adapters) if adapters.nf4 => {
                let blocks = model.n_params() - n_outside_matrices(model);
                // Codes of 4 bits, a byte of scale for 64, 4 bytes for 256 of those.
                let bytes =
                    blocks / 2 + blocks / 64 + blocks / 4096 + 2 * n_outside_matrices(model);
                parts.push(("weights, the blocks' in NF4".into(), bytes));
                reading = 0; // through the host's memory
            }
            Some(_) => parts.push(("weights beside them, bf16".into(), 2 * model.n_params())),
            None => {}
        }

        let tokens = micro_batch * sequence;
        let layers = model.n_layer as u64;
        let c = model.n_embd as u64;
        let kept = layers - recomputed.blocks.min(layers);
        if kept > 0 {
            let bytes = kept * tokens * self.block_bytes();
            parts.push((format!("activations of {kept} blocks, {tokens} tokens"), bytes));
        }
        if kept < layers {
            let again = layers - kept;
            let bytes = again * tokens * 2 * 2 * c;
            parts.push((format!("inputs of {again} recomputed blocks"), bytes));
        }
        parts.push(("embedding and final norm".into(), 3 * 2 * c * tokens));
        // Blocks go backward from the last one: where that one is kept, its values are gone before a block
        // is computed again, and no more is needed then than now.
        let (name, block) = match kept {
            0 => ("head and loss, or one block's backward pass", tokens * self.block_bytes()),
            _ => ("head and loss, or the MLP's backward pass", 0),
        };
        let backward = block + mlp_backward_bytes(model, tokens);
        let head = head_bytes(model, tokens, self.adapters.is_none());
        parts.push((name.into(), head.max(backward)));
        MemoryPlan { parts, host, reading }
    }

    /// The largest micro-batch whose plan and [`RESERVE`] fit into `memory` bytes; 0 where none does.
    pub fn largest_micro_batch(&self, sequence: u64, memory: u64) -> u64 {
        let fits = |micro: &u64| self.plan(*micro, sequence).total() + RESERVE <= memory;
        (1..=4096).take_while(fits).last().unwrap_or(0)
    }

    /// Bytes that a block keeps for each token.
    fn block_bytes(&self) -> u64 {
        let [c, f, h, _, d] = sizes(self.model);
        let attention = 2 * (self.model.qkv_rows() as u64 + h * d) + 4 * h;
        match (self.model.mlp_class, &self.adapters) {
            (MlpClass::LLaMAMLP, Some(adapters)) => {
                attention + 2 * (2 * c + 2 * f) + 8 + adapters.bytes(self.model)
            }
            (MlpClass::LLaMAMLP, None) => {
                let norms = if self.recomputed.norms { 2 * c } else { 4 * c };
                attention + 2 * (norms + 2 * f) + 8
            }
            (MlpClass::GptNeoxMLP, _) => attention + 2 * (3 * c + 2 * f) + 16,
        }
    }
}

impl MemoryPlan {
    /// The most that the card holds, in bytes: all parts, or the weights while they are read.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum::<u64>().max(self.reading)
    }
}

/// Bytes of exact weights and moments in `bf16-mixed` and `fp8-mixed`, beside the bf16 weights.
fn optimizer_parts(optimizer: &OptimizerConfig, n_params: u64) -> Vec<(String, u64)> {
    let mut parts = match optimizer.master {
        MasterFormat::Fp32 => vec![("master weights, fp32".to_owned(), 4 * n_params)],
        MasterFormat::Split => {
            vec![("master weights, the 16 bits beside bf16".to_owned(), 2 * n_params)]
        }
        MasterFormat::Bf16 => vec![],
    };
    let scales = 2 * 4 * n_params.div_ceil(low_memory::BLOCK as u64);
    let moments = match optimizer.state {
        StateFormat::Fp32 => 8 * n_params,
        StateFormat::Bf16 => 4 * n_params,
        StateFormat::Int8 => 2 * n_params + scales,
    };
    parts.push((format!("AdamW moments, {}", optimizer.state), moments));
    parts
}

/// Refuses a run whose plan does not fit into `memory` bytes, before anything is allocated. A run without a plan passes;
/// of rows of conversations, which may be shorter than `sequence`, what no token needs is looked at.
///
/// # Errors
/// The largest part, and the micro-batch that would fit.
pub fn check_fits(
    config: &RunConfig,
    model: &ModelConfig,
    share: Share,
    sequence: u64,
    memory: u64,
) -> Result<()> {
    let Some(planner) = Planner::of(config, model, share)? else { return Ok(()) };
    let micro = config.train.micro_batch_size;
    let tokens_known = config.has_fixed_shapes();
    let plan = planner.plan(if tokens_known { micro } else { 0 }, sequence);
    if plan.total() <= memory {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    if plan.reading == plan.total() {
        return Err(anyhow!(
            "the weights take {:.1} GiB of each card while they are read in fp32, it offers {:.1}",
            gib(plan.reading),
            gib(memory)
        ))
        .hint("take cards with more memory, or train adapters beside weights of 4 bits (`finetune.method: qlora`)");
    }
    let largest = plan.parts.iter().max_by_key(|(_, bytes)| *bytes);
    let (name, bytes) = largest.map_or(("nothing", 0), |(name, bytes)| (name.as_str(), *bytes));
    let hint = match (planner.largest_micro_batch(sequence, memory), &planner.adapters) {
        (0, Some(_)) => {
            "no micro-batch fits; lower `train.max_seq_length`, or set `finetune.method: qlora` or \
              `train.activation_checkpointing: block`"
                .to_owned()
        }
        (0, None) => {
            "no micro-batch fits; lower `train.max_seq_length`, or set `optimizer.master: split`, \
              `optimizer.state: int8`, `train.activation_checkpointing: block` or `optimizer.cpu_offload: true`"
                .to_owned()
        }
        (n, _) => format!("set `train.micro_batch_size` to {n} or less (accumulation rises by itself)"),
    };
    let what = match tokens_known {
        true => format!("`train.micro_batch_size`: {micro} needs"),
        false => "a row of any length needs more than".to_owned(),
    };
    Err(anyhow!(
        "{what} {:.1} GiB, the card offers {:.1}; the largest part is {name}, \
         {:.1} GiB",
        gib(plan.total()),
        gib(memory),
        gib(bytes)
    ))
    .hint(hint)
}

/// Parameters that are no matrix of a block: embedding, head, norms.
fn n_outside_matrices(model: &ModelConfig) -> u64 {
    let [c, f, h, _, d] = sizes(model);
    let rows = model.qkv_rows() as u64;
    let matrices = c * rows + h * d * c + 3 * c * f; // a Llama's
    model.n_params() - model.n_layer as u64 * matrices
}

/// `trained`: the head's weight has a gradient.
fn head_bytes(model: &ModelConfig, tokens: u64, trained: bool) -> u64 {
    let (c, v) = (model.n_embd as u64, model.padded_vocab_size as u64);
    let rows = ops::head_rows(tokens as i64, v as i64, 2) as u64;
    2 * rows * v + 2 * tokens * c + if trained { 4 * v * c } else { 0 }
}

fn mlp_backward_bytes(model: &ModelConfig, tokens: u64) -> u64 {
    2 * tokens * (3 * model.intermediate_size as u64 + 3 * model.n_embd as u64)
}

#[cfg(test)]
mod tests;
