//! What the program says to wrong arguments, before it does anything.

use crate::pretrain::{Setup, text};
use assert_cmd::cargo::cargo_bin_cmd;
use std::path::Path;
use std::process::Output;

const QUICKSTART: &str = "configs/quickstart.yaml";
const TOKENIZER: &str = "data/quickstart/tokenizer";

fn tinyllama(args: &[&str]) -> Output {
    cargo_bin_cmd!("tinyllama").args(args).output().unwrap()
}

#[test]
fn a_wrong_argument_is_told_with_what_was_expected() {
    let huge = "99999999999";
    for (args, words) in [
        (
            &["bench", "data", "--path", "x", "--seconds=-1"][..],
            &["expected seconds, from 0.001"][..],
        ),
        (&["bench", "data", "--path", "x", "--seconds=nan"], &["expected seconds"]),
        (&["bench", "comm", "--sizes", huge], &["--sizes", "1,048,576 MiB"]),
        (
            &["bench", "decode", "--preset", "tiny-llama-120m", "--prompts", huge],
            &[huge, "1,048,576"],
        ),
        (&["generate", "--checkpoint", "x", "--num-samples", huge], &[huge, "1..=100000"]),
        (
            &["convert", "x", "y", "--to", "hf", "--max-shard-size", "5 ells"],
            &["5000000000, 5GB or 5GiB"],
        ),
        (&["serve", "--checkpoint", "x", "--max-new-tokens", "0"], &["expected at least 1"]),
        (
            &["serve", "--checkpoint", "x", "--max-choices", "two"],
            &["expected a whole number from 1"],
        ),
        (
            &["tokenizer", "train", "--input", "x", "--out", "y", "--vocab-size", huge],
            &["16,777,216 or less"],
        ),
        (
            &["tokenizer", "train", "--input", "x", "--out", TOKENIZER, "--vocab-size", "300"],
            &["holds a tokenizer already", "--overwrite"],
        ),
        (
            &[
                "prepare",
                "slimpajama",
                "--source",
                "data/quickstart/slimpajama",
                "--split",
                "validation",
                "--tokenizer",
                TOKENIZER,
                "--out",
                "z",
            ],
            &["no folder `validation`", "which has train", "--split"],
        ),
    ] {
        let output = tinyllama(args);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {told}");
        for word in words {
            assert!(told.contains(word), "`{word}` is not in {told}");
        }
    }
}

#[test]
fn a_configuration_is_checked_as_far_as_it_goes_without_its_files() {
    for (set, words) in [
        ("device=gpu", &["`device`: `gpu` is not known", "`cuda:N`"][..]),
        ("data.prepare.0.kind=foo", &["`data.prepare.0.kind`", "`slimpajama`"]),
        ("data.prefetch=99999999999", &["`data.prefetch`: must be at most 65,536"]),
        ("eval.tasks=[helaswag]", &["`eval.tasks`: `helaswag` is no task", "`hellaswag`"]),
        ("model_config.n_layer=10000000000", &["n_layer`: must be at most 100000"]),
    ] {
        let output = tinyllama(&["config", "check", QUICKSTART, "--set", set]);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(2), "{set}: {told}");
        for word in words {
            assert!(told.contains(word), "`{word}` is not in {told}");
        }
    }
    // Of a run that finetunes too, whose model is that of its checkpoint.
    let output = tinyllama(&["config", "check", "configs/finetune/tinyllama-dpo.yaml"]);
    assert!(
        text(&output).contains("no checkpoint at `out/finetune/guanaco-full`"),
        "{}",
        text(&output)
    );
}

#[test]
fn what_a_run_lacks_is_told_before_its_data_are_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::create_dir(dir.path().join("data")).unwrap();
    let quickstart = dir.path().join("data/quickstart");
    std::os::unix::fs::symlink(root.join("data/quickstart"), quickstart).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    for (set, words) in [
        ("initial_checkpoint_dir=nope", &["no checkpoint at `nope`"][..]),
        ("out_dir=file/run", &["`out_dir`: `file/run` cannot be created, `file` is no folder"]),
        ("eval.tasks=[hellaswag]", &["hellaswag", "`--data`, in a run `eval.data`"]),
    ] {
        let mut command = cargo_bin_cmd!("tinyllama");
        command.arg("pretrain").arg(root.join(QUICKSTART)).args([
            "--set",
            set,
            "--set",
            "device=cpu",
        ]);
        let output = command.current_dir(dir.path()).output().unwrap();
        let told = text(&output);
        assert_ne!(output.status.code(), Some(0), "{set}");
        for word in words {
            assert!(told.contains(word), "`{word}` is not in {told}");
        }
        assert!(!dir.path().join("data/packed").exists(), "{set}");
    }
}

#[test]
fn inspect_refuses_flags_of_what_it_does_not_look_at() {
    let setup = Setup::new();
    assert!(setup.run("run", &["--set", "train.max_steps=3"]).status.success());
    let (model, data) = (setup.path("run/final"), setup.path("train"));
    let [model, data] = [&model, &data].map(|path| path.display().to_string());
    for args in [
        &["inspect", &model, "--verify"][..],
        &["inspect", &model, "--samples", "3"],
        &["inspect", &data, "--diff", &model],
        &["inspect", &data, "--statistics"],
    ] {
        let output = tinyllama(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output).contains("leave it out"), "{}", text(&output));
    }
}
