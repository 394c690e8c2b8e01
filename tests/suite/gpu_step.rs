//! The training step on a CUDA GPU: products, graph, layers behind norms, fp8. Skipped without one.

use crate::common::card;
use crate::gpu::small_llama;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};
use tinyllama::config::{AttentionBackend, OptimizerConfig, Precision, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::ffi::{self, Matmul};
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::ops;
use tinyllama::ops::{LossScalars, Mask};
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::pick_attention::{Shape, Times, line, look_up, pick};
use tinyllama::train::step::{MicroStep, train_step};

/// `||got - want|| / ||want||`.
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    ((got.to_kind(Kind::Double) - &want).norm() / want.norm()).double_value(&[])
}

/// Losses, gradient norms and final masters of six steps of two micro-batches.
fn six_steps(device: Device, fused: bool, graph: bool) -> (Vec<f64>, Vec<Tensor>) {
    six_steps_in(device, fused, graph, Precision::Bf16Mixed, false)
}

fn six_steps_in(
    device: Device,
    fused: bool,
    graph: bool,
    precision: Precision,
    recompute_norms: bool,
) -> (Vec<f64>, Vec<Tensor>) {
    tch::manual_seed(8);
    let mut model = GPT::new(&small_llama(), device);
    model.fused = fused;
    model.recompute_norms = recompute_norms;
    model.attention = if fused { AttentionBackend::Auto } else { AttentionBackend::Math };
    let mut optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
    let mut micro = MicroStep::new(graph);
    if precision == Precision::Fp8Mixed {
        model.enable_fp8().unwrap();
        micro.find_scales = true;
    }
    let mut numbers = vec![];
    for _ in 0..6 {
        let batch = || Batch {
            input: Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu)),
            target: Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu)),
            documents: None,
            n_targets: 512,
        };
        optimizer.zero_grad();
        let batches = [batch(), batch()];
        let train = TrainConfig::default();
        let out =
            train_step(&model, &mut optimizer, &mut micro, &batches, 1e-3, &train, None).unwrap();
        numbers.extend([out.loss.double_value(&[]), out.grad_norm.double_value(&[])]);
    }
    (numbers, optimizer.params.iter().map(|p| p.master.copy()).collect())
}

#[test]
fn a_cuda_graph_trains_as_the_launches_it_stands_for() {
    let Some((device, _card)) = card("a_cuda_graph_trains_as_the_launches_it_stands_for") else {
        return;
    };
    ffi::set_math_mode(true, true).unwrap();
    let (graph, plain) = (six_steps(device, true, true), six_steps(device, true, false));
    ffi::set_math_mode(true, false).unwrap();
    assert_eq!(graph.0, plain.0);
    assert!(graph.1.iter().zip(&plain.1).all(|(got, want)| got.equal(want)));
}

#[test]
fn gradients_added_by_the_products_train_as_gradients_added_by_autograd() {
    let Some((device, _card)) =
        card("gradients_added_by_the_products_train_as_those_added_by_autograd")
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
}

#[test]
fn linear_agrees_with_libtorchs() {
    let Some((device, _card)) = card("linear_agrees_with_libtorchs") else { return };
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
}

/// Results and gradients of x, residual, norm and weights.
fn behind_a_norm(leaves: &[Tensor], dy: &[Tensor], apart: bool) -> Vec<Tensor> {
    let [x, residual, norm, w1, w2, w3] = leaves else { panic!("six leaves") };
    let (y, sum) = match apart {
        true => {
            let (h, sum) = ops::add_rms_norm(x, residual, norm, 1e-5, true);
            (ops::swiglu_mlp(&h, w1, w2, w3, true), sum)
        }
        false => ops::norm_mlp(x, Some(residual), norm, 1e-5, [w1, w2, w3], None),
    };
    let (z, sum) = match apart {
        true => {
            let (h, sum) = ops::add_rms_norm(&y, &sum, norm, 1e-5, true);
            (ops::linear(&h, w1, None, None, true), sum)
        }
        false => ops::norm_linear(&y, Some(&sum), norm, 1e-5, w1, None),
    };
    let all: Vec<&Tensor> = leaves.iter().collect();
    let mut out = ffi::gradients_of(&[(&z, &dy[0]), (&sum, &dy[1])], &all).unwrap();
    out.extend([z.detach(), sum.detach()]);
    out
}

#[test]
fn layers_behind_a_norm_agree_with_the_two_apart() {
    let Some((device, _card)) = card("layers_behind_a_norm_agree_with_the_two_apart") else {
        return;
    };
    tch::manual_seed(11);
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
    let leaf = |t: Tensor| t.detach().set_requires_grad(true);
    let leaves = [
        leaf(random(&[2, 96, 512])),
        leaf(random(&[2, 96, 512])),
        leaf(random(&[512])),
        leaf(random(&[704, 512]) * 0.05),
        leaf(random(&[704, 512]) * 0.05),
        leaf(random(&[512, 704]) * 0.05),
    ];
    let dy = [random(&[2, 96, 704]), random(&[2, 96, 512])];
    let (got, want) = (behind_a_norm(&leaves, &dy, false), behind_a_norm(&leaves, &dy, true));
    for (got, want) in got.iter().zip(&want) {
        let error = distance(got, want);
        assert!(error < 1e-3, "{:?}: {error:.1e}", want.size());
    }
}

#[test]
fn norms_computed_again_train_as_norms_that_were_kept() {
    let Some((device, _card)) = card("norms_computed_again_train_as_norms_that_were_kept") else {
        return;
    };
    ffi::set_math_mode(true, true).unwrap();
    let run = |again| six_steps_in(device, true, false, Precision::Bf16Mixed, again);
    let (kept, again) = (run(false), run(true));
    ffi::set_math_mode(true, false).unwrap();
    for (got, want) in again.0.iter().zip(&kept.0) {
        assert!((got / want - 1.0).abs() < 1e-3, "{got} {want}");
    }
}

/// An fp8 layer of these sizes whose scales fit standard normal inputs and gradients.
fn fp8_layer(weights: &[&Tensor], device: Device) -> ffi::Fp8Linear {
    let (o, c) = weights[0].size2().unwrap();
    let o = o * weights.len() as i64;
    let fp8 = (Kind::Float8e4m3fn, device);
    let slots = |shape: &[i64]| {
        let slots = Tensor::zeros(shape, (Kind::Float, device));
        let _ = slots.narrow(-1, 0, 1).fill_(1.0 / 64.0);
        let _ = slots.narrow(-1, 1, 1).fill_(64.0);
        slots
    };
    let layer = ffi::Fp8Linear {
        weight: Tensor::empty([o, c], fp8),
        weight_t: Tensor::empty([c, o], fp8),
        scales: slots(&[2, 8]),
        weight_scale: slots(&[8]),
    };
    ffi::fp8_cast_weight(weights[0], weights.get(1).copied(), &layer).unwrap();
    ffi::fp8_update(&layer.weight_scale).unwrap();
    ffi::fp8_cast_weight(weights[0], weights.get(1).copied(), &layer).unwrap();
    layer
}

#[test]
fn fp8_layers_agree_with_products_of_rounded_matrices() {
    let Some((device, _card)) = card("fp8_layers_agree_with_products_of_rounded_matrices") else {
        return;
    };
    for (n, c, o) in [(256, 512, 704), (80, 48, 144), (16, 16, 16)] {
        tch::manual_seed(12);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
        let x = random(&[n, c]).set_requires_grad(true);
        let w = (random(&[o, c]) * 0.05).detach().set_requires_grad(true);
        let dy = random(&[n, o]);
        let layer = fp8_layer(&[&w], device);
        // The cast weight, in both orientations, is libtorch's cast.
        let scale = layer.weight_scale.double_value(&[1]);
        let w8 = ops::fp8_reference(&w.detach(), scale);
        let wide = |t: &Tensor| t.to_kind(Kind::Float) / scale;
        assert!(distance(&wide(&layer.weight), &w8) < 1e-6, "({n}, {c}, {o})");
        assert!(wide(&layer.weight_t).equal(&wide(&layer.weight).tr()), "({n}, {c}, {o})");
        let (x8, dy8) = (ops::fp8_reference(&x.detach(), 64.0), ops::fp8_reference(&dy, 64.0));

        let y = ffi::linear(&x, &w, Some(&layer)).unwrap();
        let gradients = ffi::gradients(&y, &dy, &[&x, &w]).unwrap();
        let want = [x8.matmul(&w8.tr()), dy8.matmul(&w8), dy8.tr().matmul(&x8)];
        for (got, want) in [&y, &gradients[0], &gradients[1]].into_iter().zip(&want) {
            let error = distance(got, want);
            assert!(error < 5e-3, "({n}, {c}, {o}) {:?}: {error:.1e}", want.size());
        }
        // The largest magnitudes were noted.
        let noted = layer.scales.select(1, 2);
        let largest = |t: &Tensor| t.abs().max().double_value(&[]);
        assert_eq!(noted.double_value(&[0]), largest(&x));
        assert_eq!(noted.double_value(&[1]), largest(&dy));
    }
}

#[test]
fn an_fp8_mlp_behind_a_norm_agrees_with_the_bf16_one() {
    let Some((device, _card)) = card("an_fp8_mlp_behind_a_norm_agrees_with_the_bf16_one") else {
        return;
    };
    for (n, c, f) in [(256, 512, 704), (48, 80, 144)] {
        tch::manual_seed(13);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let (x, residual) = (leaf(&random(&[n, c])), leaf(&random(&[n, c])));
        let norm = leaf(&(random(&[c]) * 0.1 + 1.0));
        let both = random(&[2 * f, c]) / (c as f64).sqrt();
        let (w1, w2) = (leaf(&both.narrow(0, 0, f)), leaf(&both.narrow(0, f, f)));
        let w3 = leaf(&(random(&[c, f]) / (f as f64).sqrt()));
        let (dy, dsum) = (random(&[n, c]), random(&[n, c]));
        let (gate_up, down) = (fp8_layer(&[&w1, &w2], device), fp8_layer(&[&w3], device));
        let run = |fp8| {
            let weights = [&w1, &w2, &w3];
            let (y, sum) = ops::norm_mlp(&x, Some(&residual), &norm, 1e-5, weights, fp8);
            let inputs = [&x, &residual, &norm, &w1, &w2, &w3];
            let mut all = ffi::gradients_of(&[(&y, &dy), (&sum, &dsum)], &inputs).unwrap();
            all.extend([y.detach(), sum.detach()]);
            all
        };
        let (got, want) = (run(Some((&gate_up, &down))), run(None));
        for (got, want) in got.iter().zip(&want) {
            let error = distance(got, want);
            assert!(error < 8e-2, "({n}, {c}, {f}) {:?}: {error:.1e}", want.size());
        }
    }
}

#[test]
fn fp8_training_follows_bf16_and_a_graph_changes_nothing() {
    let Some((device, _card)) = card("fp8_training_follows_bf16_and_a_graph_changes_nothing")
    else {
        return;
    };
    let (plain, _) = six_steps(device, false, false);
    ffi::set_math_mode(true, true).unwrap();
    let run = |graph| six_steps_in(device, true, graph, Precision::Fp8Mixed, false);
    let (without, with) = (run(false), run(true));
    ffi::set_math_mode(true, false).unwrap();
    assert_eq!(without.0, with.0);
    for (i, (got, want)) in with.0.iter().zip(&plain).enumerate() {
        let tolerance = if i % 2 == 0 { 1e-2 } else { 0.1 }; // loss, gradient norm
        assert!((got / want - 1.0).abs() < tolerance, "{i}: {got} {want}");
    }
}

// ---- cuDNN's attention beside ours ---------------------------------------------------------------------------

#[test]
fn cudnns_attention_of_a_packed_projection_agrees_with_ours() {
    let Some((device, _card)) = card("cudnns_attention_of_a_packed_projection_agrees_with_ours")
    else {
        return;
    };
    let cudnn = ffi::SdpBackends { math: false, flash: false, efficient: false, cudnn: true };
    ffi::set_sdp_backends(cudnn).unwrap();
    for (b, t, h, g, d) in [(2, 256, 8, 2, 64), (1, 300, 4, 1, 128), (2, 128, 4, 4, 64)] {
        tch::manual_seed(14);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
        let qkv = random(&[b, t, h + 2 * g, d]);
        let dy = random(&[b, t, h, d]).transpose(1, 2);
        let run = |backend| {
            let qkv = qkv.detach().set_requires_grad(true);
            let y = ops::attention_qkv(&qkv, h, g, Mask::CAUSAL, backend);
            let gradient = ffi::gradients(&y, &dy, &[&qkv]).unwrap().remove(0);
            [y.detach(), gradient]
        };
        let (got, want) = (run(AttentionBackend::Cudnn), run(AttentionBackend::Flash));
        for (got, want) in got.iter().zip(&want) {
            let error = distance(got, want);
            assert!(error < 1e-2, "({b}, {t}, {h}, {g}, {d}) {:?}: {error:.1e}", want.size());
        }
    }
}

#[test]
fn attention_is_picked_by_measurement_once_and_read_from_its_file_after() {
    let Some((_, _card)) = card("attention_is_picked_by_measurement_once") else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("attention.txt");
    let shape = Shape { b: 2, t: 1024, h: 8, g: 2, d: 64 };
    let first = pick(shape, 0, Some(&file)).unwrap();
    let told = first.told.clone().unwrap();
    assert!(told.contains("ours") && told.contains("cuDNN") && told.contains(" ms"), "{told}");
    assert!([AttentionBackend::Flash, AttentionBackend::Cudnn].contains(&first.backend), "{told}");

    let text = std::fs::read_to_string(&file).unwrap();
    let (key, _) = text.split_once(" = ").unwrap();
    let times = look_up(&text, key).unwrap();
    assert_eq!(times.faster(), first.backend, "{text}");
    assert!(times.ours > 1e-3 && times.cudnn > 1e-3, "a kernel takes longer than nothing: {text}");

    let second = pick(shape, 0, Some(&file)).unwrap();
    assert_eq!(second.backend, first.backend);
    assert_eq!(second.told.unwrap(), told + ", as measured before");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text, "nothing new is kept");
    for (ours, cudnn) in [(1.0, 2.0), (2.0, 1.0)] {
        let times = Times { ours, cudnn };
        std::fs::write(&file, line(key, times)).unwrap();
        assert_eq!(pick(shape, 0, Some(&file)).unwrap().backend, times.faster(), "from the file");
    }
}

// ---- the fast path against plain fp32 --------------------------------------------------------------------------

/// 4 rows of 1,024 words and marks of this repository's prose with the one that follows each; a number stands for each
/// distinct one, so that they are as frequent and as predictable as in any text.
fn prose() -> [Tensor; 2] {
    let text = concat!(
        include_str!("../../README.md"),
        include_str!("../../docs/performance.md"),
        include_str!("../../csrc/README.md"),
    );
    let (mut numbers, mut ids) = (HashMap::new(), vec![]);
    for word in text.split_inclusive(|c: char| !c.is_alphanumeric()) {
        let next = numbers.len() as i64;
        ids.push(*numbers.entry(word).or_insert(next));
    }
    let ids = Tensor::from_slice(&ids[..4 * 1024 + 1]);
    [0, 1].map(|from| ids.narrow(0, from, 4096).view([4, 1024]))
}

/// Loss and the gradient of each parameter of one micro-batch of prose: on all fast paths with these kernels of
/// attention, or plainly in fp32.
fn gradients_of_prose(
    device: Device,
    fast: Option<AttentionBackend>,
) -> (f64, Vec<(String, Tensor)>) {
    tch::manual_seed(15);
    let mut model = GPT::new(&ModelConfig::preset("tiny-llama-120m").unwrap(), device);
    model.fused = fast.is_some();
    model.attention = fast.unwrap_or(AttentionBackend::Math);
    let precision = if fast.is_some() { Precision::Bf16Mixed } else { Precision::Fp32True };
    let mut optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
    let mut micro = MicroStep::new(fast.is_some());
    let [input, target] = prose().map(|t| t.to_device(device));
    let batch = Batch { input, target, documents: None, n_targets: 4096 };
    let scalars = LossScalars { scale: 1.0 / 4096.0, ..LossScalars::SUM };
    // With a graph: two runs before it, and the one that it is launched for.
    let mut run =
        |optimizer: &mut AdamW| micro.run(&model, Some(optimizer), &batch, scalars).unwrap();
    if fast.is_some() {
        let _ = (run(&mut optimizer), run(&mut optimizer));
    }
    optimizer.clear_gradients();
    let loss = run(&mut optimizer).double_value(&[]);
    let gradients = optimizer.params.iter().map(|p| (p.name.clone(), p.grad.copy()));
    (loss, gradients.collect())
}

/// `a b / (|a| |b|)`.
fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let [a, b] = [a, b].map(|x| x.to_kind(Kind::Double).view([-1]));
    (a.dot(&b) / (a.norm() * b.norm())).double_value(&[])
}

#[test]
fn the_fast_path_has_the_gradients_of_plain_fp32_in_every_parameter() {
    let Some((device, _card)) =
        card("the_fast_path_has_the_gradients_of_plain_fp32_in_every_parameter")
    else {
        return;
    };
    let (want_loss, want) = gradients_of_prose(device, None);
    ffi::set_matmul(Matmul::Search(None)).unwrap();
    for backend in [AttentionBackend::Flash, AttentionBackend::Cudnn] {
        ffi::set_sdp_backends(ffi::SdpBackends {
            math: false,
            flash: false,
            efficient: false,
            cudnn: backend == AttentionBackend::Cudnn,
        })
        .unwrap();
        let (loss, got) = gradients_of_prose(device, Some(backend));
        let mut cosines: Vec<(f64, &str)> = got
            .iter()
            .zip(&want)
            .map(|((name, got), (_, want))| (cosine(got, want), name.as_str()))
            .collect();
        cosines.sort_by(|a, b| a.0.total_cmp(&b.0));
        eprintln!("{backend:?}: loss {loss:.5}, fp32 {want_loss:.5}; worst {:?}", &cosines[..3]);
        assert!((loss / want_loss - 1.0).abs() < 5e-3, "{backend:?}: {loss}, fp32 {want_loss}");
        assert!(cosines[0].0 > 0.999, "{backend:?}: {:?}", &cosines[..3]);
    }
}
