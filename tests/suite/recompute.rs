//! Activation checkpointing: what is computed again is the same, and what goes wrong there is told.

use crate::common::{alone, one_step, tiny_llama, tiny_neox};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use tinyllama::config::{OptimizerConfig, Precision};
use tinyllama::data::Batch;
use tinyllama::guard;
use tinyllama::model::{GPT, KvCache, ModelConfig};
use tinyllama::ops::{self, LossScalars};
use tinyllama::train::optimizer::AdamW;

/// Three blocks of both families, and a Llama whose head is its embedding.
fn models() -> [ModelConfig; 3] {
    let three = |c| ModelConfig { n_layer: 3, ..c };
    [
        three(tiny_llama()),
        three(tiny_neox()),
        ModelConfig { tie_embeddings: true, ..three(tiny_llama()) },
    ]
}

fn batches(config: &ModelConfig) -> Vec<Batch> {
    tch::manual_seed(11);
    let batch = |_| {
        let tokens = Tensor::randint(config.vocab_size, [2, 25], (Kind::Int64, Device::Cpu));
        let (input, target) = (tokens.narrow(1, 0, 24), tokens.narrow(1, 1, 24));
        Batch { input, target, documents: None, n_targets: 48 }
    };
    (0..2).map(batch).collect()
}

fn fresh(config: &ModelConfig, recomputed: usize) -> GPT {
    tch::manual_seed(12);
    let mut model = GPT::new(config, Device::Cpu);
    model.recomputed_blocks = recomputed;
    model
}

fn same(got: &[(String, Tensor)], want: &[(String, Tensor)]) {
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(want) {
        assert!(got.equal(want), "{name} differs");
    }
}

#[test]
fn recomputed_blocks_change_no_bit_of_loss_and_gradients() {
    let _alone = alone();
    for config in models() {
        // Losses of two micro-batches and the sums of their gradients.
        let run = |recomputed| {
            let model = fresh(&config, recomputed);
            model.requires_grad(true);
            let mut out = vec![];
            for (i, batch) in batches(&config).iter().enumerate() {
                let loss = model.loss(&batch.input, &batch.target, None, LossScalars::SUM);
                loss.backward();
                out.push((format!("loss {i}"), loss.detach()));
            }
            out.extend(model.named_parameters().iter().map(|(name, p)| (name.clone(), p.grad())));
            out
        };
        let kept = run(0);
        assert!(kept.iter().all(|(_, t)| t.abs().max().double_value(&[]) > 0.0));
        for recomputed in 1..=3 {
            same(&run(recomputed), &kept);
        }
    }
}

#[test]
fn five_steps_end_at_the_same_weights_in_every_precision() {
    let _alone = alone();
    for precision in [Precision::Fp32True, Precision::Bf16Mixed, Precision::Bf16True] {
        let config = models()[0].clone();
        let run = |recomputed| {
            let mut model = fresh(&config, recomputed);
            let mut optimizer =
                AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
            let mut out = vec![];
            for step in 0..5 {
                let data = batches(&config);
                let step_out = one_step(&model, &mut optimizer, &data, 1e-2);
                optimizer.zero_grad();
                out.push((format!("loss {step}"), step_out.loss));
                out.push((format!("norm {step}"), step_out.grad_norm));
            }
            out.extend(optimizer.masters());
            out
        };
        let kept = run(0);
        assert!(kept[8].1.double_value(&[]) < kept[0].1.double_value(&[]), "{precision:?} learns");
        same(&run(3), &kept);
    }
}

#[test]
fn the_first_run_records_no_graph_and_the_part_goes_with_the_loss() {
    let _alone = alone();
    let weight = Tensor::randn([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let x = Tensor::randn([2, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let recorded = Arc::new(Mutex::new(vec![]));
    let (w, notes) = (weight.shallow_clone(), recorded.clone());
    let [y] = ops::recompute(&[&x], move |inputs| {
        let inner = inputs[0].matmul(&w).exp(); // its backward pass needs it
        notes.lock().unwrap().push(inner.requires_grad());
        [inner.sin()]
    });
    assert!(y.requires_grad());
    assert_eq!(*recorded.lock().unwrap(), [false], "nothing of the first run is kept");
    let loss = y.sum(Kind::Float);
    let elsewhere = loss.shallow_clone();
    std::thread::spawn(move || elsewhere.backward()).join().unwrap(); // as autograd does on a GPU
    assert_eq!(*recorded.lock().unwrap(), [false, true]);
    assert_eq!(Arc::strong_count(&recorded), 2, "the graph still holds the part");

    let gradients = [weight.grad(), x.grad()];
    drop((y, loss));
    assert_eq!(Arc::strong_count(&recorded), 1);
    for p in [&weight, &x] {
        let _ = p.grad().zero_();
    }
    let copies = [gradients[0].copy(), gradients[1].copy()];
    x.matmul(&weight).exp().sin().sum(Kind::Float).backward();
    assert!(copies.iter().all(|c| c.abs().max().double_value(&[]) == 0.0), "the same leaves");
}

#[test]
fn an_input_without_a_gradient_or_an_unused_result_takes_nothing_from_the_others() {
    let _alone = alone();
    let leaf = |x: &Tensor| x.detach().copy().set_requires_grad(true);
    let random = || Tensor::randn([3, 4], (Kind::Float, Device::Cpu));
    let (w, x, fixed) = (random(), random(), random());
    let part = |w: &Tensor, x: &Tensor, fixed: &Tensor| [x * w + fixed, w * fixed, x * fixed];

    let (w1, x1) = (leaf(&w), leaf(&x));
    let [a, _, c] = part(&w1, &x1, &fixed);
    (a + c).sum(Kind::Float).backward();
    let (w2, x2) = (leaf(&w), leaf(&x));
    let held = w2.shallow_clone();
    let [a, _, c] = ops::recompute(&[&x2, &fixed], move |i| part(&held, &i[0], &i[1]));
    (a + c).sum(Kind::Float).backward();
    assert!(w1.grad().equal(&w2.grad()) && x1.grad().equal(&x2.grad()));
    assert!(!fixed.grad().defined());
}

#[test]
fn blocks_behind_a_frozen_embedding_still_learn() {
    let _alone = alone();
    for recomputed in [0, 3] {
        let model = fresh(&models()[0], recomputed);
        model.requires_grad(true);
        let _ = model.wte.weight.set_requires_grad(false);
        let batch = &batches(&models()[0])[0];
        model.loss(&batch.input, &batch.target, None, LossScalars::SUM).backward();
        for (name, p) in model.named_parameters() {
            assert_eq!(p.grad().defined(), !name.contains("wte"), "{name}, {recomputed} again");
        }
    }
}

#[test]
fn an_error_in_the_second_run_arrives_as_an_error_and_the_next_step_works() {
    let catch = |f: &dyn Fn()| {
        let guarded = guard::catch("the step", Device::Cpu, "make it smaller", || {
            f();
            Ok(())
        });
        format!("{:?}", guarded.unwrap_err())
    };
    let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let fails = |second: fn(&Tensor) -> Tensor| {
        let runs = Mutex::new(0);
        let [y] = ops::recompute(&[&x], move |inputs| {
            *runs.lock().unwrap() += 1;
            match *runs.lock().unwrap() {
                1 => [&inputs[0] * 2.0],
                _ => [second(&inputs[0])],
            }
        });
        catch(&|| y.sum(Kind::Float).backward())
    };
    let shapes = fails(|x| x.matmul(x));
    assert!(shapes.contains("computing a block again failed: mat1 and mat2 shapes"), "{shapes}");
    let bug = fails(|_| panic!("a bug"));
    assert!(bug.contains("internal error at tests/suite/recompute.rs"), "{bug}");
    assert!(bug.contains("a bug"), "{bug}");
    let memory = fails(|_| Tensor::zeros([1 << 50], (Kind::Float, Device::Cpu)));
    assert!(memory.contains("DefaultCPUAllocator"), "{memory}");

    let first = catch(&|| {
        let [_] = ops::recompute(&[&x], |inputs| [inputs[0].matmul(&inputs[0])]);
    });
    assert!(first.contains("mat1 and mat2 shapes"), "{first}");

    let [y] = ops::recompute(&[&x], |inputs| [&inputs[0] * 2.0]);
    y.sum(Kind::Float).backward();
    assert!(x.grad().equal(&(x.ones_like() * 2.0)));
}

#[test]
fn generation_and_validation_do_not_know_of_it() {
    let _alone = alone();
    for config in models() {
        let batch = &batches(&config)[0];
        let run = |recomputed| {
            let model = fresh(&config, recomputed);
            model.requires_grad(true);
            let _guard = tch::no_grad_guard();
            let mut cache = KvCache::new(&config, 2, 24, Kind::Float, Device::Cpu);
            let full = model.forward(&batch.input, None);
            let prompt = model.forward(&batch.input.narrow(1, 0, 20), Some(&mut cache));
            let next = model.forward(&batch.input.narrow(1, 20, 4), Some(&mut cache));
            assert_eq!(cache.len(), 24);
            [full, prompt, next]
        };
        for (got, want) in run(3).iter().zip(&run(0)) {
            assert!(got.equal(want) && !got.requires_grad());
        }
    }
}
