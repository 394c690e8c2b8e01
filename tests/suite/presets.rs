//! The presets table against published configurations, on files made by `scripts/golden/init.py`.

use serde_json::Value;
use std::fs;
use std::path::Path;
use tinyllama::checkpoint::hf_config;
use tinyllama::model::{MlpClass, ModelConfig, init};

fn json(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_preset_says_what_the_published_config_json_says() {
    let published = json("model/presets.json");
    let mut names: Vec<&String> = published.as_object().unwrap().keys().collect();
    let mut ours = ModelConfig::preset_names();
    names.sort();
    ours.sort();
    assert_eq!(names, ours.iter().collect::<Vec<_>>());

    let mut different = Vec::new();
    for (name, config) in published.as_object().unwrap() {
        let preset = ModelConfig::preset(name).unwrap();
        // `config.json` knows neither the preset's name nor the ids that the tokenizer leaves unused.
        let (same_name, vocab_size) = (preset.name.clone(), preset.vocab_size);
        let want =
            ModelConfig { name: same_name, vocab_size, ..hf_config::from_json(config).unwrap() };
        if preset != want {
            different.push(format!("{name}:\n  preset    {preset:?}\n  published {want:?}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn every_preset_has_exactly_the_parameters_that_transformers_counts() {
    for (name, count) in json("model/params.json").as_object().unwrap() {
        let preset = ModelConfig::preset(name).unwrap();
        assert_eq!(preset.n_params(), count.as_u64().unwrap(), "{name}");
    }
}

#[test]
fn every_kind_of_tensor_starts_with_lit_gpts_deviation_in_both_families() {
    let close = |got: f64, want: f64| (got / want - 1.0).abs() < 1e-12;
    for (name, case) in json("init/init.json").as_object().unwrap() {
        let preset = ModelConfig::preset(name).unwrap();
        for (tensor, std) in case["std"].as_object().unwrap() {
            let path = match tensor.split('.').next() {
                Some("attn" | "mlp") => format!("transformer.h.0.{tensor}"),
                _ => tensor.clone(),
            };
            let got = init::std_of(&path, &preset);
            assert!(
                close(got.unwrap(), std.as_f64().unwrap()),
                "{name} {path}: {got:?}, want {std}"
            );
        }
        let neox = preset.mlp_class == MlpClass::GptNeoxMLP;
        for constant in ["transformer.h.0.norm_1.weight", "transformer.ln_f.weight"] {
            assert_eq!(init::std_of(constant, &preset), None);
        }
        assert!(!neox || init::std_of("transformer.h.0.attn.qkv.bias", &preset).is_none());
    }
}
