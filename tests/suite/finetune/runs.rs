//! `tinyllama finetune` on a tiny base, from the configuration to the folder it leaves.

use super::*;

/// A tiny model with the quickstart's tokenizer, and conversations beside it.
pub(super) struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base/final"); // a run's folder, as people name it
        quickstart_like(&base);
        let row = |i: usize| {
            let (question, answer) =
                (format!("What comes after {i}?"), format!("After it comes {}.", i + 1));
            format!("{{\"text\": \"### Human: {question}### Assistant: {answer}\"}}\n")
        };
        std::fs::write(dir.path().join("rows.jsonl"), (0..40).map(row).collect::<String>())
            .unwrap();
        Self { dir }
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Runs `finetune` with these lines of YAML.
    pub(super) fn finetune(&self, yaml: &str, args: &[&str]) -> Output {
        let text = format!(
            "initial_checkpoint_dir: {}\nout_dir: {}\ndevice: cpu\nprecision: 32-true\n{yaml}",
            self.path("base"),
            self.path("out")
        );
        std::fs::write(self.path("run.yaml"), text).unwrap();
        let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
        command.args(["finetune", &self.path("run.yaml")]).args(args).output().unwrap()
    }
}

pub(super) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Losses of the training steps in metrics.jsonl.
pub(super) fn losses(out: &str) -> Vec<f64> {
    let lines = std::fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
    let objects = lines.lines().map(|line| serde_json::from_str(line).unwrap());
    objects.filter_map(|object: serde_json::Value| object.get("loss")?.as_f64()).collect()
}

pub(super) const STEPS: &str = "train: {max_seq_length: 96, global_batch_size: 4, micro_batch_size: 2, max_steps: 12, save_interval: 6}\n\
                     optimizer: {lr: 0.01}\n";

#[test]
fn lora_learns_is_resumed_and_its_folder_is_a_model() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  method: lora\n  lora: {{r: 4, targets: [all], dropout: 0.1}}\n  data: {{train: {}, template: guanaco, val_fraction: 0.2}}\n",
        folder.path("rows.jsonl")
    );
    let output = folder.finetune(&yaml, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let told = text(&output);
    assert!(told.contains("adapters    rank 4 at all"), "{told}");
    assert!(told.contains("40 conversations"), "{told}");
    let straight = losses(&folder.path("out"));
    assert_eq!(straight.len(), 12);
    assert!(straight[11] < 0.9 * straight[0], "{straight:?}");

    // From the middle on again: the same losses.
    std::fs::remove_dir_all(folder.path("out/final")).unwrap();
    std::fs::remove_dir_all(folder.path("out/step-00000012")).ok();
    let output = folder.finetune(&yaml, &["--resume", "auto"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("resume      step 6"), "{}", text(&output));
    assert_eq!(losses(&folder.path("out"))[6..], straight[6..]);

    // The folder of adapters is read as the merged model, by its tokenizer and template.
    let merged = folder.path("merged");
    let mut convert = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    let output = convert
        .args(["convert", &folder.path("out/final"), &merged, "--to", "hf"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let score = |dir: &str| {
        let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
        let args = [
            "score",
            "--device",
            "cpu",
            "--precision",
            "32-true",
            "--text",
            "After it comes 3.",
            "--checkpoint",
            dir,
        ];
        let output = command.args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(score(&folder.path("out/final")), score(&merged));
    assert!(Path::new(&merged).join("chat_template.jinja").is_file());
}

#[test]
fn all_weights_learn_and_rows_may_stay_apart() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{train: {}, template: chatml, packing: false, loss_on: all}}\n",
        folder.path("rows.jsonl")
    );
    let output =
        folder.finetune(&yaml, &["--set", "data.epochs=1", "--set", "train.max_steps=null"]);
    assert!(output.status.success(), "{}", text(&output));
    let told = text(&output);
    assert!(told.contains("micro-batches of 2 of like length"), "{told}");
    assert!(told.contains("length      10 steps"), "40 conversations, 4 a step: {told}");
    let losses = losses(&folder.path("out"));
    assert!(losses[9] < 0.9 * losses[0], "{losses:?}");
    assert!(Path::new(&folder.path("out/final/model.safetensors")).is_file());
}

#[test]
fn qlora_learns_with_blocks_computed_again_and_few_bytes_of_state() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  method: qlora\n  lora: {{r: 8, targets: [all], dropout: 0.0}}\n  data: {{train: {}, template: guanaco}}\n",
        folder.path("rows.jsonl")
    );
    let sets =
        ["precision=bf16-mixed", "optimizer.state=int8", "train.activation_checkpointing=block"];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let output = folder.finetune(&yaml, &args);
    assert!(output.status.success(), "{}", text(&output));
    let losses = losses(&folder.path("out"));
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");
    let file = folder.path("out/final/adapter_model.safetensors");
    let file = checkpoint::tensors::TensorFile::open(file.as_ref()).unwrap();
    assert_eq!(file.names().len(), 2 * 7 * 2, "two matrices beside each of seven in two blocks");
    let shape = file.shape("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight");
    assert_eq!(shape, Some(vec![64, 8]));
}

#[test]
fn new_tokens_get_rows_and_are_saved_with_the_checkpoint() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{train: {}, template: chatml, special_tokens: [\"<|im_start|>\", \"<|im_end|>\"]}}\n",
        folder.path("rows.jsonl")
    );
    let output = folder.finetune(&yaml, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let dir = PathBuf::from(folder.path("out/final"));
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let n = Tokenizer::load("data/quickstart/tokenizer".as_ref()).unwrap().vocab_size() as u32;
    assert_eq!(tokenizer.id_of("<|im_start|>"), Some(n));
    assert_eq!(tokenizer.encode("<|im_end|>", false, false).unwrap(), [n + 1]);
    let rows = i64::from((n + 2).next_multiple_of(8));
    assert_eq!(checkpoint::load_config(&dir).unwrap().padded_vocab_size, rows);
    // What the run wrote down runs again.
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    let config = folder.path("out/config.yaml");
    let args = ["finetune", &config, "--resume", "auto", "--set", "train.max_steps=13"];
    let output = command.args(args).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(losses(&folder.path("out")).len(), 13);
}

#[test]
fn two_ranks_finetune_as_one() {
    let folder = Folder::new();
    let pairs = folder.path("pairs.jsonl");
    let row = |i: usize| {
        format!(
            "{{\"prompt\": \"After {i}?\", \"chosen\": \"{}\", \"rejected\": \"No, no.\"}}\n",
            i + 1
        )
    };
    std::fs::write(&pairs, (0..40).map(row).collect::<String>()).unwrap();
    let rows = folder.path("rows.jsonl");
    let runs = [
        (
            "tokens",
            format!(
                "method: full, data: {{train: {rows}, template: chatml, special_tokens: [\"<|im_end|>\"]}}"
            ),
        ),
        (
            "apart",
            format!("method: full, data: {{train: {rows}, template: guanaco, packing: false}}"),
        ),
        (
            "lora",
            format!(
                "method: lora, lora: {{targets: [all], dropout: 0.0}}, data: {{train: {rows}, template: guanaco}}"
            ),
        ),
        (
            "dpo",
            format!(
                "method: dpo, lora: {{targets: [all], dropout: 0.0}}, data: {{train: {pairs}, template: guanaco}}"
            ),
        ),
        (
            "copy",
            format!(
                "method: dpo, dpo: {{reference: copy}}, data: {{train: {pairs}, template: guanaco}}"
            ),
        ),
    ];
    for (name, finetune) in &runs {
        let yaml = format!(
            "train: {{max_seq_length: 96, global_batch_size: 8, micro_batch_size: 2, max_steps: 6, save_interval: 3}}\n\
             optimizer: {{lr: 1e-3}}\nfinetune: {{{finetune}}}\n"
        );
        let run = |ranks: &str, more: &[&str]| {
            let sharded = if more.is_empty() { "" } else { "-sharded" };
            let out = folder.path(&format!("{name}-{ranks}{sharded}"));
            let set = format!("out_dir={out}");
            let output =
                folder.finetune(&yaml, &[&["--set", &set, "--devices", ranks], more].concat());
            assert!(output.status.success(), "{name}, {ranks}: {}", text(&output));
            let lines = std::fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
            let objects = lines.lines().map(|line| serde_json::from_str(line).unwrap());
            let numbers = |object: serde_json::Value| {
                let number = |key: &str| object.get(key).and_then(|n| n.as_f64());
                Some([
                    number("loss")?,
                    number("grad_norm")?,
                    number("reward_margin").unwrap_or(0.0),
                ])
            };
            objects.filter_map(numbers).collect::<Vec<[f64; 3]>>()
        };
        let (one, two) = (run("1", &[]), run("2", &[]));
        let alike = |one: &[[f64; 3]], two: &[[f64; 3]]| {
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-5 * a.abs() + 1e-7;
            one.len() == 6 && one.iter().flatten().zip(two.iter().flatten()).all(close)
        };
        assert!(alike(&one, &two), "{name}: {one:?} {two:?}");
        if *name == "copy" {
            let sharded = run("2", &["--set", "distributed.strategy=full_shard"]);
            assert!(alike(&one, &sharded), "{name}, sharded: {one:?} {sharded:?}");
            let from = folder.path("copy-2-sharded/step-00000003");
            let set = format!("out_dir={}", folder.path("copy-3"));
            let output = folder.finetune(&yaml, &["--set", &set, "--resume", &from]);
            assert!(output.status.success(), "{}", text(&output));
            let resumed = losses(&folder.path("copy-3"));
            assert!(resumed.iter().zip(&one[3..]).all(|(a, b)| (a / b[0] - 1.0).abs() < 1e-5));
        }
        if *name == "lora" {
            // What two ranks saved, one goes on with.
            let from = folder.path("lora-2/step-00000003");
            let set = format!("out_dir={}", folder.path("lora-3"));
            let output = folder.finetune(&yaml, &["--set", &set, "--resume", &from]);
            assert!(output.status.success(), "{}", text(&output));
            let resumed = losses(&folder.path("lora-3"));
            assert_eq!(resumed.len(), 3);
            assert!(resumed.iter().zip(&one[3..]).all(|(a, b)| (a / b[0] - 1.0).abs() < 1e-5));
        }
    }
    let yaml = format!("{STEPS}finetune: {{{}}}\n", runs[2].1);
    let output = folder.finetune(&yaml, &["--set", "distributed.strategy=full_shard"]);
    assert!(text(&output).contains("take `ddp`"), "{}", text(&output));
}

#[test]
fn margins_rise_where_preferences_are_learned() {
    preferences_are_learned(
        &["lora: {targets: [all], dropout: 0.0}", "dpo: {reference: copy}"],
        &[],
        1e-6,
    );
}

#[test]
fn on_the_card_margins_rise() {
    if card("on_the_card_margins_rise").is_none() {
        return; // else not kept: the folder of the test takes the same lock
    }
    let sets = [
        "device=cuda",
        "precision=bf16-mixed",
        "optimizer.state=int8",
        "optimizer.cpu_offload=true",
    ];
    preferences_are_learned(&["lora: {targets: [all], dropout: 0.0}"], &sets, 1e-2);
    preferences_are_learned(&["dpo: {reference: copy}"], &sets[..2], 1e-2);
}

/// `off`: how far from nothing the first margin may be.
fn preferences_are_learned(methods: &[&str], sets: &[&str], off: f64) {
    let folder = Folder::new();
    let row = |i: usize| {
        format!(
            "{{\"prompt\": \"What comes after {i}?\", \"chosen\": \"After it comes {}.\", \"rejected\": \"No.\"}}\n",
            i + 1
        )
    };
    let rows = folder.path("pairs.jsonl");
    std::fs::write(&rows, (0..40).map(row).collect::<String>() + "{\"prompt\": \"x\"}\n").unwrap();
    for method in methods {
        let yaml = format!(
            "{STEPS}finetune:\n  method: dpo\n  {method}\n  data: {{train: {rows}, template: guanaco, val_fraction: 0.1}}\n"
        );
        let out = format!("out_dir={}", folder.path(&method[..3]));
        let sets = sets.iter().copied().chain([out.as_str()]);
        let args: Vec<&str> = sets.flat_map(|set| ["--set", set]).collect();
        let output = folder.finetune(&yaml, &args);
        let told = text(&output);
        assert!(output.status.success(), "{told}");
        assert!(told.contains("40 preferences") && told.contains("left out 1 row(s)"), "{told}");
        let lines = std::fs::read_to_string(folder.path(&method[..3]) + "/metrics.jsonl").unwrap();
        let objects: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |key: &str| -> Vec<f64> {
            objects.iter().filter_map(|object| object.get(key)?.as_f64()).collect()
        };
        let (margins, right) = (of("reward_margin"), of("reward_accuracy"));
        assert!(
            margins[0].abs() < off && margins[11] > margins[3] && margins[11] > 0.1,
            "{margins:?}"
        );
        assert_eq!(right[11], 1.0, "{right:?}");
        let val = of("val_loss");
        assert!(
            (val[0] - std::f64::consts::LN_2).abs() < 10.0 * off && val[val.len() - 1] < val[0],
            "{val:?}"
        );
    }
}

#[test]
fn every_shipped_configuration_of_finetuning_is_valid_and_survives_a_round_trip() {
    let folder = Folder::new();
    let base = format!("initial_checkpoint_dir={}", folder.path("base"));
    let mut seen = 0;
    for entry in std::fs::read_dir("configs/finetune").unwrap() {
        let path = entry.unwrap().path();
        let sets = [base.clone(), "train.max_seq_length=64".into()];
        let config = config::load_finetune(&path, &sets).unwrap_or_else(|e| panic!("{e:#}"));
        let again = config::parse_finetune(&config::to_yaml(&config).unwrap(), &[]).unwrap();
        assert_eq!(config, again, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "{seen}");
}

#[test]
fn what_cannot_be_finetuned_is_told_before_it_begins() {
    let folder = Folder::new();
    let rows = folder.path("rows.jsonl");
    let lora = |lora: &str| {
        format!(
            "{STEPS}finetune:\n  method: lora\n  lora: {lora}\n  data: {{train: {rows}, template: guanaco}}\n"
        )
    };
    for (yaml, code, words) in [
        (STEPS.to_owned(), 2, vec!["`finetune`: needs at least"]),
        (format!("{STEPS}finetune: {{method: full}}\n"), 2, vec!["`finetune.data.train`: needs"]),
        (lora("{targets: [q_porj]}"), 2, vec!["`q_porj` is no matrix", "`q_proj`"]),
        (lora("{r: 0, dropout: 1.5}"), 2, vec!["`finetune.lora.r`", "`finetune.lora.dropout`"]),
        (
            format!("{STEPS}finetune: {{data: {{train: {rows}}}}}\n"),
            2,
            vec!["has no chat template"],
        ),
        (
            format!("{STEPS}finetune: {{data: {{train: {rows}, template: nope}}}}\n"),
            2,
            vec!["`nope` is no chat template"],
        ),
        (
            format!(
                "model_name: pythia-1b\n{STEPS}finetune: {{data: {{train: {rows}, template: guanaco}}}}\n"
            ),
            2,
            vec!["another one than they name"],
        ),
        (
            format!(
                "{STEPS}finetune: {{data: {{train: {}/none.jsonl, template: guanaco}}}}\n",
                folder.path("")
            ),
            2,
            vec!["no sft files at"],
        ),
    ] {
        let output = folder.finetune(&yaml, &[]);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(code), "{yaml}{told}");
        for word in words {
            assert!(told.contains(word), "`{word}` is not in {told}");
        }
        assert!(!Path::new(&folder.path("out")).exists(), "{yaml}");
    }
}

#[test]
fn conversations_without_a_target_are_left_out_and_none_left_is_an_error() {
    let folder = Folder::new();
    for (method, words) in [
        ("full", "no conversation has a target within 4 tokens"),
        ("dpo", "no answers of a pair have a target within 4 tokens"),
    ] {
        let rows = folder.path("few.jsonl");
        let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"What comes after three?\"}, \
                   {\"role\": \"assistant\", \"content\": \"Four.\"}], \"prompt\": \"What comes after three?\", \
                   \"chosen\": \"Four.\", \"rejected\": \"No.\"}\n";
        std::fs::write(&rows, row).unwrap();
        let yaml = format!(
            "train: {{max_seq_length: 4, global_batch_size: 1, micro_batch_size: 1, max_steps: 1}}\n\
             finetune: {{method: {method}, data: {{train: {rows}, template: guanaco}}}}\n"
        );
        let output = folder.finetune(&yaml, &[]);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(words) && told.contains("raise `train.max_seq_length`"), "{told}");
        assert!(!Path::new(&folder.path("out")).exists());
    }
}

#[test]
fn rows_that_hold_no_conversation_are_counted_and_the_first_shown() {
    let folder = Folder::new();
    let bad = folder.path("bad.jsonl");
    let good = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    std::fs::write(&bad, format!("{good}{{\"x\": 1}}\n{{\"messages\": 3}}\n7\n{{}}\n{good}"))
        .unwrap();
    let yaml = format!("{STEPS}finetune: {{data: {{train: {bad}, template: guanaco}}}}\n");
    let output = folder.finetune(
        &yaml,
        &[
            "--set",
            "train.max_steps=1",
            "--set",
            "train.micro_batch_size=1",
            "--set",
            "train.global_batch_size=1",
        ],
    );
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("2 conversations"), "{told}");
    for words in [
        "left out 4 row(s)",
        "row 2: no `messages`",
        "row 3: `messages` is no list",
        "no JSON object",
    ] {
        assert!(told.contains(words), "`{words}` is not in {told}");
    }
    std::fs::write(&bad, "{\"x\": 1}\n").unwrap();
    let output = folder.finetune(&yaml, &["--resume", "false", "--set", "out_dir=elsewhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("no conversation in"), "{}", text(&output));
}

#[test]
fn a_gguf_file_is_finetuned_with_a_tokenizer_beside_it_or_asks_for_one() {
    let folder = Folder::new();
    let gguf = folder.path("one/base.gguf");
    std::fs::create_dir(folder.path("one")).unwrap();
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    command.args(["convert", &folder.path("base"), &gguf, "--to", "gguf"]).assert().success();
    let yaml = format!(
        "{STEPS}finetune: {{data: {{train: {}, template: guanaco}}}}\n",
        folder.path("rows.jsonl")
    );
    let from = format!("initial_checkpoint_dir={gguf}");
    let output = folder.finetune(&yaml, &["--set", &from]);
    let told = text(&output);
    assert_eq!(output.status.code(), Some(2), "{told}");
    for word in ["`tokenizer_dir`", "a file without a tokenizer beside it", "FOLDER --to hf"] {
        assert!(told.contains(word), "`{word}` is not in {told}");
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let from = format!("data/quickstart/tokenizer/{file}");
        std::fs::copy(from, folder.path(&format!("one/{file}"))).unwrap();
    }
    let output = folder.finetune(&yaml, &["--set", &from, "--set", "train.max_steps=2"]);
    assert!(output.status.success(), "{}", text(&output));
}
