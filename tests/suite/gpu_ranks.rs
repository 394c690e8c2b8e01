//! Sharded training on a CUDA GPU: NCCL with one rank, through every buffer and collective. Skipped without a card.

use crate::common::card;
use crate::gpu::small_llama;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tinyllama::config::{OptimizerConfig, Precision, ReduceDtype, Strategy, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::distributed::{Groups, Plan, parallelize};
use tinyllama::ffi::{self, Backend, ProcessGroup, TcpStore};
use tinyllama::model::GPT;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

/// Losses and norms of six steps of two micro-batches, and the exact weights in one row.
fn six_steps(
    device: Device,
    ranks: Option<(&Arc<ProcessGroup>, Strategy)>,
    recomputed_blocks: usize,
    optimizer: &OptimizerConfig,
) -> (Vec<f64>, Tensor) {
    tch::manual_seed(8);
    let mut model = GPT::new(&small_llama(), device);
    model.recomputed_blocks = recomputed_blocks;
    let precision = Precision::Bf16Mixed;
    let (ranks, mut adamw) = match ranks {
        None => (None, AdamW::new(&mut model, precision, optimizer).unwrap()),
        Some((world, strategy)) => {
            let all = || Some(Arc::clone(world));
            let groups = match strategy {
                Strategy::FullShard | Strategy::ShardGradOp => {
                    Groups { shard: all(), replica: None }
                }
                Strategy::HybridShard => Groups { shard: all(), replica: all() },
                Strategy::Ddp => Groups { shard: None, replica: all() },
            };
            let reduce_dtype = ReduceDtype::Fp32;
            let plan = Plan { strategy, reduce_dtype, precision, optimizer };
            let (ranks, adamw) = parallelize(&mut model, groups, Arc::clone(world), plan).unwrap();
            (Some(ranks), adamw)
        }
    };
    let (train, mut micro) = (TrainConfig::default(), MicroStep::new(ranks.is_none()));
    let mut numbers = vec![];
    for _ in 0..6 {
        let ids = || Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu));
        let batch = || Batch { input: ids(), target: ids(), n_targets: 512 };
        let batches = [batch(), batch()];
        adamw.zero_grad();
        let ranks = ranks.as_ref();
        let out =
            train_step(&model, &mut adamw, &mut micro, &batches, 1e-3, &train, ranks).unwrap();
        numbers.extend([out.loss.double_value(&[]), out.grad_norm.double_value(&[])]);
    }
    let weights: Vec<Tensor> = adamw.masters().iter().map(|(_, t)| t.view([-1]).copy()).collect();
    (numbers, Tensor::cat(&weights, 0))
}

#[test]
fn every_strategy_trains_over_nccl_as_without_ranks() {
    let Some((device, _card)) = card("every_strategy_trains_over_nccl_as_without_ranks") else {
        return;
    };
    ffi::set_math_mode(true, true).unwrap();
    let long = Duration::from_secs(60);
    let store = TcpStore::serve(0, long).unwrap();
    let world = ProcessGroup::new(&store, "world", Backend::Nccl, 0, 1, device, None, long);
    let world = Arc::new(world.unwrap());
    let on_card = OptimizerConfig::default();
    let on_host = OptimizerConfig { cpu_offload: true, ..OptimizerConfig::default() };
    for recomputed_blocks in [0, 2] {
        let (want, want_weights) = six_steps(device, None, recomputed_blocks, &on_card);
        for strategy in
            [Strategy::FullShard, Strategy::HybridShard, Strategy::ShardGradOp, Strategy::Ddp]
        {
            for optimizer in [&on_card, &on_host] {
                let ranks = Some((&world, strategy));
                let (got, weights) = six_steps(device, ranks, recomputed_blocks, optimizer);
                let what = format!("{strategy:?}, {recomputed_blocks} blocks again: {got:?}");
                for (got, want) in got.iter().zip(&want) {
                    assert!((got / want - 1.0).abs() < 1e-5, "{what}, {want}");
                }
                let error = (&weights.to_device(Device::Cpu) - want_weights.to_device(Device::Cpu))
                    .norm()
                    / want_weights.norm().to_device(Device::Cpu);
                assert!(error.double_value(&[]) < 1e-5, "{what}: weights {error:?}");
            }
        }
    }
    ffi::set_math_mode(true, false).unwrap();
    world.finish().unwrap();
}
