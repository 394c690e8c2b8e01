//! Tests that need a CUDA GPU. Without one each prints why it is skipped and passes.

mod memory;

use crate::common::card;
use tch::{Device, Kind, Tensor};
use tinyllama::bench::profile::{Family, Profile, StepSpan};
use tinyllama::checkpoint::Moments;
use tinyllama::config::{AttentionBackend, MasterFormat, OptimizerConfig, Precision, StateFormat};
use tinyllama::ffi;
use tinyllama::ffi::profile::Recording;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::ops::LossScalars;
use tinyllama::train::optimizer::{AdamW, ParamState, low_memory};

/// Largest difference relative to the largest magnitude.
fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    let difference = (got.to_kind(Kind::Double) - &want).abs().max().double_value(&[]);
    difference / want.abs().max().double_value(&[])
}

pub fn small_llama() -> ModelConfig {
    ModelConfig {
        n_layer: 2,
        n_head: 8,
        n_query_groups: 2,
        n_embd: 512,
        head_size: 64,
        intermediate_size: 704,
        vocab_size: 512,
        padded_vocab_size: 512,
        block_size: 256,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    }
}

/// Masters and moments after five steps on random gradients.
fn five_steps(device: Device, precision: Precision, fused: bool) -> Vec<Tensor> {
    tch::manual_seed(3);
    let mut model = GPT::new(&small_llama(), device);
    model.fused = fused;
    let mut optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
    for step in 0..5 {
        for (i, p) in optimizer.params.iter_mut().enumerate() {
            tch::manual_seed(1000 * step + i as i64);
            p.grad = Tensor::randn_like(&p.master) * 0.01;
        }
        let _ = optimizer.step(1e-3, Some(1.0)).unwrap();
    }
    let state = |p: &ParamState| {
        [&p.master, &p.exp_avg, &p.exp_avg_sq, &p.weight].map(|t| t.detach().copy())
    };
    optimizer.params.iter().flat_map(state).collect()
}

#[test]
fn fused_adamw_agrees_with_the_plain_formula() {
    let Some((device, _card)) = card("fused_adamw_agrees_with_the_plain_formula") else { return };
    for precision in [Precision::Fp32True, Precision::Bf16Mixed] {
        let fused = five_steps(device, precision, true);
        let plain = five_steps(device, precision, false);
        for (got, want) in fused.iter().zip(&plain) {
            let tolerance = if want.kind() == Kind::BFloat16 { 8e-3 } else { 2e-6 };
            let error = relative_error(got, want);
            assert!(error < tolerance, "{precision:?} {:?}: {error:.2e}", want.kind());
        }
    }
}

#[test]
fn fused_adamw_writes_nothing_where_the_gradient_is_not_finite() {
    let Some((device, _card)) = card("fused_adamw_writes_nothing_where_not_finite") else { return };
    for bad in [f64::NAN, f64::INFINITY] {
        tch::manual_seed(4);
        let mut model = GPT::new(&small_llama(), device);
        let mut optimizer =
            AdamW::new(&mut model, Precision::Bf16Mixed, &OptimizerConfig::default()).unwrap();
        for p in &mut optimizer.params {
            p.grad = Tensor::randn_like(&p.master);
        }
        let _ = optimizer.params[3].grad.view([-1]).narrow(0, 5, 1).fill_(bad);
        let before: Vec<Tensor> = optimizer.params.iter().map(|p| p.master.copy()).collect();
        let norm = optimizer.step(1e-3, Some(1.0)).unwrap();
        assert!(!norm.double_value(&[]).is_finite());
        for (p, before) in optimizer.params.iter().zip(&before) {
            assert!(p.master.equal(before), "{} was written", p.name);
            assert_eq!(p.exp_avg.abs().max().double_value(&[]), 0.0);
        }
        assert_eq!(optimizer.non_finite(), vec![optimizer.params[3].name.as_str()]);

        // The CPU learns of it a step late: that step's gradients are fine, and must change nothing either.
        for p in &mut optimizer.params {
            p.grad = Tensor::randn_like(&p.master);
        }
        let norm = optimizer.step(1e-3, Some(1.0)).unwrap();
        assert!(norm.double_value(&[]).is_finite());
        assert!(optimizer.params.iter().zip(&before).all(|(p, before)| p.master.equal(before)));
        assert_eq!(optimizer.non_finite(), vec![optimizer.params[3].name.as_str()]);
    }
}

const MASTERS: [MasterFormat; 3] = [MasterFormat::Fp32, MasterFormat::Split, MasterFormat::Bf16];
const STATES: [StateFormat; 3] = [StateFormat::Fp32, StateFormat::Bf16, StateFormat::Int8];

/// Parameters whose sizes are multiples of nothing: 18, 198, 1,746 elements and more. For the optimizer alone.
fn odd_llama() -> ModelConfig {
    ModelConfig {
        n_layer: 1,
        n_head: 3,
        n_query_groups: 3,
        n_embd: 18,
        head_size: 6,
        intermediate_size: 11,
        vocab_size: 97,
        padded_vocab_size: 97,
        ..small_llama()
    }
}

fn optimizer(model: &ModelConfig, config: &OptimizerConfig, device: Device, fused: bool) -> AdamW {
    tch::manual_seed(3);
    let mut model = GPT::new(model, device);
    model.fused = fused;
    let mut optimizer = AdamW::new(&mut model, Precision::Bf16Mixed, config).unwrap();
    optimizer.seed = 5;
    optimizer
}

/// The same random gradients for every optimizer, with large and small ones and rows of zeros.
fn set_gradients(optimizer: &mut AdamW, step: i64) {
    for (i, p) in optimizer.params.iter_mut().enumerate() {
        tch::manual_seed(1000 * step + i as i64);
        let options = (Kind::Float, p.weight.device());
        let size = p.weight.size();
        let magnitude = (Tensor::randn(&size, options) * 2.0).exp() * 1e-3;
        p.grad = Tensor::randn(&size, options) * magnitude;
        let _ = p.grad.narrow(0, 0, 1).zero_();
    }
}

/// All that a parameter keeps.
fn kept(p: &ParamState) -> Vec<(&'static str, Tensor)> {
    let mut all = vec![("weight", &p.weight), ("master", &p.master)];
    all.extend([("exp_avg", &p.exp_avg), ("exp_avg_sq", &p.exp_avg_sq)]);
    if let Some([scale, scale_sq]) = &p.scales {
        all.extend([("exp_avg_scale", scale), ("exp_avg_sq_scale", scale_sq)]);
    }
    all.into_iter().map(|(name, t)| (name, t.detach())).collect()
}

/// Share of elements that differ, and whether each such one is a neighbour (for codes and bf16; a bf16 number may
/// also differ by what fp32 rounding leaves of the largest one, which is many steps of a number near zero).
fn different(got: &Tensor, want: &Tensor) -> (f64, bool) {
    let places = |t: &Tensor| match t.kind() {
        Kind::BFloat16 => t.view_dtype(Kind::Int16).to_kind(Kind::Int64),
        _ => t.to_kind(Kind::Int64),
    };
    let apart = (places(got) - places(want)).abs();
    let share = apart.gt(0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let rounding = match got.kind() {
        Kind::BFloat16 => 2e-6 * wide(want).abs().max().double_value(&[]),
        _ => 0.0,
    };
    let far = apart.gt(1).logical_and(&(wide(got) - wide(want)).abs().gt(rounding));
    (share, !bool::try_from(far.any()).unwrap())
}

/// A step of the kernel from the reference's state gives the reference's result: fp32 within rounding, and what
/// was drawn by the same random bits equal but where such a difference decides (1 in 1,000 at most), or next to it.
fn check_step(fused: &AdamW, plain: &AdamW, what: &str) {
    for (p, q) in fused.params.iter().zip(&plain.params) {
        if p.master.kind() != Kind::BFloat16 {
            let error = relative_error(&p.exact(), &q.exact());
            assert!(error < 2e-6, "{what}, {}: {error:.2e}", p.name);
        }
        for ((name, got), (_, want)) in kept(p).into_iter().zip(kept(q)) {
            match got.kind() {
                Kind::Float => {
                    let error = relative_error(&got, &want);
                    assert!(error < 2e-6, "{what}, {}, {name}: {error:.2e}", p.name);
                }
                Kind::Int16 => {} // low halves, compared above with their weights
                _ => {
                    let (share, near) = different(&got, &want);
                    let few = share <= 1e-3 + 2.0 / got.numel() as f64;
                    assert!(few && near, "{what}, {}, {name}: {share:.1e} differ", p.name);
                }
            }
        }
    }
}

#[test]
fn fused_adamw_keeps_every_format_as_the_reference_does() {
    let Some((device, _card)) = card("fused_adamw_keeps_every_format_as_the_reference_does") else {
        return;
    };
    for model in [small_llama(), odd_llama()] {
        for (master, state) in MASTERS.into_iter().flat_map(|m| STATES.map(|s| (m, s))) {
            let config = OptimizerConfig { master, state, ..Default::default() };
            let mut plain = optimizer(&model, &config, device, false);
            let mut fused = optimizer(&model, &config, device, true);
            for step in 0..4 {
                for (p, q) in fused.params.iter().zip(&plain.params) {
                    for ((_, mut to), (_, from)) in kept(p).into_iter().zip(kept(q)) {
                        to.copy_(&from);
                    }
                }
                set_gradients(&mut plain, step);
                set_gradients(&mut fused, step);
                let _ = plain.step(1e-3, Some(1.0)).unwrap();
                let _ = fused.step(1e-3, Some(1.0)).unwrap();
                let what = format!("{} master {master}, state {state}, step {step}", model.n_embd);
                check_step(&fused, &plain, &what);
                let cleared = |p: &ParamState| p.grad.abs().max().double_value(&[]) == 0.0;
                assert!(fused.params.iter().all(cleared), "{what}: gradients are cleared");
            }
        }
    }
}

/// What ten fused steps leave.
fn ten_fused_steps(model: &ModelConfig, config: &OptimizerConfig, device: Device) -> AdamW {
    let mut optimizer = optimizer(model, config, device, true);
    for step in 0..10 {
        set_gradients(&mut optimizer, step);
        let _ = optimizer.step(1e-3, Some(1.0)).unwrap();
    }
    optimizer
}

#[test]
fn fused_adamw_with_a_split_master_equals_the_fp32_master_bit_for_bit() {
    let Some((device, _card)) = card("fused_adamw_with_a_split_master_equals_the_fp32_master")
    else {
        return;
    };
    for model in [small_llama(), odd_llama()] {
        for state in STATES {
            let run = |master| {
                let config = OptimizerConfig { master, state, ..Default::default() };
                ten_fused_steps(&model, &config, device)
            };
            let (exact, split) = (run(MasterFormat::Fp32), run(MasterFormat::Split));
            for (p, q) in split.params.iter().zip(&exact.params) {
                assert!(p.exact().equal(&q.exact()), "{state}, {}: exact weights", p.name);
                assert!(q.weight.equal(&low_memory::nearest_bf16(&q.master)), "{}", q.name);
                for ((name, got), (_, want)) in kept(p).into_iter().zip(kept(q)) {
                    assert!(name == "master" || got.equal(&want), "{state}, {}, {name}", p.name);
                }
            }
        }
    }
}

#[test]
fn fused_adamw_repeats_its_stochastic_rounding_bit_for_bit() {
    let Some((device, _card)) = card("fused_adamw_repeats_its_stochastic_rounding") else { return };
    for state in [StateFormat::Bf16, StateFormat::Int8] {
        let config = OptimizerConfig { master: MasterFormat::Bf16, state, ..Default::default() };
        let run = || ten_fused_steps(&odd_llama(), &config, device);
        for (p, q) in run().params.iter().zip(&run().params) {
            for ((name, got), (_, want)) in kept(p).into_iter().zip(kept(q)) {
                assert!(got.equal(&want), "{state}, {}, {name}", p.name);
            }
        }
    }
}

/// An embedding and a head of ten slices each, so that a step takes its groups through the slots more than once.
fn wide_llama() -> ModelConfig {
    ModelConfig {
        n_embd: 1024,
        n_head: 16,
        n_query_groups: 4,
        vocab_size: 20_001,
        padded_vocab_size: 20_001,
        ..small_llama()
    }
}

/// Every format with its state on the card, and the same on the host.
fn both_places() -> impl Iterator<Item = (OptimizerConfig, OptimizerConfig)> {
    let formats = MASTERS.into_iter().flat_map(|m| STATES.map(|s| (m, s)));
    formats.map(|(master, state)| {
        let card = OptimizerConfig { master, state, ..Default::default() };
        (card.clone(), OptimizerConfig { cpu_offload: true, ..card })
    })
}

/// Copies of everything that an optimizer keeps.
fn all_of(optimizer: &AdamW) -> Vec<(String, Tensor)> {
    let mut all = optimizer.masters();
    all.extend(optimizer.state());
    all.extend(
        optimizer.params.iter().map(|p| (format!("weight of {}", p.name), p.weight.detach())),
    );
    all.extend(
        optimizer.params.iter().map(|p| (format!("gradient of {}", p.name), p.grad.detach())),
    );
    all.into_iter().map(|(name, t)| (name, t.to_device(Device::Cpu).copy())).collect()
}

fn assert_same(got: &[(String, Tensor)], want: &[(String, Tensor)], what: &str) {
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(want) {
        assert!(got.kind() == want.kind() && got.equal(want), "{what}: {name}");
    }
}

/// A new optimizer that begins where another stands, as a run that is resumed does.
fn resume(model: &ModelConfig, from: &AdamW, config: &OptimizerConfig, device: Device) -> AdamW {
    let mut model = GPT::new(model, device);
    model.fused = true;
    for ((_, mut to), (_, exact)) in model.named_parameters().into_iter().zip(from.masters()) {
        tch::no_grad(|| to.copy_(&exact));
    }
    let mut optimizer = AdamW::new(&mut model, Precision::Bf16Mixed, config).unwrap();
    optimizer.seed = from.seed;
    let saved: Vec<_> = from.state().into_iter().map(|(name, t)| (name, t.copy())).collect();
    optimizer.load_state(from.step_count, &Moments::of(&saved)).unwrap();
    optimizer
}

/// Steps whose launches follow each other with no wait of the CPU.
fn steps(optimizer: &mut AdamW, range: std::ops::Range<i64>) {
    for step in range {
        set_gradients(optimizer, step);
        let _ = optimizer.step(1e-3, Some(1.0)).unwrap();
    }
}

#[test]
fn state_on_the_host_trains_as_state_on_the_card_bit_for_bit_in_every_format() {
    let Some((device, _card)) = card("state_on_the_host_trains_as_state_on_the_card") else {
        return;
    };
    for model in [odd_llama(), wide_llama()] {
        for (on_card, on_host) in both_places() {
            let what = format!("{}, {} and {}", model.n_embd, on_card.master, on_card.state);
            let mut card = optimizer(&model, &on_card, device, true);
            let mut host = optimizer(&model, &on_host, device, true);
            assert_eq!(host.params[0].exp_avg.device(), Device::Cpu);
            assert_same(&all_of(&host), &all_of(&card), &format!("{what}, at first"));
            steps(&mut card, 0..4);
            steps(&mut host, 0..4);
            assert_same(&all_of(&host), &all_of(&card), &format!("{what}, four steps"));
            // From the host's memory, of which the last step may still be writing, and back into it.
            steps(&mut card, 4..5);
            steps(&mut host, 4..5);
            let mut resumed = resume(&model, &host, &on_host, device);
            drop(host);
            steps(&mut card, 5..8);
            steps(&mut resumed, 5..8);
            assert_same(&all_of(&resumed), &all_of(&card), &format!("{what}, resumed"));
            // The one is taken up by the other.
            let mut back = resume(&model, &resumed, &on_card, device);
            steps(&mut back, 8..9);
            steps(&mut resumed, 8..9);
            assert_same(&all_of(&resumed), &all_of(&back), &format!("{what}, on the card again"));
        }
    }
}

#[test]
fn state_on_the_host_stays_untouched_where_the_gradient_is_not_finite() {
    let Some((device, _card)) = card("state_on_the_host_stays_untouched_where_not_finite") else {
        return;
    };
    for (_, on_host) in both_places() {
        let mut host = optimizer(&wide_llama(), &on_host, device, true);
        steps(&mut host, 0..2);
        set_gradients(&mut host, 2);
        let _ = host.params[1].grad.view([-1]).narrow(0, 0, 1).fill_(f64::INFINITY);
        let before = all_of(&host);
        for _ in 0..2 {
            let norm = host.step(1e-3, Some(1.0)).unwrap();
            assert!(!norm.double_value(&[]).is_finite());
        }
        let what = format!("{} and {}", on_host.master, on_host.state);
        assert_same(&all_of(&host), &before, &what);
    }
}

#[test]
fn a_host_link_refuses_memory_that_is_not_page_locked_and_places_that_are_not_there() {
    let Some((device, _card)) = card("a_host_link_refuses_memory_that_is_not_page_locked") else {
        return;
    };
    let link = |host: &Tensor, card: &Tensor| ffi::HostLink::new(device, 2, &[host], &[card]);
    let card = Tensor::zeros([2, 4, 16], (Kind::Uint8, device));
    let ordinary = Tensor::zeros([8, 16], (Kind::Uint8, Device::Cpu));
    let error = link(&ordinary, &card).unwrap_err().to_string();
    assert!(error.contains("page-locked"), "{error}");
    let host = ffi::page_locked(8 * 16, device).unwrap().view([8, 16]);
    let error = link(&host, &card.narrow(0, 0, 1)).unwrap_err().to_string();
    assert!(error.contains("(2, blocks, ..)"), "{error}");
    let link = link(&host, &card).unwrap();
    link.load(1, 4, 4).unwrap();
    for (slot, start, blocks) in [(2, 0, 1), (0, 5, 4), (0, 0, 5)] {
        assert!(link.load(slot, start, blocks).is_err(), "{slot}, {start}, {blocks}");
    }
    let error = ffi::page_locked(1 << 50, device).unwrap_err().to_string();
    assert!(error.contains("memory") || error.contains("invalid"), "{error}");
    link.wait().unwrap(); // an error of the host is none of the card
}

#[test]
fn the_formats_bits_are_the_same_on_the_gpu_and_on_the_cpu() {
    let Some((device, _card)) = card("the_formats_bits_are_the_same_on_the_gpu_and_on_the_cpu")
    else {
        return;
    };
    tch::manual_seed(8);
    let x = Tensor::randn([5000], (Kind::Float, Device::Cpu));
    let x = &x * (x.roll([1], [0]) * 4.0).exp();
    let all = |device: Device| {
        let (x, noise) =
            (x.to_device(device), low_memory::Noise::new(1 << 40 | 77, &[5000], device));
        let (weight, low) = low_memory::split(&x);
        let (code, scale) = low_memory::quantize_signed(&x, &noise.exp_avg);
        let (code_sq, scale_sq) = low_memory::quantize_unsigned(&x.square(), &noise.exp_avg_sq);
        let rounded = low_memory::stochastic_bf16(&x, &noise.weight);
        [weight, low, rounded, code, scale, code_sq, scale_sq].map(|t| t.to_device(Device::Cpu))
    };
    for (i, (got, want)) in all(device).iter().zip(&all(Device::Cpu)).enumerate() {
        assert!(got.equal(want), "{i}");
    }
}

#[test]
fn fused_adamw_refuses_tensors_that_do_not_go_together() {
    let Some((device, _card)) = card("fused_adamw_refuses_tensors_that_do_not_go_together") else {
        return;
    };
    let of = |kind: Kind, n: i64| Tensor::zeros([n], (kind, device));
    let (x, low, w) = (of(Kind::Float, 300), of(Kind::Int16, 300), of(Kind::BFloat16, 300));
    let (m8, v8, scale, short) =
        (of(Kind::Int8, 300), of(Kind::Uint8, 300), of(Kind::Float, 2), of(Kind::Float, 1));
    let clip = Tensor::ones([], (Kind::Float, device));
    let scalars = ffi::AdamWScalars {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
    };
    let good = || ffi::AdamWTensors {
        param: Some(&x),
        grad: &x,
        exp_avg: &m8,
        exp_avg_sq: &v8,
        scales: Some((&scale, &scale)),
        weight: Some(&w),
        key: 1,
        clear_grad: true,
    };
    let cases: Vec<(ffi::AdamWTensors, &[&str])> = vec![
        (ffi::AdamWTensors { param: Some(&low), weight: None, ..good() }, &["weight", "missing"]),
        (ffi::AdamWTensors { param: Some(&w), ..good() }, &["param[0]", "Float", "BFloat16"]),
        (ffi::AdamWTensors { scales: None, ..good() }, &["exp_avg_scale[0]", "missing"]),
        (
            ffi::AdamWTensors { scales: Some((&scale, &short)), ..good() },
            &["exp_avg_sq_scale[0]", "2 elements", "of 1"],
        ),
        (ffi::AdamWTensors { exp_avg_sq: &m8, ..good() }, &["exp_avg_sq[0]", "Byte", "Char"]),
        (ffi::AdamWTensors { exp_avg: &low, ..good() }, &["exp_avg[0]", "Short"]),
    ];
    for (tensors, want) in cases {
        let error = ffi::adamw(&[tensors], &clip, scalars).unwrap_err().to_string();
        assert!(want.iter().all(|text| error.contains(text)), "{error}");
    }
    let mixed = [good(), ffi::AdamWTensors { exp_avg: &x, exp_avg_sq: &x, ..good() }];
    let error = ffi::adamw(&mixed, &clip, scalars).unwrap_err().to_string();
    assert!(error.contains("exp_avg[1]") && error.contains("Char"), "{error}");
}

#[test]
fn a_bf16_forward_on_the_gpu_is_near_the_fp32_forward_on_the_cpu() {
    let Some((device, _card)) = card("a_bf16_forward_on_the_gpu_is_near_the_fp32_forward") else {
        return;
    };
    tch::manual_seed(5);
    let cpu = GPT::new(&small_llama(), Device::Cpu);
    let mut gpu = GPT::empty(&small_llama(), device);
    for ((_, mut to), (_, from)) in gpu.named_parameters().into_iter().zip(cpu.named_parameters()) {
        tch::no_grad(|| to.copy_(&from));
    }
    gpu.to_kind(Kind::BFloat16);
    let idx = Tensor::randint(512, [2, 128], (Kind::Int64, Device::Cpu));
    let want = cpu.forward(&idx, None);
    let got = gpu.forward(&idx.to_device(device), None).to_device(Device::Cpu);
    let error = relative_error(&got, &want);
    assert!(error < 3e-2, "relative error {error:.2e}");
}

/// Loss and gradients of a small bf16 model on one batch.
fn loss_and_gradients(device: Device, fused: bool, backend: AttentionBackend) -> Vec<Tensor> {
    tch::manual_seed(6);
    let mut model = GPT::new(&small_llama(), device);
    model.to_kind(Kind::BFloat16);
    model.requires_grad(true);
    model.fused = fused;
    model.attention = backend;
    let idx = Tensor::randint(512, [2, 200], (Kind::Int64, device));
    let target = Tensor::randint(512, [2, 200], (Kind::Int64, device));
    let _ = target.narrow(1, 0, 3).fill_(-100);
    let loss =
        model.loss(&idx, &target, None, LossScalars { scale: 1.0 / 394.0, ..LossScalars::SUM });
    loss.backward();
    let mut all = vec![loss.detach()];
    all.extend(model.named_parameters().iter().map(|(_, p)| p.grad()));
    all
}

#[test]
fn the_fused_model_gives_the_loss_and_gradients_of_the_plain_one() {
    let Some((device, _card)) =
        card("the_fused_model_gives_the_loss_and_gradients_of_the_plain_one")
    else {
        return;
    };
    let fused = loss_and_gradients(device, true, AttentionBackend::Auto);
    let plain = loss_and_gradients(device, false, AttentionBackend::Math);
    for (got, want) in fused.iter().zip(&plain) {
        let error = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).norm() / want.norm();
        let error = error.double_value(&[]);
        assert!(error < 3e-2, "{:?}: relative error {error:.2e}", want.size());
    }
}

#[test]
fn a_profile_tells_families_of_kernels_and_the_waits_of_the_cpu() {
    let Some((device, _card)) = card("a_profile_tells_families_of_kernels_and_the_waits") else {
        return;
    };
    let x = Tensor::randn([2048, 2048], (Kind::BFloat16, device));
    let weight = Tensor::ones([2048], (Kind::BFloat16, device));
    let work = || {
        let product = (0..3).fold(x.shallow_clone(), |product, _| product.matmul(&x));
        ffi::rms_norm(&product, &weight, 1e-5).unwrap().mean(Kind::Float)
    };
    work().double_value(&[]); // loads the kernels

    let recording = Recording::start().unwrap();
    assert!(Recording::start().is_err(), "two recordings at a time");
    let start_ns = recording.now_ns().unwrap();
    let mean = work();
    let launched_ns = recording.now_ns().unwrap();
    assert!(mean.double_value(&[]).is_finite());
    let end_ns = recording.now_ns().unwrap();
    let activities = recording.stop().unwrap();

    let p = Profile::new(&activities, &[StepSpan { start_ns, launched_ns, end_ns }]);
    let row = |family| p.families.iter().find(|row| row.family == family);
    // 3 x 17.2 GFLOP take 50 us at 1 PFLOP/s; 8 MiB read and written 3 us at 6 TB/s.
    for (family, launches, least_ms) in
        [(Family::MatrixProducts, 3.0, 0.03), (Family::Norms, 1.0, 0.002)]
    {
        let row = row(family).unwrap_or_else(|| panic!("no {family:?} in {p:?}"));
        assert!(row.launches >= launches && row.ms > least_ms && row.ms < p.step_ms, "{row:?}");
    }
    assert!(row(Family::Elementwise).is_some() && row(Family::Attention).is_none(), "{p:?}");
    let sum: f64 = p.families.iter().map(|row| row.ms).sum();
    assert!((sum - p.overlap_ms + p.gap_ms - p.step_ms).abs() < 1e-6, "{p:?}");
    assert_eq!(p.waits_inside, 0, "{:?}", p.waits);
    assert!(p.waits.iter().any(|wait| wait.count == 1), "{:?}", p.waits);

    // Waiting inside is told as such, and a second recording begins anew.
    let recording = Recording::start().unwrap();
    let start_ns = recording.now_ns().unwrap();
    work().double_value(&[]);
    let _ = work().to_device(Device::Cpu);
    let end_ns = recording.now_ns().unwrap();
    let span = StepSpan { start_ns, launched_ns: end_ns, end_ns };
    let p = Profile::new(&recording.stop().unwrap(), &[span]);
    assert!(p.waits_inside >= 2, "{:?}", p.waits);
    let norms = p.families.iter().find(|row| row.family == Family::Norms);
    assert_eq!(norms.map(|row| row.launches), Some(2.0), "{p:?}");
}
