//! Quantised matrices on the CPU, and a Llama of them.

use crate::small_models::{checkpoint, families, random_ids, run_program, with_seed};
use half::f16;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::gguf::{Type, quants};
use tinyllama::checkpoint::{Source, Target, convert};
use tinyllama::generate::engine::{Engine, EngineOptions, Event, Request, generate};
use tinyllama::generate::{NetworkRef, score_tokens};
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::quant::matrix::{Activations, Format, QuantMatrix};
use tinyllama::quant::{self, QuantLlama, Scheme, parse_scheme};

/// Numbers that look random, about normal with deviation 1.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Matrices of every format, with the number of values that a row is a multiple of.
fn matrices(rows: usize, columns: usize) -> Vec<(String, QuantMatrix)> {
    let values: Vec<f32> = noise(rows * columns, 7).iter().map(|x| 0.05 * x).collect();
    let mut all = Vec::new();
    for kind in [Type::Q4_0, Type::Q8_0, Type::Q4_K, Type::Q6_K] {
        if columns.is_multiple_of(if matches!(kind, Type::Q4_K | Type::Q6_K) { 256 } else { 32 }) {
            let bytes = quants::quantized(kind, &values).unwrap();
            let matrix = QuantMatrix::from_gguf(kind, columns, &bytes).unwrap().unwrap();
            all.push((kind.to_string(), matrix));
        }
    }
    for group in [32, 64, 128] {
        for format in [Format::Int4 { group }, Format::Int8 { group }] {
            if columns.is_multiple_of(group) {
                let matrix = QuantMatrix::pack(format, &values, columns).unwrap();
                all.push((format!("{format:?}"), matrix));
            }
        }
    }
    all
}

fn row_of(matrix: &QuantMatrix, row: usize) -> Vec<f32> {
    let mut out = vec![0.0; matrix.columns()];
    matrix.dequantise_row(row, &mut out);
    out
}

fn product(matrix: &QuantMatrix, x: &[f32]) -> Vec<f32> {
    let (k, n) = (matrix.columns(), matrix.rows());
    let mut activations = Activations::default();
    activations.quantise(x, k);
    let mut y = vec![f32::NAN; x.len() / k * n];
    matrix.multiply(&activations, &mut y, n);
    y
}

#[test]
fn rows_of_gguf_blocks_are_those_that_the_reader_of_files_gives() {
    let (rows, columns) = (13, 512);
    let values = noise(rows * columns, 3);
    for kind in [Type::Q4_0, Type::Q4_1, Type::Q8_0, Type::Q4_K, Type::Q6_K] {
        let bytes = match kind {
            // Nobody writes Q4_1 here: scale, minimum, codes.
            Type::Q4_1 => (0..rows * columns / 32)
                .flat_map(|i| {
                    let halves =
                        [half::f16::from_f32(0.01 + i as f32 * 1e-4), half::f16::from_f32(-0.1)];
                    let codes = (0..16u8).map(move |v| v.wrapping_mul(37).wrapping_add(i as u8));
                    halves.into_iter().flat_map(|h| h.to_le_bytes()).chain(codes)
                })
                .collect(),
            _ => quants::quantized(kind, &values).unwrap(),
        };
        let mut expected = vec![0.0; rows * columns];
        quants::dequantize(kind, &bytes, &mut expected).unwrap();
        let matrix = QuantMatrix::from_gguf(kind, columns, &bytes).unwrap().unwrap();
        assert_eq!(matrix.rows(), rows);
        for row in 0..rows {
            let got = row_of(&matrix, row);
            let worst = got.iter().zip(&expected[row * columns..]).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0f32, f32::max);
            assert!(worst < 1e-6, "{kind}, row {row}: {worst}");
        }
    }
}

#[test]
fn rows_in_groups_say_what_the_matrix_says() {
    let (rows, columns) = (13, 512);
    for (name, matrix) in matrices(rows, columns) {
        let Some(format) = matrix.grouped_format() else {
            assert_eq!((matrix.format(), name.as_str()), (Format::Q6K, "Q6_K"));
            continue;
        };
        let (group, int8) = (format.group(), matches!(format, Format::Int8 { .. }));
        let (mut codes, mut scales) = (vec![77; columns], vec![f16::NAN; columns / group]);
        let mut minimums = scales.clone();
        for row in 0..rows {
            matrix.grouped_row(row, &mut codes, &mut scales, &mut minimums);
            for (k, expected) in row_of(&matrix, row).into_iter().enumerate() {
                let (scale, minimum) = (scales[k / group].to_f32(), minimums[k / group].to_f32());
                let code = if int8 { codes[k] as i8 as f32 } else { codes[k] as f32 };
                assert!(int8 || codes[k] < 16, "{name}");
                let got = scale * code + minimum;
                // Q4_K's products are rounded to fp16.
                let slack = (scale * code).abs().max(minimum.abs()) * 2.0 / 2048.0;
                match matrix.format() {
                    Format::Q4K => assert!((got - expected).abs() <= slack, "{got}, {expected}"),
                    _ => assert_eq!(got, expected, "{name}"),
                }
            }
        }
        if matrix.format() == Format::Q4K {
            continue;
        }
        // Out of panels and back.
        let back = QuantMatrix::from_groups(&matrix.groups().unwrap()).unwrap();
        assert_eq!((back.format(), back.rows()), (format, rows));
        (0..rows).for_each(|row| assert_eq!(row_of(&back, row), row_of(&matrix, row), "{name}"));
    }
}

#[test]
fn a_product_is_that_of_the_rounded_activations() {
    for (rows, columns) in [(1, 256), (13, 512), (40, 1280), (7, 96)] {
        for (name, matrix) in matrices(rows, columns) {
            for m in [1, 2, 3, 5, 17] {
                let mut x = noise(m * columns, m as u64);
                x[1] *= 20.0;
                let y = product(&matrix, &x);
                for i in 0..m {
                    let x = &x[i * columns..(i + 1) * columns];
                    // Rounding to 8 bits moves a value by half a step of its block at most.
                    let slack: Vec<f64> = x
                        .chunks(32)
                        .flat_map(|block| {
                            let largest = block.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                            [largest as f64 / 127.0 * 0.51; 32]
                        })
                        .collect();
                    for n in 0..rows {
                        let w = row_of(&matrix, n);
                        let exact: f64 = x.iter().zip(&w).map(|(x, w)| *x as f64 * *w as f64).sum();
                        let bound: f64 =
                            slack.iter().zip(&w).map(|(s, w)| s * w.abs() as f64).sum();
                        let got = y[i * rows + n] as f64;
                        assert!(
                            (got - exact).abs() <= bound + 1e-4,
                            "{name} {rows}x{columns}, row {i} of {m}, {n}: {got}, exact {exact}, bound {bound}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_it_is_computed_with() {
    let (rows, columns) = (72, 768);
    for (name, matrix) in matrices(rows, columns) {
        let x = noise(70 * columns, 5);
        let together = product(&matrix, &x);
        for (first, m) in [(0, 1), (69, 1), (3, 2), (10, 7), (1, 33), (6, 64)] {
            let alone = product(&matrix, &x[first * columns..(first + m) * columns]);
            assert_eq!(alone, together[first * rows..(first + m) * rows], "{name}, {m} rows");
        }
    }
}

#[test]
fn widths_that_groups_do_not_divide_are_refused() {
    let error = QuantMatrix::pack(Format::Int4 { group: 128 }, &[0.0; 96], 96).unwrap_err();
    assert!(error.to_string().contains("96") && error.to_string().contains("128"), "{error}");
    assert_eq!(parse_scheme("int4:32"), Ok(Scheme::Int4 { group: 32 }));
    assert_eq!(parse_scheme("stored"), Ok(Scheme::Stored));
    for bad in ["int4:16", "int3", "", "stored:32"] {
        assert!(parse_scheme(bad).is_err(), "{bad}");
    }
}

/// A Llama whose widths the groups divide, with random weights.
fn llama(tie_embeddings: bool) -> GPT {
    let _alone = crate::common::alone();
    let config = ModelConfig {
        block_size: 64,
        vocab_size: 258,
        padded_vocab_size: 258,
        n_layer: 2,
        n_head: 4,
        n_query_groups: 2,
        n_embd: 256,
        head_size: 64,
        intermediate_size: 512,
        tie_embeddings,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    };
    GPT::new(&config, Device::Cpu)
}

fn quantised(model: &GPT, scheme: Scheme) -> QuantLlama {
    let dir = checkpoint(model);
    quant::load(&Source::open(dir.path()).unwrap(), scheme).unwrap()
}

/// The same weights as a dense model.
fn dense(model: &GPT, quantised: &QuantLlama) -> GPT {
    let copy = GPT::empty(&model.config, Device::Cpu);
    let rows = |matrices: &[&QuantMatrix]| {
        let rows = matrices.iter().flat_map(|m| (0..m.rows()).map(|row| row_of(m, row)));
        let values: Vec<f32> = rows.flatten().collect();
        Tensor::from_slice(&values)
    };
    tch::no_grad(|| {
        for ((name, mut ours), (_, theirs)) in
            copy.named_parameters().into_iter().zip(model.named_parameters())
        {
            let leaf: Vec<&str> = name.split('.').collect();
            let block = leaf.get(2).and_then(|i| quantised.h.get(i.parse::<usize>().ok()?));
            let matrices: Vec<&QuantMatrix> = match (leaf.as_slice(), block) {
                ([_, "wte", _], _) => vec![&quantised.wte],
                (["lm_head", _], _) => quantised.lm_head.iter().collect(),
                ([.., "qkv", "weight"], Some(block)) => block.qkv.0.iter().collect(),
                ([.., "attn", "proj", _], Some(block)) => vec![&block.proj],
                ([.., "fc_1", _], Some(block)) => vec![&block.gate_up.0[0]],
                ([.., "fc_2", _], Some(block)) => vec![&block.gate_up.0[1]],
                ([.., "mlp", "proj", _], Some(block)) => vec![&block.down],
                _ => vec![],
            };
            match matrices.is_empty() {
                true => ours.copy_(&theirs),
                false => ours.copy_(&rows(&matrices).view_as(&theirs)),
            }
        }
    });
    copy
}

/// Log-probabilities that differ by no more than activations in 8 bits explain.
fn close(got: &[Option<f64>], expected: &[Option<f64>], what: &str) {
    let pairs = got.iter().flatten().zip(expected.iter().flatten());
    let differences: Vec<f64> = pairs.map(|(got, expected)| (got - expected).abs()).collect();
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    let worst = differences.iter().copied().fold(0.0, f64::max);
    assert!(mean < 0.015 && worst < 0.08, "{what}: mean {mean}, worst {worst}");
}

#[test]
fn a_quantised_model_computes_what_its_weights_say() {
    let _no_grad = tch::no_grad_guard();
    for tied in [false, true] {
        let model = llama(tied);
        for scheme in
            [Scheme::Int4 { group: 32 }, Scheme::Int4 { group: 128 }, Scheme::Int8 { group: 64 }]
        {
            let quantised = quantised(&model, scheme);
            let dense = dense(&model, &quantised);
            let ids = random_ids(50);
            let expected = score_tokens(&dense, &ids).unwrap();
            let got = score_tokens(NetworkRef::Quantised(&quantised), &ids).unwrap();
            close(&got, &expected, &format!("{scheme:?}, tied {tied}"));
        }
    }
}

#[test]
fn a_gguf_files_own_blocks_are_used() {
    let model = llama(false);
    let dir = checkpoint(&model);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(dir.path().join(name)).unwrap(); // GGUF has no name for its cut of words
    }
    let file = dir.path().join("model.gguf");
    let source = Source::open(dir.path()).unwrap();
    assert!(!source.is_quantised());
    let mix = tinyllama::checkpoint::gguf::mix::Mix::from_name("Q4_K_M").unwrap();
    convert(&source, &file, Target::Gguf { mix: Some(mix) }, None, &|_, _| {}).unwrap();
    let source = Source::open(&file).unwrap();
    assert!(source.is_quantised());
    let stored = quant::load(&source, Scheme::Stored).unwrap();
    let formats: Vec<Format> = stored.h[0].qkv.0.iter().map(QuantMatrix::format).collect();
    assert_eq!(formats[..2], [Format::Q4K, Format::Q4K]);
    // What the file says in fp32: rows of queries and keys are in our order.
    let dense = source.load_model(Kind::Float, Device::Cpu).unwrap();
    let expected = score_tokens(&dense, &random_ids(60)).unwrap();
    let got = score_tokens(NetworkRef::Quantised(&stored), &random_ids(60)).unwrap();
    close(&got, &expected, "Q4_K_M");
}

#[test]
fn a_batch_of_a_quantised_model_has_the_bits_of_each_alone() {
    let model = llama(false);
    let quantised = quantised(&model, Scheme::Int4 { group: 64 });
    let sizes =
        EngineOptions { blocks: 40, max_sequences: 9, max_step_tokens: 13, ..Default::default() };
    let mut engine = Engine::new(NetworkRef::Quantised(&quantised), sizes);
    let asked: Vec<_> = (0..20)
        .map(|i| (random_ids(80)[i..i + 1 + i * 5 % 30].to_vec(), with_seed(i as u64)))
        .collect();
    for (prompt, options) in &asked {
        let request = Request { prompt: prompt.clone(), samples: 1, options: options.clone() };
        engine.submit(request).unwrap();
    }
    let mut out = vec![(Vec::new(), Vec::new()); asked.len()];
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Token { request, token, .. } = event {
                out[request as usize].0.push(token.id);
                out[request as usize].1.push(token.logprob);
            }
        }
    }
    for ((prompt, options), (tokens, logprobs)) in asked.iter().zip(out) {
        let alone = NetworkRef::Quantised(&quantised);
        let alone = generate(alone, prompt, options, &mut |_| Ok(true)).unwrap();
        assert_eq!(alone.tokens, tokens);
        assert_eq!(alone.logprobs, logprobs, "bit for bit");
    }
}

#[test]
fn groups_that_do_not_divide_the_rows_are_refused_with_those_that_do() {
    // SmolLM2-135M's: 576 = 9 x 64.
    let config = ModelConfig {
        n_layer: 1,
        n_head: 9,
        n_query_groups: 3,
        n_embd: 576,
        head_size: 64,
        intermediate_size: 640,
        ..llama(false).config
    };
    let dir = checkpoint(&crate::small_models::random(&config));
    let source = Source::open(dir.path()).unwrap();
    let error = quant::load(&source, Scheme::Int4 { group: 128 }).map(drop).unwrap_err();
    assert_eq!(tinyllama::error::exit_code(&error), 2);
    let text = error.to_string();
    assert!(text.ends_with("rows of 576 values, expected a multiple of 128, the group"), "{text}");
    assert!(tinyllama::error::hint(&error).unwrap().ends_with("`int4:32`, `int4:64`"));
    quant::load(&source, Scheme::Int8 { group: 64 }).unwrap();
}

#[test]
fn stored_is_for_checkpoints_that_are_quantised() {
    let dir = checkpoint(&llama(false));
    let source = Source::open(dir.path()).unwrap();
    let error = quant::load(&source, Scheme::Stored).map(drop).unwrap_err();
    assert_eq!(tinyllama::error::exit_code(&error), 2);
    assert!(error.to_string().contains("got the format Hugging Face safetensors"), "{error}");
}

#[test]
fn the_command_line_quantises_and_says_what_it_cannot() {
    let dir = checkpoint(&llama(false));
    let args = |more: &[&'static str]| {
        [&["--prompt", "Hi", "--temperature", "0", "--json"], more].concat()
    };
    let run = |more: &[&'static str]| {
        let (code, out, err) = run_program("generate", dir.path(), &args(more), "");
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Value>(&out).unwrap()["tokens"].clone()
    };
    assert_eq!(run(&["--quantize", "int8"]).as_array().unwrap().len(), 50);
    run(&["--quantize", "int4:128"]);
    let refused = |more: &[&'static str], expected: &str| {
        let (code, _, err) = run_program("generate", dir.path(), &args(more), "");
        assert!(code == 2 && err.contains(expected), "{code}: {err}");
    };
    refused(&["--quantize", "int5"], "`int4`, `int8` or `stored`");
    refused(&["--quantize", "int4", "--plain"], "quantised weights");
    refused(&["--quantize", "stored"], "`--quantize stored`: expected quantised matrices");
    let neox = &families()[2].1;
    let neox = checkpoint(neox);
    let (code, _, err) = run_program("generate", neox.path(), &args(&["--quantize", "int4"]), "");
    assert!(code == 2 && err.contains("cannot be quantised"), "{code}: {err}");
}
