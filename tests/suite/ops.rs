//! The plain references that the kernels are held against, themselves held against finite differences in
//! fp64; document masks; and what a kernel says to arguments that it cannot take. No GPU is needed.

use crate::common::{alone, max_difference};
use tch::{Device, Kind, Tensor};
use tinyllama::ffi::{self, FlashOptions, LossScalars};
use tinyllama::ops::{self, Documents, Mask};

const FP64: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Largest difference between autograd's gradient of `sum(f(inputs) * r)` and central differences.
fn gradient_error(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) -> f64 {
    let leaves: Vec<Tensor> =
        inputs.iter().map(|x| x.detach().copy().set_requires_grad(true)).collect();
    let y = f(&leaves);
    tch::manual_seed(99);
    let r = Tensor::randn_like(&y.detach());
    (&y * &r).sum(Kind::Double).backward();
    let value = |inputs: &[Tensor]| (f(inputs) * &r).sum(Kind::Double).double_value(&[]);
    let step = 1e-5;
    let mut worst = 0f64;
    for (i, leaf) in leaves.iter().enumerate() {
        let gradient = leaf.grad().view([-1]);
        for e in 0..leaf.numel() as i64 {
            let at = |delta: f64| {
                let moved: Vec<Tensor> = inputs.iter().map(|x| x.detach().copy()).collect();
                let _ = moved[i].view([-1]).narrow(0, e, 1).g_add_scalar_(delta);
                value(&moved)
            };
            let numeric = (at(step) - at(-step)) / (2.0 * step);
            worst = worst.max((numeric - gradient.double_value(&[e])).abs());
        }
    }
    worst
}

#[test]
fn the_references_have_the_gradients_of_finite_differences() {
    let _alone = alone();
    tch::manual_seed(1);
    let random = |shape: &[i64]| Tensor::randn(shape, FP64);

    let qkv = [random(&[2, 4, 5, 4]), random(&[2, 2, 5, 4]), random(&[2, 2, 5, 4])];
    let documents = Documents::from_lengths(&[vec![2, 3], vec![5]], Device::Cpu);
    for mask in [Mask::CAUSAL, Mask::FULL, Mask { causal: true, documents: Some(&documents) }] {
        let error = gradient_error(&qkv, |x| ops::attention_reference(&x[0], &x[1], &x[2], mask));
        assert!(error < 1e-8, "attention {mask:?}: {error:.1e}");
    }

    let error = gradient_error(&[random(&[3, 6]), random(&[6])], |x| {
        ops::rms_norm_reference(&x[0], &x[1], 1e-5)
    });
    assert!(error < 1e-8, "rms_norm: {error:.1e}");

    let angle = Tensor::rand([3, 2], FP64) * 6.0;
    let angle = Tensor::cat(&[&angle, &angle], 1); // (T, n)
    let (cos, sin) = (angle.cos(), angle.sin());
    let error =
        gradient_error(&[random(&[1, 2, 3, 6])], |x| ops::rope_reference(&x[0], &cos, &sin));
    assert!(error < 1e-8, "rope: {error:.1e}");

    let error = gradient_error(&[random(&[3, 5]), random(&[3, 5])], |x| {
        ops::swiglu_reference(&x[0], &x[1])
    });
    assert!(error < 1e-8, "swiglu: {error:.1e}");

    let target = Tensor::from_slice(&[1i64, -100, 6]);
    let scalars = LossScalars { scale: 0.5, label_smoothing: 0.1, z_loss: 1e-2 };
    let error = gradient_error(&[random(&[3, 7])], |x| {
        ops::cross_entropy_reference(&x[0], &target, scalars)
    });
    assert!(error < 1e-8, "cross_entropy: {error:.1e}");
}

#[test]
fn the_loss_has_label_smoothing_and_z_loss_by_their_formulas() {
    let _alone = alone();
    tch::manual_seed(2);
    let logits = Tensor::randn([4, 9], FP64) * 3.0;
    let target = Tensor::from_slice(&[0i64, 8, -100, 3]);
    let scalars = LossScalars { scale: 0.25, label_smoothing: 0.2, z_loss: 0.03 };
    let got = ops::cross_entropy_reference(&logits, &target, scalars).double_value(&[]);
    let mut want = 0.0;
    for (row, t) in [(0i64, 0i64), (1, 8), (3, 3)] {
        let x = logits.get(row);
        let lse = x.logsumexp([0].as_slice(), false).double_value(&[]);
        let hit = lse - x.double_value(&[t]);
        let uniform = lse - x.mean(Kind::Double).double_value(&[]);
        want += 0.25 * (0.8 * hit + 0.2 * uniform + 0.03 * lse * lse);
    }
    assert!((got - want).abs() < 1e-10, "{got} {want}");
}

#[test]
fn a_document_in_a_packed_row_attends_as_if_it_stood_alone() {
    let _alone = alone();
    tch::manual_seed(3);
    let lengths = [vec![3, 1, 6], vec![10]];
    let documents = Documents::from_lengths(&lengths, Device::Cpu);
    let random = |h: i64| Tensor::randn([2, h, 10, 8], (Kind::Float, Device::Cpu));
    let (q, k, v) = (random(4), random(2), random(2));
    for causal in [true, false] {
        let mask = Mask { causal, documents: Some(&documents) };
        let packed = ops::attention(&q, &k, &v, mask, tinyllama::config::AttentionBackend::Auto);
        for (b, row) in lengths.iter().enumerate() {
            let mut at = 0;
            for &length in row {
                let part = |x: &Tensor| x.narrow(0, b as i64, 1).narrow(2, at, length);
                let alone = Mask { causal, documents: None };
                let want = ops::attention_reference(&part(&q), &part(&k), &part(&v), alone);
                assert!(max_difference(&part(&packed), &want) < 1e-5, "row {b}, document at {at}");
                at += length;
            }
        }
    }
}

#[test]
fn rope_of_a_packed_projection_turns_queries_and_keys_and_leaves_values() {
    let _alone = alone();
    tch::manual_seed(4);
    let qkv = Tensor::randn([2, 5, 4 * 6], (Kind::Float, Device::Cpu)); // H 2, G 1, D 6
    let angle = Tensor::rand([5, 2], (Kind::Float, Device::Cpu));
    let angle = Tensor::cat(&[&angle, &angle], 1); // (T, n)
    let (cos, sin) = (angle.cos(), angle.sin());
    let x = qkv.view([2, 5, 4, 6]);
    let want = ops::rope_reference(&x.transpose(1, 2), &cos, &sin).transpose(1, 2);
    // Plain, with gradients, and in place where there are none.
    let differentiated = qkv.copy().set_requires_grad(true);
    for (qkv, fused) in [(qkv.copy(), false), (differentiated, true), (qkv.copy(), true)] {
        let got = ops::rope_qkv(&qkv, &cos, &sin, 3, 6, fused).view([2, 5, 4, 6]);
        assert_eq!(max_difference(&got.narrow(2, 0, 3), &want.narrow(2, 0, 3)), 0.0, "{fused}");
        assert_eq!(max_difference(&got.narrow(2, 3, 1), &x.narrow(2, 3, 1)), 0.0);
    }
}

#[test]
fn a_kernel_given_a_cpu_tensor_names_the_op_the_argument_and_the_device() {
    let _alone = alone();
    let _ = ffi::cuda::load(); // also without a card; a build without CUDA says so below
    let x = Tensor::randn([2, 64], (Kind::Float, Device::Cpu));
    let q = Tensor::randn([1, 2, 4, 64], (Kind::BFloat16, Device::Cpu));
    let ids = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
    let w = Tensor::ones([64], (Kind::Float, Device::Cpu));
    let o = FlashOptions { causal: true, documents: None, deterministic: false, arch: 0 };
    let s = LossScalars { scale: 1.0, label_smoothing: 0.0, z_loss: 0.0 };
    let x3 = x.view([1, 2, 64]);
    let errors = [
        ("flash_attention: q", ffi::flash_attention(&q, &q, &q, o).err()),
        ("rms_norm: x", ffi::rms_norm(&x, &w, 1e-5).err()),
        ("rope: x", ffi::rope(&x3, &x, &x, 1, 64).err()),
        ("swiglu: gate_up", ffi::swiglu(&x).err()),
        ("swiglu_mlp: x", ffi::swiglu_mlp(&x, &x, &x, &x).err()),
        ("cross_entropy: logits", ffi::cross_entropy(&x, &ids, s).err()),
        ("head_loss: x", ffi::head_loss(&x, &x, &ids, 1, s).err()),
        ("grad_norm: grad[0]", ffi::grad_norm(&[&x], None, None).err()),
    ];
    for (argument, error) in errors {
        let error = error.map_or_else(String::new, |e| e.to_string());
        let built_without = error.contains("built without CUDA kernels");
        let named = error.contains(argument) && error.contains("must be on a CUDA device, got cpu");
        assert!(built_without || named, "{argument}: {error}");
    }
}

#[test]
fn the_backward_function_of_one_op_runs_alone_and_checks_its_gradients() {
    let _alone = alone();
    let x = Tensor::randn([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let y = x.tanh();
    ffi::node_backward(&y, &[y.ones_like()]).unwrap();
    assert!(!x.grad().defined(), "nothing is accumulated");
    let error = ffi::node_backward(&y, &[]).unwrap_err().to_string();
    assert!(error.contains("TanhBackward0 takes 1 gradients, got 0"), "{error}");
    let error = ffi::node_backward(&y.detach(), &[]).unwrap_err().to_string();
    assert!(error.contains("no differentiable op"), "{error}");
}
