//! The kernels of `csrc/` against references in higher precision, on random inputs and poisoned memory; what
//! they say to bad arguments. Each needs a CUDA GPU and says so where there is none.

mod refused;

use crate::common::card;
use tch::{Device, Kind, Tensor};
use tinyllama::config::AttentionBackend;
use tinyllama::ffi::{self, FlashOptions, LossScalars};
use tinyllama::ops::{self, Documents, Mask};

const FLASH: FlashOptions =
    FlashOptions { causal: true, documents: None, deterministic: false, arch: 0 };
const PLAIN_LOSS: LossScalars = LossScalars::SUM;

/// `||got - want|| / ||want||`; NaN wherever either is.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    ((got.to_kind(Kind::Double) - &want).norm() / want.norm()).double_value(&[])
}

fn check(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let error = error(got, want);
    assert!(
        error < tolerance,
        "{what}: relative error {error:.2e}, at most {tolerance:.0e} allowed"
    );
}

/// Fills the allocator's free memory with NaN, so that an element that a kernel does not write is seen.
fn poison(device: Device) {
    let nan = |n: i64| Tensor::full([n], f64::NAN, (Kind::Float, device));
    let _large = nan(1 << 27);
    let _small: Vec<Tensor> = (0..32).map(|_| nan(1 << 16)).collect();
}

fn leaf(x: Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

fn message(result: anyhow::Result<impl Sized>) -> String {
    result.err().map_or_else(|| "no error".into(), |e| e.to_string())
}

fn archs() -> Vec<i32> {
    let major = ffi::cuda_device(0).unwrap().capability.0;
    if major == 9 { vec![80, 90] } else { vec![80] }
}

/// Random documents that fill B rows of S tokens.
fn random_documents(b: i64, s: i64, mean: i64, device: Device) -> Documents {
    let row = |_| {
        let (mut lengths, mut left) = (vec![], s);
        while left > 0 {
            let length = Tensor::randint_low(1, 2 * mean, [1], (Kind::Int64, Device::Cpu));
            let length = length.int64_value(&[0]).min(left);
            lengths.push(length);
            left -= length;
        }
        lengths
    };
    Documents::from_lengths(&(0..b).map(row).collect::<Vec<_>>(), device)
}

struct Case {
    b: i64,
    t: i64,
    s: i64,
    h: i64,
    g: i64,
    d: i64,
    kind: Kind,
    causal: bool,
    /// Mean length of documents, 0 for none.
    documents: i64,
}

const CASE: Case = Case {
    b: 2,
    t: 64,
    s: 64,
    h: 4,
    g: 1,
    d: 64,
    kind: Kind::BFloat16,
    causal: true,
    documents: 0,
};

impl Case {
    fn square(t: i64, h: i64, g: i64) -> Self {
        let b = if t > 1000 { 1 } else { 2 };
        Self { b, t, s: t, h, g, ..CASE }
    }
    fn name(&self) -> String {
        let Self { b, t, s, h, g, d, kind, causal, documents } = self;
        format!(
            "B {b} T {t} S {s} H {h} G {g} D {d} {kind:?} causal {causal} documents {documents}"
        )
    }
}

/// Every kind of shape and mask, small enough for compute-sanitizer.
fn small_cases() -> Vec<Case> {
    let mut cases = vec![];
    for t in [1, 7, 64, 129] {
        for (h, g) in [(4, 4), (4, 1), (8, 1), (9, 3)] {
            cases.push(Case::square(t, h, g));
            cases.push(Case { documents: 1 + t / 6, ..Case::square(t, h, g) });
        }
    }
    cases.extend([
        Case { kind: Kind::Half, ..Case::square(300, 8, 2) },
        Case { d: 128, ..Case::square(300, 8, 2) },
        Case { d: 128, kind: Kind::Half, causal: false, ..Case::square(200, 4, 1) },
        Case { causal: false, ..Case::square(200, 4, 2) },
        Case { causal: false, t: 130, s: 60, ..CASE },
        Case { t: 1, s: 77, ..Case::square(1, 4, 2) },
        Case { t: 33, s: 300, ..Case::square(33, 4, 2) },
        Case { t: 33, s: 300, documents: 60, ..Case::square(33, 4, 2) },
        Case { t: 130, s: 400, d: 128, ..Case::square(130, 4, 2) },
    ]);
    cases
}

fn long_cases() -> Vec<Case> {
    let mut cases = vec![];
    for (h, g) in [(4, 4), (4, 1), (8, 1), (9, 3)] {
        cases.push(Case::square(2048, h, g));
        cases.push(Case { documents: 300, ..Case::square(2048, h, g) });
    }
    cases.extend([
        Case::square(8192, 2, 1),
        Case { documents: 900, ..Case::square(8192, 2, 1) },
        Case { d: 128, documents: 100, ..Case::square(777, 8, 2) },
        Case { causal: false, documents: 100, ..Case::square(1000, 8, 2) },
        Case { d: 128, kind: Kind::Half, causal: false, ..Case::square(1000, 4, 1) },
    ]);
    cases
}

#[test]
fn flash_attention_agrees_with_the_plain_formula_on_small_shapes() {
    let Some((device, _card)) =
        card("flash_attention_agrees_with_the_plain_formula_on_small_shapes")
    else {
        return;
    };
    flash_attention_agrees_on(small_cases(), device);
}

#[test]
fn flash_attention_agrees_with_the_plain_formula_on_long_rows() {
    let Some((device, _card)) = card("flash_attention_agrees_with_the_plain_formula_on_long_rows")
    else {
        return;
    };
    flash_attention_agrees_on(long_cases(), device);
}

fn flash_attention_agrees_on(cases: Vec<Case>, device: Device) {
    tch::manual_seed(1);
    for case in cases {
        let Case { b, t, s, h, g, d, kind, causal, .. } = case;
        let documents =
            (case.documents > 0).then(|| random_documents(b, s, case.documents, device));
        let mask = Mask { causal, documents: documents.as_ref() };
        // q, k, v (B, heads, T, D): views of one packed projection where the lengths allow it.
        let packed = Tensor::randn([b, s, h + 2 * g, d], (kind, device));
        let q = if t == s {
            packed.narrow(2, 0, h).transpose(1, 2)
        } else {
            Tensor::randn([b, t, h, d], (kind, device)).transpose(1, 2)
        };
        let k = packed.narrow(2, h, g).transpose(1, 2);
        let v = packed.narrow(2, h + g, g).transpose(1, 2);
        let dout = Tensor::randn([b, t, h, d], (kind, device)).transpose(1, 2);

        let gradients = |kind: Kind, f: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
            let [q, k, v] = [&q, &k, &v].map(|x| leaf(x.to_kind(kind)));
            let y = f(&q, &k, &v);
            ffi::backward(&y, &dout.to_kind(kind)).unwrap();
            [y.detach(), q.grad(), k.grad(), v.grad()]
        };
        let want = gradients(Kind::Float, &|q, k, v| ops::attention_reference(q, k, v, mask));
        let libtorch = (t == s && documents.is_none() && t > 1).then(|| {
            let flash =
                ffi::SdpBackends { math: false, flash: true, efficient: false, cudnn: false };
            ffi::set_sdp_backends(flash).unwrap();
            let none = None::<Tensor>;
            gradients(kind, &|q, k, v| {
                Tensor::scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    none.as_ref(),
                    0.0,
                    causal,
                    None,
                    h != g,
                )
            })
        });
        for arch in archs() {
            poison(device);
            let documents = documents.as_ref().map(|x| (&x.start, &x.end));
            let o = FlashOptions { causal, documents, arch, ..FLASH };
            let got = gradients(kind, &|q, k, v| ffi::flash_attention(q, k, v, o).unwrap().0);
            for (i, name) in ["out", "dq", "dk", "dv"].into_iter().enumerate() {
                let error = error(&got[i], &want[i]);
                // One key: the softmax is constant, dq and dk are zero but for rounding.
                if s == 1 && (i == 1 || i == 2) {
                    assert!(got[i].abs().max().double_value(&[]) < 1e-2, "{}: {name}", case.name());
                    continue;
                }
                let what = format!("sm_{arch} {}: {name}", case.name());
                assert!(error < 1e-2, "{what}: relative error {error:.2e}");
                if let Some(theirs) = &libtorch {
                    let theirs = self::error(&theirs[i], &want[i]);
                    assert!(
                        error < 1.2 * theirs + 1e-4,
                        "{what}: {error:.2e}, libtorch {theirs:.2e}"
                    );
                }
            }
        }
    }
}

#[test]
fn flash_attention_of_a_packed_projection_equals_that_of_its_views() {
    let Some((device, _card)) =
        card("flash_attention_of_a_packed_projection_equals_that_of_its_views")
    else {
        return;
    };
    tch::manual_seed(2);
    let qkv = leaf(Tensor::randn([2, 200, 12, 64], (Kind::BFloat16, device)));
    let dout = Tensor::randn([2, 8, 200, 64], (Kind::BFloat16, device));
    let o = FlashOptions { deterministic: true, ..FLASH };
    poison(device);
    let y = ffi::flash_attention_qkv(&qkv, 8, 2, None, o).unwrap();
    ffi::backward(&y, &dout).unwrap();
    let packed = qkv.grad().copy();
    let views = leaf(qkv.detach());
    let (q, k, v) = ops::split_heads(&views, 8, 2);
    let (want, lse) = ffi::flash_attention(&q, &k, &v, o).unwrap();
    ffi::backward(&want, &dout).unwrap();
    assert!(y.equal(&want) && packed.equal(&views.grad()));
    assert_eq!(lse.size(), [2, 8, 200]);
    let scores = q
        .to_kind(Kind::Float)
        .matmul(&k.repeat_interleave_self_int(4, 1, None).to_kind(Kind::Float).transpose(2, 3))
        / 8.0;
    let seen = Tensor::ones([200, 200], (Kind::Bool, device)).tril(0);
    let scores = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
    check("log sum exp", &lse, &scores.logsumexp([-1].as_slice(), false), 1e-5);
}

#[test]
fn rope_and_attention_in_one_agree_with_the_two() {
    let Some((device, _card)) = card("rope_and_attention_in_one_agree_with_the_two") else {
        return;
    };
    tch::manual_seed(12);
    let backend = AttentionBackend::Flash;
    // Whole heads of both sizes, rows that do not fill a tile, a part of each head, split groups, documents.
    for (b, t, h, g, d, n, mean) in [
        (2, 200, 8, 2, 64, 64, 0),
        (2, 333, 4, 4, 128, 128, 50),
        (2, 130, 8, 2, 64, 32, 0),
        (1, 2048, 32, 4, 64, 64, 300),
    ] {
        let documents = (mean > 0).then(|| random_documents(b, t, mean, device));
        let mask = Mask { causal: true, documents: documents.as_ref() };
        let angle = Tensor::rand([t + 3, n / 2], (Kind::Float, device)) * 6.0;
        let angle = Tensor::cat(&[&angle, &angle], 1); // (t + 3, n)
        let [cos, sin] = [angle.cos(), angle.sin()].map(|x| x.narrow(0, 3, t)); // as from a cache
        let qkv = Tensor::randn([b, t, (h + 2 * g) * d], (Kind::BFloat16, device));
        let dout = Tensor::randn([b, h, t, d], (Kind::BFloat16, device));
        poison(device);

        let pass = |x: &Tensor, y: &Tensor| {
            ffi::backward(y, &dout.to_kind(y.kind())).unwrap();
            (y.detach(), x.grad())
        };
        let x = leaf(qkv.to_kind(Kind::Float));
        let turned = ops::rope_qkv(&x, &cos, &sin, h + g, d, false).view([b, t, h + 2 * g, d]);
        let (q, k, v) = ops::split_heads(&turned, h, g);
        let want = pass(&x, &ops::attention_reference(&q, &k, &v, mask));

        let x = leaf(qkv.shallow_clone());
        let turned = ops::rope_qkv(&(&x * 1.0), &cos, &sin, h + g, d, true);
        let turned = turned.view([b, t, h + 2 * g, d]);
        let two = pass(&x, &ops::attention_qkv(&turned, h, g, mask, backend));

        let x = leaf(qkv.shallow_clone());
        let in_one =
            ops::rope_attention_qkv(&(&x * 1.0), (&cos, &sin), (h, g), mask, backend, true);
        let one = pass(&x, &in_one);

        assert!(one.0.equal(&two.0), "the same kernels forward, T {t}, D {d}");
        let what = format!("gradient, T {t}, D {d}, n {n}");
        check(&what, &one.1, &want.1, 1e-2);
        let errors = [error(&one.1, &want.1), error(&two.1, &want.1)];
        assert!(errors[0] < 1.01 * errors[1], "{what}: {errors:?}, one rounding less");
    }
}

#[test]
fn a_deterministic_backward_repeats_bit_for_bit_also_with_documents_and_split_groups() {
    let Some((device, _card)) = card("a_deterministic_backward_repeats_bit_for_bit") else {
        return;
    };
    tch::manual_seed(3);
    for (b, t, h, g, d, mean) in [
        (2, 2048, 8, 2, 64, 0),
        (2, 2048, 8, 2, 64, 300),
        (1, 1000, 16, 1, 128, 0),
        (8, 1024, 32, 4, 64, 200),
    ] {
        let documents = (mean > 0).then(|| random_documents(b, t, mean, device));
        let qkv = Tensor::randn([b, t, h + 2 * g, d], (Kind::BFloat16, device));
        let dout = Tensor::randn([b, h, t, d], (Kind::BFloat16, device));
        for arch in archs() {
            let run = || {
                let documents = documents.as_ref().map(|x| (&x.start, &x.end));
                let o = FlashOptions { deterministic: true, documents, arch, ..FLASH };
                let x = leaf(qkv.shallow_clone());
                ffi::backward(&ffi::flash_attention_qkv(&x, h, g, None, o).unwrap(), &dout)
                    .unwrap();
                x.grad()
            };
            let first = run();
            for _ in 0..3 {
                assert!(first.equal(&run()), "sm_{arch}, T {t}, documents of {mean}");
            }
        }
    }
}

#[test]
fn rms_norm_agrees_with_its_reference() {
    let Some((device, _card)) = card("rms_norm_agrees_with_its_reference") else { return };
    tch::manual_seed(4);
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-3), (Kind::Half, 1e-3)] {
        for (n, c) in [(1, 64), (7, 576), (300, 2048), (1000, 4096), (33, 8192), (513, 3200)] {
            let x = Tensor::randn([n, c], (kind, device));
            let residual = Tensor::randn([n, c], (kind, device));
            let w = Tensor::rand([c], (kind, device)) + 0.5;
            let (dy, dsum) = (x.randn_like(), x.randn_like());
            // fp32 from the sum as rounded by the op, which is what it normalises.
            let (x32, w32) =
                (leaf((&x + &residual).to_kind(Kind::Float)), leaf(w.to_kind(Kind::Float)));
            let want = ops::rms_norm_reference(&x32, &w32, 1e-5);
            ffi::backward(&want, &dy.to_kind(Kind::Float)).unwrap();
            let dx = x32.grad() + dsum.to_kind(Kind::Float);

            poison(device);
            let (x, residual, w) = (leaf(x), leaf(residual), leaf(w));
            let (y, sum) = ops::add_rms_norm(&x, &residual, &w, 1e-5, true);
            ffi::backward(&Tensor::cat(&[&y, &sum], 0), &Tensor::cat(&[&dy, &dsum], 0)).unwrap();
            let name = format!("{kind:?} ({n}, {c})");
            check(&format!("{name} sum"), &sum, &x32, tolerance);
            check(&format!("{name} y"), &y, &want, tolerance);
            check(&format!("{name} dx"), &x.grad(), &dx, tolerance);
            assert!(x.grad().equal(&residual.grad()), "{name}: both summands have one gradient");
            check(&format!("{name} dweight"), &w.grad(), &w32.grad(), tolerance);

            poison(device);
            let (x, w) = (leaf(sum.detach()), leaf(w.detach()));
            let y = ops::rms_norm(&x, &w, 1e-5, true);
            ffi::backward(&y, &dy).unwrap();
            check(&format!("{name} alone y"), &y, &want, tolerance);
            check(&format!("{name} alone dx"), &x.grad(), &x32.grad(), tolerance);
            check(&format!("{name} alone dweight"), &w.grad(), &w32.grad(), tolerance);
        }
    }
}

#[test]
fn rope_agrees_with_its_reference() {
    let Some((device, _card)) = card("rope_agrees_with_its_reference") else { return };
    tch::manual_seed(5);
    for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 5e-3), (Kind::Half, 1e-3)] {
        for (b, t, h, g, d, n) in [
            (2, 33, 4, 2, 64, 64),
            (1, 5, 8, 8, 64, 16),
            (3, 7, 9, 3, 80, 20),
            (2, 17, 12, 1, 128, 128),
        ] {
            let angle = Tensor::rand([t, n / 2], (Kind::Float, device)) * 6.0;
            let angle = Tensor::cat(&[&angle, &angle], 1); // (T, n)
            let (cos, sin) = (angle.cos(), angle.sin());
            let x = Tensor::randn([b, t, (h + 2 * g) * d], (kind, device));
            let dy = x.randn_like();
            let run = |kind: Kind, fused: bool| {
                let x = leaf(x.to_kind(kind));
                let y = ops::rope_qkv(&(&x * 1.0), &cos, &sin, h + g, d, fused);
                ffi::backward(&y, &dy.to_kind(kind)).unwrap();
                [y.detach(), x.grad()]
            };
            for (got, want) in run(kind, true).iter().zip(run(Kind::Float, false)) {
                check(&format!("{kind:?} D {d} n {n}"), got, &want, tolerance);
            }
        }
    }
}

#[test]
fn rope_does_not_write_into_a_gradient_that_others_hold() {
    let Some((device, _card)) = card("rope_does_not_write_into_a_gradient_that_others_hold") else {
        return;
    };
    tch::manual_seed(6);
    let angle = Tensor::rand([4, 64], (Kind::Float, device));
    let x = leaf(Tensor::randn([1, 4, 128], (Kind::Float, device)));
    let other = leaf(x.randn_like());
    // The addition hands one gradient to both of its inputs.
    let y = ops::rope_qkv(&(&x * 1.0), &angle.cos(), &angle.sin(), 2, 64, true) + &other;
    let dy = y.randn_like();
    let before = dy.copy();
    ffi::backward(&y, &dy).unwrap();
    assert!(dy.equal(&before) && other.grad().equal(&before));
    assert!(!x.grad().equal(&before));
}

#[test]
fn swiglu_agrees_with_its_reference() {
    let Some((device, _card)) = card("swiglu_agrees_with_its_reference") else { return };
    tch::manual_seed(7);
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-3), (Kind::Half, 1e-3)] {
        for (n, f) in [(1, 8), (5, 176), (333, 5632)] {
            let x = Tensor::randn([n, 2 * f], (kind, device)) * 2.0;
            let dy = Tensor::randn([n, f], (kind, device));
            let run = |kind: Kind, fused: bool| {
                let x = leaf(x.to_kind(kind));
                let y = ops::swiglu(&x, fused);
                ffi::backward(&y, &dy.to_kind(kind)).unwrap();
                [y.detach(), x.grad()]
            };
            let want = run(Kind::Float, false);
            poison(device);
            for (got, want) in run(kind, true).iter().zip(want) {
                check(&format!("{kind:?} ({n}, {f})"), got, &want, tolerance);
            }
        }
    }
}

#[test]
fn the_mlp_agrees_with_its_reference() {
    let Some((device, _card)) = card("the_mlp_agrees_with_its_reference") else { return };
    tch::manual_seed(8);
    for (kind, tolerance) in [(Kind::Float, 2e-3), (Kind::BFloat16, 1e-2)] {
        let (n, c, f) = (300, 256, 704);
        let random = |shape: &[i64]| Tensor::randn(shape, (kind, device)) * 0.1;
        let (x, w3, dy) = (random(&[2, n, c]) * 10.0, random(&[c, f]), random(&[2, n, c]));
        let w12 = random(&[2 * f, c]);
        for joined in [false, true] {
            let halves = || [w12.narrow(0, 0, f), w12.narrow(0, f, f)];
            let run = |kind: Kind, fused: bool| {
                let [w1, w2] = halves();
                // Two leaves over one block of memory, or over two.
                let [w1, w2] = if joined && kind == w12.kind() {
                    [leaf(w1), leaf(w2)]
                } else {
                    [leaf(w1.to_kind(kind).copy()), leaf(w2.to_kind(kind).copy())]
                };
                let (x, w3) = (leaf(x.to_kind(kind)), leaf(w3.to_kind(kind)));
                let y = ops::swiglu_mlp(&x, &w1, &w2, &w3, fused);
                ffi::backward(&y, &dy.to_kind(kind)).unwrap();
                [y.detach(), x.grad(), w1.grad(), w2.grad(), w3.grad()]
            };
            let want = run(Kind::Float, false);
            poison(device);
            for (i, (got, want)) in run(kind, true).iter().zip(want).enumerate() {
                check(&format!("{kind:?} joined {joined} result {i}"), got, &want, tolerance);
            }
        }
    }
}

#[test]
fn cross_entropy_agrees_with_its_reference() {
    let Some((device, _card)) = card("cross_entropy_agrees_with_its_reference") else { return };
    tch::manual_seed(9);
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-3), (Kind::Half, 2e-3)] {
        for (n, v) in
            [(1, 8), (5, 97), (300, 1000), (500, 32_000), (7, 50_304), (9, 49_152), (5, 128_256)]
        {
            for (label_smoothing, z_loss) in [(0.0, 0.0), (0.1, 1e-4)] {
                let s = LossScalars { scale: 0.25, label_smoothing, z_loss };
                let logits = Tensor::randn([n, v], (kind, device)) * 3.0;
                let target = Tensor::randint(v, [n], (Kind::Int64, device));
                if n > 2 {
                    let _ = target.narrow(0, 1, 1).fill_(-100);
                }
                let want_x = leaf(logits.to_kind(Kind::Float));
                let want = ops::cross_entropy_reference(&want_x, &target, s);
                (&want * 3.0).backward();
                let x = leaf(logits);
                // The op may overwrite its input, which a leaf must not be.
                let loss = ops::cross_entropy(&(&x * 1.0), &target, s, true);
                (&loss * 3.0).backward();
                let name = format!("{kind:?} ({n}, {v}) e {label_smoothing}");
                check(&format!("{name} loss"), &loss, &want, tolerance);
                check(&format!("{name} gradient"), &x.grad(), &want_x.grad(), tolerance);
            }
        }
    }
    let logits = Tensor::randn([2, 64], (Kind::Float, device));
    for bad in [64, -1] {
        let target = Tensor::from_slice(&[3i64, bad]).to_device(device);
        let loss = ffi::cross_entropy(&logits.copy(), &target, PLAIN_LOSS).unwrap();
        assert!(loss.double_value(&[]).is_nan(), "target {bad} of 64");
    }
}

#[test]
fn the_fused_head_agrees_with_its_reference() {
    let Some((device, _card)) = card("the_fused_head_agrees_with_its_reference") else { return };
    tch::manual_seed(10);
    for (kind, tolerance) in [(Kind::Float, 2e-3), (Kind::BFloat16, 1e-2)] {
        let (n, c, v) = (301, 128, 1000);
        let x = Tensor::randn([n, c], (kind, device));
        let w = Tensor::randn([v, c], (kind, device)) * 0.2;
        let target = Tensor::randint(v, [n], (Kind::Int64, device));
        let _ = target.narrow(0, 7, 20).fill_(-100);
        let s = LossScalars { scale: 1.0 / 281.0, label_smoothing: 0.0, z_loss: 1e-4 };
        let run = |kind: Kind, chunks: Option<i64>, factor: f64| {
            let (x, w) = (leaf(x.to_kind(kind)), leaf(w.to_kind(kind)));
            let loss = match chunks {
                Some(chunks) => ffi::head_loss(&x, &w, &target, chunks, s).unwrap(),
                None => ops::head_loss(&x, &w, &target, s, false),
            };
            (&loss * factor).backward();
            [loss.detach(), x.grad(), w.grad()]
        };
        for factor in [1.0, 0.5] {
            let want = run(Kind::Float, None, factor);
            for chunks in [1, 3, 301] {
                poison(device);
                for (i, got) in run(kind, Some(chunks), factor).iter().enumerate() {
                    check(
                        &format!("{kind:?} {chunks} chunks result {i}"),
                        got,
                        &want[i],
                        tolerance,
                    );
                }
            }
        }
        let loss = ffi::head_loss(&leaf(x), &w, &target, 1, s).unwrap();
        let one = loss.ones_like();
        ffi::backward(&loss, &one).unwrap();
        let again = message(ffi::backward(&loss, &one));
        assert!(again.contains("head_loss: backward can run once"), "{again}");
    }
}

#[test]
fn the_gradient_norm_and_its_clip_factor_are_those_of_torch() {
    let Some((device, _card)) = card("the_gradient_norm_and_its_clip_factor_are_those_of_torch")
    else {
        return;
    };
    tch::manual_seed(11);
    let sizes = [1i64, 3, 4, 1000, 30_001, 1 << 20];
    let mut grads: Vec<Tensor> =
        sizes.iter().map(|&n| Tensor::randn([n], (Kind::Float, device))).collect();
    grads.extend((0..600).map(|i| Tensor::randn([17 + i % 3], (Kind::BFloat16, device))));
    let wide: Vec<Tensor> = grads.iter().map(|g| g.to_kind(Kind::Double)).collect();
    let want = Tensor::cat(&wide, 0).norm().double_value(&[]);
    let all: Vec<&Tensor> = grads.iter().collect();
    for (max_norm, factor) in [(Some(1.0), 1.0 / want), (Some(1e9), 1.0), (None, 1.0)] {
        let (norm, clip) = ffi::grad_norm(&all, max_norm, None).unwrap();
        assert!((norm.double_value(&[]) / want - 1.0).abs() < 1e-6);
        assert!((clip.double_value(&[]) / factor - 1.0).abs() < 1e-5, "{max_norm:?}");
    }
    let _ = grads[2].get(1).fill_(f64::INFINITY);
    let (norm, clip) = ffi::grad_norm(&grads.iter().collect::<Vec<_>>(), Some(1.0), None).unwrap();
    assert!(!norm.double_value(&[]).is_finite() && !clip.double_value(&[]).is_finite());
}
