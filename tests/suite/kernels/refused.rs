//! What kernels say to bad arguments, and their bench where there is no card.

use super::{FLASH, PLAIN_LOSS, message};
use crate::common::card;
use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::ffi::{self, FlashOptions, LossScalars};

#[test]
fn bad_arguments_are_refused_with_op_argument_expected_and_got() {
    let Some((device, _card)) = card("bad_arguments_are_refused_with_op_argument_expected_and_got")
    else {
        return;
    };
    let bf16 = (Kind::BFloat16, device);
    let q = |shape: [i64; 4]| Tensor::randn(shape, bf16);
    let table = |t: i64, n: i64| Tensor::randn([t, n], (Kind::Float, device));
    let attend = |q: &Tensor, k: &Tensor| message(ffi::flash_attention(q, k, k, FLASH));
    let x = Tensor::randn([4, 64], bf16);
    let ids = Tensor::zeros([4], (Kind::Int64, device));
    let w = Tensor::ones([64], bf16);
    let angles = Tensor::zeros([2, 8], (Kind::Float, device));
    let shifted = Tensor::randn([4 * 64 + 1], bf16).narrow(0, 1, 4 * 64).view([4, 64]);
    let huge = Tensor::zeros([1], bf16).expand([1, 1 << 31], false);
    let loss = |x: &Tensor, t: &Tensor| message(ffi::cross_entropy(x, t, PLAIN_LOSS));
    let documents = Tensor::zeros([1, 9], (Kind::Int, device));
    let with_documents = FlashOptions { documents: Some((&documents, &documents)), ..FLASH };
    let cpu = x.to_device(Device::Cpu);
    let cases: Vec<(String, &[&str])> = vec![
        (
            attend(&q([1, 2, 8, 96]), &q([1, 2, 8, 96])),
            &["flash_attention", "head size", "64 or 128", "96"],
        ),
        (
            attend(&q([1, 2, 8, 64]).to_kind(Kind::Float), &q([1, 2, 8, 64])),
            &["flash_attention", "q must be bf16 or fp16", "Float"],
        ),
        (
            attend(&q([1, 2, 8, 64]), &q([1, 2, 8, 64]).to_kind(Kind::Half)),
            &["flash_attention", "k must be BFloat16", "Half"],
        ),
        (attend(&q([1, 3, 8, 64]), &q([1, 2, 8, 64])), &["3 heads", "not a multiple", "2 heads"]),
        (attend(&q([1, 2, 9, 64]), &q([1, 2, 8, 64])), &["S >= T", "T = 9", "S = 8"]),
        (
            attend(&q([1, 2, 8, 128]).slice(3, 0, 128, 2), &q([1, 2, 8, 64])),
            &["q must have its last dimension contiguous"],
        ),
        (
            attend(&q([1, 2, 8, 68]).narrow(3, 0, 64), &q([1, 2, 8, 64])),
            &["q must have strides", "multiples of 8"],
        ),
        (
            attend(&q([1, 2, 8, 72]).narrow(3, 1, 64), &q([1, 2, 8, 64])),
            &["q must start at a multiple of 16 bytes", "got offset 2"],
        ),
        (attend(&q([0, 2, 8, 64]), &q([0, 2, 8, 64])), &["q must not be empty", "[0, 2, 8, 64]"]),
        (
            message(ffi::flash_attention(
                &q([1, 2, 8, 64]),
                &q([1, 2, 8, 64]),
                &q([1, 2, 8, 64]),
                with_documents,
            )),
            &["documents.start must have shape [1, 8]", "[1, 9]"],
        ),
        (
            message(ffi::flash_attention_qkv(&q([1, 8, 5, 64]), 2, 2, None, FLASH)),
            &["(B, T, H + 2G, D)", "[1, 8, 5, 64]"],
        ),
        (
            message(ffi::flash_attention_qkv(
                &q([1, 8, 6, 64]),
                2,
                2,
                Some((&table(8, 64), &table(9, 64))),
                FLASH,
            )),
            &["sin must be (T, n) with T = 8", "[9, 64]"],
        ),
        (
            message(ffi::flash_attention_qkv(
                &q([1, 8, 6, 64]),
                2,
                2,
                Some((&table(8, 66), &table(8, 66))),
                FLASH,
            )),
            &["cos must be (T, n)", "even n of at most 64", "[8, 66]"],
        ),
        (
            message(ffi::rms_norm(&x, &w.narrow(0, 0, 32), 1e-5)),
            &["rms_norm", "weight must have shape [64]", "[32]"],
        ),
        (
            message(ffi::rms_norm(&x, &w.to_kind(Kind::Float), 1e-5)),
            &["weight must be BFloat16", "Float"],
        ),
        (
            message(ffi::rms_norm(&x.tr(), &w.narrow(0, 0, 4), 1e-5)),
            &["rms_norm", "multiple of 8", "got 4"],
        ),
        (
            message(ffi::rms_norm(&x.to_kind(Kind::Double), &w, 1e-5)),
            &["x must be fp32, bf16 or fp16", "Double"],
        ),
        (
            message(ffi::rms_norm(&shifted, &w, 1e-5)),
            &["rms_norm: x must start at a multiple of 16 bytes"],
        ),
        (
            message(ffi::add_rms_norm(&x, &cpu, &w, 1e-5)),
            &["residual must be on a CUDA device", "cpu"],
        ),
        (
            message(ffi::rope(&x.view([2, 2, 64]), &angles, &angles, 9, 8)),
            &["rope", "cannot rotate 9 of 8 heads"],
        ),
        (
            message(ffi::rope(&x.view([1, 4, 64]), &angles, &angles, 8, 8)),
            &["cos must be (T, n)", "T = 4", "[2, 8]"],
        ),
        (message(ffi::swiglu(&x.narrow(1, 0, 24))), &["swiglu", "F a multiple of 8", "[4, 24]"]),
        (message(ffi::swiglu(&x.narrow(1, 0, 32))), &["gate_up must be contiguous", "[64, 1]"]),
        (
            message(ffi::swiglu_mlp(&x, &x, &x, &w.view([64, 1]))),
            &["swiglu_mlp", "fc_1", "multiple of 8"],
        ),
        (loss(&huge, &ids), &["cross_entropy", "V below 2^31", "2147483648"]),
        (loss(&x, &ids.narrow(0, 0, 3)), &["one id a row (4)", "got 3"]),
        (loss(&x, &ids.to_kind(Kind::Int)), &["target must be Long", "Int"]),
        (loss(&x.view([2, 2, 64]), &ids), &["logits must be (N, V)", "[2, 2, 64]"]),
        (
            message(ffi::head_loss(&x, &x, &ids, 0, PLAIN_LOSS)),
            &["head_loss", "chunks must be at least 1", "got 0"],
        ),
        (
            message(ffi::cross_entropy(
                &x,
                &ids,
                LossScalars { label_smoothing: 1.0, ..PLAIN_LOSS },
            )),
            &["label_smoothing must be in [0, 1)", "got 1"],
        ),
        (
            message(ffi::grad_norm(&[&x, &cpu], None, None)),
            &["grad_norm", "must be on a CUDA device", "cpu"],
        ),
    ];
    for (message, words) in cases {
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        assert!(!message.contains('\n'), "one line: {message}");
    }
    // The process and its CUDA context are as alive as before.
    Cuda::synchronize(0);
    assert!(ffi::rms_norm(&x, &w, 1e-5).is_ok());
}

#[test]
fn without_a_card_the_kernel_bench_says_what_is_missing() {
    if Cuda::is_available() {
        return;
    }
    let output =
        assert_cmd::cargo::cargo_bin_cmd!("tinyllama").args(["bench", "kernels"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("error:") && text.contains("CUDA card"), "{text}");
    assert!(text.contains("hint:"), "{text}");
    assert!(output.stdout.is_empty());
}
