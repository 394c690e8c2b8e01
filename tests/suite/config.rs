//! Configuration: every problem at once, nearest keys, numbers as people write them.

use assert_cmd::cargo::cargo_bin_cmd;
use proptest::prelude::*;
use std::path::Path;
use tinyllama::config::{
    self, BatchPlan, ConfigError, DataSource, MasterFormat, Resume, RunConfig, StateFormat,
};

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
        "model_config.n_embd",
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
    let again = problems(BASE, &["train.checkpoint_blocks=3"]);
    assert!(again[0].ends_with("`train.activation_checkpointing` to be `block`, got `none`"));
    for blocks in ["train.checkpoint_blocks=0", "train.checkpoint_blocks=23"] {
        let far = problems(BASE, &["train.activation_checkpointing=block", blocks]);
        let want =
            "`train.checkpoint_blocks`: must be between 1 and the model's `n_layer` = 22, got ";
        assert!(far[0].starts_with(want), "{far:?}");
    }
    let c = |sets: &[&str]| parse(BASE, sets).train.recomputed_blocks(22);
    assert_eq!(c(&[]), 0);
    assert_eq!(c(&["train.activation_checkpointing=block"]), 22);
    assert_eq!(c(&["train.activation_checkpointing=block", "train.checkpoint_blocks=14"]), 14);

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
    let written = [
        ("3_000_000", 3_000_000),
        ("3T", 3_000_000_000_000),
        ("1.5M", 1_500_000),
        ("1.07B", 1_070_000_000), // 1.07 * 1e9 in floating point is 1070000000.0000001
        ("4.35T", 4_350_000_000_000),
    ];
    for (text, want) in written {
        let tokens = format!("train.max_tokens={text}");
        let c = parse(BASE, &[&tokens, "train.lr_warmup_steps=0"]);
        assert_eq!(c.train.max_tokens, Some(want), "{text}");
    }
    let c = parse(BASE, &["train.max_norm=1", "resume=true", "data.train.0.weight=2"]);
    assert_eq!((c.train.max_norm, c.data.train[0].weight.constant()), (Some(1.0), Some(2.0)));
    let half = problems(BASE, &["train.max_steps=1.5"]);
    assert!(half[0].contains("`train.max_steps`: expected an integer"), "{half:?}");
}

#[test]
fn weights_may_change_between_token_counts_and_what_cannot_be_is_told() {
    let text =
        |weights: &str| format!("data: {{train: [{weights}]}}\ntrain: {{max_steps: 3000}}\n");
    let schedule = text(
        "{path: a, weight: [{tokens: 0, weight: 1}, {tokens: 1.5T, weight: 0.6}]},
         {path: b, weight: [{tokens: 1.5e12, weight: 0}, {tokens: 1_800_000_000_000, weight: 0.4}]}",
    );
    let c = parse(&schedule, &["data.order=global", "data.train.1.weight.1.tokens=2T"]);
    let at = |source: usize, tokens| c.data.train[source].weight.at(tokens);
    assert_eq!((at(0, 750_000_000_000), at(0, 3_000_000_000_000)), (0.8, 0.6));
    assert_eq!((at(1, 1_750_000_000_000), at(1, 2_000_000_000_000)), (0.2, 0.4));
    assert_eq!(parse(&config::to_yaml(&c).unwrap(), &[]), c);
    let points = "data.train.N.weight.N.tokens";
    assert_eq!(config::explain("data.train.0.weight.1.tokens").unwrap()[0].path, points);

    let refused = [
        (
            text("{path: a, weight: [{tokens: 5, weight: 1}, {tokens: 5, weight: -1}]}"),
            vec![
                "`data.train.0.weight.1.weight`: must be at least 0, got -1",
                "`data.train.0.weight.1.tokens`: must be above the point before, 5, got 5",
            ],
        ),
        (
            text("{path: a, weight: [{tokens: 0, weight: 1}, {tokens: 9, weight: 0}]}"),
            vec![
                "`data.train`: weights must be 0 or more and one above 0 at any time; after 9 tokens they are 0",
            ],
        ),
        (
            text("{path: a, weight: [{tokens: 0, wight: 1}]}"),
            vec![
                "`data.train.0.weight.0.weight`: missing",
                "`data.train.0.weight.0.wight`: unknown key; did you mean `data.train.0.weight.0.weight`?",
            ],
        ),
        (
            text("{path: a, weight: much}"),
            vec!["`data.train.0.weight`: expected a number or a list, got `much`"],
        ),
    ];
    for (text, want) in refused {
        assert_eq!(problems(&text, &[]), want);
    }
    let lit_gpt = problems(&schedule, &["data.order=lit-gpt", "data.epochs=0"]);
    assert_eq!(lit_gpt.len(), 3, "{lit_gpt:?}");
    assert!(lit_gpt[0].ends_with("takes one number, got a list of points"), "{lit_gpt:?}");
    assert!(lit_gpt[2].starts_with("`data.epochs`: must be at least 1, or null"), "{lit_gpt:?}");
    let word = problems(BASE, &["data.order=litgpt"]);
    assert!(word[0].ends_with("did you mean `lit-gpt`?"), "{word:?}");
}

#[test]
fn epochs_alone_end_a_run() {
    let c = parse("data: {train: [{path: x}], epochs: 2}", &[]);
    assert_eq!((c.data.epochs, c.train.max_steps), (Some(2), None));
    let mut plan = BatchPlan::new(&c, 2048, 1).unwrap();
    assert!(plan.limit_samples(0, 5 * 512 + 511));
    assert_eq!(plan.total_steps, Some(5));
    assert!(!plan.limit_samples(0, 6 * 512));
    assert_eq!(plan.total_steps, Some(5));
}

#[test]
fn a_run_that_goes_on_in_other_batches_has_as_many_tokens() {
    let c =
        parse("data: {train: [{path: x}]}\ntrain: {max_tokens: 41943040, lr_warmup_steps: 2}", &[]); // 40 steps of 2^20
    let mut plan = BatchPlan::new(&c, 2048, 1).unwrap();
    assert_eq!((plan.global, plan.total_steps), (512, Some(40)));
    plan.go_on_from(&c, 10, 10 << 20, 10 * 512); // as before
    assert_eq!(plan.total_steps, Some(40));
    plan.go_on_from(&c, 10, 10 << 19, 10 * 256); // after steps of half the size
    assert_eq!(plan.total_steps, Some(45));
    assert!(plan.limit_samples(10, 20 * 512 + 3));
    assert_eq!(plan.total_steps, Some(30));
    plan.go_on_from(&c, 25, 35 << 20, 5 * 512); // data that began anew after 20 steps
    assert_eq!(plan.total_steps, Some(30));
    plan.go_on_from(&c, 10, 0, 0); // nothing is known
    assert_eq!(plan.total_steps, Some(40));
    plan.go_on_from(&c, 90, 0, 100 * 512); // more than the run has
    assert_eq!(plan.total_steps, Some(90));
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
        if path.is_dir() {
            continue; // tests/suite/finetune.rs reads those
        }
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
    for (key, default) in [
        ("train.max_norm", "1.0"),
        ("data.prepare.0.chunk_tokens", "2098176"),
        ("data.prepare.0.split", "\"train\""),
        ("data.prepare.0.kind", ""), // must be given
        ("finetune", "null"),
        ("finetune.lora.r", "8"),
    ] {
        assert_eq!(config::explain(key).unwrap()[0].default, default, "{key}");
    }
    for (key, finetune) in [
        ("train.max_norm", ""),
        ("train.lr_warmup_steps", "0"),
        ("optimizer.lr", "0.00002 (full), 0.0002 (lora, qlora), 5e-6 (dpo)"),
        ("distributed.strategy", "\"full_shard\" (full), \"ddp\" (lora, qlora, dpo)"),
    ] {
        assert_eq!(config::explain(key).unwrap()[0].finetune, finetune, "{key}");
    }
    assert!(config::explain("optimizr").unwrap_err().to_string().contains("`optimizer`"));
    assert!(config::explain("max_norm").unwrap_err().to_string().contains("`train.max_norm`"));
    assert_eq!(config::explain("data.train.0.weight").unwrap()[0].path, "data.train.N.weight");
}

#[test]
fn the_nine_inputs_of_the_yaml_survey_are_read_or_refused_as_documented() {
    let with = |line: &str| format!("data: {{train: [{{path: x}}]}}\ntrain:\n  {line}\n");
    let read = |line: &str| parse(&with(line), &["train.max_steps=3000"]).train;
    assert_eq!(read("min_lr: 4e-5").min_lr, 4e-5);
    assert_eq!(read("max_tokens: 9_000_000_000").max_tokens, Some(9_000_000_000));
    assert_eq!(read("max_tokens: 3e12").max_tokens, Some(3_000_000_000_000));
    assert_eq!(read("sample_prompt: \"no\"").sample_prompt.as_deref(), Some("no"));
    let refused = [
        ("max_token: 3", "`train.max_token`: unknown key; did you mean `train.max_tokens`?"),
        ("min_lr: fast", "`train.min_lr`: expected a number, got `fast`"),
        ("sample_prompt: no", "`train.sample_prompt`: expected text or null, got `false`"),
    ];
    for (line, want) in refused {
        assert_eq!(problems(&with(line), &[]), [want]);
    }
    for (text, want) in [
        ("train:\n  max_steps: 1\n  max_steps: 2\n", "duplicate mapping key: max_steps"),
        ("train:\n\tmax_steps: 1\n", "tabs disallowed"),
    ] {
        let error = format!("{:#}", config::parse(text, &[]).unwrap_err());
        assert!(error.contains(want) && error.contains('^') && error.contains("line "), "{error}");
    }
}

#[test]
fn ranks_that_cannot_be_are_refused_and_the_batch_is_theirs() {
    let zero = problems(BASE, &["devices=0", "num_nodes=0", "distributed.timeout=0"]);
    let want = ["`devices`: must be", "`num_nodes`: must be", "`distributed.timeout`: must be"];
    assert!(zero.iter().zip(want).all(|(got, want)| got.starts_with(want)), "{zero:?}");
    let card = problems(BASE, &["devices=2", "device=cuda:1"]);
    assert!(card[0].starts_with("`device`: `cuda:1` is one card, but `devices` asks"), "{card:?}");
    let batch = problems(BASE, &["devices=3", "num_nodes=2"]);
    assert!(batch[0].contains("512 is not divisible by 6 rank(s) x "), "{batch:?}");
    let config = parse(BASE, &["devices=8", "num_nodes=2"]);
    assert_eq!(config.ranks(), 16);
    assert_eq!(config.distributed.period().as_secs_f64(), 1.0);
}

#[test]
fn absurd_sizes_are_refused_at_once_instead_of_hanging_or_wrapping() {
    let micro = problems(BASE, &["train.micro_batch_size=1e12"]);
    assert!(micro[0].contains("512 is not divisible"), "{micro:?}");
    assert!(micro[0].ends_with("or `train.micro_batch_size` to 512"), "{micro:?}");
    // 2^53 sequences of 2048 tokens are 2^64 tokens.
    let global = problems(BASE, &["train.global_batch_size=9007199254740992"]);
    assert!(global[0].contains("18446744073709551616 tokens a step"), "{global:?}");
    let none = BatchPlan::new(&parse(BASE, &[]), 2048, 0).unwrap_err();
    assert_eq!(none.problems, ["a run needs at least 1 rank, got 0"]);
}

#[test]
fn lengths_and_rates_that_cannot_be_are_refused() {
    let by_tokens = "data: {train: [{path: x}]}\ntrain: {max_tokens: 1e9}\n";
    assert_eq!(
        problems(by_tokens, &[]),
        ["`train.lr_warmup_steps`: 2000 is longer than the run of 953 \
          (whole steps in `train.max_tokens`)"]
    );
    assert_eq!(
        problems(BASE, &["train.max_tokens=0", "train.lr_warmup_steps=0"]),
        ["`train.max_tokens`: must be at least 1, got 0"]
    );
    let negative = ["`train.min_lr`: must be at least 0, got -1"];
    assert_eq!(problems(BASE, &["train.min_lr=-1"]), negative);
    let loss = [
        "`train.label_smoothing`: must be in [0, 1), got 1",
        "`train.z_loss`: must be at least 0, got -0.1",
    ];
    assert_eq!(problems(BASE, &["train.label_smoothing=1", "train.z_loss=-0.1"]), loss);
    let zero = ["`train.global_batch_size`: must be at least 1, got 0"];
    assert_eq!(problems(BASE, &["train.global_batch_size=0"]), zero);
    assert_eq!(problems("[1, 2]", &[]), ["the file: expected a table of keys, got a list of 2"]);
}

#[test]
fn memory_formats_of_the_optimizer_belong_to_mixed_precision() {
    let c = parse(BASE, &["optimizer.state=int8", "optimizer.master=split"]);
    assert_eq!((c.optimizer.state, c.optimizer.master), (StateFormat::Int8, MasterFormat::Split));
    assert_eq!(
        problems(BASE, &["optimizer.state=int4", "optimizer.master=int8"]),
        [
            "`optimizer.state`: expected one of `fp32`, `bf16`, `int8`, got `int4`; did you mean `int8`?",
            "`optimizer.master`: expected one of `fp32`, `split`, `bf16`, got `int8`"
        ]
    );
    let smaller = ["precision=32-true", "optimizer.state=int8", "optimizer.master=split"];
    let got = problems(BASE, &smaller);
    assert_eq!(
        got,
        [
            "`optimizer.state`: `int8` needs `precision: bf16-mixed` or `fp8-mixed`; `32-true` keeps one fp32 copy of the \
             weights and fp32 moments and takes `fp32` only",
            "`optimizer.master`: `split` needs `precision: bf16-mixed` or `fp8-mixed`; `32-true` keeps one fp32 copy of the \
             weights and fp32 moments and takes `fp32` only"
        ]
    );
    let bf16 = problems(BASE, &["precision=bf16-true", "optimizer.master=bf16"]);
    assert!(bf16[0].contains("bf16 weights and moments already"), "{bf16:?}");
}

#[test]
fn state_on_the_host_needs_a_gpu_mixed_precision_and_fused_kernels() {
    assert!(!parse(BASE, &[]).optimizer.cpu_offload);
    assert!(parse(BASE, &["optimizer.cpu_offload=true"]).optimizer.cpu_offload);
    let on = "optimizer.cpu_offload=true";
    let needs = "`optimizer.cpu_offload`: needs a GPU, `precision: bf16-mixed` or `fp8-mixed`, and `fused: true`; got";
    for (setting, got) in [
        ("precision=32-true", "`precision: 32-true`"),
        ("precision=bf16-true", "`precision: bf16-true`"),
        ("fused=false", "`fused: false`"),
        ("device=cpu", "`device: cpu`"),
    ] {
        assert_eq!(problems(BASE, &[on, setting]), [format!("{needs} {got}")]);
    }
    let both = problems(BASE, &[on, "device=cpu", "precision=32-true"]);
    assert_eq!(both, [format!("{needs} `precision: 32-true`, `device: cpu`")]);
    parse(BASE, &[on, "precision=fp8-mixed", "device=cuda:1"]);
}

#[test]
fn overrides_reach_into_default_lists_and_older_spellings_of_rope_scaling() {
    let c = parse(BASE, &["optimizer.betas.1=0.99"]);
    assert_eq!(c.optimizer.betas, [0.9, 0.99]);
    let c = parse(BASE, &["model_config.rope_scaling={type: linear, factor: 4}"]);
    assert_eq!(c.model().unwrap().rope_scaling.unwrap().factor, 4.0);
    let width = problems(BASE, &["model_config.n_embd=2050"]);
    assert!(width[0].contains("2050 is not divisible by `n_head` = 32"), "{width:?}");
}

#[test]
fn the_command_line_exits_with_2_on_a_wrong_configuration_and_prints_a_right_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let run = |args: &[&str]| {
        let output = cargo_bin_cmd!("tinyllama").current_dir(root).args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let file = "configs/tinyllama.yaml";
    let (code, out, err) = run(&["config", "check", file, "--devices", "16"]);
    assert_eq!(code, Some(0), "{err}");
    let whole = config::load(&root.join(file), &["devices=16".to_owned()]).unwrap();
    assert_eq!(config::parse(&out, &[]).unwrap(), whole);
    assert!(err.contains("8 accumulation = 2,097,152 tokens/step"), "{err}");
    let (code, out, err) = run(&["config", "check", file, "--set", "train.max_stps=1"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(err.contains("did you mean `train.max_steps`?"), "{err}");
    assert_eq!(run(&["config", "explain", "train.max_nrm"]).0, Some(2));
    assert!(run(&["config", "models"]).1.contains("1,100,048,384"));
}

/// Texts that YAML could take for something else, beside any other.
fn any_text() -> impl Strategy<Value = String> {
    let tricky = ["no", "1e5", "3_000", "~", "0x1f", "- a", "a: b", "2024-01-01", "", " x", "null"];
    prop_oneof![
        proptest::sample::select(tricky.to_vec()).prop_map(String::from),
        "[ -~]{0,24}",
        "[ \n\t:#a-z'\"]{0,60}",
        "\\PC{0,12}",
    ]
}

proptest! {
    #[test]
    fn a_resolved_configuration_is_read_back_as_it_was(
        prompt in proptest::option::of(any_text()),
        (out, resume) in (any_text(), any_text()),
        seed in any::<u64>(),
        (lr, eps, weight) in (1e-12f64..1e3, 1e-12f64..1.0, 1e-9f64..1e9),
        steps in 2000u64..u64::MAX,
        time in proptest::option::of(1e-3f64..1e9),
    ) {
        let mut c = RunConfig::default();
        (c.out_dir, c.resume, c.seed) = (out.into(), Resume::Text(resume), seed);
        (c.optimizer.lr, c.optimizer.eps, c.train.min_lr) = (lr, eps, lr / 10.0);
        (c.train.max_steps, c.train.max_time, c.train.sample_prompt) = (Some(steps), time, prompt);
        c.data.train = vec![DataSource { path: "x".into(), weight: weight.into() }];
        let text = config::to_yaml(&c).unwrap();
        prop_assert_eq!(config::parse(&text, &[]).unwrap(), c, "{}", text);
    }
}

#[test]
fn a_model_that_no_checkpoint_can_hold_is_refused_before_it_trains() {
    let got = problems(BASE, &["model_config.rotary_percentage=0.5", "model_config.bias=true"]);
    assert_eq!(got.len(), 2, "{got:?}");
    assert!(got[0].contains("`model_config.rotary_percentage`: a Llama rotates whole heads"));
    assert!(got[1].contains("must be equal in a Llama"), "{got:?}");
}

#[test]
fn fp8_and_memory_limits_that_cannot_work_are_refused() {
    let problems = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let path = std::path::Path::new("configs/tinyllama-h100-fp8.yaml");
        match tinyllama::config::load(path, &sets) {
            Ok(_) => String::new(),
            Err(e) => format!("{e:#}"),
        }
    };
    assert_eq!(problems(&[]), "");
    let error = problems(&["fused=false"]);
    assert!(error.contains("`fused`") && error.contains("fp8-mixed"), "{error}");
    let error = problems(&["train.max_seq_length=1001"]);
    assert!(error.contains("needs a multiple of 16, got 1001"), "{error}");
    let error = problems(&["devices=2"]);
    assert!(error.contains("`distributed.strategy`") && error.contains("`ddp`"), "{error}");
    assert_eq!(problems(&["devices=2", "distributed.strategy=ddp"]), "");
    let error = problems(&["memory_limit=-1"]);
    assert!(error.contains("`memory_limit`: must be above 0 GiB"), "{error}");
    // Without a card: one message before training.
    let model = tinyllama::model::ModelConfig::preset("tiny-llama-1.1b").unwrap();
    let reason = tinyllama::model::fp8_obstacle(&model, tch::Device::Cpu).unwrap();
    assert!(reason.is_some_and(|reason| reason.contains("needs a CUDA card")));
}

#[test]
fn a_reader_that_stops_early_is_no_failure_to_tell_of() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tinyllama"));
    command.args(["config", "explain"]).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
}
