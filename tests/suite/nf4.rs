//! NF4 weights: bitsandbytes' codes and values bit for bit, the kernel against the reference, the frozen layer.

use crate::common::{alone, card, max_difference};
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::tensors::TensorFile;
use tinyllama::ffi;
use tinyllama::ops;
use tinyllama::quant::nf4::Nf4Weight;

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// Whole blocks, a short last one, an odd number of values, several and a short second level.
const SHAPES: [(i64, i64); 6] = [(8, 128), (5, 30), (3, 43), (1, 1), (514, 32), (130, 257)];

fn random(shape: (i64, i64), device: Device) -> Tensor {
    Tensor::randn([shape.0, shape.1], (Kind::Float, device)) * 0.02
}

fn bits(x: &Tensor) -> Vec<u8> {
    ffi::tensor_bytes(x)
}

fn mixed(x: u32) -> u32 {
    let x = x.wrapping_mul(0x9e37_79b1);
    let x = (x ^ (x >> 15)).wrapping_mul(0x85eb_ca77);
    x ^ (x >> 13)
}

/// The weights of `scripts/golden/nf4.py`.
fn hashed(seed: u32, rows: i64, columns: i64) -> Tensor {
    let value = |i: u32| {
        let s = (mixed(i.wrapping_add(seed << 20)) as i32 >> 8) as f32 / (1 << 23) as f32;
        let a = (mixed((i / 64).wrapping_add(seed << 24)) >> 24) as f32 / 256.0;
        s * s * s * ((1.0 + a) * 0.01)
    };
    let values: Vec<f32> = (0..(rows * columns) as u32).map(value).collect();
    Tensor::from_slice(&values).view([rows, columns])
}

/// A golden file, by case and name.
struct Golden(TensorFile);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/nf4/nf4.safetensors");
        Self(TensorFile::open(&path).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        self.0.tensor(name).unwrap()
    }

    fn numbers(&self, name: &str) -> Vec<i64> {
        Vec::try_from(self.get(name)).unwrap()
    }

    fn weight(&self, case: &str, seed: u32) -> Tensor {
        let shape = self.numbers(&format!("{case}.shape"));
        let weight = match case {
            "borders" => self.get("borders.weight"),
            _ => hashed(seed, shape[0], shape[1]),
        };
        if case == "zeros" {
            let _ = weight.get(1).zero_();
        }
        weight.to_kind(KINDS[self.numbers(&format!("{case}.kind"))[0] as usize])
    }
}

#[test]
fn nf4_codes_and_values_are_those_of_bitsandbytes() {
    let golden = Golden::open();
    let hashed = [("whole", 1), ("bf16", 2), ("short", 3), ("odd", 4), ("zeros", 5), ("nested", 6)];
    for (case, seed) in hashed.into_iter().chain([("borders", 0)]) {
        let weight = golden.weight(case, seed);
        for double in [false, true] {
            let name = |part: &str| match (double, part) {
                (true, part) if part != "codes" => format!("{case}.double.{part}"),
                _ => format!("{case}.{part}"),
            };
            let ours = Nf4Weight::quantize(&weight, double).unwrap();
            assert_eq!(ours.is_double(), double);
            for (part, got) in ours.parts() {
                let want = match part {
                    "nested_quant_map" => golden.get(part),
                    part => golden.get(&name(part)),
                };
                if matches!(part, "nested_offset" | "nested_absmax") {
                    // A mean: its last bit depends on the order of the sum.
                    let scale = golden.get(&format!("{case}.absmax")).max().double_value(&[]);
                    let error = max_difference(&got, &want);
                    assert!(error <= 1e-6 * scale, "{case}, {part}: {error:.1e}");
                } else {
                    assert_eq!(got.kind(), want.kind());
                    assert!(got.equal(&want), "{case}, double {double}: {part}");
                }
            }
            // What comes back, of bitsandbytes' own tensors.
            let part = |part: &str| match part {
                "nested_quant_map" => Some(golden.get(part)),
                part => Some(golden.get(&name(part))),
            };
            let theirs = Nf4Weight::from_parts(weight.size2().unwrap(), part).unwrap();
            let crcs =
                golden.numbers(&format!("{case}.{}.crc32", ["single", "double"][double as usize]));
            for (kind, want) in KINDS.into_iter().zip(crcs) {
                let got = crc32fast::hash(&bits(&theirs.dequantize(kind).unwrap()));
                assert_eq!(i64::from(got), want, "{case}, double {double}, {kind:?}");
            }
        }
    }
}

#[test]
fn nf4_values_come_back_within_half_the_widest_gap_of_the_table() {
    let _alone = alone();
    tch::manual_seed(5);
    for shape in SHAPES {
        let weight = random(shape, Device::Cpu);
        let absmax = weight.abs().max().double_value(&[]);
        for double in [false, true] {
            let ours = Nf4Weight::quantize(&weight, double).unwrap();
            assert_eq!((ours.shape(), ours.device()), (shape, Device::Cpu));
            let back = ours.dequantize(Kind::Float).unwrap();
            let error = max_difference(&back, &weight) / absmax;
            // -1 and -0.696; the bytes of the scales are 1 % apart at most.
            assert!(error < if double { 0.17 } else { 0.1520 }, "{shape:?}: {error}");
        }
    }
}

#[test]
fn nf4_scales_take_half_a_bit_a_value_and_an_eighth_where_they_are_quantised() {
    let _alone = alone();
    let weight = random((512, 512), Device::Cpu);
    let n = 512 * 512;
    let bytes = |double| Nf4Weight::quantize(&weight, double).unwrap().bytes();
    assert_eq!(bytes(false), n / 2 + n / 64 * 4);
    assert_eq!(bytes(true), n / 2 + n / 64 + n / 64 / 256 * 4 + 256 * 4 + 4);
}

#[test]
fn an_nf4_weight_is_the_same_after_saving_its_parts() {
    let _alone = alone();
    for (shape, double) in SHAPES.into_iter().flat_map(|s| [(s, false), (s, true)]) {
        let ours = Nf4Weight::quantize(&random(shape, Device::Cpu), double).unwrap();
        let parts = ours.parts();
        let part =
            |name: &str| parts.iter().find(|(n, _)| *n == name).map(|(_, t)| t.shallow_clone());
        let again = Nf4Weight::from_parts(shape, part).unwrap();
        for other in [again, ours.shallow_clone(), ours.to_device(Device::Cpu)] {
            let values = |w: &Nf4Weight| bits(&w.dequantize(Kind::BFloat16).unwrap());
            assert_eq!((other.is_double(), values(&other)), (double, values(&ours)), "{shape:?}");
        }
    }
}

#[test]
fn nf4_refuses_what_is_no_weight_and_says_what_it_expected() {
    let matrix = Tensor::arange(128, (Kind::Float, Device::Cpu)).view([2, 64]);
    let error = |w: &Tensor| Nf4Weight::quantize(w, false).unwrap_err().to_string();
    assert_eq!(
        error(&matrix.view([2, 8, 8])),
        "nf4: weight must be a matrix (O, C), got shape [2, 8, 8]"
    );
    assert_eq!(
        error(&matrix.to_kind(Kind::Double)),
        "nf4: weight must be fp32, bf16 or fp16, got Double"
    );
    assert_eq!(error(&(&matrix / 0.0)), "nf4: weight (2, 64) has values that are not finite");

    let ours = Nf4Weight::quantize(&matrix, true).unwrap();
    assert_eq!(
        ours.dequantize(Kind::Int).unwrap_err().to_string(),
        "nf4: result must be fp32, bf16 or fp16, got Int"
    );
    let with = |shape, name: &str, other: Option<Tensor>| {
        let part = |wanted: &str| match wanted == name {
            true => other.as_ref().map(Tensor::shallow_clone),
            false => {
                let mut parts = ours.parts().into_iter();
                parts.find(|(n, _)| *n == wanted).map(|(_, t)| t)
            }
        };
        Nf4Weight::from_parts(shape, part).unwrap_err().to_string()
    };
    assert_eq!(with((2, 64), "codes", None), "nf4: no tensor `codes`");
    assert_eq!(with((2, 64), "nested_absmax", None), "nf4: no tensor `nested_absmax`");
    assert_eq!(
        with((2, 65), "", None),
        "nf4: `codes` of a weight (2, 65): expected (Uint8, [65], Cpu), got (Uint8, [64], Cpu)"
    );
    assert_eq!(
        with((2, 64), "nested_offset", Some(matrix.shallow_clone())),
        "nf4: `nested_offset` of a weight (2, 64): expected (Float, [], Cpu), got (Float, [2, 64], Cpu)"
    );
}

/// y and dx of a layer, for a random gradient of y.
fn passes(x: &Tensor, layer: impl Fn(&Tensor) -> Tensor) -> (Tensor, Tensor) {
    let x = x.detach().copy().set_requires_grad(true);
    let y = layer(&x);
    tch::manual_seed(11);
    let dy = Tensor::randn(y.size(), (Kind::Float, y.device())).to_kind(y.kind());
    (&y * dy).sum(Kind::Float).backward();
    (y.detach(), x.grad())
}

#[test]
fn nf4_linear_equals_a_linear_layer_with_the_dequantised_weight() {
    let _alone = alone();
    tch::manual_seed(6);
    for double in [false, true] {
        let weight = Nf4Weight::quantize(&random((24, 43), Device::Cpu), double).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = Tensor::randn([2, 5, 43], (Kind::Float, Device::Cpu)).to_kind(kind);
            let (y, dx) = passes(&x, |x| ops::nf4_linear(x, &weight));
            let (want_y, want_dx) = passes(&x, |x| ops::nf4_linear_reference(x, &weight));
            assert_eq!((y.size(), y.kind(), dx.size()), (vec![2, 5, 24], kind, x.size()));
            assert!(y.equal(&want_y) && dx.equal(&want_dx), "{kind:?}");
            assert!(dx.abs().max().double_value(&[]) > 0.01);
            // And by hand: no gradient is of another matrix than the forward pass had.
            let w = weight.dequantize(kind).unwrap();
            assert!(max_difference(&y, &x.matmul(&w.tr())) < 1e-2);
        }
        let plain = ops::nf4_linear(&Tensor::ones([1, 43], (Kind::Float, Device::Cpu)), &weight);
        assert!(!plain.requires_grad());
    }
}

#[test]
fn nf4_linear_refuses_an_x_that_does_not_fit_the_weight() {
    let weight = Nf4Weight::quantize(&hashed(1, 4, 64), false).unwrap();
    let error = |x: Tensor| {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = ops::nf4_linear(&x, &weight);
        }));
        *caught.unwrap_err().downcast::<String>().unwrap()
    };
    let cpu = |kind| (kind, Device::Cpu);
    assert_eq!(
        error(Tensor::ones([3, 32], cpu(Kind::Float))),
        "nf4_linear: x must be (.., 64) for a weight (4, 64), got shape [3, 32]"
    );
    assert_eq!(
        error(Tensor::ones([3, 64], cpu(Kind::Int64))),
        "nf4_linear: x must be fp32, bf16 or fp16, got Int64"
    );
    // The card's functions say what is missing where there is none, and what is wrong where there is one.
    let text = format!("{:#}", ffi_error(&weight));
    let right = text.contains("codes must be on a CUDA device, got cpu");
    assert!(right || text.contains("GPU") || text.contains("CUDA kernels"), "{text}");
}

fn ffi_error(weight: &Nf4Weight) -> anyhow::Error {
    let parts = weight.parts();
    let raw = ffi::Nf4Parts {
        codes: &parts[0].1,
        absmax: &parts[1].1,
        nested: None,
        shape: weight.shape(),
    };
    ffi::nf4_dequantize(&raw, Kind::Float).unwrap_err()
}

// ---- on a card -------------------------------------------------------------------------------------------------

#[test]
fn the_nf4_kernel_gives_the_references_bits() {
    let Some((device, _card)) = card("the_nf4_kernel_gives_the_references_bits") else { return };
    tch::manual_seed(7);
    let large = [(1000, 1027), (2048, 5632)]; // many blocks of threads, the last in part
    for shape in SHAPES.into_iter().chain(large) {
        let cpu = random(shape, Device::Cpu);
        for double in [false, true] {
            let here = Nf4Weight::quantize(&cpu, double).unwrap();
            let there = here.to_device(device);
            for kind in KINDS {
                let want = here.dequantize(kind).unwrap();
                assert_eq!(
                    bits(&there.dequantize(kind).unwrap()),
                    bits(&want),
                    "{shape:?} {kind:?}"
                );
                let got = ops::nf4_dequantize(&there, kind).unwrap();
                assert_eq!((got.device(), got.kind(), got.size()), (device, kind, want.size()));
                assert_eq!(bits(&got), bits(&want), "{shape:?}, {kind:?}, double {double}");
            }
        }
    }
}

#[test]
fn nf4_quantises_on_the_card_as_on_the_cpu() {
    let Some((device, _card)) = card("nf4_quantises_on_the_card_as_on_the_cpu") else { return };
    tch::manual_seed(8);
    for shape in SHAPES {
        let cpu = random(shape, Device::Cpu);
        for double in [false, true] {
            let here = Nf4Weight::quantize(&cpu, double).unwrap().parts();
            let there = Nf4Weight::quantize(&cpu.to_device(device), double).unwrap().parts();
            for ((name, here), (_, there)) in here.into_iter().zip(there) {
                let there = there.to_device(Device::Cpu);
                match name {
                    // Of a mean, whose last bit differs; a byte may then be the next one.
                    "nested_offset" | "nested_absmax" => {
                        assert!(max_difference(&here, &there) < 1e-8, "{shape:?}, {name}");
                    }
                    "absmax" if double => assert!(max_difference(&here, &there) <= 1.0),
                    _ => assert!(here.equal(&there), "{shape:?}, {name}"),
                }
            }
        }
    }
}

#[test]
fn nf4_linear_on_the_card_agrees_with_its_reference() {
    let Some((device, _card)) = card("nf4_linear_on_the_card_agrees_with_its_reference") else {
        return;
    };
    tch::manual_seed(9);
    for (rows, columns) in [(256, 512), (96, 40), (43, 24)] {
        for (kind, double) in KINDS.into_iter().flat_map(|k| [(k, false), (k, true)]) {
            let weight = Nf4Weight::quantize(&random((rows, columns), device), double).unwrap();
            let x = Tensor::randn([3, 7, columns], (Kind::Float, device)).to_kind(kind);
            let (y, dx) = passes(&x, |x| ops::nf4_linear(x, &weight));
            let (want_y, want_dx) = passes(&x, |x| ops::nf4_linear_reference(x, &weight));
            assert_eq!((y.kind(), y.size()), (kind, vec![3, 7, rows]));
            for (got, want, of) in [(y, want_y, "y"), (dx, want_dx, "dx")] {
                let error = max_difference(&got, &want) / want.abs().max().double_value(&[]);
                assert!(error < if kind == Kind::Float { 1e-6 } else { 1e-2 }, "{of}: {error:.1e}");
            }
        }
    }
}

#[test]
fn the_graph_of_nf4_linear_keeps_no_matrix() {
    let Some((device, _card)) = card("the_graph_of_nf4_linear_keeps_no_matrix") else { return };
    let allocated = || ffi::cuda_memory(0).unwrap().allocated;
    let (rows, columns, tokens) = (2048, 1024, 64);
    let weight = Nf4Weight::quantize(&random((rows, columns), device), true).unwrap();
    let x = Tensor::randn([tokens, columns], (Kind::BFloat16, device)).set_requires_grad(true);
    ops::nf4_linear(&x, &weight).sum(Kind::Float).backward(); // cuBLAS's workspace is there from now on
    let h = &x * 2.0; // its backward pass needs no values
    let before = allocated();
    let y = ops::nf4_linear(&h, &weight);
    assert_eq!(allocated() - before, tokens * rows * 2, "y and nothing else");
    drop(h);
    assert_eq!(allocated() - before, tokens * rows * 2 - tokens * columns * 2, "nor h");
    y.sum(Kind::Float).backward();
}

#[test]
fn the_nf4_kernel_refuses_tensors_that_do_not_go_together() {
    let Some((device, _card)) = card("the_nf4_kernel_refuses_tensors_that_do_not_go_together")
    else {
        return;
    };
    let weight = Nf4Weight::quantize(&hashed(1, 4, 64).to_device(device), true).unwrap();
    let parts = weight.parts();
    let get = |name| &parts.iter().find(|(n, _)| *n == name).unwrap().1;
    let nested = ffi::Nf4Nested {
        map: get("nested_quant_map"),
        absmax: get("nested_absmax"),
        offset: get("nested_offset"),
    };
    let whole = ffi::Nf4Parts {
        codes: get("codes"),
        absmax: get("absmax"),
        nested: Some(nested),
        shape: (4, 64),
    };
    assert!(ffi::nf4_dequantize(&whole, Kind::Half).is_ok());
    let error = |w: ffi::Nf4Parts| ffi::nf4_dequantize(&w, Kind::Half).unwrap_err().to_string();
    assert_eq!(
        error(ffi::Nf4Parts { shape: (4, 66), ..whole }),
        "nf4_dequantize: codes must have shape [132], got [128]"
    );
    assert_eq!(
        error(ffi::Nf4Parts { nested: None, ..whole }),
        "nf4_dequantize: absmax must be Float, got Byte"
    );
    let map = nested.map.narrow(0, 0, 128);
    assert_eq!(
        error(ffi::Nf4Parts { nested: Some(ffi::Nf4Nested { map: &map, ..nested }), ..whole }),
        "nf4_dequantize: nested_map must have shape [256], got [128]"
    );
    let cpu = nested.offset.to_device(Device::Cpu);
    assert_eq!(
        error(ffi::Nf4Parts { nested: Some(ffi::Nf4Nested { offset: &cpu, ..nested }), ..whole }),
        "nf4_dequantize: nested_offset must be on a CUDA device, got cpu"
    );
    let x = Tensor::ones([2, 32], (Kind::Half, device));
    assert_eq!(
        ffi::nf4_linear(&x, &whole).unwrap_err().to_string(),
        "nf4_linear: x must be (.., 64), got shape [2, 32]"
    );
}
