//! `generate` and `score`: the cache, sampling, stop strings, scores, and what users see.

use crate::common::alone;
use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tinyllama::generate::engine::generate;
use tinyllama::generate::request::{FinishReason, GenerateOptions};
use tinyllama::generate::sampler::{SamplingParams, repetition_penalty, warp};
use tinyllama::generate::{check_vocabulary, generate_text, score_tokens, score_windows};
use tinyllama::model::{GPT, KvCache, ModelConfig};
use tinyllama::tokenizer::Tokenizer;

const BOS: u32 = 0;
pub const EOS: u32 = 1;
/// bos, eos and the 256 bytes.
pub const VOCAB: i64 = 258;

/// A small model of a preset's family with random weights.
pub fn tiny(preset: &str, n_query_groups: i64) -> GPT {
    let config = ModelConfig {
        block_size: 64,
        vocab_size: VOCAB,
        padded_vocab_size: VOCAB,
        n_layer: 2,
        n_head: 4,
        n_query_groups,
        n_embd: 32,
        head_size: 8,
        intermediate_size: 48,
        ..ModelConfig::preset(preset).unwrap()
    };
    random(&config)
}

fn random(config: &ModelConfig) -> GPT {
    let _alone = alone();
    GPT::new(config, Device::Cpu)
}

/// Grouped queries, multi-query, NeoX: every shape of cache.
pub fn families() -> [(&'static str, GPT); 3] {
    let [llama, neox] = ["tiny-llama-1.1b", "pythia-14m"];
    [("GQA", tiny(llama, 2)), ("MQA", tiny(llama, 1)), ("NeoX", tiny(neox, 4))]
}

/// A model without thoughts: after byte b it says b + 1, after `m` eos, after `z` `a`.
pub fn alphabet() -> GPT {
    let mut config = tiny("tiny-llama-1.1b", 1).config;
    config.n_embd = VOCAB;
    let model = random(&config);
    let next = |id: i64| match id - 2 {
        b if b == b'm' as i64 => EOS as i64,
        b if b == b'z' as i64 => id_of('a') as i64,
        _ => (id + 1) % VOCAB,
    };
    let next: Vec<i64> = (0..VOCAB).map(next).collect();
    let eye = Tensor::eye(VOCAB, (Kind::Float, Device::Cpu));
    let head = eye.index_select(0, &Tensor::from_slice(&next)).transpose(0, 1); // [next(i), i] = 1
    tch::no_grad(|| {
        for (name, mut weight) in model.named_parameters() {
            match name.as_str() {
                "transformer.wte.weight" => weight.copy_(&eye),
                "lm_head.weight" => weight.copy_(&head),
                _ if name.contains("norm") || name.contains("ln_f") => continue,
                _ => drop(weight.zero_()),
            }
        }
    });
    model
}

fn id_of(c: char) -> u32 {
    c as u32 + 2
}

pub fn ids_of(text: &str) -> Vec<u32> {
    text.bytes().map(|b| b as u32 + 2).collect()
}

/// A byte-level tokenizer without merges: id = byte + 2.
pub fn write_tokenizer(dir: &Path, extra_tokens: usize) {
    // The characters that byte-level BPE writes bytes as.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut shifted = 0..;
    let letter = |b: u32| match printable(b) {
        true => b,
        false => 256 + shifted.next().unwrap(),
    };
    let letters: Vec<char> = (0..256).map(letter).map(|c| char::from_u32(c).unwrap()).collect();
    let mut vocab = serde_json::Map::new();
    vocab.insert("<s>".into(), BOS.into());
    vocab.insert("</s>".into(), EOS.into());
    vocab.extend(letters.iter().enumerate().map(|(b, c)| (c.to_string(), Value::from(b + 2))));
    let special = |id: usize, content: String| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let mut added = vec![special(0, "<s>".into()), special(1, "</s>".into())];
    added.extend((0..extra_tokens).map(|i| special(VOCAB as usize + i, format!("<extra_{i}>"))));
    let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": false});
    let json = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": []}});
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
        "add_eos_token": false, "tokenizer_class": "PreTrainedTokenizerFast"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// A checkpoint folder with the byte tokenizer.
pub fn checkpoint(model: &GPT) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    tinyllama::checkpoint::save(dir.path(), model).unwrap();
    write_tokenizer(dir.path(), 0);
    dir
}

pub fn random_ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i as u32 * 7919 + 13) % VOCAB as u32).collect()
}

fn tensor(ids: &[u32]) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
    Tensor::from_slice(&ids).unsqueeze(0)
}

pub fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, sampling: SamplingParams::greedy(), ..Default::default() }
}

pub fn with_seed(seed: u64) -> GenerateOptions {
    let sampling = SamplingParams { seed, temperature: 1.0, top_k: None, ..Default::default() };
    GenerateOptions { max_new_tokens: 20, sampling, ..Default::default() }
}

pub fn tokens_of(model: &GPT, prompt: &[u32], options: &GenerateOptions) -> Vec<u32> {
    generate(model, prompt, options, &mut |_| Ok(true)).unwrap().tokens
}

// ------------------------------------------------------------------------------------------ cache

#[test]
fn cached_decoding_gives_the_logits_of_a_full_forward() {
    let _no_grad = tch::no_grad_guard();
    for (name, model) in families() {
        let ids = random_ids(24);
        let full = model.forward(&tensor(&ids), None); // (1, T, V)
        let mut cache = KvCache::new(&model.config, 1, 24, Kind::Float, Device::Cpu);
        let mut parts = vec![model.forward(&tensor(&ids[..9]), Some(&mut cache))];
        for id in &ids[9..] {
            parts.push(model.forward(&tensor(&[*id]), Some(&mut cache)));
        }
        let difference = (Tensor::cat(&parts, 1) - full).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn a_prompt_read_in_two_pieces_gives_the_logits_of_one() {
    let _no_grad = tch::no_grad_guard();
    for (name, model) in families() {
        let ids = random_ids(20);
        let read = |pieces: &[&[u32]]| {
            let mut cache = KvCache::new(&model.config, 1, 20, Kind::Float, Device::Cpu);
            let parts: Vec<Tensor> =
                pieces.iter().map(|ids| model.forward(&tensor(ids), Some(&mut cache))).collect();
            Tensor::cat(&parts, 1)
        };
        let difference = read(&[&ids]) - read(&[&ids[..13], &ids[13..]]);
        let difference = difference.abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn greedy_generation_follows_the_argmax_of_full_forwards_and_reports_their_logprobs() {
    let _no_grad = tch::no_grad_guard();
    for (name, model) in families() {
        let mut ids = random_ids(6);
        let out = generate(&model, &ids, &greedy(10), &mut |_| Ok(true)).unwrap();
        for (&id, &logprob) in out.tokens.iter().zip(&out.logprobs) {
            let logits = model.forward(&tensor(&ids), None).select(1, -1).squeeze_dim(0); // (V,)
            let behind = (logits.max() - logits.get(id as i64)).double_value(&[]);
            assert!(behind < 1e-5, "{name}: {behind} below the largest logit");
            let expected = logits.log_softmax(-1, Kind::Float).double_value(&[id as i64]);
            assert!((logprob - expected).abs() < 1e-5, "{name}: {logprob} {expected}");
            ids.push(id);
        }
        assert_eq!((out.tokens.len(), out.finish_reason), (10, FinishReason::Length));
        assert_eq!(out.timings.prompt_tokens + out.timings.decoded_tokens, 6 + 9);
        // k and v, L, G, D, a block of 16 tokens, fp32
        let bytes = 2 * 2 * model.config.n_query_groups as u64 * 8 * 16 * 4;
        assert_eq!(out.cache_bytes, bytes, "{name}");
    }
}

// --------------------------------------------------------------------------------------- sampling

#[test]
fn the_warpers_leave_what_transformers_leaves() {
    let text = include_str!("../golden/generate/sampling.json");
    let golden: Value = serde_json::from_str(text).unwrap();
    let floats = |value: &Value| -> Vec<f64> {
        let values = value.as_array().unwrap().iter();
        values.map(|x| x.as_f64().unwrap_or(f64::NEG_INFINITY)).collect()
    };
    let close = |got: &Tensor, expected: &Value, what: &str| {
        let got: Vec<f64> = Vec::try_from(&got.to_kind(Kind::Double)).unwrap();
        for (i, (g, e)) in got.iter().zip(floats(expected)).enumerate() {
            assert!(*g == e || (g - e).abs() < 1e-5, "{what} at {i}: {g}, transformers {e}");
        }
    };
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let logits = Tensor::from_slice(&floats(&case["logits"])).to_kind(Kind::Float);
        let params = SamplingParams {
            temperature: case["temperature"].as_f64().unwrap(),
            top_k: case["top_k"].as_i64(),
            top_p: case["top_p"].as_f64().unwrap(),
            repetition_penalty: case["repetition_penalty"].as_f64().unwrap(),
            seed: 0,
        };
        let seen: Vec<i64> =
            case["seen"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
        let mut mask = Tensor::zeros(logits.size(), (Kind::Bool, Device::Cpu));
        let _ = mask.index_fill_(0, &Tensor::from_slice(&seen), 1);
        let penalised = repetition_penalty(&logits, &mask, params.repetition_penalty);
        close(&penalised, &case["penalised"], &format!("{name}, penalised"));
        let warped = warp(&penalised, &params);
        close(&warped, &case["warped"], &format!("{name}, warped"));
        close(&warped.softmax(-1, Kind::Float), &case["probs"], &format!("{name}, probabilities"));
    }
}

#[test]
fn the_seed_alone_decides_the_draws() {
    let (_, model) = &families()[0];
    let prompt = random_ids(4);
    let first = tokens_of(model, &prompt, &with_seed(7));
    {
        let _alone = alone();
        tch::manual_seed(99);
    }
    assert_eq!(first, tokens_of(model, &prompt, &with_seed(7)), "same seed");
    assert_ne!(first, tokens_of(model, &prompt, &with_seed(8)), "another seed");
    let greedy_once = tokens_of(model, &prompt, &greedy(20));
    assert_eq!(greedy_once, tokens_of(model, &prompt, &greedy(20)), "greedy");
    let top_1 = SamplingParams { top_k: Some(1), ..with_seed(7).sampling };
    let top_1 = GenerateOptions { sampling: top_1, ..with_seed(7) };
    assert_eq!(greedy_once, tokens_of(model, &prompt, &top_1), "top_k = 1 is greedy");
}

#[test]
fn a_strong_repetition_penalty_never_says_a_token_twice() {
    let model = alphabet();
    let mut options = greedy(30);
    let plain = tokens_of(&model, &ids_of("xyz"), &options);
    assert!(plain.starts_with(&ids_of("abcdef")), "{plain:?}");
    options.sampling.repetition_penalty = 1e6;
    let mut all = ids_of("ax");
    all.extend(tokens_of(&model, &all, &options));
    // y, z, then `a` was in the prompt: its logit falls to about 0 but is still positive.
    assert_eq!(all[2..4], ids_of("yz"));
    options.sampling.repetition_penalty = 1.0;
    assert_eq!(tokens_of(&model, &ids_of("ax"), &options)[..3], ids_of("yza"));
}

#[test]
fn ids_that_pad_the_vocabulary_are_never_chosen() {
    let model = alphabet();
    let options = GenerateOptions { vocab_size: Some(id_of('d') as usize), ..greedy(8) };
    let tokens = tokens_of(&model, &ids_of("a"), &options);
    assert_eq!(tokens[..2], ids_of("bc"));
    assert!(tokens.iter().all(|&id| id < id_of('d')), "{tokens:?}");
}

// --------------------------------------------------------------------------------------- stopping

#[test]
fn each_way_to_stop_gives_its_reason() {
    let model = alphabet();
    let eos = GenerateOptions { eos: vec![EOS], ..greedy(40) };
    let out = generate(&model, &ids_of("j"), &eos, &mut |_| Ok(true)).unwrap();
    let mut expected = ids_of("klm");
    expected.push(EOS);
    assert_eq!((out.tokens, out.finish_reason), (expected, FinishReason::Eos));

    let mut left = 3;
    let out = generate(&model, &ids_of("a"), &eos, &mut |_| {
        left -= 1;
        Ok(left > 0)
    });
    let out = out.unwrap();
    assert_eq!((out.tokens, out.finish_reason), (ids_of("bcd"), FinishReason::Stop));

    let out = generate(&model, &ids_of("a").repeat(60), &greedy(9), &mut |_| Ok(true)).unwrap();
    assert_eq!((out.tokens, out.finish_reason), (ids_of("bcde"), FinishReason::Context));

    let out = generate(&model, &ids_of("a"), &greedy(0), &mut |_| Ok(true)).unwrap();
    assert_eq!((out.tokens.len(), out.finish_reason), (0, FinishReason::Length));

    let failed = generate(&model, &ids_of("a"), &eos, &mut |_| anyhow::bail!("no more paper"));
    assert_eq!(failed.unwrap_err().to_string(), "no more paper");
}

#[test]
fn a_stop_string_across_tokens_ends_the_text_before_it() {
    let (model, dir) = (alphabet(), tempfile::tempdir().unwrap());
    write_tokenizer(dir.path(), 0);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let run = |stop: &[&str], max_new_tokens: usize| {
        let options = GenerateOptions { eos: vec![EOS], ..greedy(max_new_tokens) };
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut pieces = Vec::new();
        let mut on_text = |piece: &str| {
            pieces.push(piece.to_owned());
            Ok(())
        };
        let prompt = ids_of("a");
        let out =
            generate_text(&model, &tokenizer, &prompt, &options, &stop, &mut on_text).unwrap();
        assert_eq!(pieces.concat(), out.text, "what was streamed is the text");
        (out.text, out.generation.tokens.len(), out.generation.finish_reason)
    };
    assert_eq!(run(&["efg"], 20), ("bcd".into(), 6, FinishReason::Stop));
    assert_eq!(run(&["xx", "gh", "fgh"], 20), ("bcde".into(), 7, FinishReason::Stop));
    // Began like a stop string, then ran out of tokens: nothing is lost.
    assert_eq!(run(&["efg!"], 5), ("bcdef".into(), 5, FinishReason::Length));
    assert_eq!(run(&["efg!"], 40), ("bcdefghijklm".into(), 13, FinishReason::Eos));
}

// -------------------------------------------------------------------------------------- bad input

#[test]
fn prompts_that_do_not_fit_are_refused_with_both_numbers() {
    let model = tiny("tiny-llama-1.1b", 1);
    let refused = |prompt: &[u32]| {
        let error = generate(&model, prompt, &greedy(5), &mut |_| Ok(true)).unwrap_err();
        assert_eq!(tinyllama::error::exit_code(&error), 2);
        error.to_string()
    };
    assert_eq!(refused(&[]), "the prompt has no tokens");
    let long = "the prompt is longer than the model's context: 70 tokens, `block_size` is 64";
    assert_eq!(refused(&random_ids(70)), long);
    let full = "the prompt fills the model's context: 64 tokens, `block_size` is 64";
    assert_eq!(refused(&random_ids(64)), full);
    let foreign = "token 258 at position 2 is out of the vocabulary: the model has ids 0 to 257";
    assert_eq!(refused(&[1, 2, 258]), foreign);
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), 3);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let mut config = tiny("tiny-llama-1.1b", 1).config;
    let error = check_vocabulary(&tokenizer, &config).unwrap_err().to_string();
    let expected =
        "the tokenizer's vocabulary is larger than the model's: 261 ids, the model has 258";
    assert_eq!(error, expected);
    config.padded_vocab_size = 261;
    check_vocabulary(&tokenizer, &config).unwrap();
}

// ------------------------------------------------------------------------------------------ score

#[test]
fn the_score_of_tokens_is_the_log_softmax_of_a_full_forward() {
    let _no_grad = tch::no_grad_guard();
    for (name, model) in families() {
        let ids = random_ids(64);
        let logprobs = score_tokens(&model, &ids).unwrap();
        let full = model.forward(&tensor(&ids), None).log_softmax(-1, Kind::Double).squeeze_dim(0);
        assert_eq!(logprobs[0], None);
        for t in 1..ids.len() {
            let expected = full.double_value(&[t as i64 - 1, ids[t] as i64]);
            let got = logprobs[t].unwrap();
            assert!((got - expected).abs() < 1e-5, "{name} at {t}: {got} {expected}");
        }
    }
}

#[test]
fn windows_score_each_token_once_with_the_promised_prefix() {
    let model = tiny("tiny-llama-1.1b", 2);
    let ids = random_ids(150);
    let logprobs = score_windows(&model, &ids, 64, 24).unwrap();
    assert_eq!(logprobs.len(), ids.len());
    assert_eq!(logprobs.iter().filter(|p| p.is_none()).count(), 1);
    // Windows begin at 0, 24, 48, 72, 96; each scores what the one before did not reach.
    for (begin, scored) in [(0, 0..64), (24, 64..88), (48, 88..112), (72, 112..136), (96, 136..150)]
    {
        let window = score_tokens(&model, &ids[begin..(begin + 64).min(150)]).unwrap();
        assert_eq!(logprobs[scored.clone()], window[scored.start - begin..scored.end - begin]);
    }
    let short = score_windows(&model, &ids[..64], 64, 32).unwrap();
    assert_eq!(short, score_tokens(&model, &ids[..64]).unwrap(), "one window is the plain score");
    for (window, stride) in [(65, 10), (1, 1), (64, 0), (64, 64)] {
        let error = score_windows(&model, &ids, window, stride).unwrap_err();
        assert_eq!(tinyllama::error::exit_code(&error), 2, "{window} {stride}");
    }
}

#[test]
fn texts_that_cannot_be_scored_are_refused_with_numbers() {
    let model = tiny("tiny-llama-1.1b", 1);
    let refused = |ids: &[u32]| score_tokens(&model, ids).unwrap_err().to_string();
    let long = "sequence longer than block_size: 65 tokens, `block_size` is 64";
    assert_eq!(refused(&random_ids(65)), long);
    assert!(refused(&[3, 999]).starts_with("token 999 at position 1 is out of the vocabulary"));
}

// -------------------------------------------------------------------------------------------- CLI

/// Runs the program on the CPU; gives exit code, stdout, stderr.
pub fn run_program(verb: &str, dir: &Path, args: &[&str], stdin: &str) -> (i32, String, String) {
    let mut command = Command::cargo_bin("tinyllama").unwrap();
    command.arg(verb).arg("--checkpoint").arg(dir).args(["--device", "cpu"]).args(args);
    let out = command.write_stdin(stdin).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

#[test]
fn generate_prints_the_text_on_stdout_and_the_speed_on_stderr() {
    let dir = checkpoint(&alphabet());
    let run = |args: &[&str], stdin: &str| {
        let (code, out, err) = run_program("generate", dir.path(), args, stdin);
        assert_eq!(code, 0, "{err}");
        assert!(err.contains("decode") && err.contains("peak memory"), "{err}");
        out
    };
    let greedy = ["--temperature", "0", "--max-new-tokens", "4"];
    assert_eq!(run(&[&greedy[..], &["--prompt", "a"]].concat(), ""), "bcde\n");
    assert_eq!(run(&greedy, "the a\n"), "bcde\n", "from stdin, without its line break");
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "x").unwrap();
    let from_file = ["--prompt-file", file.to_str().unwrap(), "--no-stream"];
    assert_eq!(run(&[&greedy[..], &from_file].concat(), ""), "yzab\n");
    let stop = ["--prompt", "a", "--stop", "zz", "--stop", "de", "--num-samples", "2"];
    assert_eq!(run(&[&greedy[..], &stop].concat(), ""), "bc\nbc\n");
    assert_eq!(run(&[&greedy[..], &["--prompt", "99", "--ids"]].concat(), ""), "100 101 102 103\n");
}

#[test]
fn generate_prints_one_json_object_a_sample() {
    let dir = checkpoint(&tiny("tiny-llama-1.1b", 2));
    let args = ["--prompt", "Hi", "--json", "--num-samples", "2", "--seed", "5", "--top-k", "0"];
    let (code, out, err) = run_program("generate", dir.path(), &args, "");
    assert_eq!(code, 0, "{err}");
    let samples: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let keys: Vec<&String> = samples[0].as_object().unwrap().keys().collect();
    let expected = [
        "prompt",
        "text",
        "tokens",
        "logprobs",
        "finish_reason",
        "prompt_tokens",
        "new_tokens",
        "seed",
        "tokens_per_sec",
    ];
    assert_eq!(keys, expected);
    assert_eq!((&samples[0]["seed"], &samples[1]["seed"]), (&5.into(), &6.into()));
    assert_eq!(samples[0]["prompt_tokens"], 3, "bos, H, i");
    assert_ne!(samples[0]["tokens"], samples[1]["tokens"]);
    for sample in &samples {
        let new_tokens = sample["new_tokens"].as_u64().unwrap() as usize;
        assert_eq!(sample["tokens"].as_array().unwrap().len(), new_tokens);
        assert_eq!(sample["logprobs"].as_array().unwrap().len(), new_tokens);
    }

    // The second sample again, by its seed; an empty prompt is bos alone.
    let again = ["--prompt", "Hi", "--json", "--seed", "6", "--top-k", "0"];
    let (_, out, _) = run_program("generate", dir.path(), &again, "");
    let again: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(again["tokens"], samples[1]["tokens"]);
    let (_, out, _) = run_program("generate", dir.path(), &["--prompt", "", "--json"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["prompt_tokens"], 1);
    let no_bos = ["--prompt", "Hi", "--json", "--no-bos"];
    let (_, out, _) = run_program("generate", dir.path(), &no_bos, "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["prompt_tokens"], 2);
    let bf16 =
        ["--prompt", "Hi", "--json", "--precision", "bf16-true", "--repetition-penalty", "1.1"];
    let (code, out, err) = run_program("generate", dir.path(), &bf16, "");
    assert_eq!(code, 0, "{err}");
    assert!(serde_json::from_str::<Value>(&out).unwrap()["new_tokens"].as_u64() > Some(0));
}

#[test]
fn score_prints_exactly_the_promised_json() {
    let model = tiny("tiny-llama-1.1b", 2);
    let dir = checkpoint(&model);
    let (code, out, err) = run_program("score", dir.path(), &["--text", "Hi you", "--json"], "");
    assert_eq!(code, 0, "{err}");
    let json: Value = serde_json::from_str(&out).unwrap();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["tokens", "logprobs", "nll", "ppl"]);
    let mut ids = vec![BOS];
    ids.extend(ids_of("Hi you"));
    assert_eq!(json["tokens"], serde_json::json!(ids));
    let logprobs = score_tokens(&model, &ids).unwrap();
    assert_eq!(json["logprobs"], serde_json::json!(logprobs));
    let nll = -logprobs.iter().flatten().sum::<f64>() / 6.0;
    assert!((json["nll"].as_f64().unwrap() - nll).abs() < 1e-12);
    assert!((json["ppl"].as_f64().unwrap() - nll.exp()).abs() < 1e-6);

    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    let by_ids = ["--tokens", &list.join(","), "--json"];
    assert_eq!(run_program("score", dir.path(), &by_ids, "").1, out, "the same by ids");
    let file = dir.path().join("text.txt");
    std::fs::write(&file, "a longer text. ".repeat(20)).unwrap();
    let file = file.to_str().unwrap();
    let (code, out, err) =
        run_program("score", dir.path(), &["--file", file, "--window", "64"], "");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("301 tokens, 300 scored | nll ") && out.lines().count() == 304, "{out}");
    let (code, _, err) = run_program("score", dir.path(), &["--file", file], "");
    assert_eq!(code, 2);
    assert!(
        err.contains("sequence longer than block_size: 301 tokens, `block_size` is 64"),
        "{err}"
    );
    assert!(err.contains("hint: ") && err.contains("--window 64"), "{err}");
}

#[test]
fn bad_arguments_get_one_clear_message_and_exit_code_2() {
    let dir = checkpoint(&tiny("tiny-llama-1.1b", 1));
    let long = "x".repeat(100);
    let cases: [(&str, &[&str], &str); 9] = [
        ("generate", &["--prompt", &long], "101 tokens, `block_size` is 64"),
        ("generate", &["--prompt", "", "--no-bos"], "the prompt is empty"),
        ("generate", &["--prompt", "a", "--temperature", "-1"], "`temperature`: must be 0 or more"),
        ("generate", &["--prompt", "a", "--device", "tpu"], "device `tpu` is not known"),
        ("generate", &["--prompt", "1,x", "--ids"], "`x` is no token id"),
        ("score", &["--tokens", "1,999"], "token 999 at position 1 is out of the vocabulary"),
        ("score", &["--tokens", "5"], "nothing to score: 1 token"),
        ("score", &["--text", "a", "--tokens", "5"], "cannot be used with"),
        ("score", &["--json"], "required"),
    ];
    for (verb, args, message) in cases {
        let mut command = Command::cargo_bin("tinyllama").unwrap();
        command.arg(verb).arg("--checkpoint").arg(dir.path()).args(args);
        let out = command.write_stdin("").output().unwrap();
        let err = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{verb} {args:?}: {err}");
        assert!(err.starts_with("error: ") && err.contains(message), "{verb} {args:?}: {err}");
        assert!(out.stdout.is_empty());
    }
}

#[test]
fn files_that_are_missing_or_do_not_fit_are_named() {
    let dir = checkpoint(&tiny("tiny-llama-1.1b", 1));
    let missing = ["--file", "/nowhere/text.txt"];
    let (code, _, err) = run_program("score", dir.path(), &missing, "");
    assert!(code == 1 && err.contains("cannot read the file `/nowhere/text.txt`"), "{err}");
    let (code, _, err) = run_program("generate", Path::new("/nowhere/run"), &["--prompt", "a"], "");
    assert!((1..=2).contains(&code) && err.contains("/nowhere/run"), "{err}");
    write_tokenizer(dir.path(), 5);
    let (code, _, err) = run_program("generate", dir.path(), &["--prompt", "a"], "");
    assert!(code == 2 && err.contains("263 ids, the model has 258"), "{err}");
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let (code, _, err) = run_program("generate", dir.path(), &["--prompt", "a"], "");
    assert!(code == 1 && err.contains("hint: put `tokenizer.json`"), "{err}");
    let (code, out, err) = run_program("generate", dir.path(), &["--prompt", "7 8", "--ids"], "");
    assert!(code == 0 && !out.trim().is_empty(), "{err}");
}

#[test]
fn a_closed_pipe_ends_generation_quietly() {
    use std::process::{Command, Stdio};
    let dir = checkpoint(&alphabet());
    let mut child = Command::new(assert_cmd::cargo::cargo_bin("tinyllama"))
        .args([
            "generate",
            "--device",
            "cpu",
            "--prompt",
            "a",
            "--temperature",
            "0",
            "--checkpoint",
        ])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap().as_str()), (Some(0), ""));
}
