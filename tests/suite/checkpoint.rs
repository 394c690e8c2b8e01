//! Checkpoint folders: what goes in comes out, what is damaged is told, what is interrupted is
//! harmless.

mod folders;

use crate::common::{alone, tiny_llama, tiny_neox};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tinyllama::checkpoint::{self, TrainState, hf_config, tensors};
use tinyllama::model::{GPT, ModelConfig, RopeScaling, RopeType};
use tinyllama::tokenizer::Tokenizer;
use tinyllama::{error, ffi};

/// A model whose every parameter is random: norms and biases too, so that none is mistaken for
/// another.
fn random_model(config: &ModelConfig) -> GPT {
    let _alone = alone();
    tch::manual_seed(11);
    let model = GPT::new(config, Device::Cpu);
    tch::no_grad(|| {
        for (name, mut p) in model.named_parameters() {
            let center = f64::from(name.contains("norm_") || name.contains("ln_f"));
            let center = if name.ends_with("weight") { center } else { 0.0 };
            let _ = p.normal_(center, 0.2);
        }
    });
    model
}

/// Both families and what varies within them.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    // Heads of 16 dimensions, of which 4 rotate: with 2 there is one frequency, base^0, and no base
    // is ever wrong.
    let (llama, neox) = (tiny_llama(), ModelConfig { n_embd: 64, head_size: 16, ..tiny_neox() });
    let scaled = |rope_scaling| ModelConfig { rope_scaling: Some(rope_scaling), ..llama.clone() };
    let llama3 = RopeScaling {
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        original_max_position_embeddings: Some(16),
        ..RopeScaling::new(RopeType::Llama3, 8.0)
    };
    let dynamic = RopeScaling {
        original_max_position_embeddings: Some(llama.block_size),
        ..RopeScaling::new(RopeType::Dynamic, 2.0)
    };
    let yarn = RopeScaling {
        original_max_position_embeddings: Some(16),
        beta_fast: Some(16.0),
        ..RopeScaling::new(RopeType::Yarn, 4.0)
    };
    vec![
        ("llama_gqa", llama.clone()),
        (
            "llama_9_3",
            ModelConfig { n_head: 9, n_query_groups: 3, n_embd: 36, head_size: 4, ..llama.clone() },
        ),
        ("llama_mqa", ModelConfig { n_query_groups: 1, ..llama.clone() }),
        ("llama_mha", ModelConfig { n_query_groups: 4, ..llama.clone() }),
        ("llama_tied", ModelConfig { tie_embeddings: true, rope_base: 1e5, ..llama.clone() }),
        ("llama_bias", ModelConfig { bias: true, attn_bias: true, ..llama.clone() }),
        ("llama_head_dim", ModelConfig { head_size: 12, ..llama.clone() }),
        ("llama_linear", scaled(RopeScaling::new(RopeType::Linear, 4.0))),
        ("llama_dynamic", scaled(dynamic)),
        ("llama_yarn", scaled(yarn)),
        ("llama_yarn_plain", scaled(RopeScaling::new(RopeType::Yarn, 4.0))),
        ("llama_llama3", scaled(llama3)),
        ("neox", neox.clone()),
        ("neox_sequential", ModelConfig { parallel_residual: false, ..neox.clone() }),
        ("neox_tied", ModelConfig { tie_embeddings: true, rope_base: 5e4, ..neox.clone() }),
        (
            "neox_linear",
            ModelConfig { rope_scaling: Some(RopeScaling::new(RopeType::Linear, 2.0)), ..neox },
        ),
    ]
}

fn same_bits(a: &GPT, b: &GPT) -> bool {
    let (a, b) = (a.named_parameters(), b.named_parameters());
    a.len() == b.len()
        && a.iter().zip(&b).all(|((name_a, x), (name_b, y))| {
            name_a == name_b
                && (x.kind(), x.size()) == (y.kind(), y.size())
                && ffi::tensor_bytes(x) == ffi::tensor_bytes(y)
        })
}

fn saved(model: &GPT) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    checkpoint::save(dir.path(), model).unwrap();
    dir
}

fn message<T>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.err().expect("an error"))
}

/// The tensors of a weights file, to be changed and written again.
fn tensors_in(path: &Path) -> Vec<(String, Tensor)> {
    tensors::TensorFile::open(path).unwrap().all().unwrap()
}

// Weights

#[test]
fn both_families_come_back_bit_for_bit() {
    for (name, config) in variants() {
        let mut model = random_model(&config);
        for kind in [Kind::Float, Kind::BFloat16] {
            model.to_kind(kind);
            let dir = saved(&model);
            let back = checkpoint::load_model(dir.path(), kind, Device::Cpu).unwrap();
            assert!(same_bits(&model, &back), "{name} {kind:?}");
            assert_eq!(back.config.name, config.name);
            // A run that resumes is strict, and has the configuration before it went to disk.
            let resumed = random_model(&config);
            checkpoint::load_weights(&resumed, dir.path()).unwrap();
            assert_eq!(same_bits(&model, &resumed), kind == Kind::Float, "{name} {kind:?}");
        }
    }
}

#[test]
fn weights_change_their_dtype_on_load_and_on_save() {
    let mut model = random_model(&tiny_llama());
    let dir = saved(&model);
    let half = tempfile::tempdir().unwrap();
    let (config, named) = (model.config.clone(), model.named_parameters());
    fs::copy(dir.path().join("config.json"), half.path().join("config.json")).unwrap();
    checkpoint::save_weights(half.path(), &config, &named, Kind::Half, u64::MAX).unwrap();
    let from_half = checkpoint::load_model(half.path(), Kind::Float, Device::Cpu).unwrap();
    let (_, original) = &named[0];
    let (_, rounded) = &from_half.named_parameters()[0];
    assert!(rounded.equal(&original.to_kind(Kind::Half).to_kind(Kind::Float)));

    let loaded = checkpoint::load_model(dir.path(), Kind::BFloat16, Device::Cpu).unwrap();
    model.to_kind(Kind::BFloat16);
    assert!(same_bits(&model, &loaded));
}

#[test]
fn large_weights_are_sharded_with_an_index_and_come_back() {
    let model = random_model(&tiny_neox());
    let dir = saved(&model);
    let whole = fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
    let (config, named) = (&model.config, model.named_parameters());
    checkpoint::save_weights(dir.path(), config, &named, Kind::Float, whole / 4).unwrap();
    assert!(!dir.path().join("model.safetensors").exists(), "the stale single file is gone");

    let index = fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), named.len());
    assert_eq!(index["metadata"]["total_size"], 4 * model.n_params());
    let mut shards: Vec<&str> = map.values().map(|v| v.as_str().unwrap()).collect();
    shards.dedup();
    assert!(shards.len() >= 4, "{shards:?}");
    assert_eq!(shards[0], format!("model-00001-of-{:05}.safetensors", shards.len()));
    for shard in &shards {
        let tensor_bytes: u64 =
            tensors_in(&dir.path().join(shard)).iter().map(|(_, t)| 4 * t.numel() as u64).sum();
        assert!(tensor_bytes <= whole / 4, "{shard}: {tensor_bytes}");
    }
    let back = checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap();
    assert!(same_bits(&model, &back));

    checkpoint::save(dir.path(), &model).unwrap();
    assert!(!dir.path().join("model.safetensors.index.json").exists(), "the stale index is gone");
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoint").join(name)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn configs_of_transformers_4_and_5_mean_the_same() {
    let old = read_json(&golden("configs-4.46.3.json"));
    let new = read_json(&golden("configs-5.23.0.json"));
    for (name, json) in old.as_object().unwrap() {
        let mut configs = [json, &new[name]].map(|json| hf_config::from_json(json).unwrap());
        for config in &mut configs {
            if let Some(s) = &mut config.rope_scaling
                && s.rope_type == RopeType::Yarn
            {
                // Version 5 spells the default out.
                s.original_max_position_embeddings.get_or_insert(config.block_size);
            }
        }
        let [old, new] = configs;
        assert_eq!(old, new, "{name}");
        let scaling = old.rope_scaling.as_ref().map(|s| s.rope_type);
        let named = [
            ("llama_linear", RopeType::Linear),
            ("llama_dynamic", RopeType::Dynamic),
            ("llama_yarn", RopeType::Yarn),
            ("llama_llama3", RopeType::Llama3),
        ];
        assert_eq!(scaling, named.iter().find(|(n, _)| n == name).map(|(_, t)| *t), "{name}");
    }
}

/// `TINYLLAMA_PARITY_DIR=DIR cargo test --release folders_for_transformers -- --ignored`, then
/// `python scripts/golden/checkpoint.py check DIR`.
#[test]
#[ignore = "writes folders that scripts/golden/checkpoint.py reads with transformers"]
fn folders_for_transformers() {
    let out = PathBuf::from(std::env::var("TINYLLAMA_PARITY_DIR").expect("TINYLLAMA_PARITY_DIR"));
    for (name, config) in variants() {
        // `dynamic` changes beyond the trained length only.
        let long = config.rope_scaling.as_ref().is_some_and(|s| s.rope_type == RopeType::Dynamic);
        let t = if long { 96 } else { 48 };
        let model = random_model(&config);
        let tokens = (Tensor::arange(2 * t, tch::kind::INT64_CPU) * 7 + 3)
            .remainder(config.vocab_size)
            .view([2, t]);
        let logits = tch::no_grad(|| model.forward(&tokens, None));
        checkpoint::save(&out.join(name), &model).unwrap();
        let expected = out.join(format!("{name}.expected.safetensors"));
        tensors::write(&expected, &[("tokens".into(), tokens), ("logits".into(), logits)]).unwrap();
    }
    // Sharded, and bf16 (whose dtype transformers must find in `config.json`).
    let (_, neox) = variants().into_iter().find(|(name, _)| *name == "neox").unwrap();
    let mut model = random_model(&neox);
    let expected = out.join("neox.expected.safetensors");
    for name in ["neox_sharded", "neox_bf16"] {
        fs::copy(&expected, out.join(format!("{name}.expected.safetensors"))).unwrap();
    }
    let sharded = out.join("neox_sharded");
    checkpoint::save(&sharded, &model).unwrap();
    let named = model.named_parameters();
    checkpoint::save_weights(&sharded, &model.config, &named, Kind::Float, 30_000).unwrap();
    model.to_kind(Kind::BFloat16);
    checkpoint::save(&out.join("neox_bf16"), &model).unwrap();
    // Ids of a tokenizer.
    let tokenizer = Tokenizer::load(&golden("../tokenizer/llama.model")).unwrap();
    let model = random_model(&tiny_llama());
    let dir = out.join("llama_gqa");
    checkpoint::save_model(&dir, &model.config, &model.named_parameters(), Some(&tokenizer))
        .unwrap();
}

#[test]
fn old_buffers_are_ignored_and_a_tied_head_may_be_there_or_alone() {
    for config in [tiny_llama(), tiny_neox()] {
        let config = ModelConfig { tie_embeddings: true, ..config };
        let neox = config.norm_eps == tiny_neox().norm_eps && config.bias;
        let (wte, head) = match neox {
            true => ("gpt_neox.embed_in.weight", "embed_out.weight"),
            false => ("model.embed_tokens.weight", "lm_head.weight"),
        };
        let model = random_model(&config);
        let dir = saved(&model);
        let path = dir.path().join("model.safetensors");
        let mut all = tensors_in(&path);
        let embedding = all.iter().find(|(n, _)| n == wte).unwrap().1.shallow_clone();
        all.push((head.into(), embedding));
        for buffer in ["rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"] {
            let name = format!("gpt_neox.layers.0.{buffer}");
            all.push((name, Tensor::ones([2], tch::kind::FLOAT_CPU)));
        }
        tensors::write(&path, &all).unwrap();
        let back = checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap();
        assert!(same_bits(&model, &back));

        all.retain(|(name, _)| name != wte);
        tensors::write(&path, &all).unwrap();
        let back = checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap();
        assert!(same_bits(&model, &back));
    }
}

// Bad input

#[test]
fn a_truncated_file_is_refused_with_expected_and_got_bytes() {
    let dir = saved(&random_model(&tiny_llama()));
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let told = message(checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu));
    let sizes = format!("expected {} bytes by its header, got {}", bytes.len(), bytes.len() - 100);
    assert!(told.contains("model.safetensors") && told.contains(&sizes), "{told}");
}

#[test]
fn every_missing_shard_is_named() {
    let model = random_model(&tiny_llama());
    let dir = saved(&model);
    let named = model.named_parameters();
    checkpoint::save_weights(dir.path(), &model.config, &named, Kind::Float, 20_000).unwrap();
    let mut shards: Vec<PathBuf> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    assert!(shards.len() > 3);
    for shard in [&shards[0], &shards[2]] {
        fs::remove_file(shard).unwrap();
    }
    let told = message(checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu));
    for shard in [&shards[0], &shards[2]] {
        assert!(told.contains(shard.file_name().unwrap().to_str().unwrap()), "{told}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_told_all_at_once_and_nothing_is_loaded() {
    let dir = saved(&random_model(&tiny_llama()));
    let path = dir.path().join("model.safetensors");
    let mut all = tensors_in(&path);
    all.retain(|(name, _)| name != "model.norm.weight");
    for (name, tensor) in &mut all {
        match name.as_str() {
            "model.layers.0.self_attn.k_proj.weight" => {
                *tensor = Tensor::ones([8, 32], tch::kind::FLOAT_CPU)
            }
            "model.layers.1.mlp.up_proj.weight" => *tensor = tensor.to_kind(Kind::Int64),
            _ => {}
        }
    }
    all.push(("model.layers.2.mlp.up_proj.weight".into(), Tensor::ones([1], tch::kind::FLOAT_CPU)));
    tensors::write(&path, &all).unwrap();

    let target = random_model(&tiny_llama());
    let before: Vec<_> = target.named_parameters().iter().map(|(_, t)| t.copy()).collect();
    let told = message(checkpoint::load_weights(&target, dir.path()));
    for line in [
        "4 tensor(s)",
        "`model.norm.weight`: missing, expected shape [32]",
        "`model.layers.0.self_attn.k_proj.weight`: expected shape [16, 32], got [8, 32]",
        "`model.layers.1.mlp.up_proj.weight`: expected a float dtype, got Int64",
        "`model.layers.2.mlp.up_proj.weight`: not expected",
    ] {
        assert!(told.contains(line), "{line}\nin: {told}");
    }
    let after = target.named_parameters();
    assert!(before.iter().zip(&after).all(|(a, (_, b))| a.equal(b)));
}

#[test]
fn a_checkpoint_of_another_architecture_names_the_fields_that_differ() {
    let dir = saved(&random_model(&tiny_llama()));
    let other = ModelConfig { n_layer: 3, n_query_groups: 1, ..tiny_llama() };
    let told = message(checkpoint::load_weights(&GPT::empty(&other, Device::Cpu), dir.path()));
    assert!(told.contains("another architecture"), "{told}");
    assert!(told.contains("`n_layer`: expected 3, got 2"), "{told}");
    assert!(told.contains("`n_query_groups`: expected 1, got 2"), "{told}");
    assert!(!told.contains("n_embd") && !told.contains("tensor(s)"), "{told}");

    let told =
        message(checkpoint::load_weights(&GPT::empty(&tiny_neox(), Device::Cpu), dir.path()));
    assert!(told.contains("`mlp_class`") && told.contains("`norm_class`"), "{told}");
}

#[test]
fn a_longer_context_may_start_from_weights_of_a_shorter_one() {
    let model = random_model(&tiny_llama());
    let dir = saved(&model);
    let longer = ModelConfig {
        block_size: 256,
        rope_scaling: Some(RopeScaling::new(RopeType::Linear, 4.0)),
        ..tiny_llama()
    };
    let target = GPT::empty(&longer, Device::Cpu);
    checkpoint::load_initial_weights(&target, dir.path()).unwrap();
    assert!(same_bits(&model, &target));
    // A resumed run is no place for it, and no other field may differ.
    let told = message(checkpoint::load_weights(&target, dir.path()));
    assert!(told.contains("`block_size`: expected 256, got 64"), "{told}");
    assert!(told.contains("`rope_scaling`: expected {") && told.contains("got null"), "{told}");
    let other = ModelConfig { norm_eps: 1e-6, ..longer };
    let told =
        message(checkpoint::load_initial_weights(&GPT::empty(&other, Device::Cpu), dir.path()));
    assert!(told.contains("`norm_eps`") && !told.contains("block_size"), "{told}");
}

#[test]
fn a_folder_without_weights_or_with_pickled_ones_says_so() {
    let dir = saved(&random_model(&tiny_llama()));
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let told = message(checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu));
    assert!(told.contains("looked for `model.safetensors`"), "{told}");
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let told = message(checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu));
    assert!(told.contains("config.json"), "{told}");
}

#[test]
fn an_index_that_points_out_of_its_folder_is_refused() {
    let dir = saved(&random_model(&tiny_llama()));
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let index = json!({"weight_map": {"a": "../../secret.safetensors"}}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let told = message(checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu));
    assert!(told.contains("no file of its folder"), "{told}");
}

#[test]
fn a_model_that_hugging_face_cannot_hold_is_refused_before_it_is_written() {
    let config = ModelConfig { rotary_percentage: 0.5, parallel_residual: true, ..tiny_llama() };
    let dir = tempfile::tempdir().unwrap();
    let told = message(checkpoint::save(dir.path(), &random_model(&config)));
    assert!(told.contains("`rotary_percentage`") && told.contains("`parallel_residual`"), "{told}");
    let grouped = ModelConfig { n_query_groups: 2, ..tiny_neox() };
    assert!(hf_config::unsupported(&grouped)[0].contains("`n_query_groups`"));
    for (name, config) in variants() {
        assert!(hf_config::unsupported(&config).is_empty(), "{name}");
    }
}

// Train state

fn state_at(step: u64) -> TrainState {
    TrainState {
        step,
        iter: 8 * step,
        tokens: 3_000_001_101_824,
        elapsed_seconds: 0.1 + 0.2,
        world_size: 16,
        seed: u64::MAX,
        precision: "bf16-mixed".into(),
        data: json!({"epoch": 3, "cursor": [1u64 << 53, 7], "nested": {"a": null}}),
    }
}

/// A complete checkpoint folder of a run, as training writes it.
fn write_checkpoint(dir: &Path, model: &GPT, step: u64) -> anyhow::Result<()> {
    checkpoint::save_model(dir, &model.config, &model.named_parameters(), None)?;
    let moments = [("exp_avg.transformer.wte.weight".to_owned(), model.wte.weight.detach())];
    let generators = [("cpu".to_owned(), ffi::rng_state(Device::Cpu)?)];
    checkpoint::save_train_state(dir, &state_at(step), &moments, &generators)
}

#[test]
fn train_state_comes_back_bit_for_bit_and_the_generator_goes_on() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let x = Tensor::randn([3, 5], tch::kind::FLOAT_CPU);
    let moments = vec![
        ("exp_avg.a".to_owned(), x.shallow_clone()),
        ("exp_avg_sq.a".to_owned(), x.to_kind(Kind::BFloat16).tr()),
        ("nan".to_owned(), Tensor::from_slice(&[f32::NAN, f32::NEG_INFINITY, -0.0, 1e-45])),
        ("count".to_owned(), Tensor::from_slice(&[i64::MIN, i64::MAX])),
    ];
    tch::manual_seed(5);
    let _ = Tensor::randn([7], tch::kind::FLOAT_CPU);
    let generators = vec![("cpu".to_owned(), ffi::rng_state(Device::Cpu).unwrap())];
    let next = Tensor::randn([100], tch::kind::FLOAT_CPU);

    checkpoint::save_train_state(dir.path(), &state_at(7), &moments, &generators).unwrap();
    let (state, back, rng) = checkpoint::load_train_state(dir.path()).unwrap();
    assert_eq!(state, state_at(7));
    assert_eq!(back.names().count(), moments.len());
    for (name, tensor) in &moments {
        let got = back.get(name, tensor.kind(), &tensor.size()).unwrap();
        assert_eq!((got.kind(), got.size()), (tensor.kind(), tensor.size()), "{name}");
        assert_eq!(ffi::tensor_bytes(&got), ffi::tensor_bytes(tensor), "{name}");
    }
    ffi::set_rng_state(Device::Cpu, &rng[0].1).unwrap();
    assert!(Tensor::randn([100], tch::kind::FLOAT_CPU).equal(&next));
}

#[test]
fn damaged_train_state_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let told = message(checkpoint::load_train_state(dir.path()));
    assert!(told.contains("train_state/state.json"), "{told}");
    checkpoint::save_train_state(dir.path(), &state_at(1), &[], &[]).unwrap();
    checkpoint::load_train_state(dir.path()).unwrap();
    let file = |name: &str| dir.path().join("train_state").join(name);
    fs::write(file("optimizer.safetensors"), b"").unwrap();
    let told = message(checkpoint::load_train_state(dir.path()));
    assert!(told.contains("optimizer.safetensors") && told.contains("0 bytes"), "{told}");
    fs::write(file("state.json"), b"{\"step\": 1").unwrap();
    let told = message(checkpoint::load_train_state(dir.path()));
    assert!(told.contains("state.json") && told.contains("damaged"), "{told}");
}
