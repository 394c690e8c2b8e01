//! `convert` and `inspect` of checkpoints, through the program.

use crate::chat_template::write_pieces;
use crate::common::{alone, tiny_llama, tiny_neox};
use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::gguf::GgufFile;
use tinyllama::checkpoint::names::{self, LitGpt, Naming};
use tinyllama::checkpoint::{self, MAX_SHARD_BYTES, Source, Target, outline, tensors};
use tinyllama::model::{GPT, ModelConfig, RopeScaling, RopeType};
use tinyllama::tokenizer::Tokenizer;

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = cargo_bin_cmd!("tinyllama").args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A Hugging Face folder of random weights.
fn folder(dir: &Path, config: &ModelConfig, kind: Kind) -> GPT {
    tch::manual_seed(31);
    let mut model = GPT::new(config, Device::Cpu);
    model.to_kind(kind);
    checkpoint::save(dir, &model).unwrap();
    model
}

/// All files of tensors and configurations are the same, byte for byte.
fn same_files(a: &Path, b: &Path) {
    let names = |dir: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name:?}");
    }
}

#[test]
fn from_hugging_face_to_litgpt_and_back_is_the_same_to_the_byte() {
    let _alone = alone();
    let scaled = ModelConfig {
        rope_scaling: Some(RopeScaling::new(RopeType::Linear, 4.0)),
        n_query_groups: 2,
        ..tiny_llama()
    };
    for (config, kind) in
        [(scaled, Kind::BFloat16), (tiny_neox(), Kind::Half), (tiny_llama(), Kind::Float)]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        folder(&path("hf"), &config, kind);
        let (code, _, err) =
            run(&["convert", &shown(&path("hf")), &shown(&path("lit")), "--to", "litgpt"]);
        assert_eq!(code, Some(0), "{err}");
        assert!(path("lit/model_config.yaml").is_file() && err.contains("wrote"), "{err}");
        let (code, _, err) =
            run(&["convert", &shown(&path("lit")), &shown(&path("back")), "--to", "hf"]);
        assert_eq!(code, Some(0), "{err}");
        same_files(&path("hf"), &path("back"));
        // Two formats of the same parameters differ in none.
        let (code, out, err) =
            run(&["inspect", &shown(&path("lit")), "--diff", &shown(&path("hf"))]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("all parameters are equal"), "{out}");
    }
}

/// A folder as lit-gpt and TinyLlama wrote it, with safetensors in the place of a pickle.
fn old_lit_gpt(dir: &Path, model: &GPT, variant: LitGpt) {
    fs::create_dir(dir).unwrap();
    let c = &model.config;
    let json = serde_json::json!({
        "name": "old", "block_size": c.block_size, "vocab_size": c.vocab_size,
        "padded_vocab_size": c.padded_vocab_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "rotary_percentage": 1.0, "parallel_residual": false, "bias": false, "n_query_groups": c.n_query_groups,
        "shared_attention_norm": false, "_norm_class": "RMSNorm", "norm_eps": c.norm_eps,
        "_mlp_class": "LLaMAMLP", "intermediate_size": c.intermediate_size, "condense_ratio": 1
    });
    fs::write(dir.join("lit_config.json"), json.to_string()).unwrap();
    let naming = Naming::LitGpt(variant);
    let mut tensors: Vec<(String, Tensor)> = vec![];
    for (name, ours) in model.named_parameters() {
        let part = naming.parts(&name, c).swap_remove(0);
        tensors.push((part.name, names::to_disk(&ours.detach(), part.layout, c)));
    }
    tensors::write(&dir.join("lit_model.safetensors"), &tensors).unwrap();
}

#[test]
fn every_packing_and_naming_of_lit_gpt_is_the_same_model() {
    let _alone = alone();
    let config = ModelConfig { n_query_groups: 2, ..tiny_llama() };
    let dir = tempfile::tempdir().unwrap();
    let model = folder(&dir.path().join("hf"), &config, Kind::Float);
    let hf = shown(&dir.path().join("hf"));
    for (i, (interleaved, swiglu)) in
        [(true, true), (true, false), (false, false)].into_iter().enumerate()
    {
        let path = dir.path().join(format!("lit{i}"));
        old_lit_gpt(&path, &model, LitGpt { interleaved, swiglu });
        let (code, out, err) = run(&["inspect", &hf, "--diff", &shown(&path)]);
        assert_eq!(code, Some(0), "interleaved {interleaved} swiglu {swiglu}: {out}{err}");
        let loaded = checkpoint::load_model(&path, Kind::Float, Device::Cpu).unwrap();
        for ((name, got), (_, want)) in
            loaded.named_parameters().iter().zip(model.named_parameters())
        {
            assert!(got.equal(&want), "{name}");
        }
    }
}

#[test]
fn rows_packed_by_group_and_rotated_in_pairs_are_where_their_owners_put_them() {
    // H 4, G 2, D 4: ours [q0 q1 q2 q3 | k0 k1 | v0 v1], lit-gpt's [q0 q1 k0 v0 | q2 q3 k1 v1].
    let config =
        ModelConfig { n_head: 4, n_query_groups: 2, head_size: 4, n_embd: 16, ..tiny_llama() };
    let ours = Tensor::arange(32, tch::kind::INT64_CPU).view([32, 1]);
    let rows = |x: &Tensor| Vec::<i64>::try_from(x.reshape([-1])).unwrap();
    let grouped = names::to_disk(&ours, names::Layout::GroupInterleaved, &config);
    let heads: Vec<i64> = rows(&grouped).iter().step_by(4).map(|row| row / 4).collect();
    assert_eq!(heads, [0, 1, 4, 6, 2, 3, 5, 7]);
    let layout = names::Layout::RotaryPairs { start: 16, len: 8 };
    let pairs = names::to_disk(&ours, layout, &config);
    assert_eq!(rows(&pairs), [16, 18, 17, 19, 20, 22, 21, 23]);
    for (theirs, layout) in [(grouped, names::Layout::GroupInterleaved), (pairs, layout)] {
        let back = ours.copy();
        let _ = back.shallow_clone().fill_(-1);
        names::from_disk(&back, &theirs, layout, &config);
        let kept =
            rows(&back).iter().zip(rows(&ours)).all(|(got, want)| *got == want || *got == -1);
        assert!(kept, "{layout:?}: {:?}", rows(&back));
        let filled = rows(&back).iter().filter(|&&row| row >= 0).count();
        assert_eq!(filled, theirs.size()[0] as usize);
    }
}

#[test]
fn shards_and_dtypes_are_those_asked_for_and_an_existing_folder_is_left_alone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| shown(&dir.path().join(name));
    let config = ModelConfig {
        vocab_size: 12_000,
        padded_vocab_size: 12_000,
        tie_embeddings: true,
        ..tiny_llama()
    };
    let model = folder(Path::new(&path("hf")), &config, Kind::Float);
    let (from, to) = (path("hf"), path("half"));
    let sizes = ["--max-shard-size", "1048576", "--dtype", "bf16"];
    let (code, _, err) = run(&[&["convert", &from, &to, "--to", "hf"], &sizes[..]].concat());
    assert_eq!(code, Some(0), "{err}");
    let half = checkpoint::load_model(Path::new(&path("half")), Kind::Float, Device::Cpu).unwrap();
    for ((name, got), (_, want)) in half.named_parameters().iter().zip(model.named_parameters()) {
        assert!(got.equal(&want.to_kind(Kind::BFloat16).to_kind(Kind::Float)), "{name}");
    }
    let (code, _, err) = run(&["convert", &path("hf"), &path("half"), "--to", "litgpt"]);
    assert_eq!(code, Some(2));
    assert!(err.contains("exists already") && err.contains("name a new folder"), "{err}");
    let (code, out, _) = run(&["inspect", &path("hf"), "--diff", &path("half")]);
    assert_eq!(code, Some(1));
    assert!(out.contains("transformer.wte.weight: largest difference"), "{out}");
}

#[test]
fn a_checkpoint_that_is_broken_or_does_not_fit_leaves_no_folder() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| shown(&dir.path().join(name));
    folder(Path::new(&path("hf")), &tiny_llama(), Kind::Float);
    // Another vocabulary in the configuration than in the weights.
    let config = fs::read_to_string(dir.path().join("hf/config.json")).unwrap();
    let vocab = format!("\"vocab_size\": {}", tiny_llama().padded_vocab_size);
    assert!(config.contains(&vocab), "{config}");
    fs::write(dir.path().join("hf/config.json"), config.replace(&vocab, "\"vocab_size\": 8"))
        .unwrap();
    let (code, _, err) = run(&["convert", &path("hf"), &path("out"), "--to", "litgpt"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("`model.embed_tokens.weight`: expected shape [8, "), "{err}");
    let (code, out, _) = run(&["inspect", &path("hf")]);
    assert_eq!(code, Some(1));
    assert!(out.contains("bad         2 tensor(s)"), "{out}");
    // What litgpt has no place for is told before anything is there.
    let yarn = RopeScaling::new(RopeType::Yarn, 2.0);
    folder(
        Path::new(&path("yarn")),
        &ModelConfig { rope_scaling: Some(yarn), ..tiny_llama() },
        Kind::Float,
    );
    let (code, _, err) = run(&["convert", &path("yarn"), &path("out"), "--to", "litgpt"]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("no place for `rope_scaling` of type Yarn") && err.contains("--to hf"),
        "{err}"
    );
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn inspect_tells_format_architecture_and_every_tensor_with_its_statistics() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hf");
    let model = folder(&path, &tiny_llama(), Kind::BFloat16);
    let _ = model.ln_f.weight.detach().narrow(0, 0, 1).fill_(f64::NAN);
    checkpoint::save(&path, &model).unwrap();
    let (code, out, err) = run(&["inspect", &shown(&path), "--statistics"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("format      Hugging Face safetensors"), "{out}");
    let norm = out.lines().find(|line| line.starts_with("model.norm.weight")).unwrap();
    assert!(
        norm.contains("BF16") && norm.contains("1 not finite") && norm.contains("mean +1.000e0"),
        "{norm}"
    );
    let (_, json, _) = run(&["inspect", &shown(&path), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let source = Source::open(&path).unwrap();
    let n: i64 =
        outline(&source.config).iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    assert_eq!(json["report"]["parameters"], n);
    assert_eq!(json["report"]["tensors"].as_array().unwrap().len(), source.stored().unwrap().len());
}

const HF: Target = Target::HuggingFace { max_shard_bytes: MAX_SHARD_BYTES, quantise: None };
const GGUF: Target = Target::Gguf { mix: None };

/// Converts without a program of its own.
fn made(from: &Path, to: &Path, target: Target) -> anyhow::Result<()> {
    checkpoint::convert(&Source::open(from)?, to, target, None, &|_, _| {}).map(drop)
}

fn ends(path: &Path) -> Vec<u32> {
    Source::open(path).unwrap().end_ids().unwrap()
}

fn write_json(path: &Path, json: Value) {
    fs::write(path, json.to_string()).unwrap();
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Adapters of one matrix of [`tiny_llama`], with a tokenizer of their own.
fn adapters(dir: &Path, base: &Path) {
    fs::create_dir(dir).unwrap();
    let lora =
        json!({"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4});
    write_json(&dir.join("adapter_config.json"), lora);
    let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let module = "base_model.model.model.layers.0.self_attn.q_proj";
    let pair = [("lora_A", zeros([2, 32])), ("lora_B", zeros([32, 2]))];
    let pair = pair.map(|(name, t)| (format!("{module}.{name}.weight"), t));
    tensors::write(&dir.join("adapter_model.safetensors"), &pair).unwrap();
    write_pieces(dir, |_| {});
}

#[test]
fn ends_of_a_text_are_found_where_they_stand_and_come_along() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let (base, lora) = (path("base"), path("lora"));
    folder(&base, &tiny_llama(), Kind::Float);
    write_pieces(&base, |_| {});
    let generation = json!({"bos_token_id": 1, "eos_token_id": [2, 4], "top_p": 0.9});
    write_json(&base.join("generation_config.json"), generation.clone());

    // Adapters that name none have their base's, also in a copy.
    adapters(&lora, &base);
    assert_eq!(ends(&lora), [2, 4]);
    made(&lora, &path("merged"), HF).unwrap();
    assert_eq!(read_json(&path("merged/generation_config.json")), generation);
    write_json(&lora.join("generation_config.json"), json!({"eos_token_id": 3}));
    assert_eq!(ends(&lora), [3]);

    // A list that stands in `config.json` alone.
    fs::remove_file(base.join("generation_config.json")).unwrap();
    let mut config = read_json(&base.join("config.json"));
    config["eos_token_id"] = json!([4, 2, 3]);
    write_json(&base.join("config.json"), config);
    assert_eq!(ends(&base), [4, 2, 3]);
    for (name, target) in [("hf", HF), ("lit", Target::LitGpt)] {
        made(&base, &path(name), target).unwrap();
        assert_eq!(ends(&path(name)), [2, 4, 3], "{name}: the tokenizer's own comes first");
    }
}

#[test]
fn a_gguf_file_says_itself_what_ends_a_text_and_which_template_is_the_default() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let (hf, file) = (path("hf"), path("alone/m.gguf"));
    folder(&hf, &tiny_llama(), Kind::Float);
    write_pieces(&hf, |_| {});
    write_json(&hf.join("generation_config.json"), json!({"eos_token_id": [2, 4, 3]}));
    let mut config = read_json(&hf.join("tokenizer_config.json"));
    config["chat_template"] =
        json!([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]);
    write_json(&hf.join("tokenizer_config.json"), config);
    fs::create_dir(path("alone")).unwrap();
    made(&hf, &file, GGUF).unwrap();

    let gguf = GgufFile::open(&file).unwrap();
    let id = |name: &str| gguf.metadata().find_u64(&format!("tokenizer.ggml.{name}")).unwrap();
    let ids = ["eos_token_id", "eot_token_id", "eom_token_id"].map(id);
    assert_eq!(ids, [Some(2), Some(4), Some(3)]);
    assert_eq!(gguf.metadata().str("tokenizer.chat_template").unwrap(), "b");
    // What lies beside the file is another model's.
    write_json(&path("alone/generation_config.json"), json!({"eos_token_id": 9}));
    write_json(&path("alone/config.json"), json!({"eos_token_id": 9}));
    assert_eq!(ends(&file), [2, 4, 3]);
    made(&file, &path("back"), HF).unwrap();
    assert_eq!(ends(&path("back")), [2, 4, 3]);
}

#[test]
fn a_normaliser_that_gguf_has_no_place_for_is_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (hf, file) = (dir.path().join("hf"), dir.path().join("m.gguf"));
    folder(&hf, &tiny_llama(), Kind::Float);
    fs::copy("tests/golden/tokenizer/rules.model", hf.join("tokenizer.model")).unwrap();
    let error = made(&hf, &file, GGUF).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("character rules `user_defined`: expected none"), "{text}");
    assert!(tinyllama::error::hint(&error).is_some() && !file.exists());

    // That extra spaces are left out has a key.
    let key = "tokenizer.ggml.remove_extra_whitespaces";
    let tokenizer = write_pieces(&hf, |m| m.set(key, true));
    made(&hf, &file, GGUF).unwrap();
    assert_eq!(GgufFile::open(&file).unwrap().metadata().find_bool(key).unwrap(), Some(true));
    let back = Source::open(&file).unwrap().read_tokenizer(Tokenizer::load).unwrap();
    let ids = |tokenizer: &Tokenizer| tokenizer.encode("  a   b ", false, false).unwrap();
    assert_eq!(ids(&back), ids(&tokenizer));
    assert_eq!(ids(&back).len(), 3);
}
