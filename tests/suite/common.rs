//! Small models and helpers shared by the tests.

use tch::{Kind, Tensor};
use tinyllama::config::TrainConfig;
use tinyllama::data::Batch;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, StepOutput, train_step};

/// A Llama with grouped queries, small enough for a test.
pub fn tiny_llama() -> ModelConfig {
    ModelConfig {
        name: "test-llama".into(),
        block_size: 64,
        vocab_size: 97,
        padded_vocab_size: 104,
        n_layer: 2,
        n_head: 4,
        n_query_groups: 2,
        n_embd: 32,
        head_size: 8,
        intermediate_size: 48,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    }
}

/// A GPT-NeoX with parallel residual and a quarter of each head rotated.
pub fn tiny_neox() -> ModelConfig {
    ModelConfig {
        name: "test-neox".into(),
        block_size: 64,
        vocab_size: 97,
        padded_vocab_size: 104,
        n_layer: 2,
        n_head: 4,
        n_query_groups: 4,
        n_embd: 32,
        head_size: 8,
        intermediate_size: 128,
        ..ModelConfig::preset("pythia-14m").unwrap()
    }
}

/// Largest absolute difference.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// One optimizer step with the default training settings, launched kernel by kernel.
pub fn one_step(model: &GPT, optimizer: &mut AdamW, batches: &[Batch], lr: f64) -> StepOutput {
    let train = TrainConfig::default();
    train_step(model, optimizer, &mut MicroStep::default(), batches, lr, &train).unwrap()
}
