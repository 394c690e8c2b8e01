//! Sharded training on CUDA GPUs over NCCL: one rank, through every buffer and collective, and two ranks with a card
//! each, as threads. Skipped without a card, and without two.

use crate::common::card;
use crate::gpu::small_llama;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::config::{OptimizerConfig, Precision, ReduceDtype, Strategy, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::distributed::{Groups, Plan, parallelize};
use tinyllama::ffi::{self, Backend, ProcessGroup, TcpStore};
use tinyllama::model::{GPT, ModelConfig, init};
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

const LONG: Duration = Duration::from_secs(60);
const STRATEGIES: [Strategy; 4] =
    [Strategy::FullShard, Strategy::HybridShard, Strategy::ShardGradOp, Strategy::Ddp];

/// A model on a card, the same on every one.
fn model(device: Device, recomputed_blocks: usize) -> GPT {
    tch::manual_seed(8);
    let mut model = GPT::new(&small_llama(), device);
    model.recomputed_blocks = recomputed_blocks;
    model
}

/// Six steps of two micro-batches of (2, 256) tokens.
fn batches() -> Vec<[Batch; 2]> {
    tch::manual_seed(9);
    let ids = || Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu));
    let batch = || Batch { input: ids(), target: ids(), documents: None, n_targets: 512 };
    (0..6).map(|_| [batch(), batch()]).collect()
}

/// The same tensors once more.
fn share(batch: &Batch) -> Batch {
    let [input, target] = [&batch.input, &batch.target].map(Tensor::shallow_clone);
    Batch { input, target, documents: None, n_targets: batch.n_targets }
}

/// What a rank ends with.
struct Outcome {
    /// Loss and gradient norm of each step.
    numbers: Vec<f64>,
    /// Exact weights of its parts, by the parameter's number and the part's start, on the CPU.
    parts: Vec<((usize, i64), Tensor)>,
}

/// Trains on a rank's share of the batches.
fn train(
    mut model: GPT,
    steps: &[Vec<&Batch>],
    ranks: Option<(Groups, &Arc<ProcessGroup>, Strategy)>,
    precision: Precision,
    optimizer: &OptimizerConfig,
) -> Outcome {
    let (ranks, mut adamw) = match ranks {
        None => (None, AdamW::new(&mut model, precision, optimizer).unwrap()),
        Some((groups, world, strategy)) => {
            let reduce_dtype = ReduceDtype::Fp32;
            let plan = Plan { strategy, reduce_dtype, precision, optimizer, sharers: 2 };
            let (ranks, adamw) =
                parallelize(&mut model, groups, Arc::clone(world), plan, None).unwrap();
            (Some(ranks), adamw)
        }
    };
    let (config, mut micro) = (TrainConfig::default(), MicroStep::new(ranks.is_none()));
    let mut numbers = vec![];
    for batches in steps {
        let batches: Vec<Batch> = batches.iter().map(|batch| share(batch)).collect();
        adamw.zero_grad();
        let ranks = ranks.as_ref();
        let out =
            train_step(&model, &mut adamw, &mut micro, &batches, 1e-3, &config, ranks).unwrap();
        numbers.extend([out.loss.double_value(&[]), out.grad_norm.double_value(&[])]);
    }
    adamw.settle();
    let part = |p: &tinyllama::train::optimizer::ParamState| {
        let exact = p.exact().view([-1]).to_device(Device::Cpu).copy();
        ((p.index, p.start.unwrap_or(0)), exact)
    };
    Outcome { numbers, parts: adamw.params.iter().map(part).collect() }
}

/// The parts of all ranks, each once, in the model's order.
fn weights<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Tensor {
    let all = outcomes.into_iter().flat_map(|o| &o.parts);
    let parts: std::collections::BTreeMap<_, _> = all.map(|(place, t)| (place, t)).collect();
    Tensor::cat(&parts.into_values().collect::<Vec<_>>(), 0)
}

fn assert_alike(got: &[&Outcome], want: &Outcome, tolerance: f64, what: &str) {
    for (i, (a, b)) in got[0].numbers.iter().zip(&want.numbers).enumerate() {
        assert!((a / b - 1.0).abs() < tolerance, "{what}: number {i} is {a}, {b} without ranks");
    }
    let (got, want) = (weights(got.iter().copied()), weights([want]));
    let error = ((got - &want).norm() / want.norm()).double_value(&[]);
    assert!(error < tolerance, "{what}: weights differ by {error:.1e}");
}

fn nccl(store: &TcpStore, name: &str, rank: usize, size: usize) -> Arc<ProcessGroup> {
    let card = Device::Cuda(rank);
    Arc::new(ProcessGroup::new(store, name, Backend::Nccl, rank, size, card, None, LONG).unwrap())
}

/// All ranks on one node.
fn groups(world: &Arc<ProcessGroup>, strategy: Strategy) -> Groups {
    let all = || Some(Arc::clone(world));
    match strategy {
        Strategy::Ddp => Groups { shard: None, replica: all() },
        _ => Groups { shard: all(), replica: None },
    }
}

#[test]
fn every_strategy_trains_over_nccl_as_without_ranks() {
    let Some((device, _card)) = card("every_strategy_trains_over_nccl_as_without_ranks") else {
        return;
    };
    ffi::set_math_mode(true, true).unwrap();
    let store = TcpStore::serve(0, LONG).unwrap();
    let world = nccl(&store, "world", 0, 1);
    let on_card = OptimizerConfig::default();
    let on_host = OptimizerConfig { cpu_offload: true, ..OptimizerConfig::default() };
    let batches = batches();
    let steps: Vec<Vec<&Batch>> = batches.iter().map(|step| step.iter().collect()).collect();
    for again in [0, 2] {
        let mixed = Precision::Bf16Mixed;
        let want = train(model(device, again), &steps, None, mixed, &on_card);
        for strategy in STRATEGIES {
            for optimizer in [&on_card, &on_host] {
                let mut groups = groups(&world, strategy);
                if strategy == Strategy::HybridShard {
                    groups.replica = Some(Arc::clone(&world)); // one node of one rank, sums and all
                }
                let ranks = Some((groups, &world, strategy));
                let got = train(model(device, again), &steps, ranks, mixed, optimizer);
                let offload = optimizer.cpu_offload;
                let what = format!("{strategy:?}, {again} blocks again, offload {offload}");
                assert_alike(&[&got], &want, 1e-5, &what);
            }
        }
    }
    ffi::set_math_mode(true, false).unwrap();
    world.finish().unwrap();
}

#[test]
fn two_cards_train_over_nccl_as_one() {
    let name = "two_cards_train_over_nccl_as_one";
    let Some((device, _card)) = card(name) else { return };
    if Cuda::device_count() < 2 {
        eprintln!("skipped {name}: one GPU is visible");
        return;
    }
    ffi::set_math_mode(false, true).unwrap();
    let optimizer = OptimizerConfig::default();
    let batches = batches();
    let both: Vec<Vec<&Batch>> = batches.iter().map(|step| step.iter().collect()).collect();
    let store = TcpStore::serve(0, LONG).unwrap();
    for (precision, tolerance) in [(Precision::Fp32True, 1e-5), (Precision::Bf16Mixed, 2e-3)] {
        for again in [0, 2] {
            let want = train(model(device, again), &both, None, precision, &optimizer);
            for strategy in STRATEGIES {
                let what = format!("{strategy:?}, {again} blocks again, {precision}");
                let rank = |rank: usize, model: GPT, steps: Vec<Batch>| {
                    ffi::cuda_set_device(rank).unwrap();
                    let world = nccl(&store, &what, rank, 2);
                    let steps: Vec<Vec<&Batch>> = steps.iter().map(|batch| vec![batch]).collect();
                    let ranks = Some((groups(&world, strategy), &world, strategy));
                    let outcome = train(model, &steps, ranks, precision, &optimizer);
                    world.barrier().unwrap();
                    world.finish().unwrap();
                    outcome
                };
                let rank = &rank;
                let inputs: Vec<_> = (0..2)
                    .map(|r| {
                        let own = |step: &[Batch; 2]| share(&step[r]);
                        (r, model(Device::Cuda(r), again), batches.iter().map(own).collect())
                    })
                    .collect();
                let got: Vec<Outcome> = thread::scope(|scope| {
                    let run = |(r, model, steps)| scope.spawn(move || rank(r, model, steps));
                    let threads: Vec<_> = inputs.into_iter().map(run).collect();
                    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
                });
                assert_eq!(got[0].numbers, got[1].numbers, "{what}");
                assert_alike(&[&got[0], &got[1]], &want, tolerance, &what);
            }
        }
    }
    ffi::set_math_mode(true, false).unwrap();
}

/// Beside what it keeps in the end, with the optimizer's state on the host.
#[test]
fn no_card_holds_more_than_a_unit_of_whole_weights() {
    let Some((device, _card)) = card("no_card_holds_more_than_a_unit_of_whole_weights") else {
        return;
    };
    // Blocks of 44M parameters, beside which the allocator's rounding is little.
    let config = ModelConfig {
        n_layer: 6,
        vocab_size: 8192,
        padded_vocab_size: 8192,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    };
    let optimizer = OptimizerConfig { cpu_offload: true, ..OptimizerConfig::default() };
    let store = TcpStore::serve(0, LONG).unwrap();
    let world = nccl(&store, "outline", 0, 1);
    let mut model = GPT::outline(&config, device);
    ffi::cuda_reset_peak_memory(0).unwrap();
    let fill = |name: &str, parameter: &Tensor| {
        init::init_parameter(name, parameter, &config);
        Ok(())
    };
    let plan = Plan {
        strategy: Strategy::FullShard,
        reduce_dtype: ReduceDtype::Fp32,
        precision: Precision::Bf16Mixed,
        optimizer: &optimizer,
        sharers: 1,
    };
    let groups = groups(&world, plan.strategy);
    let (ranks, adamw) =
        parallelize(&mut model, groups, Arc::clone(&world), plan, Some(&fill)).unwrap();
    let memory = ffi::cuda_memory(0).unwrap();
    let largest = ranks.layouts.iter().map(|layout| 4 * layout.len).max().unwrap();
    let whole = 4 * model.n_params() as i64;
    let beside = memory.peak_allocated - memory.allocated;
    eprintln!("{beside} bytes beside what stays, a unit {largest}, all {whole}");
    assert!(beside < largest + (16 << 20), "{beside} bytes, a unit has {largest}");
    assert!(whole > 6 * largest, "{whole} bytes are too few to tell");
    drop(adamw);
    world.finish().unwrap();
}
