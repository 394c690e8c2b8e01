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
//!   where that is more, the buffers of an MLP's backward pass.

use super::optimizer::{low_memory, offload};
use crate::config::{
    ActivationCheckpointing, MasterFormat, OptimizerConfig, Precision, RunConfig, StateFormat,
    Strategy,
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
            let ends = model.padded_vocab_size as u64 * model.n_embd as u64;
            let heads = if model.tie_embeddings { 1 } else { 2 };
            let blocks = (model.n_params() - heads * ends) / model.n_layer as u64;
            // A tied embedding has a buffer of its own beside those of two blocks.
            if model.tie_embeddings { ends + 2 * blocks } else { 2 * ends.max(blocks) }
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

/// Bytes by part.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// What, and how many bytes of the card.
    pub parts: Vec<(String, u64)>,
    /// The same of page-locked memory on the host.
    pub host: Vec<(String, u64)>,
}

impl MemoryPlan {
    /// The plan of a micro-batch of this many sequences with fused kernels on a GPU, with `recomputed` computed
    /// again, on a rank that keeps its `share`; `None` where the plan knows no arithmetic (`32-true`, head sizes without a kernel).
    pub fn new(
        model: &ModelConfig,
        precision: Precision,
        optimizer: &OptimizerConfig,
        recomputed: Recompute,
        share: Share,
        micro_batch: u64,
        sequence: u64,
    ) -> Option<Self> {
        let per_parameter: &[(&str, u64)] = match precision {
            Precision::Bf16Mixed => &[("gradient sums, fp32", 4), ("weights, bf16", 2)],
            Precision::Fp8Mixed => &[
                ("gradient sums, fp32", 4),
                ("weights, bf16", 2),
                ("weights, e4m3 in both orientations", 2),
            ],
            Precision::Bf16True => &[("weights, bf16", 2), ("gradients, bf16", 2)],
            Precision::Fp32True => return None,
        };
        if !matches!(model.head_size, 64 | 128) {
            return None;
        }
        let n_params = model.n_params() / share.state;
        let mut parts = match precision {
            Precision::Bf16Mixed | Precision::Fp8Mixed => optimizer_parts(optimizer, n_params),
            _ => vec![("AdamW moments, bf16".to_owned(), 4 * n_params)],
        };
        let mut host = Vec::new();
        if optimizer.cpu_offload {
            let staging = offload::staging_bytes(optimizer, n_params);
            host = std::mem::replace(
                &mut parts,
                vec![("staging of the host's state".into(), staging)],
            );
        }
        let n_kept = model.n_params() / share.weights + share.slots;
        parts.extend(per_parameter.iter().map(|&(name, bytes)| (name.into(), bytes * n_kept)));

        let tokens = micro_batch * sequence;
        let layers = model.n_layer as u64;
        let c = model.n_embd as u64;
        let kept = layers - recomputed.blocks.min(layers);
        if kept > 0 {
            let bytes = kept * tokens * block_bytes(model, recomputed.norms);
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
            0 => (
                "head and loss, or one block's backward pass",
                tokens * block_bytes(model, recomputed.norms),
            ),
            _ => ("head and loss, or the MLP's backward pass", 0),
        };
        let backward = block + mlp_backward_bytes(model, tokens);
        parts.push((name.into(), head_bytes(model, tokens).max(backward)));
        Some(Self { parts, host })
    }

    /// All parts on the card, in bytes.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// The largest micro-batch whose plan and [`RESERVE`] fit into `memory` bytes; 0 where none does.
pub fn largest_micro_batch(
    model: &ModelConfig,
    precision: Precision,
    optimizer: &OptimizerConfig,
    recomputed: Recompute,
    share: Share,
    sequence: u64,
    memory: u64,
) -> Option<u64> {
    let plan =
        |micro| MemoryPlan::new(model, precision, optimizer, recomputed, share, micro, sequence);
    let total = |micro| plan(micro).map(|plan| plan.total());
    total(1)?;
    let fits = |micro: &u64| total(*micro).is_some_and(|bytes| bytes + RESERVE <= memory);
    Some((1..=4096).take_while(fits).last().unwrap_or(0))
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

/// Refuses a run whose plan does not fit into `memory` bytes, before anything is allocated. A run without a plan
/// passes.
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
    let again = Recompute::of(config, model.n_layer);
    let (precision, optimizer) = (config.precision, &config.optimizer);
    let micro = config.train.micro_batch_size;
    let plan = MemoryPlan::new(model, precision, optimizer, again, share, micro, sequence);
    let Some(plan) = plan.filter(|plan| config.fused && plan.total() > memory) else {
        return Ok(());
    };
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let largest = plan.parts.iter().max_by_key(|(_, bytes)| *bytes);
    let (name, bytes) = largest.map_or(("nothing", 0), |(name, bytes)| (name.as_str(), *bytes));
    let fits = largest_micro_batch(model, precision, optimizer, again, share, sequence, memory);
    let hint = match fits.unwrap_or(0) {
        0 => {
            "no micro-batch fits; lower `train.max_seq_length`, or set `optimizer.master: split`, \
              `optimizer.state: int8`, `train.activation_checkpointing: block` or `optimizer.cpu_offload: true`"
                .to_owned()
        }
        n => format!("set `train.micro_batch_size` to {n} or less (accumulation rises by itself)"),
    };
    Err(anyhow!(
        "`train.micro_batch_size`: {micro} needs {:.1} GiB, the card offers {:.1}; the largest part is {name}, \
         {:.1} GiB",
        gib(plan.total()),
        gib(memory),
        gib(bytes)
    ))
    .hint(hint)
}

/// Bytes that a block keeps for each token.
fn block_bytes(model: &ModelConfig, recompute_norms: bool) -> u64 {
    let (c, f) = (model.n_embd as u64, model.intermediate_size as u64);
    let (h, d) = (model.n_head as u64, model.head_size as u64);
    let attention = 2 * (model.qkv_rows() as u64 + h * d) + 4 * h;
    match model.mlp_class {
        MlpClass::LLaMAMLP => {
            let norms = if recompute_norms { 2 * c } else { 4 * c };
            attention + 2 * (norms + 2 * f) + 8
        }
        MlpClass::GptNeoxMLP => attention + 2 * (3 * c + 2 * f) + 16,
    }
}

fn head_bytes(model: &ModelConfig, tokens: u64) -> u64 {
    let (c, v) = (model.n_embd as u64, model.padded_vocab_size as u64);
    let rows = ops::head_rows(tokens as i64, v as i64, 2) as u64;
    2 * rows * v + 2 * tokens * c + 4 * v * c
}

fn mlp_backward_bytes(model: &ModelConfig, tokens: u64) -> u64 {
    2 * tokens * (3 * model.intermediate_size as u64 + 3 * model.n_embd as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Share = Share::ALONE;

    fn fp32() -> OptimizerConfig {
        OptimizerConfig::default()
    }

    #[test]
    fn each_format_of_master_and_moments_has_its_bytes_a_parameter() {
        let n = 256_000;
        let total = |master, state| {
            let optimizer = OptimizerConfig { master, state, ..fp32() };
            optimizer_parts(&optimizer, n).iter().map(|(_, bytes)| bytes).sum::<u64>()
        };
        assert_eq!(total(MasterFormat::Fp32, StateFormat::Fp32), 12 * n);
        assert_eq!(total(MasterFormat::Split, StateFormat::Fp32), 10 * n);
        assert_eq!(total(MasterFormat::Bf16, StateFormat::Bf16), 4 * n);
        assert_eq!(total(MasterFormat::Bf16, StateFormat::Int8), 2 * n + n / 32);
    }

    #[test]
    fn state_on_the_host_leaves_weights_gradients_and_three_groups_on_the_card() {
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let n = model.n_params();
        let plan = |optimizer: &OptimizerConfig, precision| {
            MemoryPlan::new(&model, precision, optimizer, Recompute::default(), ALONE, 1, 2048)
                .unwrap()
        };
        for precision in [Precision::Bf16Mixed, Precision::Fp8Mixed] {
            let here = plan(&fp32(), precision);
            let there = plan(&OptimizerConfig { cpu_offload: true, ..fp32() }, precision);
            assert!(here.host.is_empty());
            let host: u64 = there.host.iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(host, 12 * n);
            assert_eq!(here.total() - there.total(), 12 * n - (288 << 20));
        }
    }

    /// Peaks of the allocator on an H100, as `bench train` printed them (docs/performance.md), in GiB.
    #[test]
    fn the_plan_is_within_five_percent_of_the_peaks_that_were_measured() {
        use Precision::{Bf16Mixed, Fp8Mixed};
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let split = |state| OptimizerConfig { master: MasterFormat::Split, state, ..fp32() };
        let (split32, split8) = (split(StateFormat::Fp32), split(StateFormat::Int8));
        for (precision, optimizer, norms, micro, measured) in [
            (Bf16Mixed, fp32(), false, 8, 35.6),
            (Bf16Mixed, fp32(), false, 16, 52.1),
            (Bf16Mixed, fp32(), true, 8, 32.8),
            (Bf16Mixed, split32.clone(), true, 8, 30.8),
            (Bf16Mixed, split32.clone(), true, 2, 20.5),
            (Bf16Mixed, split32, true, 3, 22.5),
            (Bf16Mixed, split8, true, 6, 21.5),
            (Fp8Mixed, fp32(), true, 8, 34.7),
            (Fp8Mixed, fp32(), true, 16, 48.9),
        ] {
            let again = Recompute { blocks: 0, norms };
            let plan =
                MemoryPlan::new(&model, precision, &optimizer, again, ALONE, micro, 2048).unwrap();
            let gib = plan.total() as f64 / (1u64 << 30) as f64;
            let what =
                format!("{precision}, {norms}, micro {micro}: {gib:.1}, measured {measured}");
            println!("{what}");
            assert!((gib / measured - 1.0).abs() < 0.05, "{what}");
        }
    }

    #[test]
    fn a_run_that_does_not_fit_is_refused_with_its_largest_part_and_what_would_fit() {
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let mut config = RunConfig::default();
        config.train.micro_batch_size = 16;
        check_fits(&config, &model, ALONE, 2048, 80 << 30).unwrap();
        let error =
            format!("{:#}", check_fits(&config, &model, ALONE, 2048, 40 << 30).unwrap_err());
        for words in ["16 needs 52.6 GiB", "offers 40.0", "activations of 22 blocks", "32.4 GiB"] {
            assert!(error.contains(words), "`{words}` is not in {error}");
        }
        config.train.micro_batch_size = 1;
        assert!(check_fits(&config, &model, ALONE, 2048, 10 << 30).is_err());
        config.precision = Precision::Fp32True; // no plan
        check_fits(&config, &model, ALONE, 2048, 10 << 30).unwrap();
    }

    #[test]
    fn the_largest_micro_batch_is_the_last_that_fits() {
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        for gib in [10, 24, 40, 80] {
            let memory = gib << 30;
            let (precision, optimizer) = (Precision::Bf16Mixed, fp32());
            let largest = |blocks| {
                let again = Recompute { blocks, norms: false };
                let largest =
                    largest_micro_batch(&model, precision, &optimizer, again, ALONE, 2048, memory)
                        .unwrap();
                let total = |micro| {
                    let plan =
                        MemoryPlan::new(&model, precision, &optimizer, again, ALONE, micro, 2048)
                            .unwrap();
                    plan.total() + RESERVE
                };
                assert!(largest == 0 || total(largest) <= memory);
                assert!(total(largest + 1) > memory, "{gib} GiB: {largest}");
                largest
            };
            let (none, all) = (largest(0), largest(22));
            assert!(all >= none && (gib < 40 || all > 2 * none), "{gib} GiB: {none}, {all}");
        }
        let fp32 = largest_micro_batch(
            &model,
            Precision::Fp32True,
            &fp32(),
            Recompute::default(),
            ALONE,
            2048,
            80 << 30,
        );
        assert_eq!(fp32, None);
    }

    #[test]
    fn a_recomputed_block_costs_its_inputs_alone_but_for_the_last() {
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let (tokens, inputs) = (16 * 2048, 2 * 2 * 2048);
        let total = |blocks| {
            let again = Recompute { blocks, norms: false };
            let precision = Precision::Bf16Mixed;
            MemoryPlan::new(&model, precision, &fp32(), again, ALONE, 16, 2048).unwrap().total()
        };
        for again in 1..22 {
            let saved = again * tokens * (block_bytes(&model, false) - inputs);
            assert_eq!(total(0) - total(again), saved, "{again} blocks");
        }
        // The last block's values are needed at once, so that computing them again saves nothing.
        assert_eq!(total(22) - total(21), tokens * inputs);
        assert_eq!(total(22), total(99));
    }

    #[test]
    fn ranks_share_the_state_and_with_full_shard_weights_and_gradients_too() {
        let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
        let n = model.n_params();
        let total = |strategy, ranks, local| {
            let share = Share::of(strategy, ranks, local, &model);
            let precision = Precision::Bf16Mixed;
            let plan =
                MemoryPlan::new(&model, precision, &fp32(), Recompute::default(), share, 8, 2048);
            plan.unwrap().total()
        };
        let alone = total(Strategy::Ddp, 1, 1);
        assert_eq!(total(Strategy::Ddp, 16, 8), alone);
        assert_eq!(total(Strategy::ShardGradOp, 16, 8), alone - 12 * (n - n / 16));
        let slots = 6 * 2 * 32_000 * 2048; // embedding and head are larger than a block
        assert_eq!(total(Strategy::FullShard, 16, 8), alone - 18 * (n - n / 16) + slots);
        assert_eq!(total(Strategy::HybridShard, 16, 8), total(Strategy::FullShard, 8, 8));
        assert_eq!(total(Strategy::FullShard, 1, 1), alone);
    }
}
