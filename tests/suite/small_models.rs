//! Small models and a tokenizer of bytes, for tests of what generates text.

use crate::common::alone;
use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tinyllama::generate::engine::generate;
use tinyllama::generate::request::GenerateOptions;
use tinyllama::generate::sampler::SamplingParams;
use tinyllama::model::{GPT, ModelConfig};

pub const BOS: u32 = 0;
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

pub fn random(config: &ModelConfig) -> GPT {
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

pub fn id_of(c: char) -> u32 {
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

pub fn tensor(ids: &[u32]) -> Tensor {
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

/// Runs the program on the CPU; gives exit code, stdout, stderr.
pub fn run_program(verb: &str, dir: &Path, args: &[&str], stdin: &str) -> (i32, String, String) {
    let mut command = Command::cargo_bin("tinyllama").unwrap();
    command.arg(verb).arg("--checkpoint").arg(dir).args(["--device", "cpu"]).args(args);
    let out = command.write_stdin(stdin).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}
