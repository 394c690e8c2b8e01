//! Configuration: every problem at once, nearest keys, numbers as people write them.

use std::path::Path;
use tinyllama::config::{self, BatchPlan, ConfigError, RunConfig};

const BASE: &str = "data: {train: [{path: x}]}\ntrain: {max_steps: 3000}\n";

fn problems(text: &str, sets: &[&str]) -> Vec<String> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let error = config::parse(text, &sets).unwrap_err();
    match error.chain().find_map(|e| e.downcast_ref::<ConfigError>()) {
        Some(e) => e.problems.clone(),
        None => panic!("{error:#}"),
    }
}

fn parse(text: &str, sets: &[&str]) -> RunConfig {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    config::parse(text, &sets).unwrap()
}

#[test]
fn every_problem_of_a_configuration_is_told_at_once() {
    let text = "
model_name: tiny-lama-1.1b
model_config: {n_layr: 3, n_embd: wide}
train:
  max_token: 3e12
  max_steps: 1.5M
  min_lr: fast
  max_norm: null
  lr_schedule: cosin
eval: 3
optimizer: {betas: [0.9], lr: 4e-4}
data:
  train: [{pth: x, weight: 1}]
";
    let got = problems(text, &["trian.max_steps=3", "seed"]);
    let want = [
        "`--set trian.max_steps=3`: `trian`: unknown key; did you mean `train`?",
        "`--set seed`: expected KEY=VALUE",
        "`train.max_token`: unknown key; did you mean `train.max_tokens`?",
        "`train.min_lr`: expected a number, got `fast`",
        "`train.lr_schedule`: expected one of `cosine`, `constant`, `wsd`, got `cosin`; \
         did you mean `cosine`?",
        "`eval`: expected a table of keys, got `3`",
        "`optimizer.betas`: expected 2 values, got 1",
        "`data.train.0.path`: missing",
        "`data.train.0.pth`: unknown key; did you mean `data.train.0.path`?",
        "`model_name`: no preset is called `tiny-lama-1.1b`; did you mean `tiny-llama-1.1b`? \
         (`tinyllama config models` lists them)",
        "`model_config.n_layr`: unknown key; did you mean `model_config.n_layer`?",
        "`model_config.n_embd`: expected an integer, got `wide`",
    ];
    assert_eq!(got, want);
}

#[test]
fn impossible_values_are_told_at_once_with_key_paths() {
    let text = "
train: {global_batch_size: 10, micro_batch_size: 4, lr_warmup_steps: 90, max_steps: 50,
        min_lr: 1, decay_fraction: 0, max_seq_length: 4096, log_interval: 0}
data: {train: [{path: x, weight: 0}]}
optimizer: {betas: [0.9, 1.5], eps: 0}
model_config: {n_head: 30, n_query_groups: 4}
";
    let got = problems(text, &[]);
    let paths: Vec<&str> = got.iter().filter_map(|p| p.split('`').nth(1)).collect();
    let want = [
        "model_config.n_query_groups",
        "train.log_interval",
        "train.global_batch_size",
        "train.lr_warmup_steps",
        "train.decay_fraction",
        "optimizer.eps",
        "optimizer.betas.1",
        "train.min_lr",
        "data.train.0.weight",
    ];
    assert_eq!(paths, want, "{got:#?}");
    let batch = got.iter().find(|p| p.contains("global_batch_size")).unwrap();
    assert!(batch.contains("set it to 8 or 12, or `train.micro_batch_size` to 2"), "{batch}");

    let long = problems(BASE, &["train.max_seq_length=4096"]);
    assert!(
        long[0].contains("between 1 and the model's `block_size` = 2048, got 4096"),
        "{long:?}"
    );
    let endless = problems("data: {train: [{path: x}]}", &[]);
    assert!(endless[0].contains("nothing stops the run"), "{endless:?}");
}

#[test]
fn numbers_may_be_written_as_people_write_them() {
    let c = parse(BASE, &["train.max_tokens=3e12", "optimizer.lr=4e-4", "train.min_lr=0"]);
    assert_eq!(
        (c.train.max_tokens, c.optimizer.lr, c.train.min_lr),
        (Some(3_000_000_000_000), 4e-4, 0.0)
    );
    for (text, want) in [("3_000_000", 3_000_000), ("3T", 3_000_000_000_000), ("1.5M", 1_500_000)] {
        let c = parse(BASE, &[&format!("train.max_tokens={text}")]);
        assert_eq!(c.train.max_tokens, Some(want), "{text}");
    }
    let c = parse(BASE, &["train.max_norm=1", "resume=true", "data.train.0.weight=2"]);
    assert_eq!((c.train.max_norm, c.data.train[0].weight), (Some(1.0), 2.0));
    let half = problems(BASE, &["train.max_steps=1.5"]);
    assert!(half[0].contains("`train.max_steps`: expected an integer"), "{half:?}");
}

#[test]
fn syntax_errors_show_the_place() {
    let error = config::parse("train:\n\tmax_steps: 3\n", &[]).unwrap_err();
    assert!(format!("{error:#}").contains("line 2"), "{error:#}");
    let twice = config::parse("seed: 1\nseed: 2\n", &[]).unwrap_err();
    assert!(format!("{twice:#}").contains("seed"), "{twice:#}");
}

#[test]
fn every_shipped_configuration_is_valid_and_survives_a_round_trip() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let config = config::load(&path, &[]).unwrap_or_else(|e| panic!("{e:#}"));
        let again = config::parse(&config::to_yaml(&config).unwrap(), &[]).unwrap();
        assert_eq!(config, again, "{}", path.display());
        assert!(config::diff(&config, &again).is_empty());
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn the_published_run_has_the_published_arithmetic() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tinyllama.yaml");
    let config = config::load(&path, &[]).unwrap();
    let model = config.model().unwrap();
    assert_eq!(model.n_params(), 1_100_048_384);
    let plan = BatchPlan::new(&config, config.sequence_length(&model), 16).unwrap();
    assert_eq!(
        plan.to_string(),
        "1024 seq/step = 16 ranks x 8 micro x 8 accumulation = 2,097,152 tokens/step"
    );
    assert_eq!(plan.total_tokens(), Some(3_000_001_101_824));
    assert!(BatchPlan::new(&config, 2048, 3).is_err());
}

#[test]
fn a_difference_names_the_key_and_both_values() {
    let (a, b) = (parse(BASE, &[]), parse(BASE, &["train.max_norm=2.0", "seed=7"]));
    assert_eq!(config::diff(&a, &b), ["seed: 42 -> 7", "train.max_norm: 1.0 -> 2.0"]);
}

#[test]
fn every_key_is_explained() {
    for key in config::keys() {
        assert!(!key.doc.is_empty(), "`{}` has no doc", key.path);
    }
    assert_eq!(config::explain("train.max_norm").unwrap()[0].default, "1.0");
    assert!(config::explain("optimizr").unwrap_err().to_string().contains("`optimizer`"));
}
