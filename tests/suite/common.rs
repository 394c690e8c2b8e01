//! Small models and helpers shared by the tests.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::checkpoint;
use tinyllama::config::TrainConfig;
use tinyllama::data::Batch;
use tinyllama::ffi::{self, Matmul, SdpBackends};
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::tokenizer::Tokenizer;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, StepOutput, train_step};

/// Holds what libtorch has once a process: the random generators, which `tch::manual_seed` sets for all devices, and the
/// switches. A test that draws random numbers holds it while it does, one that seeds them until it drew its last; a
/// failed test leaves it to the others.
pub fn alone() -> MutexGuard<'static, ()> {
    static LIBTORCH: Mutex<()> = Mutex::new(());
    LIBTORCH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The GPU for this test alone, as [`alone`], with all switches as at the start of a process, before and after; `None`
/// after saying that the test is skipped. A test that ran beside it could wait for the card while it captures a graph, which breaks the
/// capture, or add to what it measures: peak memory, kernels, the CPU's waits.
pub fn card(test: &str) -> Option<(Device, Card)> {
    if !Cuda::is_available() {
        eprintln!("skipped {test}: no CUDA GPU is visible");
        return None;
    }
    let card = Card { _alone: alone() };
    reset_switches().unwrap();
    Some((Device::Cuda(0), card))
}

/// A test's turn on the GPU.
pub struct Card {
    _alone: MutexGuard<'static, ()>,
}

impl Drop for Card {
    fn drop(&mut self) {
        let _ = reset_switches(); // tests on the CPU come next
    }
}

fn reset_switches() -> anyhow::Result<()> {
    ffi::set_math_mode(false, false)?;
    ffi::set_matmul(Matmul::Aten)?;
    ffi::set_sdp_backends(SdpBackends { math: true, flash: true, efficient: true, cudnn: true })
}

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
    train_step(model, optimizer, &mut MicroStep::default(), batches, lr, &train, None).unwrap()
}

/// Writes a checkpoint of random weights, the same each time, with the quickstart's tokenizer.
pub fn quickstart_like(dir: &Path) {
    let from = Path::new("data/quickstart/tokenizer");
    let mut config = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    (config.n_layer, config.n_embd, config.n_head, config.n_query_groups) = (2, 64, 4, 2);
    (config.head_size, config.intermediate_size, config.block_size) = (16, 128, 128);
    config.padded_vocab_size = Tokenizer::load(from).unwrap().vocab_size() as i64;
    config.vocab_size = config.padded_vocab_size;
    {
        let _alone = alone();
        tch::manual_seed(3);
        checkpoint::save(dir, &GPT::new(&config, Device::Cpu)).unwrap();
    }
    checkpoint::copy_files(&Tokenizer::files(from), dir).unwrap();
}
