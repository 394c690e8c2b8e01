//! What `tinyllama finetune` says of rows, keys and checkpoints that do not go together, and what it does without them.

use super::runs::{Folder, STEPS, losses, text};
use std::fs;
use std::path::Path;

#[test]
fn rows_that_the_template_refuses_are_left_out_and_told() {
    let folder = Folder::new();
    let tool = r#"{"messages": [{"role": "user", "content": "Call it."}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4."}]}"#;
    let empty = r#"{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "After 7?"}, {"role": "assistant", "content": "8."}]}"#;
    let rows = folder.path("rows.jsonl");
    let whole = fs::read_to_string(&rows).unwrap();
    fs::write(&rows, format!("{whole}{tool}\n{empty}\n")).unwrap();
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{train: {rows}, template: guanaco, loss_on: all, packing: false}}\n"
    );
    let output = folder.finetune(&yaml, &["--set", "train.max_steps=1"]);
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("42 conversations"), "{told}");
    assert!(told.contains("1 conversation(s) that the chat template refuses"), "{told}");
    assert!(told.contains("begins `Call it.`") && told.contains("not tool"), "{told}");

    fs::write(&rows, format!("{tool}\n")).unwrap();
    let output = folder.finetune(&yaml, &["--samples", "1"]);
    assert!(text(&output).contains("left out: "), "{}", text(&output));
    let output = folder.finetune(&yaml, &["--set", "out_dir=none"]);
    assert!(!output.status.success());
    assert!(
        text(&output).contains("the roles are system, user and assistant"),
        "{}",
        text(&output)
    );
    assert!(!Path::new("none").exists());
}

#[test]
fn a_run_of_one_step_learns_in_it_and_equal_answers_are_no_preference() {
    let folder = Folder::new();
    let rows = folder.path("pairs.jsonl");
    let row = |i: usize| {
        let long = "and so on ".repeat(40); // the answers differ behind the row's end
        format!(
            "{{\"prompt\": \"After {i}?\", \"chosen\": \"{long}yes\", \"rejected\": \"{long}no\"}}\n"
        )
    };
    let differs = "{\"prompt\": \"After 3?\", \"chosen\": \"4\", \"rejected\": \"No.\"}\n";
    fs::write(&rows, (0..3).map(row).collect::<String>() + &differs.repeat(4)).unwrap();
    let yaml =
        format!("{STEPS}finetune:\n  method: dpo\n  data: {{train: {rows}, template: guanaco}}\n");
    let output = folder.finetune(&yaml, &["--set", "train.max_steps=1"]);
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("3 pair(s) whose answers are the same within 96 tokens"), "{told}");
    assert!(
        told.contains("4 pairs/step = 1 rank x 2 micro x 2 accumulation = 768 tokens"),
        "{told}"
    );
    let line = fs::read_to_string(folder.path("out/metrics.jsonl")).unwrap();
    let step: serde_json::Value = line
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .find(|v: &serde_json::Value| v.get("lr").is_some())
        .unwrap();
    assert!(step["lr"].as_f64().unwrap() > 4e-3, "half of 0.01: {step}");
    let config = fs::read_to_string(folder.path("out/config.yaml")).unwrap();
    assert!(config.contains("dropout: 0.0"), "preferences are learned without: {config}");
}

#[test]
fn samples_have_the_tokens_that_the_run_adds_and_both_answers() {
    let folder = Folder::new();
    let data = format!("train: {}, template: chatml", folder.path("rows.jsonl"));
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{{data}, special_tokens: [\"<|im_start|>\", \"<|im_end|>\"]}}\n"
    );
    let output = folder.finetune(&yaml, &["--samples", "2"]);
    assert!(output.status.success(), "{}", text(&output));
    let out = String::from_utf8(output.stdout).unwrap();
    let first: serde_json::Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    let ids: Vec<u64> =
        first["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
    let n = ids.iter().filter(|id| [4096, 4097].contains(id)).count();
    assert_eq!((out.lines().count(), n), (2, 4), "two turns, each with both: {ids:?}");
    assert!(!Path::new(&folder.path("out")).exists(), "nothing is left behind");

    let pairs = folder.path("pairs.jsonl");
    fs::write(&pairs, "{\"prompt\": \"3?\", \"chosen\": \"4\", \"rejected\": \"5\"}\n").unwrap();
    let yaml =
        format!("{STEPS}finetune:\n  method: dpo\n  data: {{train: {pairs}, template: guanaco}}\n");
    let output = folder.finetune(&yaml, &["--samples", "1"]);
    assert!(output.status.success(), "{}", text(&output));
    let pair: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_ne!(pair["chosen"]["ids"], pair["rejected"]["ids"]);
}

#[test]
fn what_the_method_ignores_is_refused() {
    let folder = Folder::new();
    let data = format!("data: {{train: {}, template: guanaco}}", folder.path("rows.jsonl"));
    for (keys, said) in [
        (
            format!("lora: {{r: 64}}, {data}"),
            "`finetune.lora`: does nothing with `finetune.method: full`",
        ),
        (format!("method: lora, dpo: {{beta: 0.5}}, {data}"), "`finetune.dpo`: does nothing"),
        (
            format!("method: dpo, {}", data.replace("template", "loss_on: all, template")),
            "`finetune.data.loss_on`",
        ),
    ] {
        let output = folder.finetune(&format!("{STEPS}finetune: {{{keys}}}\n"), &[]);
        assert_eq!(output.status.code(), Some(2), "{keys}: {}", text(&output));
        assert!(text(&output).contains(said), "{keys}: {}", text(&output));
    }
}

#[test]
fn adapters_go_on_beside_the_weights_that_they_began_beside() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  method: lora\n  lora: {{r: 4, targets: [all]}}\n  data: {{train: {}, template: guanaco}}\n",
        folder.path("rows.jsonl")
    );
    let output = folder.finetune(&yaml, &["--set", "train.max_steps=6"]);
    assert!(output.status.success(), "{}", text(&output));
    let adapter = fs::read_to_string(folder.path("out/final/adapter_config.json")).unwrap();
    assert!(adapter.contains("/base/final\""), "the checkpoint, not the run's folder: {adapter}");

    let more =
        ["--resume", "auto", "--set", "train.max_steps=8", "--set", "finetune.lora.dropout=0.1"];
    let output = folder.finetune(&yaml, &more);
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("changed     finetune.lora.dropout"), "{told}");
    assert_eq!(losses(&folder.path("out")).len(), 8);

    let other = folder.path("other");
    fs::create_dir(&other).unwrap();
    for file in fs::read_dir(folder.path("base/final")).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(file.path(), Path::new(&other).join(file.file_name())).unwrap();
    }
    let set = format!("initial_checkpoint_dir={other}");
    let beside_other = ["--resume", "auto", "--set", "train.max_steps=9", "--set", &set];
    let output = folder.finetune(&yaml, &beside_other);
    assert!(!output.status.success());
    assert!(text(&output).contains("were trained beside"), "{}", text(&output));

    // A run's folder, as older versions wrote it down, and weights that have moved.
    let path = folder.path("out/final/adapter_config.json");
    fs::write(&path, adapter.replace("/base/final\"", "/base\"")).unwrap();
    let output = folder.finetune(&yaml, &["--resume", "auto", "--set", "train.max_steps=9"]);
    assert!(output.status.success(), "{}", text(&output));
    fs::rename(folder.path("base"), folder.path("was-base")).unwrap();
    let beside_other = ["--resume", "auto", "--set", "train.max_steps=10", "--set", &set];
    let output = folder.finetune(&yaml, &beside_other);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("which is not there"), "{}", text(&output));
}
