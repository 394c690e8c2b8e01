//! Whole runs through the program: resume, signals, and what it says when it cannot go on.

use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A small run on 4,000 tokens of a known pattern, without a tokenizer.
pub struct Setup {
    pub dir: tempfile::TempDir,
}

impl Setup {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, salt) in [("train", 7), ("val", 13)] {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            let mut writer = tinyllama::data::packed::PackedWriter::new(&path, name, 1000, 90);
            let tokens: Vec<u32> = (0..4000u32).map(|i| (i * i / salt + i) % 90).collect();
            writer.add(&tokens).unwrap();
            writer.finish().unwrap();
        }
        let yaml = "
model_name: tiny-llama-120m
model_config: {n_layer: 2, n_head: 4, n_query_groups: 2, n_embd: 32, intermediate_size: 48,
               vocab_size: 96, block_size: 16}
precision: 32-true
device: cpu
data: {train: [{path: DIR/train}], val: DIR/val}
train: {global_batch_size: 8, micro_batch_size: 4, max_steps: 20, lr_warmup_steps: 3, min_lr: 1e-4,
        save_interval: 5, log_interval: 1}
eval: {interval: 10, max_iters: 4}
optimizer: {lr: 3e-3}
";
        let yaml = yaml.replace("DIR", &dir.path().display().to_string());
        fs::write(dir.path().join("run.yaml"), yaml).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn args(&self, out: &str, more: &[&str]) -> Vec<String> {
        let config = self.path("run.yaml").display().to_string();
        let out = format!("out_dir={}", self.path(out).display());
        let mut args = vec!["pretrain".into(), config, "--set".into(), out];
        args.extend(more.iter().map(|s| s.to_string()));
        args
    }

    pub fn run(&self, out: &str, more: &[&str]) -> Output {
        cargo_bin_cmd!("tinyllama").args(self.args(out, more)).output().unwrap()
    }

    pub fn start(&self, out: &str, more: &[&str]) -> std::process::Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinyllama"));
        let command = command.args(self.args(out, more)).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// (step, loss, grad_norm, lr) of every logged step, exact.
    pub fn losses(&self, out: &str) -> Vec<(u64, f64, f64, f64)> {
        let text = fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap_or_default();
        let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let float = |v: &Value, key: &str| v[key].as_f64();
        rows.filter_map(|v| {
            let step = v["step"].as_u64()?;
            Some((step, float(&v, "loss")?, float(&v, "grad_norm")?, float(&v, "lr")?))
        })
        .collect()
    }
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model.safetensors")).unwrap()
}

#[test]
fn a_run_killed_at_step_seven_and_resumed_equals_one_that_was_not_bit_for_bit() {
    let mixed = "precision=bf16-mixed";
    let settings = [
        ["precision=32-true"; 3],
        [mixed; 3],
        [mixed, "optimizer.master=split", "optimizer.state=int8"],
        [mixed, "optimizer.master=bf16", "optimizer.state=bf16"],
    ];
    for settings in settings {
        let s = Setup::new();
        let more = settings.map(|setting| ["--set", setting]).concat();
        let straight = s.run("straight", &more);
        assert!(straight.status.success(), "{}", text(&straight));

        let mut child = s.start("killed", &more);
        wait_for("step 7", || s.losses("killed").iter().any(|row| row.0 >= 7));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        let resumed = s.run("killed", &[&more[..], &["--resume", "auto"]].concat());
        assert!(resumed.status.success(), "{}", text(&resumed));

        assert_eq!(s.losses("straight").len(), 20);
        assert_eq!(s.losses("straight"), s.losses("killed"));
        let (a, b) = (s.path("straight/final"), s.path("killed/final"));
        assert_eq!(weights(&a), weights(&b));
        let optimizer = "train_state/optimizer.safetensors";
        assert_eq!(fs::read(a.join(optimizer)).unwrap(), fs::read(b.join(optimizer)).unwrap());
    }
}

#[test]
fn a_signal_saves_and_exits_with_its_code_and_the_run_goes_on_from_there() {
    let s = Setup::new();
    let straight = s.run("straight", &[]);
    assert!(straight.status.success());
    for (signal, code) in [("-TERM", 143), ("-INT", 130)] {
        let out = format!("stopped{signal}");
        let child = s.start(&out, &["--set", "train.save_interval=null"]);
        wait_for("step 3", || s.losses(&out).iter().any(|row| row.0 >= 3));
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        // A fast machine may have finished before the signal came.
        if output.status.code() != Some(0) {
            assert_eq!(output.status.code(), Some(code), "{}", text(&output));
            assert!(text(&output).contains("--resume auto"), "{}", text(&output));
        }
        let more = ["--set", "train.save_interval=null", "--resume", "auto"];
        assert!(s.run(&out, &more).status.success());
        assert_eq!(s.losses("straight"), s.losses(&out));
    }
}

#[test]
fn a_finished_run_keeps_its_newest_checkpoints_and_validates_over_the_whole_set() {
    let s = Setup::new();
    let output = s.run("run", &["--set", "train.keep_last=2"]);
    let stderr = text(&output);
    assert!(output.status.success(), "{stderr}");
    let out = s.path("run");
    let exists = |name: &str| out.join(name).exists();
    assert!(!exists("step-00000005") && exists("step-00000010") && exists("step-00000015"));
    for file in ["config.yaml", "metrics.jsonl", "loss.png", "final/config.json"] {
        assert!(exists(file), "{file}");
    }
    for word in ["2 accumulation = 128 tokens/step", "checkpoint", "loss curve", "try next"] {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    let first = s.losses("run")[0].1;
    let last = s.losses("run")[19].1;
    assert!(last < first - 0.2, "{first} -> {last}");

    // The same again: refused, nothing lost; `auto` finds it finished and leaves all as it is.
    let again = s.run("run", &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again).contains("--resume auto"), "{}", text(&again));
    let metrics = || fs::read(out.join("metrics.jsonl")).unwrap();
    let modified = || out.join("final/model.safetensors").metadata().unwrap().modified().unwrap();
    let before = (metrics(), modified());
    let resumed = s.run("run", &["--resume", "auto"]);
    assert!(resumed.status.success(), "{}", text(&resumed));
    for word in ["finished    step 20 was the last", "raise `train.max_steps`", "try next"] {
        assert!(text(&resumed).contains(word), "{word}: {}", text(&resumed));
    }
    assert!(before == (metrics(), modified()), "something was written");
    let longer = s.run("run", &["--resume", "auto", "--set", "train.max_steps=22"]);
    assert!(longer.status.success(), "{}", text(&longer));
    assert_eq!(s.losses("run").last().unwrap().0, 22);
}

#[test]
fn checkpoints_later_than_the_one_gone_on_from_step_aside() {
    let s = Setup::new();
    let with = |save: &str, keep: &str, steps: &str| {
        let sets = [("save_interval", save), ("keep_last", keep), ("max_steps", steps)];
        sets.map(|(key, value)| format!("train.{key}={value}"))
    };
    let run = |sets: &[String], resume: &str| {
        let mut more = vec!["--resume", resume, "--set", "eval.interval=null"];
        more.extend(sets.iter().flat_map(|set| ["--set", set]));
        let output = s.run("run", &more);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    run(&with("2", "3", "8"), "auto");
    let from = s.path("run/step-00000002").display().to_string();
    let told = run(&with("2", "1", "6"), &from);
    assert_eq!(told.matches("aside       a later checkpoint is now").count(), 3, "{told}");
    let there = |name: &str| s.path("run").join(name).join("config.json").is_file();
    for name in
        ["aside-step-00000004", "aside-step-00000006", "aside-final", "step-00000004", "final"]
    {
        assert!(there(name), "{name}");
    }
    assert!(!there("step-00000006") && !there("step-00000002"));
    let told = run(&with("2", "1", "6"), "auto");
    assert!(told.contains("finished    step 6 was the last"), "{told}");
}

#[test]
fn a_final_that_cannot_be_gone_on_from_is_not_replaced() {
    let s = Setup::new();
    let more = ["--set", "train.max_steps=6", "--set", "train.save_interval=3"];
    assert!(s.run("run", &more).status.success());
    let (state, weights) = (s.path("run/final/train_state"), s.path("run/final/model.safetensors"));
    let before = fs::read(&weights).unwrap();
    for damage in ["{", ""] {
        match damage {
            "" => fs::remove_dir_all(&state).unwrap(),
            text => fs::write(state.join("state.json"), text).unwrap(),
        }
        for (steps, resume) in [(true, "auto"), (true, "false"), (false, "auto"), (false, "false")]
        {
            let aside = s.path("aside");
            let step = s.path("run/step-00000003");
            if !steps {
                fs::rename(&step, &aside).unwrap();
            }
            let again = s.run("run", &["--resume", resume, "--set", "train.max_steps=8"]);
            if !steps {
                fs::rename(&aside, &step).unwrap();
            }
            assert_eq!(again.status.code(), Some(1));
            let told = text(&again);
            assert!(told.contains("run/final") || told.contains("step-00000003"), "{told}");
            assert!(told.contains("hint:") && told.contains("out_dir"), "{told}");
            assert!(fs::read(&weights).unwrap() == before);
        }
    }
    // Gone on from an older one by name, the run leaves it too.
    let from = s.path("run/step-00000003").display().to_string();
    let gone_on = s.run("run", &["--resume", &from, "--set", "train.max_steps=4"]);
    assert!(gone_on.status.success(), "{}", text(&gone_on));
    assert!(fs::read(s.path("run/aside-final/model.safetensors")).unwrap() == before);
}

#[test]
fn continued_pretraining_starts_from_the_weights_with_a_fresh_optimizer() {
    let s = Setup::new();
    assert!(s.run("base", &[]).status.success());
    let from = format!("initial_checkpoint_dir={}", s.path("base").display());
    let next = s.run("next", &["--set", &from, "--set", "train.max_steps=3"]);
    assert!(next.status.success(), "{}", text(&next));
    let (base, next) = (s.losses("base"), s.losses("next"));
    assert_eq!(next[0].0, 1);
    assert!(next[0].1 < base[0].1 - 0.2, "{} {}", next[0].1, base[0].1);
    // At twice the context, positions condensed by two; another width is refused.
    let linear = "model_config.rope_scaling={rope_type: linear, factor: 2.0}";
    let long = ["--set", &from, "--set", "train.max_steps=1", "--set", "train.lr_warmup_steps=0"];
    let long = [&long[..], &["--set", "model_config.block_size=32", "--set", linear]].concat();
    let long = s.run("long", &long);
    assert!(long.status.success(), "{}", text(&long));
    assert!(
        text(&long).contains("positions   `block_size`: expected 16, got 32"),
        "{}",
        text(&long)
    );
    let wide = s.run("wide", &["--set", &from, "--set", "model_config.n_embd=64"]);
    assert!(text(&wide).contains("another architecture"), "{}", text(&wide));
}

#[test]
fn wrong_input_is_told_in_one_message_with_the_next_action_and_loses_nothing() {
    let s = Setup::new();
    assert!(s.run("good", &["--set", "train.max_steps=5"]).status.success());
    let before = weights(&s.path("good/final"));
    let other = format!("resume={}", s.path("good/final").display());
    let val = format!("data.val={}", s.path("broken").display());
    fs::create_dir(s.path("broken")).unwrap();
    fs::write(s.path("broken/x.bin"), b"LITPKDS\x01\0\0").unwrap();

    let tokenizer =
        concat!("tokenizer_dir=", env!("CARGO_MANIFEST_DIR"), "/data/quickstart/tokenizer");
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["--set", "train.max_step=3"], 2, &["unknown key", "`train.max_steps`"]),
        (&["--set", "train.micro_batch_size=3"], 2, &["8 is not divisible", "set it to 6 or 9"]),
        (&["--set", "train.max_seq_length=17"], 2, &["`block_size` = 16, got 17"]),
        (&["--set", "data.train.0.path=/no/such"], 1, &["no packed `.bin` files", "prepare"]),
        (&["--set", &val], 1, &["begins with `LITPKDS`, got 10 bytes"]),
        (&["--set", tokenizer], 2, &["4096", "96"]),
        (&["--set", "model_config.vocab_size=40"], 1, &["outside the model's vocabulary of 40"]),
        (
            &["--set", &other, "--set", "model_config.n_layer=3"],
            1,
            &["another architecture", "`n_layer`: expected 3, got 2"],
        ),
    ];
    for (args, code, words) in cases {
        let output = s.run("bad", args);
        let stderr = text(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") || stderr.contains("\nerror: "), "{stderr}");
        assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args:?}: `{word}` not in {stderr}");
        }
    }
    let missing = cargo_bin_cmd!("tinyllama").args(["pretrain", "/no/such.yaml"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
    assert_eq!(weights(&s.path("good/final")), before);
}

#[test]
fn a_model_too_large_for_the_memory_is_an_error_and_no_panic() {
    let s = Setup::new();
    let output = s.run("huge", &["--set", "model_config.n_embd=8388608"]);
    let stderr = text(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("DefaultCPUAllocator") && !stderr.contains("panicked"), "{stderr}");
    assert!(stderr.contains("hint: choose a smaller model"), "{stderr}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_step_group_and_checkpoint() {
    let s = Setup::new();
    let output = s.run("nan", &["--set", "optimizer.lr=1e30", "--set", "train.lr_warmup_steps=0"]);
    let stderr = text(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: step ") && stderr.contains("not finite in"), "{stderr}");
    assert!(stderr.contains("transformer.") || stderr.contains("no parameter alone"), "{stderr}");
    assert!(stderr.contains("hint: ") && stderr.contains("checkpoint"), "{stderr}");
}

#[test]
fn a_full_disk_stops_the_run_or_not_as_configured_and_spares_the_previous_checkpoint() {
    let s = Setup::new();
    let disk = s.path("disk");
    fs::create_dir(&disk).unwrap();
    // A checkpoint takes 0.3 MiB and wants 1.3 free: two fit, the third does not.
    let mount = ["-t", "tmpfs", "-o", "size=1800k", "tmpfs"];
    let mounted = Command::new("mount").args(mount).arg(&disk).output();
    if !mounted.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: this user may not mount a small file system");
        return;
    }
    let stop = s.run("disk/run", &[]);
    let more = ["--resume", "auto", "--set", "train.on_save_error=continue"];
    let goes_on = s.run("disk/run", &more);
    let last = s.losses("disk/run").last().map(|row| row.0);
    let survives = s.path("disk/run/step-00000010/train_state/state.json").is_file();
    let names = fs::read_dir(s.path("disk/run")).unwrap().flatten().map(|e| e.file_name());
    let unfinished = names.into_iter().any(|name| name.to_string_lossy().starts_with(".tmp-"));
    Command::new("umount").arg(&disk).status().unwrap();

    assert_eq!(stop.status.code(), Some(1), "{}", text(&stop));
    assert!(text(&stop).contains("out of disk: a checkpoint needs"), "{}", text(&stop));
    assert!(text(&stop).contains("earlier checkpoints are intact"), "{}", text(&stop));
    assert!(survives && !unfinished);
    // Told and gone on; the last checkpoint cannot be written either, which is an error.
    let stderr = text(&goes_on);
    assert!(stderr.contains("checkpoint of step 15 not written"), "{stderr}");
    assert_eq!((goes_on.status.code(), last), (Some(1), Some(20)), "{stderr}");
}

#[test]
fn recomputed_blocks_leave_a_runs_numbers_as_they_are() {
    let s = Setup::new();
    let kept = s.run("kept", &[]);
    assert_eq!(kept.status.code(), Some(0), "{}", text(&kept));
    let block = ["--set", "train.activation_checkpointing=block"];
    let again = s.run("again", &block);
    assert!(text(&again).contains("recompute   2 of 2 blocks"), "{}", text(&again));
    assert_eq!((s.losses("again").len(), s.losses("again")), (20, s.losses("kept")));
    let one = s.run("one", &[&block[..], &["--set", "train.checkpoint_blocks=1"]].concat());
    assert!(text(&one).contains("recompute   1 of 2 blocks"), "{}", text(&one));
    assert_eq!(s.losses("one"), s.losses("kept"));
}

#[test]
fn bench_train_times_steps_and_leaves_nothing_behind() {
    let setup = Setup::new();
    let config = setup.path("run.yaml").display().to_string();
    let bench = |more: &[&str]| {
        let mut command = cargo_bin_cmd!("tinyllama");
        command.env("TMPDIR", setup.dir.path()).args(["bench", "train", &config]);
        command.args(more).output().unwrap()
    };
    let output = bench(&["--warmup", "1", "--steps", "3", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (report["steps"].as_u64(), report["tokens_per_step"].as_u64()),
        (Some(3), Some(128))
    );
    let (speed, seconds) = (&report["tokens_per_sec"], &report["step_seconds"]);
    let tokens = speed.as_f64().unwrap() * seconds.as_f64().unwrap();
    assert!((tokens - 128.0).abs() < 1e-6, "{report}");
    assert!(report["profile"].is_null(), "{report}");
    assert_eq!(report["losses"].as_array().unwrap().len(), 4, "{report}");
    assert!(report["no_profile"].as_str().unwrap().contains("on the CPU"), "{report}");
    let left: Vec<_> =
        fs::read_dir(setup.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "train, val, run.yaml; found {left:?}");

    let two = ["--devices", "2", "--set", "train.micro_batch_size=2", "--steps", "2", "--json"];
    let output = bench(&two);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let got = (&report["ranks"], &report["accumulation"], &report["tokens_per_step"]);
    assert_eq!(got, (&2.into(), &2.into(), &128.into()));
    assert_eq!(fs::read_dir(setup.dir.path()).unwrap().count(), 3);

    let output = bench(&["--steps", "0"]);
    assert_eq!(output.status.code(), Some(2));
    let complaint = text(&output);
    assert!(complaint.contains("'0'") && complaint.contains("--steps"), "{complaint}");
    assert!(complaint.contains("expected at least 1"), "{complaint}");
    let trace = setup.path("trace.json").display().to_string();
    let output = bench(&["--trace", &trace, "--profile-steps", "0"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let output = bench(&["--trace", &trace]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("leave out `--trace`"), "{}", text(&output));
    let output = bench(&["--set", "optimizer.lr=1e30", "--warmup", "0", "--steps", "9"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("not finite are not timed"), "{}", text(&output));
}

#[test]
fn a_dry_run_prints_arithmetic_and_memory_and_writes_nothing() {
    let dry = |config: &str, more: &[&str]| {
        let mut command = cargo_bin_cmd!("tinyllama");
        command.args(["pretrain", config, "--dry-run", "--set", "device=cpu"]).args(more);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), text(&output))
    };
    let (code, out, err) = dry("configs/tinyllama-1xh100.yaml", &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    for line in
        ["524,288 tokens/step", "42,000 steps", "master weights, fp32", "4.10", "total", "52.6"]
    {
        assert!(out.contains(line), "`{line}` is not in\n{out}");
    }
    assert!(
        out.contains(
            "  80 GB                                            27, or 16, which divides the batch"
        ),
        "{out}"
    );
    let block = ["--set", "train.activation_checkpointing=block"];
    let (_, out, _) = dry("configs/tinyllama-1xh100.yaml", &block);
    for line in ["inputs of 22 recomputed blocks", "5.50", "one block's backward pass"] {
        assert!(out.contains(line) && !out.contains("activations of"), "`{line}` is not in\n{out}");
    }
    let part = ["--set", "train.checkpoint_blocks=14"];
    let (_, out, _) = dry("configs/tinyllama-1xh100.yaml", &[block, part].concat());
    for line in ["activations of 8 blocks", "inputs of 14 recomputed blocks", "3.50"] {
        assert!(out.contains(line), "`{line}` is not in\n{out}");
    }
    let setup = Setup::new();
    let config = setup.path("run.yaml").display().to_string();
    let (code, out, _) = dry(&config, &[]);
    assert_eq!(code, Some(0));
    assert!(out.contains("no plan"), "{out}");
    assert!(!Path::new("out/pretrain").join("config.yaml").exists());
    let (code, _, err) = dry(&config, &["--set", "train.micro_batch_size=3"]);
    assert_eq!(code, Some(2), "{err}");
}

#[test]
fn a_run_ends_with_the_epochs_of_its_data_and_says_which_begin() {
    let s = Setup::new(); // 4,000 tokens are 235 blocks of 17, 29 steps of 8 and 3 samples
    let quick = ["--set", "eval.interval=null", "--set", "train.save_interval=20"];
    let with = |more: &[&'static str]| [&quick[..], more].concat();
    let one = s.run("one", &with(&["--set", "data.epochs=1", "--set", "train.max_steps=500"]));
    let told = text(&one);
    assert!(one.status.success(), "{told}");
    assert!(
        told.contains("data        train: 4 file(s), 4.00k tokens, 235 blocks of 17, weight 1")
    );
    assert!(told.contains("length      29 steps, then `train` is through 1 epoch"), "{told}");
    assert!(told.contains("data        at an end after step 29: `train` is through 1"), "{told}");
    let rows = s.losses("one");
    assert_eq!(rows.len(), 29);
    assert!((rows[28].3 - 1e-4).abs() < 1e-12, "the rate ends at min_lr: {:?}", rows[28]);

    let epochs = ["--set", "data.epochs=3", "--set", "train.max_steps=40"];
    let longer = s.run("longer", &with(&epochs));
    let told = text(&longer);
    assert!(told.contains("length      40 steps\n"), "{told}");
    assert!(
        told.contains("data        train begins epoch 2 in step 30, in another order"),
        "{told}"
    );
    assert!(!told.contains("at an end"), "{told}");

    let none =
        s.run("none", &with(&["--set", "data.epochs=1", "--set", "train.global_batch_size=240"]));
    assert_eq!(none.status.code(), Some(2));
    let told = text(&none);
    assert!(told.contains("through 1 epoch after 235 samples, a step takes 240"), "{told}");
    let warmup = [
        "--set",
        "data.epochs=1",
        "--set",
        "train.max_steps=500",
        "--set",
        "train.lr_warmup_steps=30",
    ];
    let told = text(&s.run("warmup", &with(&warmup)));
    assert!(told.contains("`train.lr_warmup_steps`: 30 is longer than the run of 29"), "{told}");
}

#[test]
fn a_run_in_lit_gpts_order_resumes_to_the_same_losses_and_refuses_too_few_files() {
    let s = Setup::new();
    let few = s.run("few", &["--set", "data.order=lit-gpt"]);
    assert_eq!(few.status.code(), Some(1));
    let told = text(&few);
    assert!(
        told.contains("has 4 files; `data.order: lit-gpt` needs at least 8 a rank, 8 for 1"),
        "{told}"
    );
    assert!(told.contains("hint: use `data.order: global`"), "{told}");

    let path = s.path("many");
    fs::create_dir(&path).unwrap();
    let mut writer = tinyllama::data::packed::PackedWriter::new(&path, "train", 200, 90);
    writer.add(&(0..3800u32).map(|i| (i * i / 7 + i) % 90).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    let many = format!("data.train.0.path={}", path.display());
    let more = ["--set", "data.order=lit-gpt", "--set", &many];
    let straight = s.run("straight", &more);
    let told = text(&straight);
    assert!(straight.status.success(), "{told}");
    assert!(told.contains("3 of 19 files are never read, as lit-gpt never read them"), "{told}");
    let from = s.path("straight/step-00000010").display().to_string();
    let resumed = s.run("resumed", &[&more[..], &["--resume", &from]].concat());
    assert!(resumed.status.success(), "{}", text(&resumed));
    assert_eq!(s.losses("straight")[10..], s.losses("resumed"));
}

#[test]
fn raw_text_in_the_yaml_is_prepared_once_into_a_cache_and_trained_on() {
    let setup = Setup::new();
    let rows = |n: usize, salt: usize| {
        let text = |i: usize| format!("Row {i} of the corpus says {} times hello.", i * salt);
        let line = |i: usize| serde_json::json!({ "body": text(i) }).to_string() + "\n";
        (0..n).map(line).collect::<String>()
    };
    fs::write(setup.path("mine.jsonl"), rows(300, 3)).unwrap();
    fs::write(setup.path("val.jsonl"), rows(20, 5)).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart/tokenizer");
    let set = |key: &str, value: String| ["--set".to_owned(), format!("{key}={value}")];
    let path = |name: &str| setup.path(name).display().to_string();
    let sets = [
        set("data.train", format!("[{{path: {}}}]", path("mine.jsonl"))),
        set("data.val", path("val.jsonl")),
        set("data.text_field", "body".into()),
        set("data.cache_dir", path("cache")),
        set("tokenizer_dir", tokenizer.display().to_string()),
        set("model_config.vocab_size", "4096".into()),
        set("train.max_steps", "3".into()),
    ]
    .concat();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let first = setup.run("out", &sets);
    assert!(first.status.success(), "{}", text(&first));
    assert!(text(&first).contains("prepared    "), "{}", text(&first));
    let cached = || fs::read_dir(setup.path("cache")).unwrap().count();
    assert_eq!(cached(), 2);
    let again = setup.run("again", &sets);
    assert!(text(&again).contains("already prepared"), "{}", text(&again));
    assert_eq!(setup.losses("out"), setup.losses("again"));
    assert_eq!(cached(), 2);
    fs::write(setup.path("mine.jsonl"), rows(300, 7)).unwrap();
    assert!(setup.run("other", &sets).status.success());
    assert_eq!(cached(), 3, "another content, another folder");
}
