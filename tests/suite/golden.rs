//! Parity with PyTorch and transformers, on vectors made by `scripts/golden/{model,train}.py`.

use crate::common::one_step;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::{self, hf_config, names, tensors::TensorFile};
use tinyllama::config::{OptimizerConfig, Precision, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::model::{GPT, ModelConfig, RopeScaling, rope};
use tinyllama::ops;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::schedule::lr_at;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn json(path: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(golden(path)).unwrap()).unwrap()
}

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

/// The model of a case, loaded through a folder as a user has it.
fn load(config: &Value, weights: &Path) -> GPT {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(weights, dir.path().join("model.safetensors")).unwrap();
    checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap()
}

#[test]
fn logits_equal_transformers_in_both_families_with_every_rope_scaling() {
    let cases = json("model/cases.json");
    for case in cases.as_array().unwrap() {
        let file = |key: &str| golden("model").join(case[key].as_str().unwrap());
        let model = load(&case["config"], &file("weights"));
        let io = TensorFile::open(&file("io")).unwrap();
        let (ids, want) = (io.tensor("input_ids").unwrap(), io.tensor("logits").unwrap());
        let error = tch::no_grad(|| largest(&(model.forward(&ids, None) - &want)));
        println!("{:20} max |difference| {error:.1e} of {:.1}", case["name"], largest(&want));
        assert!(error < 2e-4, "{}: {error}", case["name"]);
    }
    assert!(cases.as_array().unwrap().len() >= 14);
}

#[test]
fn gradients_equal_transformers_for_every_parameter() {
    let mut checked = 0;
    for case in json("model/cases.json").as_array().unwrap() {
        let file = |key: &str| golden("model").join(case[key].as_str().unwrap());
        let io = TensorFile::open(&file("io")).unwrap();
        let Ok(want_loss) = io.tensor("loss") else { continue };
        let model = load(&case["config"], &file("weights"));
        model.requires_grad(true);
        let ids = io.tensor("input_ids").unwrap(); // (B, T)
        let (b, t) = ids.size2().unwrap();
        let logits = model.forward(&ids, None).narrow(1, 0, t - 1);
        let target = ids.narrow(1, 1, t - 1);
        let loss = ops::cross_entropy_sum(&logits, &target) / (b * (t - 1)) as f64;
        loss.backward();
        assert!(largest(&(loss - want_loss)) < 1e-5);
        for (name, p) in model.named_parameters() {
            for part in names::parts(&name, &model.config) {
                let want = io.tensor(&format!("grad.{}", part.name)).unwrap();
                let got = names::to_disk(&p.grad(), part.layout, &model.config);
                let error = largest(&(got - &want)) / largest(&want).max(1e-3);
                assert!(error < 1e-4, "{} {}: {error}", case["name"], part.name);
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "{checked}");
}

#[test]
fn rope_frequencies_equal_transformers_at_full_size() {
    for case in json("model/rope.json").as_array().unwrap() {
        let int = |key: &str| case[key].as_i64().unwrap();
        let scaling: RopeScaling = serde_json::from_value(case["rope_scaling"].clone()).unwrap();
        let config = ModelConfig {
            block_size: int("max_position_embeddings"),
            head_size: int("head_dim"),
            rope_base: case["rope_theta"].as_f64().unwrap(),
            rope_scaling: Some(scaling),
            ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
        };
        let got = rope::frequencies(&config, int("seq_len"));
        let want: Vec<f64> = serde_json::from_value(case["inv_freq"].clone()).unwrap();
        assert_eq!(got.inv_freq.len(), want.len());
        for (g, w) in got.inv_freq.iter().zip(&want) {
            assert!((g / w - 1.0).abs() < 1e-5, "{}: {g} {w}", case["name"]);
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((got.attention_factor - factor).abs() < 1e-6, "{}", case["name"]);
    }
}

#[test]
fn twenty_training_steps_equal_pytorchs() {
    for family in ["llama", "neox"] {
        let expected = json(&format!("train/{family}/expected.json"));
        let float = |key: &str| expected[key].as_f64().unwrap();
        let list =
            |key: &str| -> Vec<f64> { serde_json::from_value(expected[key].clone()).unwrap() };
        let folder = golden(&format!("train/{family}"));
        let data = TensorFile::open(&folder.join("data.safetensors")).unwrap();
        let tokens = data.tensor("tokens").unwrap(); // (steps, accumulation, micro, T+1)
        let mut model = checkpoint::load_model(&folder, Kind::Float, Device::Cpu).unwrap();
        let settings = OptimizerConfig {
            lr: expected["lr_peak"].as_f64().unwrap(),
            betas: [0.9, 0.95],
            weight_decay: float("weight_decay"),
            eps: float("eps"),
            ..OptimizerConfig::default()
        };
        let schedule = TrainConfig {
            lr_warmup_steps: float("warmup") as u64,
            min_lr: float("min_lr"),
            ..TrainConfig::default()
        };
        let mut optimizer = AdamW::new(&mut model, Precision::Fp32True, &settings).unwrap();
        let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
        let (losses, norms, rates) = (list("loss"), list("grad_norm"), list("lr"));
        for step in 1..=losses.len() {
            let lr = lr_at(step as u64, Some(losses.len() as u64), &schedule, settings.lr);
            assert!((lr - rates[step - 1]).abs() < 1e-12);
            let of_step = tokens.get(step as i64 - 1); // (accumulation, micro, T+1)
            let batches: Vec<Batch> = (0..of_step.size()[0])
                .map(|i| {
                    let rows = of_step.get(i);
                    let t = rows.size()[1] - 1;
                    let (input, target) = (rows.narrow(1, 0, t), rows.narrow(1, 1, t));
                    let n_targets = target.numel() as i64;
                    Batch { input, target, documents: None, n_targets }
                })
                .collect();
            let out = one_step(&model, &mut optimizer, &batches, lr);
            optimizer.zero_grad();
            let relative = |got: f64, want: f64| (got / want - 1.0).abs();
            worst_loss = worst_loss.max(relative(out.loss.double_value(&[]), losses[step - 1]));
            worst_norm = worst_norm.max(relative(out.grad_norm.double_value(&[]), norms[step - 1]));
        }
        println!(
            "{family}: worst relative difference: loss {worst_loss:.1e}, norm {worst_norm:.1e}"
        );
        assert!(worst_loss < 1e-5, "{family}: {worst_loss}");
        assert!(worst_norm < 1e-3, "{family}: {worst_norm}");
        for (name, p) in optimizer.masters() {
            for part in names::parts(&name, &model.config) {
                let want = expected["l2"][&part.name].as_f64().unwrap();
                let ours = names::to_disk(&p, part.layout, &model.config);
                let got = ours.to_kind(Kind::Double).norm().double_value(&[]);
                assert!((got / want - 1.0).abs() < 1e-4, "{family} {}: {got} {want}", part.name);
            }
        }
    }
}

#[test]
fn a_config_json_written_here_reads_back_as_the_one_of_transformers() {
    for case in json("model/cases.json").as_array().unwrap() {
        let config = hf_config::from_json(&case["config"]).unwrap();
        let extras = hf_config::Extras { dtype: "float32", bos: None, eos: None };
        assert_eq!(hf_config::from_json(&hf_config::to_json(&config, &extras)).unwrap(), config);
    }
}
