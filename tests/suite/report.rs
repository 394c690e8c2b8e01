//! `report`: what `evaluate` and training left becomes a table and a picture.

use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Output;

fn report(dir: &Path, dirs: &[&str]) -> Output {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    command.current_dir(dir).arg("report").args(dirs).args(["--out", "shown"]).output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Results of a checkpoint in the seven tasks of the published table, each `acc`.
fn results(dir: &Path, name: &str, step: u64, acc: f64) {
    let tasks = tinyllama::eval::published::TASKS;
    let of = |task: &&str| ((*task).to_owned(), json!({"acc,none": acc, "acc_stderr,none": 0.01}));
    let results: serde_json::Map<String, serde_json::Value> = tasks.iter().map(of).collect();
    let config = json!({
        "model_args": format!("out/mine/step-{step:08}"), "step": step, "tokens": step * 4096
    });
    fs::create_dir_all(dir.join(name)).unwrap();
    let text = json!({"results": results, "config": config}).to_string();
    fs::write(dir.join(name).join("results.json"), text).unwrap();
}

#[test]
fn forms_of_a_checkpoint_are_rows_and_commands_of_their_own_and_some_subjects_are_no_mmlu() {
    let dir = tempfile::tempdir().unwrap();
    for (name, scheme, acc) in [("mine/a", "int4:64", 0.25), ("mine/b", "int8:32", 0.5)] {
        let subjects = ["anatomy", "astronomy", "marketing", "sociology", "virology"];
        let names = subjects.map(|subject| format!("mmlu_{subject}"));
        let mut results: serde_json::Map<String, serde_json::Value> =
            names.iter().map(|task| (task.clone(), json!({"acc,none": acc}))).collect();
        // As an older version wrote it: the mean of five under the name of all.
        results.insert("mmlu".into(), json!({"acc,none": acc}));
        let config = json!({
            "model_args": "out/mine/final", "step": 9, "tokens": 4_096_000, "precision": null,
            "quantize": scheme, "kv_cache_dtype": "auto"
        });
        let json = json!({"results": results, "group_subtasks": {"mmlu": names}, "config": config});
        fs::create_dir_all(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("results.json"), json.to_string()).unwrap();
    }
    let output = report(dir.path(), &["mine"]);
    assert!(output.status.success(), "{}", told(&output));
    let table = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(table.contains("| mine, int4:64 | 9 | 4.10M | 25.00 | 25.00 |"), "{table}");
    assert!(table.contains("| mine, int8:32 | 9 | 4.10M | 50.00 | 50.00 |"), "{table}");
    assert!(table.contains("| mmlu_virology |") && !table.contains("| mmlu |"), "{table}");
    let page = fs::read_to_string(dir.path().join("shown/report.md")).unwrap();
    for said in ["--num-fewshot 0 --quantize int4:64", "--num-fewshot 0 --quantize int8:32"] {
        assert!(page.contains(said), "{page}");
    }
}

#[test]
fn checkpoints_and_scores_of_training_become_a_table_and_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    results(dir.path(), "mine/a", 1000, 0.25);
    results(dir.path(), "mine/b", 2000, 0.5);
    let line = r#"{"step": 500, "tokens": 2048000, "task": "piqa", "samples": 200, "num_fewshot": 0, "acc": 0.51}"#;
    fs::write(dir.path().join("mine/metrics.jsonl"), format!("{line}\n{{\"ste")).unwrap();
    fs::create_dir(dir.path().join("mine/bad")).unwrap();
    fs::write(dir.path().join("mine/bad/results.json"), "{\"results\": []}").unwrap();
    for _ in 0..2 {
        // The second time over the files of the first.
        let output = report(dir.path(), &["mine"]);
        assert!(output.status.success(), "{}", told(&output));
        let warning =
            "mine/bad/results.json`: field `results`: expected an object of tasks, got a list";
        assert!(told(&output).contains(warning), "{}", told(&output));
        let table = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(table.contains("| mine | 1000 | 4.10M | 25.00 ± 0.38 | 25.00 ± 1.00 |"), "{table}");
        assert!(table.contains("| mine, in training, 200 samples | 500 | 2.05M |  |"), "{table}");
        assert!(
            table.contains("| TinyLlama-1.1B, published |  | 3.00T | 52.99 | 59.20 |"),
            "{table}"
        );
        assert!(fs::read_to_string(dir.path().join("shown/report.md")).unwrap().contains(&table));
        let png = fs::read(dir.path().join("shown/report.png")).unwrap();
        assert_eq!(&png[1..4], b"PNG");
    }
}

#[test]
fn without_scores_it_says_what_was_looked_for_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    let output = report(dir.path(), &["empty"]);
    assert_eq!(output.status.code(), Some(2));
    let told = told(&output);
    assert!(
        told.contains("no scores below `empty`") && told.contains("tinyllama evaluate"),
        "{told}"
    );
    let output = report(dir.path(), &["absent"]);
    assert!(self::told(&output).contains("`absent` does not exist"), "{}", self::told(&output));
}
