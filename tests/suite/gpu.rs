//! Tests that need a CUDA GPU. Without one each prints why it is skipped and passes.

use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::bench::profile::{Family, Profile, StepSpan};
use tinyllama::config::{AttentionBackend, OptimizerConfig, Precision, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::ffi::profile::Recording;
use tinyllama::ffi::{self, Matmul};
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::ops::LossScalars;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

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

/// `||got - want|| / ||want||`.
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    ((got.to_kind(Kind::Double) - &want).norm() / want.norm()).double_value(&[])
}

/// Losses, gradient norms and final masters of six steps of two micro-batches.
fn six_steps(device: Device, fused: bool, graph: bool) -> (Vec<f64>, Vec<Tensor>) {
    tch::manual_seed(8);
    let mut model = GPT::new(&small_llama(), device);
    model.fused = fused;
    model.attention = if fused { AttentionBackend::Auto } else { AttentionBackend::Math };
    let mut optimizer = AdamW::new(&mut model, Precision::Bf16Mixed, &OptimizerConfig::default());
    let mut micro = MicroStep::new(graph);
    let mut numbers = vec![];
    for _ in 0..6 {
        let batch = || Batch {
            input: Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu)),
            target: Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu)),
            n_targets: 512,
        };
        optimizer.zero_grad();
        let batches = [batch(), batch()];
        let train = TrainConfig::default();
        let out = train_step(&model, &mut optimizer, &mut micro, &batches, 1e-3, &train).unwrap();
        numbers.extend([out.loss.double_value(&[]), out.grad_norm.double_value(&[])]);
    }
    (numbers, optimizer.params.iter().map(|p| p.master.copy()).collect())
}

#[test]
fn a_cuda_graph_trains_as_the_launches_it_stands_for() {
    let Some(device) = gpu("a_cuda_graph_trains_as_the_launches_it_stands_for") else { return };
    ffi::set_math_mode(true, true).unwrap();
    let (graph, plain) = (six_steps(device, true, true), six_steps(device, true, false));
    ffi::set_math_mode(true, false).unwrap();
    assert_eq!(graph.0, plain.0);
    assert!(graph.1.iter().zip(&plain.1).all(|(got, want)| got.equal(want)));
}

#[test]
fn gradients_added_by_the_products_train_as_gradients_added_by_autograd() {
    let Some(device) = gpu("gradients_added_by_the_products_train_as_those_added_by_autograd")
    else {
        return;
    };
    let (plain, _) = six_steps(device, false, false);
    for how in [Matmul::Aten, Matmul::Heuristic, Matmul::Search(None)] {
        ffi::set_matmul(how).unwrap();
        for graph in [false, true] {
            let (got, _) = six_steps(device, true, graph);
            for (got, want) in got.iter().zip(&plain) {
                assert!((got / want - 1.0).abs() < 5e-3, "{how:?}, graph {graph}: {got} {want}");
            }
        }
    }
    ffi::set_matmul(Matmul::Aten).unwrap();
}

#[test]
fn linear_agrees_with_libtorchs() {
    let Some(device) = gpu("linear_agrees_with_libtorchs") else { return };
    for how in [Matmul::Aten, Matmul::Heuristic, Matmul::Search(None)] {
        ffi::set_matmul(how).unwrap();
        // The second case is not aligned to more than 16 bytes, the third is one token.
        for (n, c, o) in [(300, 512, 704), (77, 88, 40), (1, 512, 512)] {
            tch::manual_seed(9);
            let options = (Kind::BFloat16, device);
            let x = Tensor::randn([n, c], options).set_requires_grad(true);
            let w = Tensor::randn([o, c], options).set_requires_grad(true);
            let dy = Tensor::randn([n, o], options);
            let y = ffi::linear(&x, &w, None).unwrap();
            let [x32, w32, dy32] = [&x, &w, &dy].map(|t| t.detach().to_kind(Kind::Double));
            let got = ffi::gradients(&y, &dy, &[&x, &w]).unwrap();
            let want = [x32.matmul(&w32.tr()), dy32.matmul(&w32), dy32.tr().matmul(&x32)];
            for (got, want) in [&y, &got[0], &got[1]].into_iter().zip(&want) {
                let error = distance(got, want);
                assert!(error < 4e-3, "{how:?} ({n}, {c}, {o}): {error:.1e}");
            }
            // Into a buffer that holds something already.
            let sum = Tensor::ones([o, c], (Kind::Float, device));
            ffi::set_grad(&w, &sum).unwrap();
            ffi::backward(&y, &dy).unwrap();
            ffi::backward(&y, &dy).unwrap();
            let error = distance(&sum, &(&want[2] * 2.0 + 1.0));
            assert!(error < 1e-5, "{how:?} ({n}, {c}, {o}) into a buffer: {error:.1e}");
        }
    }
    ffi::set_matmul(Matmul::Aten).unwrap();
}

#[test]
fn a_profile_tells_families_of_kernels_and_the_waits_of_the_cpu() {
    let Some(device) = gpu("a_profile_tells_families_of_kernels_and_the_waits") else { return };
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
