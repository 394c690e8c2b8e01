//! The structs of a run's YAML. Keys are litgpt's where litgpt has them.

use super::{
    DpoConfig, EvalConfig, FinetuneConfig, LoraConfig, Method, PrepareConfig, Reference,
    weight::Weight,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A pretraining run: one YAML file.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Preset of the architecture, e.g. `tiny-llama-1.1b` (`tinyllama config models` lists them).
    pub model_name: String,
    /// Fields of the model configuration that replace the preset's, e.g. `{n_layer: 12, n_embd: 768}`.
    pub model_config: serde_json::Map<String, serde_json::Value>,
    /// Folder of the run: `config.yaml`, `metrics.jsonl`, TensorBoard events, checkpoints.
    pub out_dir: PathBuf,
    /// Number formats of weights, state and activations.
    pub precision: Precision,
    /// Start from the weights of this checkpoint folder (the optimizer starts fresh).
    pub initial_checkpoint_dir: Option<PathBuf>,
    /// `false`: start anew (refused where `out_dir` holds checkpoints); `auto`: newest checkpoint in
    /// `out_dir`, or start; a path: that checkpoint.
    pub resume: Resume,
    /// Folder with `tokenizer.json` or `tokenizer.model`; copied into each checkpoint.
    pub tokenizer_dir: Option<PathBuf>,
    /// Where to run: `auto` (a GPU if there is one), `cpu`, `cuda`, or `cuda:1`.
    pub device: DeviceChoice,
    /// Worker processes on this node, one a card; on the CPU as many as asked. 1: no other process. Where `torchrun`,
    /// Slurm or the variables `RANK`, `WORLD_SIZE`, .. start the workers, these say how many there are.
    pub devices: u64,
    /// Nodes with `devices` workers each. For more than one, start the command on each node with `NODE_RANK`,
    /// `MASTER_ADDR` and `MASTER_PORT` set, or by `torchrun` or Slurm.
    pub num_nodes: u64,
    /// Seed of the initial weights and of the data order.
    pub seed: u64,
    /// Kernels of attention: `auto` times ours and cuDNN's at the run's shape on its GPU and keeps the faster, `flash`
    /// are ours, `cudnn` is cuDNN's, `math` the plain formula. `deterministic` leaves cuDNN's out.
    pub attention: AttentionBackend,
    /// Fused kernels of `csrc/` (`true`) or their plain references (`false`).
    pub fused: bool,
    /// The same losses bit for bit from run to run on a GPU, at the price of speed: attention sums its
    /// gradients in a fixed order. On the CPU this holds anyway.
    pub deterministic: bool,
    /// Matrix products on a GPU: `search` times cuBLASLt's algorithms once for each shape and keeps the fastest,
    /// `heuristic` takes cuBLASLt's first choice, `aten` libtorch's. `deterministic` takes libtorch's.
    pub matmul: MatmulBackend,
    /// `auto`: a micro-batch's forward and backward pass is captured as a CUDA graph and launched by one call;
    /// `never`: each kernel is launched by itself, as ever on several ranks and in finetuning.
    pub cuda_graph: CudaGraph,
    /// Most GiB of a card that tensors may take; CUDA itself needs about 0.7 more. `null`: all there is. For a card
    /// shared with others, or to try what a smaller one would do.
    pub memory_limit: Option<f64>,
    /// What to train and validate on.
    pub data: DataConfig,
    /// Batch sizes, schedule, stopping, saving.
    pub train: TrainConfig,
    /// Validation.
    pub eval: EvalConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Runs of more than one process.
    pub distributed: DistributedConfig,
    /// What `tinyllama finetune` does; `null` in a pretraining run.
    pub finetune: Option<FinetuneConfig>,
}

/// `bf16-mixed` (fp32 master weights and state, bf16 compute), `fp8-mixed` (the same with the blocks' matrix products
/// in fp8), `bf16-true` (everything bf16), `32-true`.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Precision {
    /// fp32 master weights and AdamW state, bf16 working copy and activations, fp32 accumulation.
    #[serde(rename = "bf16-mixed")]
    Bf16Mixed,
    /// As `bf16-mixed`, but the matrix products of the blocks, forward and backward, are of e4m3 casts with one scale a
    /// tensor. Needs compute capability 8.9 (RTX 4090, H100) and a Llama without biases.
    #[serde(rename = "fp8-mixed")]
    Fp8Mixed,
    /// bf16 weights, gradients and AdamW state.
    #[serde(rename = "bf16-true")]
    Bf16True,
    /// fp32 throughout (TF32 matrix products on GPUs that have them).
    #[serde(rename = "32-true")]
    Fp32True,
}

/// `resume:` - `false`, `true` (= `auto`), `auto`, or a checkpoint folder.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(untagged)]
pub enum Resume {
    /// `false` starts anew, `true` is `auto`.
    Switch(bool),
    /// `auto` or a path.
    Text(String),
}

/// `device:` - `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(transparent)]
pub struct DeviceChoice(pub String);

/// Kernels of attention.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum AttentionBackend {
    /// In training on a GPU in 16 bits, the faster of our FlashAttention kernels and cuDNN's, by measurement at the
    /// start, once for a card and shape; elsewhere ours; libtorch's choice where they do not apply (fp32, other head
    /// sizes, CPU).
    Auto,
    /// Our FlashAttention kernels; libtorch's FlashAttention-2 where they do not apply.
    Flash,
    /// cuDNN, through libtorch.
    Cudnn,
    /// The plain formula: a T x S matrix in memory. The reference of the others.
    Math,
}

/// Matrix products of the fused path on a GPU.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum MatmulBackend {
    /// The fastest of cuBLASLt's algorithms, found by measurement and kept in `~/.cache/tinyllama/matmul.txt`.
    Search,
    /// cuBLASLt's first choice.
    Heuristic,
    /// libtorch's choice.
    Aten,
}

/// Whether micro-batches run as a CUDA graph.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum CudaGraph {
    /// On a GPU with fused kernels, where one process pretrains.
    Auto,
    /// Not at all.
    Never,
}

/// Training and validation sets: folders of packed files.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Weighted sources, e.g. `[{path: data/packed/slim, weight: 0.69}]`. Each sample is drawn from one.
    pub train: Vec<DataSource>,
    /// In which order samples come.
    pub order: DataOrder,
    /// End the run before a source would begin its epoch N+1, whichever is first; `null`: read on, each epoch in
    /// another order. With several sources the others are then not read to their end.
    pub epochs: Option<u64>,
    /// Attention stays within documents instead of going across a whole row of several: those end where the tokenizer
    /// of `tokenizer_dir` has its end-of-text token, or begin with its beginning-of-text token.
    pub document_mask: bool,
    /// Packed files for validation, or raw text as in `train`; read in order, the same every time.
    pub val: Option<PathBuf>,
    /// Micro-batches read ahead by the background thread.
    pub prefetch: usize,
    /// Run these preparations first where their output is missing (what `tinyllama prepare` does).
    pub prepare: Vec<PrepareConfig>,
    /// Key or column of the text of raw sources; `null`: `text`, or `content` in Parquet.
    pub text_field: Option<String>,
    /// Where raw sources are kept as packed files; `null`: `~/.cache/tinyllama/data`.
    pub cache_dir: Option<PathBuf>,
}

/// One weighted source of a mixture.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// Folder of packed `.bin` files (or a file prefix: `data/packed/train_slim`). Or raw text: a file, a folder or a
    /// pattern such as `corpus/*.jsonl.zst` of `.txt`, `.jsonl`, `.json`, `.csv` or `.parquet`; it is prepared once, with
    /// the tokenizer of `tokenizer_dir`, and kept in `data.cache_dir`.
    pub path: PathBuf,
    /// Share of samples drawn from it; weights are normalised to sum 1. A list of points
    /// `[{tokens: 0, weight: 1.0}, {tokens: 1.5T, weight: 0.6}]` changes it in straight lines between them.
    #[serde(default)]
    pub weight: Weight,
}

/// Orders of samples.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DataOrder {
    /// One seeded shuffle over all blocks of all files of a source, epoch by epoch: each block once, the same samples in
    /// a step for any number of ranks.
    #[default]
    Global,
    /// The order of lit-gpt and TinyLlama to the sample, for reproducing their runs: windows of 8 files a rank, files
    /// after the last whole window never read. It depends on the number of ranks.
    LitGpt,
}

/// Batch sizes, schedule, stopping, saving. A *step* is one optimizer step, an *iter* one micro-batch.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Sequences in one optimizer step, over all ranks.
    pub global_batch_size: u64,
    /// Sequences in one forward/backward on one rank.
    pub micro_batch_size: u64,
    /// What the forward pass keeps for the backward pass. `block` trades time for memory; losses stay the same.
    pub activation_checkpointing: ActivationCheckpointing,
    /// With `activation_checkpointing: block`, how many of the first blocks are computed again; default: all.
    /// The last one saves memory only where the head needs more than a block does.
    pub checkpoint_blocks: Option<u64>,
    /// Tokens of a training sequence; default: the model's `block_size`.
    pub max_seq_length: Option<u64>,
    /// Stop after this many tokens (over all ranks), e.g. `3e12`.
    pub max_tokens: Option<u64>,
    /// Stop after this many optimizer steps.
    pub max_steps: Option<u64>,
    /// Stop after this many seconds of training.
    pub max_time: Option<f64>,
    /// Learning-rate schedule after the warmup.
    pub lr_schedule: LrSchedule,
    /// Steps of linear warmup.
    pub lr_warmup_steps: u64,
    /// Learning rate at the end of `cosine` and `wsd`.
    pub min_lr: f64,
    /// Share of all steps that `wsd` decays over, at the end.
    pub decay_fraction: f64,
    /// Clip the global L2 norm of the gradients to this; `null`: no clipping.
    pub max_norm: Option<f64>,
    /// Share of the target's probability that is spread over the vocabulary in the training loss.
    pub label_smoothing: f64,
    /// Weight of `(log sum exp(logits))^2` in the training loss, which keeps logits from drifting; PaLM: 1e-4.
    pub z_loss: f64,
    /// Steps between log lines.
    pub log_interval: u64,
    /// Steps between checkpoints; `null`: only at the end and on a signal.
    pub save_interval: Option<u64>,
    /// Checkpoints kept besides `final/`; `null`: all.
    pub keep_last: Option<u64>,
    /// What to do where a periodic checkpoint cannot be written (disk full): `stop` or `continue`.
    pub on_save_error: OnSaveError,
    /// Use one matrix for the input embedding and the head; `null`: as the model's preset says.
    pub tie_embeddings: Option<bool>,
    /// Prompt continued at the end of training, as a taste; `null`: none.
    pub sample_prompt: Option<String>,
}

/// Activation checkpointing.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// Each operation keeps what its backward pass needs.
    None,
    /// The backward pass computes the outputs of the norms again (a read and a write of C values a token each); for
    /// Llamas without biases, with fused kernels, on a GPU. In `fp8-mixed` this is always so.
    Selective,
    /// A block keeps only its inputs (4 C bytes a token in bf16) and the backward pass runs it again: a third more
    /// arithmetic in it, which MFU does not count.
    Block,
}

/// Learning-rate schedule after the warmup.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Half a cosine from `lr` to `min_lr`.
    Cosine,
    /// `lr` throughout.
    Constant,
    /// Warmup, stable, then linear decay to `min_lr` over `decay_fraction` of the steps.
    Wsd,
}

/// What a failed periodic save does.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OnSaveError {
    /// End the run with an error; earlier checkpoints stay.
    Stop,
    /// Say so and go on training; the next save may succeed.
    Continue,
}

/// The optimizer.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `AdamW` (decoupled weight decay on every parameter, as in the original).
    pub name: OptimizerName,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// How `bf16-mixed` and `fp8-mixed` keep the two moments. `32-true` and `bf16-true` keep them in the dtype of the
    /// weights and take `fp32` only.
    pub state: StateFormat,
    /// How `bf16-mixed` and `fp8-mixed` keep the exact weights beside the bf16 ones that they compute with.
    /// `32-true` and `bf16-true` have one copy of the weights and take `fp32` only.
    pub master: MasterFormat,
    /// Keep moments and the exact weights beside the bf16 ones in page-locked memory of the host and stream them
    /// through the GPU in each step: the same training bit for bit, up to 12 bytes a parameter less on the card. A step
    /// takes those bytes over PCIe's bandwidth longer (TinyLlama, 25 GB/s: 0.53 s). Mixed precision and `fused` only.
    pub cpu_offload: bool,
}

/// Runs of more than one process: who keeps what, and how long ranks wait for each other.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// What each rank keeps. `full_shard`: 1/W of weights, gradients and optimizer state, weights are gathered a block
    /// ahead; `hybrid_shard`: the same within a node, copies of it on the others; `shard_grad_op`: whole weights and
    /// gradients, 1/W of the optimizer state; `ddp`: all of everything.
    pub strategy: Strategy,
    /// Dtype in which gradients travel: `fp32`, or `bf16`, half the bytes and rounded before they are summed.
    pub reduce_dtype: ReduceDtype,
    /// `auto`: NCCL between cards, Gloo between CPUs. `gloo`: between cards too, through the host's memory, far slower;
    /// then ranks may share a card, to try out sharding on one.
    pub backend: CommBackend,
    /// Seconds that a collective operation may take, and a rank may go without progress in its steps, before the job
    /// ends on all ranks.
    pub timeout: f64,
    /// Seconds without a sign of life after which a rank counts as dead and the job ends on all ranks. A process that
    /// merely computes gives its sign every second.
    pub heartbeat_timeout: f64,
    /// Seconds that ranks wait for each other at the start.
    pub rendezvous_timeout: f64,
}

/// Who keeps what of a run of several ranks.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// FSDP, ZeRO-3.
    FullShard,
    /// ZeRO-2.
    ShardGradOp,
    /// FSDP within a node, data-parallel between nodes.
    HybridShard,
    /// Data-parallel.
    Ddp,
}

/// Dtype in which gradients travel.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ReduceDtype {
    /// 4 bytes a value.
    Fp32,
    /// 2 bytes a value.
    Bf16,
}

/// What carries tensors between ranks.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum CommBackend {
    /// NCCL between cards, Gloo between CPUs.
    Auto,
    /// Gloo, also between cards.
    Gloo,
}

/// Formats of AdamW's moments.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum StateFormat {
    /// 8 bytes a parameter.
    Fp32,
    /// 4 bytes a parameter, rounded stochastically.
    Bf16,
    /// 2.03 bytes a parameter: 8 bits each and a scale for every 256, rounded stochastically.
    Int8,
}

/// Formats of the exact weights.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum MasterFormat {
    /// fp32 beside the bf16 weights: 6 bytes a parameter together.
    Fp32,
    /// The 16 bits that the bf16 weights lack, 4 bytes together: the same training bit for bit.
    Split,
    /// The bf16 weights alone, 2 bytes, updated with stochastic rounding.
    Bf16,
}

/// Optimizers.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum OptimizerName {
    /// Adam with decoupled weight decay.
    AdamW,
}

impl RunConfig {
    /// `memory_limit` in bytes.
    pub fn memory_limit_bytes(&self) -> Option<u64> {
        self.memory_limit.map(|gib| (gib * (1u64 << 30) as f64) as u64)
    }

    /// The adapters that are trained, where the weights are not.
    pub fn lora(&self) -> Option<&LoraConfig> {
        let adapters = |f: &&FinetuneConfig| match f.method {
            Method::Full => false,
            Method::Lora | Method::Qlora => true,
            Method::Dpo => f.dpo.reference == Reference::Adapters,
        };
        self.finetune.as_ref().filter(adapters).map(|f| &f.lora)
    }

    /// Whether all micro-batches have one shape: conversations have, where they are packed.
    pub fn has_fixed_shapes(&self) -> bool {
        self.finetune.as_ref().is_none_or(|f| f.method != Method::Dpo && f.data.packing)
    }

    /// Whether the weights beside the adapters are of 4 bits.
    pub fn is_qlora(&self) -> bool {
        self.finetune.as_ref().is_some_and(|f| f.method == Method::Qlora)
    }

    /// Preference optimisation, where that is the run's method.
    pub fn dpo(&self) -> Option<&DpoConfig> {
        self.finetune.as_ref().filter(|f| f.method == Method::Dpo).map(|f| &f.dpo)
    }

    /// Workers on all nodes that the configuration asks for. The actual number is the run's
    /// [`crate::distributed::World`]'s.
    pub fn ranks(&self) -> u64 {
        self.devices.saturating_mul(self.num_nodes)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16Mixed => "bf16-mixed",
            Self::Fp8Mixed => "fp8-mixed",
            Self::Bf16True => "bf16-true",
            Self::Fp32True => "32-true",
        })
    }
}

impl Precision {
    /// fp32 masters beside bf16 weights, which the model computes with.
    pub fn is_mixed(self) -> bool {
        matches!(self, Self::Bf16Mixed | Self::Fp8Mixed)
    }
}

impl DistributedConfig {
    /// Time between two signs of life of a rank: a tenth of `heartbeat_timeout`, at most a second.
    pub fn period(&self) -> Duration {
        Duration::from_secs_f64((self.heartbeat_timeout / 10.0).clamp(0.05, 1.0))
    }
}

impl TrainConfig {
    /// How many of a model's first blocks the backward pass computes again.
    pub fn recomputed_blocks(&self, n_layer: i64) -> u64 {
        match self.activation_checkpointing {
            ActivationCheckpointing::None | ActivationCheckpointing::Selective => 0,
            ActivationCheckpointing::Block => self.checkpoint_blocks.unwrap_or(n_layer as u64),
        }
    }
}

impl std::fmt::Display for StateFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl std::fmt::Display for MasterFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Split => "split",
            Self::Bf16 => "bf16",
        })
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            model_name: "tiny-llama-1.1b".into(),
            model_config: Default::default(),
            out_dir: "out/pretrain".into(),
            precision: Precision::Bf16Mixed,
            initial_checkpoint_dir: None,
            resume: Resume::Switch(false),
            tokenizer_dir: None,
            device: DeviceChoice("auto".into()),
            devices: 1,
            num_nodes: 1,
            seed: 42,
            attention: AttentionBackend::Auto,
            fused: true,
            deterministic: false,
            matmul: MatmulBackend::Search,
            cuda_graph: CudaGraph::Auto,
            memory_limit: None,
            data: DataConfig::default(),
            train: TrainConfig::default(),
            eval: EvalConfig::default(),
            optimizer: OptimizerConfig::default(),
            distributed: DistributedConfig::default(),
            finetune: None,
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            order: DataOrder::Global,
            epochs: None,
            document_mask: false,
            val: None,
            prefetch: 8,
            prepare: Vec::new(),
            text_field: None,
            cache_dir: None,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            global_batch_size: 512,
            micro_batch_size: 4,
            activation_checkpointing: ActivationCheckpointing::None,
            checkpoint_blocks: None,
            max_seq_length: None,
            max_tokens: None,
            max_steps: None,
            max_time: None,
            lr_schedule: LrSchedule::Cosine,
            lr_warmup_steps: 2000,
            min_lr: 4e-5,
            decay_fraction: 0.1,
            max_norm: Some(1.0),
            label_smoothing: 0.0,
            z_loss: 0.0,
            log_interval: 1,
            save_interval: Some(1000),
            keep_last: None,
            on_save_error: OnSaveError::Stop,
            tie_embeddings: None,
            sample_prompt: None,
        }
    }
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self {
            strategy: Strategy::FullShard,
            reduce_dtype: ReduceDtype::Fp32,
            backend: CommBackend::Auto,
            timeout: 600.0,
            heartbeat_timeout: 15.0,
            rendezvous_timeout: 300.0,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::AdamW,
            lr: 4e-4,
            betas: [0.9, 0.95],
            weight_decay: 0.1,
            eps: 1e-8,
            state: StateFormat::Fp32,
            master: MasterFormat::Fp32,
            cpu_offload: false,
        }
    }
}
