//! Tests that need a CUDA GPU. Without one each prints why it is skipped and passes.

use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::config::{AttentionBackend, OptimizerConfig, Precision};
use tinyllama::ffi;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::ops::LossScalars;
use tinyllama::train::optimizer::AdamW;

/// The GPU, or `None` after saying that the test is skipped.
pub fn gpu(test: &str) -> Option<Device> {
    if Cuda::is_available() {
        return Some(Device::Cuda(0));
    }
    eprintln!("skipped {test}: no CUDA GPU is visible");
    None
}

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
    let mut optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default());
    for step in 0..5 {
        for (i, p) in optimizer.params.iter_mut().enumerate() {
            tch::manual_seed(1000 * step + i as i64);
            p.grad = Tensor::randn_like(&p.master) * 0.01;
        }
        let _ = optimizer.step(1e-3, Some(1.0)).unwrap();
    }
    let state = |p: &tinyllama::train::optimizer::ParamState| {
        [&p.master, &p.exp_avg, &p.exp_avg_sq, &p.weight].map(|t| t.detach().copy())
    };
    optimizer.params.iter().flat_map(state).collect()
}

#[test]
fn fused_adamw_agrees_with_the_plain_formula() {
    let Some(device) = gpu("fused_adamw_agrees_with_the_plain_formula") else { return };
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
    let Some(device) = gpu("fused_adamw_writes_nothing_where_not_finite") else { return };
    for bad in [f64::NAN, f64::INFINITY] {
        tch::manual_seed(4);
        let mut model = GPT::new(&small_llama(), device);
        let mut optimizer =
            AdamW::new(&mut model, Precision::Bf16Mixed, &OptimizerConfig::default());
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
    }
}

#[test]
fn a_bf16_forward_on_the_gpu_is_near_the_fp32_forward_on_the_cpu() {
    let Some(device) = gpu("a_bf16_forward_on_the_gpu_is_near_the_fp32_forward") else { return };
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
    let loss = model.loss(&idx, &target, LossScalars { scale: 1.0 / 394.0, ..LossScalars::SUM });
    loss.backward();
    let mut all = vec![loss.detach()];
    all.extend(model.named_parameters().iter().map(|(_, p)| p.grad()));
    all
}

#[test]
fn the_fused_model_gives_the_loss_and_gradients_of_the_plain_one() {
    let Some(device) = gpu("the_fused_model_gives_the_loss_and_gradients_of_the_plain_one") else {
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

/// Loss and gradients of 12 blocks on 16,384 tokens, and the bytes that forward and backward took at most.
fn recomputing(device: Device, recomputed: usize) -> (Vec<Tensor>, i64) {
    tch::manual_seed(7);
    let config = ModelConfig { n_layer: 12, block_size: 4096, ..small_llama() };
    let mut model = GPT::new(&config, device);
    model.to_kind(Kind::BFloat16);
    model.requires_grad(true);
    model.recomputed_blocks = recomputed;
    let idx = Tensor::randint(512, [4, 4096], (Kind::Int64, device));
    let target = Tensor::randint(512, [4, 4096], (Kind::Int64, device));
    let Device::Cuda(index) = device else { panic!("{device:?}") };
    let before = ffi::cuda_memory(index).unwrap().allocated;
    ffi::cuda_reset_peak_memory(index).unwrap();
    let loss = model.loss(&idx, &target, LossScalars { scale: 1.0 / 16384.0, ..LossScalars::SUM });
    loss.backward();
    let peak = ffi::cuda_memory(index).unwrap().peak_allocated - before;
    let mut all = vec![loss.detach()];
    all.extend(model.named_parameters().iter().map(|(_, p)| p.grad()));
    (all, peak)
}

#[test]
fn recomputed_blocks_take_less_than_half_the_memory_and_give_the_same_gradients() {
    let Some(device) = gpu("recomputed_blocks_take_less_than_half_the_memory") else { return };
    let (kept, most) = recomputing(device, 0);
    let (half, less) = recomputing(device, 6);
    let (again, least) = recomputing(device, 12);
    eprintln!("peaks: {most}, 6 of 12 blocks {less}, all {least} bytes");
    assert!(2 * least < most, "{least} of {most} bytes");
    assert!(least < less && less < most, "{least} {less} {most} bytes");
    for got in [&half, &again] {
        for (got, want) in got.iter().zip(&kept) {
            let error = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).norm();
            let error = (error / want.to_kind(Kind::Double).norm()).double_value(&[]);
            assert!(error < 1e-2, "{:?}: relative error {error:.2e}", want.size());
        }
    }
}
