//! The plan against what was measured.

use super::*;

const ALONE: Share = Share::ALONE;

fn fp32() -> OptimizerConfig {
    OptimizerConfig::default()
}

/// Of all weights of a model in `bf16-mixed`, of which nothing is computed again.
fn planner<'a>(model: &'a ModelConfig, optimizer: &'a OptimizerConfig) -> Planner<'a> {
    let recomputed = Recompute::default();
    let precision = Precision::Bf16Mixed;
    Planner { model, precision, optimizer, recomputed, share: ALONE, adapters: None }
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
        Planner { precision, ..planner(&model, optimizer) }.plan(1, 2048)
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
        let recomputed = Recompute { blocks: 0, norms };
        let planner = Planner { precision, recomputed, ..planner(&model, &optimizer) };
        let plan = planner.plan(micro, 2048);
        let gib = plan.total() as f64 / (1u64 << 30) as f64;
        let what = format!("{precision}, {norms}, micro {micro}: {gib:.1}, measured {measured}");
        println!("{what}");
        assert!((gib / measured - 1.0).abs() < 0.05, "{what}");
    }
}

/// Peaks of `benches/lora.sh` and of docs/finetuning.md, in GiB.
#[test]
fn the_plan_of_adapters_is_within_five_percent_of_the_peaks_that_were_measured() {
    let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    let (qv, all): (&[&'static str], &[_]) = (&["q_proj", "v_proj"], &crate::model::lora::TARGETS);
    for (targets, rank, dropout, nf4, micro, measured) in [
        (qv, 8, true, false, 8, 10.49),
        (qv, 8, true, false, 16, 18.30),
        (all, 8, true, false, 8, 16.52),
        (all, 8, true, false, 16, 30.27),
        (all, 16, false, false, 8, 13.4),
        (all, 16, false, true, 8, 11.6),
    ] {
        let adapters = Some(Adapters { targets: targets.to_vec(), rank, dropout, nf4 });
        let plan = Planner { adapters, ..planner(&model, &fp32()) }.plan(micro, 1024);
        let gib = plan.total() as f64 / (1u64 << 30) as f64;
        let what = format!("{targets:?} x {micro}, NF4 {nf4}: {gib:.2}, measured {measured}");
        println!("{what}");
        assert!((gib / measured - 1.0).abs() < 0.05, "{what}");
    }
    // configs/finetune/tinyllama-qlora-4gb.yaml: 1.1 GiB, where what no plan sees is more than 5 %.
    let adapters = Some(Adapters { targets: all.to_vec(), rank: 16, dropout: false, nf4: true });
    let recomputed = Recompute { blocks: 22, norms: false };
    let optimizer = OptimizerConfig { state: StateFormat::Int8, ..fp32() };
    let planner = Planner { adapters, recomputed, ..planner(&model, &optimizer) };
    let gib = planner.plan(1, 512).total() as f64 / (1u64 << 30) as f64;
    assert!((gib - 1.1).abs() < 0.12, "{gib}");
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_its_largest_part_and_what_would_fit() {
    let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    let mut config = RunConfig::default();
    config.train.micro_batch_size = 16;
    check_fits(&config, &model, ALONE, 2048, 80 << 30).unwrap();
    let error = format!("{:#}", check_fits(&config, &model, ALONE, 2048, 40 << 30).unwrap_err());
    for words in ["16 needs 52.6 GiB", "offers 40.0", "activations of 22 blocks", "32.4 GiB"] {
        assert!(error.contains(words), "`{words}` is not in {error}");
    }
    config.train.micro_batch_size = 1;
    assert!(check_fits(&config, &model, ALONE, 2048, 10 << 30).is_err());
    // Seven billion over eight cards of 24 GiB: no card reads all of them in fp32, which would be 25.1 GiB.
    let large = ModelConfig::preset("Llama-2-7b").unwrap();
    let share = Share::of(Strategy::FullShard, 8, 8, &large);
    let optimizer = fp32();
    let plan = Planner { share, ..planner(&large, &optimizer) }.plan(1, 512);
    let gib = plan.reading as f64 / (1u64 << 30) as f64;
    assert!((10.0..11.0).contains(&gib) && plan.total() > plan.reading, "{gib}");
    // Masters are in fp32 until all are there, whatever they become: 25.1 GiB of sums, 12.6 of weights, 12.6 of those.
    let narrow = OptimizerConfig {
        master: MasterFormat::Bf16,
        state: StateFormat::Int8,
        ..OptimizerConfig::default()
    };
    let share = Share::of(Strategy::ShardGradOp, 2, 2, &large);
    let plan = Planner { share, ..planner(&large, &narrow) }.plan(1, 512);
    let gib = plan.reading as f64 / (1u64 << 30) as f64;
    assert!((50.0..51.5).contains(&gib), "{gib}");
    // Adapters have all weights beside them.
    let lora = |rank| Adapters { targets: vec!["q_proj"], rank, dropout: false, nf4: false };
    let plan = Planner { adapters: Some(lora(8)), ..planner(&large, &optimizer) }.plan(1, 512);
    assert_eq!(plan.total(), 4 * large.n_params());
    config.precision = Precision::Fp32True; // no plan
    check_fits(&config, &model, ALONE, 2048, 10 << 30).unwrap();
}

#[test]
fn the_largest_micro_batch_is_the_last_that_fits() {
    let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    for gib in [10, 24, 40, 80] {
        let memory = gib << 30;
        let optimizer = fp32();
        let largest = |blocks| {
            let recomputed = Recompute { blocks, norms: false };
            let planner = Planner { recomputed, ..planner(&model, &optimizer) };
            let largest = planner.largest_micro_batch(2048, memory);
            let total = |micro| planner.plan(micro, 2048).total() + RESERVE;
            assert!(largest == 0 || total(largest) <= memory);
            assert!(total(largest + 1) > memory, "{gib} GiB: {largest}");
            largest
        };
        let (none, all) = (largest(0), largest(22));
        assert!(all >= none && (gib < 40 || all > 2 * none), "{gib} GiB: {none}, {all}");
    }
    let config = RunConfig { precision: Precision::Fp32True, ..RunConfig::default() };
    assert!(Planner::of(&config, &model, ALONE).unwrap().is_none());
}

#[test]
fn a_recomputed_block_costs_its_inputs_alone_but_for_the_last() {
    let model = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    let (tokens, inputs) = (16 * 2048, 2 * 2 * 2048);
    let total = |blocks| {
        let recomputed = Recompute { blocks, norms: false };
        Planner { recomputed, ..planner(&model, &fp32()) }.plan(16, 2048).total()
    };
    let block = planner(&model, &fp32()).block_bytes();
    for again in 1..22 {
        let saved = again * tokens * (block - inputs);
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
        Planner { share, ..planner(&model, &fp32()) }.plan(8, 2048).total()
    };
    let alone = total(Strategy::Ddp, 1, 1);
    assert_eq!(total(Strategy::Ddp, 16, 8), alone);
    assert_eq!(total(Strategy::ShardGradOp, 16, 8), alone - 12 * (n - n / 16));
    let slots = 6 * 2 * 32_000 * 2048; // embedding and head are larger than a block
    assert_eq!(total(Strategy::FullShard, 16, 8), alone - 18 * (n - n / 16) + slots);
    assert_eq!(total(Strategy::HybridShard, 16, 8), total(Strategy::FullShard, 8, 8));
    assert_eq!(total(Strategy::FullShard, 1, 1), alone);
}
