//! The key `finetune` of a run's YAML.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What `tinyllama finetune` does with the checkpoint in `initial_checkpoint_dir`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// `full`: every weight; `lora`: two thin matrices beside each target, the weights stay as they are; `qlora`: the same
    /// beside weights of 4 bits; `dpo`: preferences between answers, by all weights or by adapters.
    pub method: Method,
    /// Conversations to learn from.
    pub data: ChatDataConfig,
    /// Adapters of `lora` and `qlora`, and of `dpo` unless its reference is a `copy`.
    pub lora: LoraConfig,
    /// Preferences.
    pub dpo: DpoConfig,
}

/// Direct preference optimisation (arXiv 2305.18290).
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DpoConfig {
    /// How strongly the model is held to the reference.
    pub beta: f64,
    /// The model that is stayed close to.
    pub reference: Reference,
}

/// The reference of preference optimisation.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Reference {
    /// LoRA adapters are trained, and the model without them is the reference.
    #[default]
    Adapters,
    /// Every weight is trained, and a frozen copy is the reference.
    Copy,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self { beta: 0.1, reference: Reference::default() }
    }
}

/// Methods of finetuning.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every weight is trained.
    #[default]
    Full,
    /// `W + (alpha / r) B A` with trained A (r, in) and B (out, r), W as it is.
    Lora,
    /// LoRA beside weights of 4 bits: the blocks' matrices in NF4, their scales in 8 bits, 4.13 bits a weight.
    Qlora,
    /// Direct preference optimisation: of two answers the chosen one is made likelier beside the rejected one.
    Dpo,
}

/// Conversations: where they are, how they are written down and what of them is learned.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ChatDataConfig {
    /// A file, a folder or a pattern of `.jsonl`, `.json` or `.parquet`, plain, `.gz` or `.zst`.
    pub train: PathBuf,
    /// The same for validation; `null`: see `val_fraction`.
    pub val: Option<PathBuf>,
    /// Part of the conversations of `train` that is kept for validation where `val` names none.
    pub val_fraction: f64,
    /// How a row holds its conversation; `auto` looks at each row's fields.
    pub format: ChatFormat,
    /// How a conversation becomes text: `auto` (the checkpoint's own template), `guanaco`, `chatml`, `zephyr`, `llama-2`,
    /// `alpaca`, or a file with a Jinja template. It is saved with the checkpoint.
    pub template: String,
    /// Which tokens are targets.
    pub loss_on: LossOn,
    /// `true`: several conversations fill a row of `train.max_seq_length` tokens and do not see each other; `false`: each
    /// has a row of its own, padded to the longest of its micro-batch, which holds conversations of like length.
    pub packing: bool,
    /// Tokens to add to the vocabulary where it lacks them, e.g. `["<|im_start|>", "<|im_end|>"]`; their rows in embedding and
    /// head begin as the mean of the others. `method: full` only.
    pub special_tokens: Vec<String>,
}

/// Layouts of a row.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ChatFormat {
    /// By the fields that are there.
    #[default]
    Auto,
    /// `text`: `### Human: ..### Assistant: ..`, turn after turn.
    Guanaco,
    /// `instruction`, `input` (may be empty) and `output`.
    Alpaca,
    /// `messages`, a list of `role` and `content`.
    Messages,
    /// `conversations`, a list of `from` and `value`.
    Sharegpt,
}

/// Which tokens of a conversation are targets.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// What the assistant says, and the end of its turns.
    #[default]
    Assistant,
    /// Everything, as in TinyLlama's chat models.
    All,
}

/// Low-rank adapters.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank.
    pub r: i64,
    /// The product of both matrices is scaled by `alpha / r`.
    pub alpha: f64,
    /// Part of the adapters' inputs that is zeroed in training.
    pub dropout: f64,
    /// Which matrices get an adapter: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj` (Hugging
    /// Face's names), lit-gpt's `qkv`, `proj`, `fc_1`, `fc_2`, `mlp.proj`, or `all`.
    pub targets: Vec<String>,
}

impl Default for ChatDataConfig {
    fn default() -> Self {
        Self {
            train: PathBuf::new(),
            val: None,
            val_fraction: 0.0,
            format: ChatFormat::Auto,
            template: "auto".into(),
            loss_on: LossOn::Assistant,
            packing: true,
            special_tokens: Vec::new(),
        }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        let targets = ["q_proj", "v_proj"].map(str::to_owned).to_vec();
        Self { r: 8, alpha: 16.0, dropout: 0.05, targets }
    }
}

/// Keys that a finetuning run has other defaults for than a pretraining run. `ends`: the run's length is given otherwise
/// than by epochs; `saves`: when it saves is given.
pub(super) fn defaults(method: Method, ends: bool, saves: bool) -> Value {
    json!({
        "out_dir": "out/finetune",
        "data": {"epochs": if ends { Value::Null } else { 1.into() }},
        "train": {
            "global_batch_size": 16,
            "lr_schedule": "cosine",
            "lr_warmup_steps": 0,
            "min_lr": 0.0,
            "save_interval": 500,
            "keep_last": if saves { Value::Null } else { 1.into() },
        },
        "finetune": if method == Method::Dpo { json!({"lora": {"dropout": 0.0}}) } else { json!({}) },
        "eval": {"interval": null, "max_iters": null, "initial_validation": true},
        "distributed": if method == Method::Full { json!({}) } else { json!({"strategy": "ddp"}) },
        "optimizer": {
            "lr": match method {
                Method::Full => 2e-5,
                Method::Lora | Method::Qlora => 2e-4,
                Method::Dpo => 5e-6,
            },
            "betas": [0.9, 0.999],
            "weight_decay": 0.0,
        },
    })
}
