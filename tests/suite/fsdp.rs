//! Sharded training against one process: threads of this process over Gloo, each a rank with its own model.

use crate::common::{alone, tiny_llama, tiny_neox};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::Moments;
use tinyllama::config::{OptimizerConfig, Precision, ReduceDtype, Strategy, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::distributed::{Groups, Held, Plan, parallelize};
use tinyllama::ffi::{Backend, ProcessGroup, TcpStore};
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

const STEPS: usize = 20;
const SEQUENCES: i64 = 8;
const T: i64 = 16;
const STRATEGIES: [Strategy; 4] =
    [Strategy::FullShard, Strategy::HybridShard, Strategy::ShardGradOp, Strategy::Ddp];

/// One way to train.
#[derive(Clone, Debug)]
struct Way {
    model: ModelConfig,
    ranks: usize,
    strategy: Strategy,
    accumulation: i64,
    recomputed_blocks: usize,
    precision: Precision,
    reduce_dtype: ReduceDtype,
}

impl Way {
    fn plain(model: ModelConfig) -> Self {
        Self {
            model,
            ranks: 1,
            strategy: Strategy::FullShard,
            accumulation: 1,
            recomputed_blocks: 0,
            precision: Precision::Fp32True,
            reduce_dtype: ReduceDtype::Fp32,
        }
    }

    fn plan<'a>(&self, optimizer: &'a OptimizerConfig) -> Plan<'a> {
        let Self { strategy, reduce_dtype, precision, .. } = *self;
        Plan { strategy, reduce_dtype, precision, optimizer, sharers: 2 }
    }
}

type Named = BTreeMap<String, Tensor>;

/// What one rank ends with.
struct Rank {
    /// Loss and gradient norm of each step.
    numbers: Vec<[f64; 2]>,
    /// Exact weights of its parts, under `NAME@START`.
    parts: Vec<(String, Tensor)>,
    /// What its optimizer holds.
    state: Vec<(String, Tensor)>,
    held: Held,
}

/// What a run ends with.
struct Outcome {
    /// Loss and gradient norm of each step.
    numbers: Vec<[f64; 2]>,
    /// Exact weights, put together from all ranks.
    weights: Named,
    /// What each rank's optimizer holds.
    states: Vec<Vec<(String, Tensor)>>,
    held: Vec<Held>,
}

/// The same 8 sequences a step for every number of ranks; some targets do not count.
fn tokens(config: &ModelConfig) -> Tensor {
    let _alone = alone();
    tch::manual_seed(11);
    let shape = [STEPS as i64, SEQUENCES, T + 1];
    Tensor::randint(config.vocab_size, shape, (Kind::Int64, Device::Cpu))
}

fn batch(tokens: &Tensor, step: usize, first: i64, rows: i64) -> Batch {
    let rows = tokens.get(step as i64).narrow(0, first, rows); // (B, T + 1)
    let target = rows.narrow(1, 1, T).copy(); // (B, T)
    if first == 0 {
        let _ = target.get(0).narrow(0, 0, 5).fill_(-100);
    }
    let n_targets = target.ne(-100).sum(Kind::Int64).int64_value(&[]);
    Batch { input: rows.narrow(1, 0, T).copy(), target, documents: None, n_targets }
}

fn model(way: &Way) -> GPT {
    let _alone = alone();
    tch::manual_seed(3);
    let mut model = GPT::new(&way.model, Device::Cpu);
    model.recomputed_blocks = way.recomputed_blocks;
    model
}

/// Runs steps of one rank of `way`, from what was saved where something was.
fn steps(
    way: &Way,
    world: Option<&Arc<ProcessGroup>>,
    groups: Groups,
    tokens: &Tensor,
    range: std::ops::Range<usize>,
    from: Option<(&Named, &Moments)>,
) -> Rank {
    let mut model = model(way);
    if let Some((weights, _)) = from {
        for (name, mut weight) in model.named_parameters() {
            tch::no_grad(|| weight.copy_(&weights[&name]));
        }
    }
    let optimizer = OptimizerConfig::default();
    let plan = way.plan(&optimizer);
    let (ranks, mut adamw) = match world {
        None => (None, AdamW::new(&mut model, way.precision, &optimizer).unwrap()),
        Some(world) => {
            let weights: Named = model.named_parameters().into_iter().collect();
            let fill = |name: &str, parameter: &Tensor| {
                if world.rank() == 0 {
                    parameter.shallow_clone().copy_(&weights[name]);
                }
                Ok(())
            };
            model = GPT::outline(&way.model, Device::Cpu);
            model.recomputed_blocks = way.recomputed_blocks;
            let (ranks, adamw) =
                parallelize(&mut model, groups, Arc::clone(world), plan, Some(&fill)).unwrap();
            (Some(ranks), adamw)
        }
    };
    if let Some((_, moments)) = from {
        adamw.load_state(range.start as i64, moments).unwrap();
    }
    let rank = world.map_or(0, |world| world.rank() as i64);
    let micro_batch = SEQUENCES / (way.ranks as i64 * way.accumulation);
    let (train, mut micro) = (TrainConfig::default(), MicroStep::default());
    let mut numbers = Vec::new();
    for step in range {
        let of = |a: i64| (a * way.ranks as i64 + rank) * micro_batch;
        let batches: Vec<Batch> =
            (0..way.accumulation).map(|a| batch(tokens, step, of(a), micro_batch)).collect();
        adamw.zero_grad();
        let ranks = ranks.as_ref();
        let out =
            train_step(&model, &mut adamw, &mut micro, &batches, 1e-4, &train, ranks).unwrap();
        numbers.push([out.loss.double_value(&[]), out.grad_norm.double_value(&[])]);
    }
    let held = ranks.as_ref().map_or_else(Held::default, |ranks| ranks.fsdp.held());
    let parts = adamw.params.iter().map(|p| {
        let start = p.start.unwrap_or(0);
        (format!("{}@{start}", p.name), p.exact().copy())
    });
    let parts = parts.collect();
    let state = adamw.state().into_iter().map(|(name, t)| (name, t.copy())).collect();
    Rank { numbers, parts, state, held }
}

/// Groups of a rank: `hybrid_shard` has nodes of two ranks.
fn groups(store: &TcpStore, world: &Arc<ProcessGroup>, way: &Way) -> Groups {
    let (rank, size) = (world.rank(), world.size());
    let all = || Some(Arc::clone(world));
    match way.strategy {
        Strategy::FullShard | Strategy::ShardGradOp => Groups { shard: all(), replica: None },
        Strategy::Ddp => Groups { shard: None, replica: all() },
        Strategy::HybridShard => Groups {
            shard: Some(gloo(store, &format!("shard{}", rank / 2), rank % 2, 2)),
            replica: Some(gloo(store, &format!("replica{}", rank % 2), rank / 2, size / 2)),
        },
    }
}

fn gloo(store: &TcpStore, name: &str, rank: usize, size: usize) -> Arc<ProcessGroup> {
    let (cpu, here, long) = (Device::Cpu, Some("127.0.0.1"), Duration::from_secs(60));
    let group = ProcessGroup::new(store, name, Backend::Gloo, rank, size, cpu, here, long);
    Arc::new(group.unwrap())
}

fn run_from(
    way: &Way,
    range: std::ops::Range<usize>,
    from: Option<(&Named, &[(String, Tensor)])>,
) -> Outcome {
    type Saved = Option<(Named, Vec<(String, Tensor)>)>;
    // Tensors go to a thread, they are not shared.
    let input = || -> (Tensor, Saved) {
        let weights =
            |named: &Named| named.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        (tokens(&way.model), from.map(|(named, moments)| (weights(named), copies(moments))))
    };
    let one =
        |world: Option<&Arc<ProcessGroup>>, groups: Groups, (tokens, saved): (Tensor, Saved)| {
            let saved = saved.map(|(weights, moments)| (weights, Moments::of(&moments)));
            let from = saved.as_ref().map(|(weights, moments)| (weights, moments));
            steps(way, world, groups, &tokens, range.clone(), from)
        };
    let results = if way.ranks == 1 {
        vec![one(None, Groups { shard: None, replica: None }, input())]
    } else {
        let store = TcpStore::serve(0, Duration::from_secs(60)).unwrap();
        let rank = |rank: usize, input: (Tensor, Saved)| {
            let world = gloo(&store, "world", rank, way.ranks);
            let result = one(Some(&world), groups(&store, &world, way), input);
            world.barrier().unwrap();
            result
        };
        let rank = &rank;
        let inputs: Vec<_> = (0..way.ranks).map(|r| (r, input())).collect();
        thread::scope(|scope| {
            let run = |(r, input)| scope.spawn(move || rank(r, input));
            let threads: Vec<_> = inputs.into_iter().map(run).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    for other in &results[1..] {
        assert_eq!(
            other.numbers, results[0].numbers,
            "all ranks know the same loss and norm: {way:?}"
        );
    }
    let parts: Vec<(String, Tensor)> = results.iter().flat_map(|r| copies(&r.parts)).collect();
    let mut seen = std::collections::HashSet::new();
    let parts: Vec<_> = parts.into_iter().filter(|(name, _)| seen.insert(name.clone())).collect();
    let all = Moments::of(&parts);
    let shapes = model(way).named_parameters();
    let kind = parts[0].1.kind();
    let weights = shapes.into_iter().map(|(name, p)| {
        let weight = all.get(&format!("{name}@0"), kind, &[p.numel() as i64]).unwrap();
        (name, weight.view(&p.size()[..]))
    });
    let weights = weights.collect();
    let (states, held) = results.iter().map(|r| (copies(&r.state), r.held)).unzip();
    Outcome { numbers: results[0].numbers.clone(), weights, states, held }
}

fn copies(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
}

fn run(way: &Way) -> Outcome {
    run_from(way, 0..STEPS, None)
}

fn assert_close(got: &Outcome, want: &Outcome, tolerance: f64, way: &Way) {
    for (step, (got, want)) in got.numbers.iter().zip(&want.numbers).enumerate() {
        for (got, want) in got.iter().zip(want) {
            let error = (got / want - 1.0).abs();
            assert!(error < tolerance, "step {step}: {got} against {want}, {error:.1e}: {way:?}");
        }
    }
    for (name, want) in &want.weights {
        let mut got = got.weights[name].shallow_clone();
        let mut want = want.shallow_clone();
        if name.ends_with("attn.qkv.bias") {
            // A bias of the keys moves all scores of a query alike: its gradient is rounding, which Adam makes large.
            let n = want.numel() as i64 / 3;
            let others = |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, n), t.narrow(0, 2 * n, n)], 0);
            (got, want) = (others(&got), others(&want));
        }
        let error = ((&got - &want).norm() / want.norm()).double_value(&[]);
        assert!(error < tolerance, "{name}: relative difference {error:.1e}: {way:?}");
    }
}

#[test]
fn every_strategy_trains_as_one_process_does() {
    for model in [tiny_llama(), ModelConfig { tie_embeddings: true, ..tiny_llama() }, tiny_neox()] {
        let plain = Way::plain(model);
        let want = run(&plain);
        assert!(want.numbers[STEPS - 1][0] < want.numbers[0][0]);
        for ranks in [2, 4] {
            for strategy in STRATEGIES {
                if strategy == Strategy::HybridShard && ranks == 2 {
                    continue;
                }
                for (accumulation, recomputed_blocks) in [(1, 0), (2, 2)] {
                    let way =
                        Way { ranks, strategy, accumulation, recomputed_blocks, ..plain.clone() };
                    assert_close(&run(&way), &want, 1e-6, &way);
                }
            }
        }
    }
}

#[test]
fn sixteen_bits_train_alike_in_every_strategy_and_gradients_may_travel_in_them() {
    let plain = Way { precision: Precision::Bf16Mixed, ..Way::plain(tiny_llama()) };
    let want = run(&plain);
    for strategy in STRATEGIES {
        let way = Way { ranks: 4, strategy, ..plain.clone() };
        assert_close(&run(&way), &want, 2e-3, &way); // products of other sizes round differently
        let way = Way { reduce_dtype: ReduceDtype::Bf16, ..way };
        assert_close(&run(&way), &want, 1e-2, &way);
    }
}

#[test]
fn a_rank_holds_its_share_and_two_units_working_copies() {
    let config = ModelConfig { n_layer: 6, n_embd: 64, intermediate_size: 128, ..tiny_llama() };
    let all = config.n_params();
    let largest = {
        let way = Way::plain(config.clone());
        let sizes = |unit: &Vec<(String, Tensor)>| {
            let padded = |(_, p): &(String, Tensor)| (p.numel() as u64).next_multiple_of(256);
            unit.iter().map(padded).sum::<u64>()
        };
        let mut units: Vec<u64> = model(&way).units().iter().map(sizes).collect();
        units.sort();
        units[units.len() - 1] + 4 * 256
    };
    let ranks = 4;
    for strategy in STRATEGIES {
        let way =
            Way { ranks, strategy, precision: Precision::Bf16Mixed, ..Way::plain(config.clone()) };
        let outcome = run_from(&way, 0..1, None);
        let (cut, slots) = match strategy {
            Strategy::FullShard => (4, 2 * largest),
            Strategy::HybridShard => (2, 2 * largest),
            Strategy::ShardGradOp | Strategy::Ddp => (1, 0),
        };
        let padding = 8 * 4 * 256 + 20 * 256; // of units and parameters
        let most = |bytes: u64| bytes * ((all + padding) / cut + slots);
        for held in &outcome.held {
            assert!(held.weights <= most(2), "{strategy:?}: {held:?}, at most {}", most(2));
            assert!(held.gradients <= most(4), "{strategy:?}: {held:?}, at most {}", most(4));
            assert!(held.weights >= 2 * all / cut, "{strategy:?}: {held:?}");
        }
        let cut = if strategy == Strategy::ShardGradOp { 4 } else { cut };
        for state in &outcome.states {
            let bytes: u64 = state.iter().map(|(_, t)| 4 * t.numel() as u64).sum();
            assert!(bytes <= 8 * (all + padding) / cut, "{strategy:?}: {bytes}");
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks_and_another_strategy() {
    let plain = Way::plain(tiny_llama());
    let want = run(&plain);
    let four = Way { ranks: 4, ..plain.clone() };
    let first = run_from(&four, 0..10, None);
    let saved: Vec<(String, Tensor)> = first.states.iter().flat_map(|s| copies(s)).collect();
    for (ranks, strategy) in [
        (1, Strategy::FullShard),
        (2, Strategy::FullShard),
        (2, Strategy::Ddp),
        (4, Strategy::HybridShard),
        (4, Strategy::ShardGradOp),
    ] {
        let way = Way { ranks, strategy, ..plain.clone() };
        let mut second = run_from(&way, 10..STEPS, Some((&first.weights, &saved)));
        second.numbers.splice(0..0, first.numbers.iter().copied());
        assert_close(&second, &want, 1e-6, &way);
    }
}

#[test]
fn a_norm_that_is_not_finite_on_one_rank_stops_all_of_them() {
    let plain = Way::plain(tiny_llama());
    let way = Way { ranks: 2, ..plain };
    let store = TcpStore::serve(0, Duration::from_secs(60)).unwrap();
    let rank = |rank: usize| {
        let world = gloo(&store, "world", rank, 2);
        let mut model = model(&way);
        let optimizer = OptimizerConfig::default();
        let plan = way.plan(&optimizer);
        let groups = groups(&store, &world, &way);
        let (ranks, mut adamw) =
            parallelize(&mut model, groups, Arc::clone(&world), plan, None).unwrap();
        let before: Vec<Tensor> = adamw.params.iter().map(|p| p.exact().copy()).collect();
        let norm = Tensor::from(if rank == 1 { f32::NAN } else { 1.0 });
        let loss = Tensor::from(1.0f32);
        let [norm, _, factor] = ranks.totals(&norm, &loss, 4, 8.0).unwrap();
        assert!(norm.double_value(&[]).is_nan() && factor.double_value(&[]) == 1.0);
        adamw.step_by_norm(1e-3, Some(1.0), &norm, &factor).unwrap();
        let finite = Tensor::from(1.0f32);
        adamw.step_by_norm(1e-3, Some(1.0), &finite, &factor).unwrap();
        assert!(adamw.params.iter().zip(&before).all(|(p, b)| p.exact().equal(b)));
        world.barrier().unwrap();
    };
    let rank = &rank;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// Gradients are cleared where the backward pass enters their unit.
#[test]
fn a_backward_pass_that_does_not_say_where_it_is_is_an_error() {
    let way = Way::plain(tiny_llama());
    let store = TcpStore::serve(0, Duration::from_secs(60)).unwrap();
    let world = gloo(&store, "world", 0, 1);
    let (mut model, optimizer) = (model(&way), OptimizerConfig::default());
    let groups = Groups { shard: None, replica: None };
    let (ranks, _) =
        parallelize(&mut model, groups, Arc::clone(&world), way.plan(&optimizer), None).unwrap();
    let batch = batch(&tokens(&way.model), 0, 0, 2);
    for again in 0..2 {
        ranks.fsdp.begin_step();
        ranks.fsdp.begin_micro_batch(true);
        model.log_probabilities(&batch.input, &batch.target).sum(Kind::Float).backward();
        ranks.fsdp.end_micro_batch().unwrap_or_else(|e| panic!("pass {again}: {e:#}"));
    }
    ranks.fsdp.begin_micro_batch(true);
    model.hidden(&batch.input, None, None).sum(Kind::Float).backward();
    let error = format!("{:#}", ranks.fsdp.end_micro_batch().unwrap_err());
    let units = model.units().len();
    assert!(error.contains(&format!("entered {} of {units} units", units - 1)), "{error}");
    world.finish().unwrap();
}
