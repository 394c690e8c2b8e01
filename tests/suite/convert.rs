//! `convert` and `inspect` of checkpoints, through the program.

use crate::common::{alone, tiny_llama, tiny_neox};
use assert_cmd::cargo::cargo_bin_cmd;
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::names::{self, LitGpt, Naming};
use tinyllama::checkpoint::{self, Source, outline, tensors};
use tinyllama::model::{GPT, ModelConfig, RopeScaling, RopeType};

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
