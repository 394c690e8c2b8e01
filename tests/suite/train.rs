//! The training step against its own invariants; parity with PyTorch is in `golden`.

use crate::common::{alone, max_difference, one_step, tiny_llama, tiny_neox};
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::Moments;
use tinyllama::config::{OptimizerConfig, Precision, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::train::optimizer::{AdamW, low_memory};
use tinyllama::train::step::{MicroStep, train_step};

fn batch(config: &ModelConfig, b: i64, t: i64) -> Batch {
    let tokens = Tensor::randint(config.vocab_size, [b, t + 1], (Kind::Int64, Device::Cpu));
    let (input, target) = (tokens.narrow(1, 0, t), tokens.narrow(1, 1, t));
    Batch { input, target, documents: None, n_targets: b * t }
}

fn slice(batch: &Batch, from: i64, len: i64) -> Batch {
    let input = batch.input.narrow(0, from, len);
    let target = batch.target.narrow(0, from, len);
    let n_targets = target.ne(-100).sum(Kind::Int64).int64_value(&[]);
    Batch { input, target, documents: None, n_targets }
}

fn fresh(config: &ModelConfig, precision: Precision) -> (GPT, AdamW) {
    tch::manual_seed(1);
    let mut model = GPT::new(config, Device::Cpu);
    let optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
    (model, optimizer)
}

#[test]
fn both_families_overfit_one_batch_in_every_precision() {
    let _alone = alone();
    for config in [tiny_llama(), tiny_neox()] {
        for precision in [Precision::Fp32True, Precision::Bf16Mixed, Precision::Bf16True] {
            let (model, mut optimizer) = fresh(&config, precision);
            let data = [batch(&config, 2, 16)];
            let mut losses = Vec::new();
            for _ in 0..60 {
                let out = one_step(&model, &mut optimizer, &data, 1e-2);
                optimizer.zero_grad();
                losses.push(out.loss.double_value(&[]));
            }
            let (first, last) = (losses[0], losses[59]);
            assert!((4.3..5.4).contains(&first), "{precision:?} starts near ln V: {first}");
            assert!(last < 0.5, "{} {precision:?}: {first} -> {last}", config.name);
        }
    }
}

#[test]
fn two_micro_batches_of_two_equal_one_of_four_also_with_masked_targets() {
    let _alone = alone();
    let config = tiny_llama();
    tch::manual_seed(7);
    let whole = batch(&config, 4, 16);
    let target = whole.target.copy();
    let _ = target.narrow(0, 0, 1).narrow(1, 0, 13).fill_(-100); // very unequal halves
    let whole = Batch { target, ..whole };
    let whole = slice(&whole, 0, 4);

    let run = |batches: &[Batch]| {
        let (model, mut optimizer) = fresh(&config, Precision::Fp32True);
        let mut losses = Vec::new();
        for _ in 0..3 {
            let out = one_step(&model, &mut optimizer, batches, 1e-4);
            optimizer.zero_grad();
            losses.push(out.loss.double_value(&[]));
        }
        (losses, optimizer.masters())
    };
    let (one, weights_one) = run(&[slice(&whole, 0, 4)]);
    let (two, weights_two) = run(&[slice(&whole, 0, 2), slice(&whole, 2, 2)]);
    for (a, b) in one.iter().zip(&two) {
        assert!((a - b).abs() < 1e-5, "{one:?} {two:?}");
    }
    for ((name, a), (_, b)) in weights_one.iter().zip(&weights_two) {
        assert!(max_difference(a, b) < 2e-5, "{name}");
    }
}

#[test]
fn mixed_precision_keeps_exact_masters_and_refreshes_the_bf16_copy() {
    let _alone = alone();
    let config = tiny_llama();
    let (model, mut optimizer) = fresh(&config, Precision::Bf16Mixed);
    assert_eq!(model.kind(), Kind::BFloat16);
    let data = [batch(&config, 2, 16), batch(&config, 2, 16)];
    let _ = one_step(&model, &mut optimizer, &data, 1e-4);
    for p in &optimizer.params {
        assert_eq!(p.master.kind(), Kind::Float);
        assert_eq!(p.grad.kind(), Kind::Float);
        assert!(p.weight.equal(&low_memory::nearest_bf16(&p.master)), "{}", p.name);
    }
    let moved = |p: &tinyllama::train::optimizer::ParamState| {
        !p.master.equal(&p.weight.to_kind(Kind::Float))
    };
    assert!(optimizer.params.iter().any(moved), "masters carry more than bf16");
}

#[test]
fn a_gradient_that_is_not_finite_updates_nothing_and_is_named() {
    let _alone = alone();
    let config = tiny_llama();
    let (_, mut optimizer) = fresh(&config, Precision::Fp32True);
    for p in &mut optimizer.params {
        p.grad = Tensor::randn_like(&p.master);
    }
    let _ = optimizer.params[2].grad.view([-1]).narrow(0, 0, 1).fill_(f64::NAN);
    let before: Vec<Tensor> = optimizer.params.iter().map(|p| p.master.copy()).collect();
    let norm = optimizer.step(1e-3, Some(1.0)).unwrap();
    assert!(norm.double_value(&[]).is_nan());
    assert!(optimizer.params.iter().zip(&before).all(|(p, b)| p.master.equal(b)));
    assert_eq!(optimizer.non_finite(), vec!["transformer.h.0.attn.qkv.weight"]);
}

#[test]
fn the_optimizers_state_survives_a_round_trip_bit_for_bit_and_refuses_a_strangers() {
    let _alone = alone();
    let config = tiny_llama();
    let (model, mut optimizer) = fresh(&config, Precision::Fp32True);
    let data = [batch(&config, 2, 16)];
    let _ = one_step(&model, &mut optimizer, &data, 1e-3);
    let saved: Vec<(String, Tensor)> =
        optimizer.state().into_iter().map(|(n, t)| (n, t.copy())).collect();

    let (_, mut other) = fresh(&config, Precision::Fp32True);
    other.load_state(1, &Moments::of(&saved)).unwrap();
    assert_eq!(other.step_count, 1);
    assert!(other.state().iter().zip(&saved).all(|((_, a), (_, b))| a.equal(b)));

    let (_, mut stranger) = fresh(&tiny_neox(), Precision::Fp32True);
    let error = stranger.load_state(1, &Moments::of(&saved)).unwrap_err().to_string();
    assert!(error.contains("optimizer state"), "{error}");
}

#[test]
fn label_smoothing_and_z_loss_are_in_the_training_loss_and_not_in_validation() {
    let _alone = alone();
    tch::manual_seed(7);
    let model = GPT::new(&tiny_llama(), Device::Cpu);
    let idx = Tensor::randint(97, [2, 8], (Kind::Int64, Device::Cpu));
    let target = Tensor::randint(97, [2, 8], (Kind::Int64, Device::Cpu));
    let batch = Batch { input: idx.copy(), target: target.copy(), documents: None, n_targets: 16 };
    let step = |train: TrainConfig| {
        tch::manual_seed(7);
        let mut model = GPT::new(&tiny_llama(), Device::Cpu);
        let mut optimizer =
            AdamW::new(&mut model, Precision::Fp32True, &OptimizerConfig::default()).unwrap();
        let batches = std::slice::from_ref(&batch);
        train_step(&model, &mut optimizer, &mut MicroStep::default(), batches, 1e-4, &train, None)
            .unwrap()
            .loss
            .double_value(&[])
    };
    let logits = model.forward(&idx, None).view([16, -1]).to_kind(Kind::Double);
    let lse = logits.logsumexp([-1].as_slice(), false); // (N,)
    let z = lse.square().mean(Kind::Double).double_value(&[]);
    let uniform = (&lse - logits.mean_dim([-1].as_slice(), false, Kind::Double)).mean(Kind::Double);
    let plain = step(TrainConfig::default());
    let with_z = step(TrainConfig { z_loss: 0.1, ..TrainConfig::default() });
    assert!((with_z - plain - 0.1 * z).abs() < 1e-4, "{with_z} {plain} {z}");
    let smooth = step(TrainConfig { label_smoothing: 0.2, ..TrainConfig::default() });
    let want = 0.8 * plain + 0.2 * uniform.double_value(&[]);
    assert!((smooth - want).abs() < 1e-4, "{smooth} {want}");
}
