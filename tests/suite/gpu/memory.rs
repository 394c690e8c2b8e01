//! What a step keeps on the card.

use super::small_llama;
use crate::common::card;
use tch::{Device, Kind, Tensor};
use tinyllama::ffi;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::ops::{self, LossScalars};

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
    let loss =
        model.loss(&idx, &target, None, LossScalars { scale: 1.0 / 16384.0, ..LossScalars::SUM });
    loss.backward();
    let peak = ffi::cuda_memory(index).unwrap().peak_allocated - before;
    let mut all = vec![loss.detach()];
    all.extend(model.named_parameters().iter().map(|(_, p)| p.grad()));
    (all, peak)
}

#[test]
fn recomputed_blocks_take_less_than_half_the_memory_and_give_the_same_gradients() {
    let Some((device, _card)) = card("recomputed_blocks_take_less_than_half_the_memory") else {
        return;
    };
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

/// `y` and the gradient of x by an op of x (N, C) and weights that are trained or not, and bytes that the graph keeps.
fn of_layer(
    op: &dyn Fn(&Tensor, &[Tensor]) -> Tensor,
    (x, weights): (&Tensor, &[Tensor]),
    trained: bool,
) -> ([Tensor; 2], i64) {
    let Device::Cuda(card) = x.device() else { panic!("{:?}", x.device()) };
    let weights: Vec<Tensor> =
        weights.iter().map(|w| w.detach().set_requires_grad(trained)).collect();
    let leaf = x.detach().set_requires_grad(true);
    let before = ffi::cuda_memory(card).unwrap().allocated;
    let y = op(&(&leaf * 1.0), &weights); // of a value that nobody else holds
    let kept = ffi::cuda_memory(card).unwrap().allocated - before;
    y.sum(Kind::Float).backward();
    assert!(weights.iter().all(|w| w.grad().defined() == trained));
    ([y.detach(), leaf.grad()], kept)
}

#[test]
fn for_weights_that_are_not_trained_no_layer_keeps_its_input() {
    let Some((device, _card)) = card("for_weights_that_are_not_trained") else { return };
    tch::manual_seed(11);
    let (n, c, f) = (4096, 512, 1024);
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device)) * 0.05;
    let x = random(&[n, c]) * 20.0;
    let norm = Tensor::ones([c], (Kind::BFloat16, device));
    let (w, w1, w2, w3) = (random(&[f, c]), random(&[f, c]), random(&[f, c]), random(&[c, f]));
    let linear = |x: &Tensor, w: &[Tensor]| ops::linear(x, &w[0], None, None, true);
    let mlp = |x: &Tensor, w: &[Tensor]| ops::swiglu_mlp(x, &w[0], &w[1], &w[2], true);
    let behind_norm =
        |x: &Tensor, w: &[Tensor]| ops::norm_linear(x, None, &norm, 1e-5, &w[0], None).0;
    let mlp_behind_norm = |x: &Tensor, w: &[Tensor]| {
        ops::norm_mlp(x, None, &norm, 1e-5, [&w[0], &w[1], &w[2]], None).0
    };
    type Op<'a> = &'a dyn Fn(&Tensor, &[Tensor]) -> Tensor;
    let one = std::slice::from_ref(&w);
    let three = [w1, w2, w3];
    // Bytes that remain: of y, of gate and up; behind a norm x itself, which the norm's gradient needs.
    let cases: [(&str, Op, &[Tensor], i64, bool); 4] = [
        ("linear", &linear, one, 2 * n * f, true),
        ("mlp", &mlp, &three, 2 * n * (c + 2 * f), true),
        ("linear behind a norm", &behind_norm, one, 2 * n * (f + c), false),
        ("mlp behind a norm", &mlp_behind_norm, &three, 2 * n * (c + 2 * f + c), false),
    ];
    for (name, op, weights, least, less) in cases {
        let (want, with) = of_layer(op, (&x, weights), true);
        let (got, without) = of_layer(op, (&x, weights), false);
        for (got, want) in got.iter().zip(&want) {
            assert!(got.equal(want), "{name}");
        }
        let of_x = 2 * n * c;
        assert!(without >= least && without < least + of_x / 2, "{name}: {without} of {least}");
        assert!(!less || with >= without + of_x, "{name}: {with}, {without}");
    }
}
