//! Caches of 16 and 8 bits beside quantised weights on the CPU.

use crate::small_models::{checkpoint, random, random_ids, run_program, with_seed};
use serde_json::Value;
use tch::Kind;
use tinyllama::checkpoint::Source;
use tinyllama::generate::engine::{Engine, EngineOptions, Event, Request, generate};
use tinyllama::generate::{NetworkRef, score_tokens};
use tinyllama::model::paged_cache::BLOCK;
use tinyllama::model::{GPT, ModelConfig, PagedCache};
use tinyllama::quant::{self, QuantLlama, Scheme};

const KINDS: [Kind; 4] = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Int8];

/// Heads of 32, for which there are kernels, or of 20, for which there are none.
fn llama(head_size: i64) -> GPT {
    random(&ModelConfig {
        block_size: 96,
        vocab_size: 258,
        padded_vocab_size: 258,
        n_layer: 2,
        n_head: 8,
        n_query_groups: 2,
        n_embd: 128,
        head_size,
        intermediate_size: 256,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    })
}

fn quantised(model: &GPT) -> QuantLlama {
    let dir = checkpoint(model);
    quant::load(&Source::open(dir.path()).unwrap(), Scheme::Int8 { group: 32 }).unwrap()
}

#[test]
fn a_smaller_cache_says_nearly_the_same() {
    let _no_grad = tch::no_grad_guard();
    for head_size in [32, 20] {
        let mut model = quantised(&llama(head_size));
        let mut score = |kind| {
            model.cache_kind = kind;
            score_tokens(NetworkRef::Quantised(&model), &random_ids(90)).unwrap()
        };
        let expected = score(Kind::Float);
        for (kind, bound) in [(Kind::BFloat16, 0.02), (Kind::Half, 0.01), (Kind::Int8, 0.03)] {
            let got = score(kind);
            let pairs = got.iter().flatten().zip(expected.iter().flatten());
            let differences: Vec<f64> = pairs.map(|(a, b)| (a - b).abs()).collect();
            let mean = differences.iter().sum::<f64>() / differences.len() as f64;
            assert!(mean < bound && mean > 0.0, "{kind:?}, heads of {head_size}: {mean}");
        }
    }
}

/// Tokens and log-probabilities of a sample.
type Said = (Vec<u32>, Vec<f64>);

/// What an engine says of each sample of each request, and how many tokens of prompts it found in the cache.
fn said(model: &QuantLlama, sizes: EngineOptions, asked: &[Request]) -> (Vec<Said>, u64) {
    let mut engine = Engine::new(NetworkRef::Quantised(model), sizes);
    let mut first = Vec::new();
    let mut samples = 0;
    for request in asked {
        engine.submit(request.clone()).unwrap();
        first.push(samples);
        samples += request.samples;
    }
    let mut out = vec![(Vec::new(), Vec::new()); samples];
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Token { request, index, token } = event {
                let (tokens, logprobs) = &mut out[first[request as usize] + index];
                tokens.push(token.id);
                logprobs.push(token.logprob);
            }
        }
    }
    (out, engine.counters().cached_prompt_tokens)
}

fn alone(model: &QuantLlama, request: &Request) -> Vec<Said> {
    let sample = |i: usize| {
        let mut options = request.options.clone();
        options.sampling.seed += i as u64;
        let model = NetworkRef::Quantised(model);
        let out = generate(model, &request.prompt, &options, &mut |_| Ok(true)).unwrap();
        (out.tokens, out.logprobs)
    };
    (0..request.samples).map(sample).collect()
}

#[test]
fn a_batch_has_the_bits_of_each_alone_in_every_cache() {
    for head_size in [32, 20] {
        let mut model = quantised(&llama(head_size));
        for kind in KINDS {
            model.cache_kind = kind;
            let asked: Vec<Request> = (0..8)
                .map(|i| Request {
                    prompt: random_ids(60)[i..i + 1 + i * 7 % 40].to_vec(),
                    samples: 1,
                    options: with_seed(i as u64),
                })
                .collect();
            // So few blocks that sequences give theirs back and are read again.
            let sizes = EngineOptions {
                blocks: 14,
                max_sequences: 5,
                max_step_tokens: 13,
                ..Default::default()
            };
            let (together, _) = said(&model, sizes, &asked);
            let each: Vec<_> = asked.iter().flat_map(|request| alone(&model, request)).collect();
            assert!(together == each, "{kind:?}, heads of {head_size}");
        }
    }
}

#[test]
fn samples_and_prompts_that_begin_alike_share_every_cache() {
    for head_size in [32, 20] {
        let mut model = quantised(&llama(head_size));
        for kind in KINDS {
            model.cache_kind = kind;
            // Two full blocks, which are shared, and a part of one, which is copied.
            let prompt = random_ids(2 * BLOCK + 5);
            let first = Request { prompt: prompt.clone(), samples: 3, options: with_seed(1) };
            let longer = [&prompt[..], &[9, 8, 7]].concat();
            let second = Request { prompt: longer, samples: 1, options: with_seed(9) };
            // One at a time, so that the second request finds what the first has kept.
            let sizes = EngineOptions { max_sequences: 3, ..Default::default() };
            let asked = [first, second];
            let (together, shared) = said(&model, sizes, &asked);
            let each: Vec<_> = asked.iter().flat_map(|request| alone(&model, request)).collect();
            assert!(together == each, "{kind:?}, heads of {head_size}");
            assert_eq!(shared, 2 * BLOCK as u64, "{kind:?}");
        }
    }
}

#[test]
fn bytes_of_a_cache_are_told() {
    let config = llama(32).config; // L 2, G 2, D 32
    let bytes = KINDS.map(|kind| PagedCache::block_bytes(&config, kind));
    let values = (2 * 2 * 2 * 32 * BLOCK) as u64;
    let scales = (2 * 2 * 2 * 4 * BLOCK) as u64;
    assert_eq!(bytes, [4 * values, 2 * values, 2 * values, values + scales]);
    let mut model = quantised(&llama(32));
    let blocks = |model: &QuantLlama| {
        let sizes = EngineOptions::within(NetworkRef::Quantised(model), 1 << 18, 64);
        assert!(sizes.cache_bytes(NetworkRef::Quantised(model)) <= 1 << 18);
        sizes.blocks
    };
    model.cache_kind = Kind::Float;
    assert_eq!(blocks(&model), 16);
    model.cache_kind = Kind::Int8;
    assert_eq!(blocks(&model), 56);
}

#[test]
fn the_command_line_chooses_the_cache() {
    let dir = checkpoint(&llama(32));
    let run = |more: &[&'static str]| {
        let args = [&["--prompt", "Hi there", "--temperature", "0", "--json"], more].concat();
        run_program("generate", dir.path(), &args, "")
    };
    for dtype in ["auto", "float32", "bfloat16", "float16", "int8"] {
        let (code, out, err) = run(&["--quantize", "int8", "--kv-cache-dtype", dtype]);
        assert_eq!(code, 0, "{err}");
        let tokens = serde_json::from_str::<Value>(&out).unwrap()["tokens"].clone();
        assert_eq!(tokens.as_array().unwrap().len(), 50);
    }
    let (code, _, err) = run(&["--kv-cache-dtype", "float32"]);
    assert_eq!(code, 0, "{err}");
    for (dtype, told) in [("int8", "a cache of Int8"), ("float16", "a cache of Half")] {
        let (code, _, err) = run(&["--kv-cache-dtype", dtype]);
        assert!(code == 2 && err.contains(told) && err.contains("expected Float"), "{err}");
        assert!(err.contains("hint: leave `--kv-cache-dtype` out"), "{err}");
    }
    let (code, _, err) = run(&["--kv-cache-dtype", "fp8"]);
    assert!(code == 2 && err.contains("float16"), "{err}");
}
