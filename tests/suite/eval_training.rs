//! Tasks of `eval.tasks` while a model is trained.

use crate::eval::GOLDEN;
use crate::pretrain::{Setup, text};
use serde_json::Value;
use tinyllama::tokenizer::Tokenizer;

const TOKENIZER: &str = "data/quickstart/tokenizer";

/// A run whose model fits the quickstart's tokenizer.
fn setup() -> Setup {
    let setup = Setup::new();
    let path = setup.path("run.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap();
    let rows = Tokenizer::load(TOKENIZER.as_ref()).unwrap().vocab_size();
    let yaml = yaml
        .replace("vocab_size: 96, block_size: 16", &format!("vocab_size: {rows}, block_size: 64"));
    let yaml = yaml + &format!("tokenizer_dir: {TOKENIZER}\n");
    std::fs::write(
        path,
        yaml.replace("max_iters: 4}", &format!("max_iters: 4, data: {GOLDEN}, limit: 3}}")),
    )
    .unwrap();
    setup
}

fn scores(setup: &Setup, out: &str) -> Vec<Value> {
    let lines = std::fs::read_to_string(setup.path(out).join("metrics.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["task"].is_string()).collect()
}

#[test]
fn tasks_are_logged_with_each_validation_and_change_no_training() {
    let setup = setup();
    let output = setup.run("with", &["--set", "eval.tasks=[hellaswag, wikitext]"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("| hellaswag | acc "), "{}", text(&output));
    let found = scores(&setup, "with");
    let at: Vec<(u64, &str)> =
        found.iter().map(|s| (s["step"].as_u64().unwrap(), s["task"].as_str().unwrap())).collect();
    let want = [10, 20].map(|step| [(step, "hellaswag"), (step, "wikitext")]).concat();
    assert_eq!(at, want);
    let first = &found[0];
    assert_eq!((&first["samples"], &first["tokens"]), (&3.into(), &(10 * 8 * 64).into()));
    assert!(first["acc_norm"].is_number() && first["acc_stderr"].is_number(), "{first}");
    assert!(found[1]["bits_per_byte"].as_f64().unwrap() > 0.0, "{}", found[1]);

    let output = setup.run("without", &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(setup.losses("with"), setup.losses("without"));
    assert!(scores(&setup, "without").is_empty());
}

#[test]
fn ranks_share_the_requests_and_find_the_scores_of_one() {
    let setup = setup();
    let more = [
        "--set",
        "eval.tasks=[piqa, hellaswag, wikitext]",
        "--set",
        "train.max_steps=3",
        "--set",
        "optimizer.lr=1e-4",
        "--set",
        "train.global_batch_size=12",
        "--set",
        "train.micro_batch_size=4",
    ];
    let output = setup.run("one", &more);
    assert!(output.status.success(), "{}", text(&output));
    let one = scores(&setup, "one");
    assert_eq!(one.len(), 3);
    // Few and small rows: some ranks have none in the last turn.
    for (ranks, strategy) in [("3", "full_shard"), ("3", "ddp")] {
        let strategy = format!("distributed.strategy={strategy}");
        let more = [&more[..], &["--devices", ranks, "--set", &strategy]].concat();
        let output = setup.run(&strategy, &more);
        assert!(output.status.success(), "{}", text(&output));
        let shared = scores(&setup, &strategy);
        assert_eq!(shared.len(), 3, "{shared:?}");
        for (got, want) in shared.iter().zip(&one) {
            for key in ["task", "samples", "acc", "acc_norm"] {
                assert_eq!(got[key], want[key], "{strategy}, {key}");
            }
            let bits = |score: &Value| score["bits_per_byte"].as_f64().unwrap_or(1.0);
            assert!((bits(got) / bits(want) - 1.0).abs() < 1e-5, "{strategy}: {got}, {want}");
        }
    }
}

#[test]
fn tasks_that_cannot_run_are_told_before_training() {
    let setup = setup();
    for (more, said) in [
        ("eval.tasks=[hellaswog]", "near are `hellaswag`"),
        ("eval.tasks=[humaneval]", "runs programs"),
        ("eval.tasks=[mmlu_virology]", "has no rows of the task `mmlu_virology`"),
        ("eval.tasks=[gsm8k]", "leave no room for a question"),
        ("eval.limit=0", "`eval.limit`"),
    ] {
        let output = setup.run("out", &["--set", more]);
        assert!(!output.status.success(), "{more}");
        assert!(text(&output).contains(said), "{more}: {}", text(&output));
        assert!(!setup.path("out/metrics.jsonl").exists(), "{more}");
    }
    let output = setup.run("out", &["--set", "eval.tasks=[piqa]", "--set", "tokenizer_dir=null"]);
    assert!(text(&output).contains("the run has no tokenizer"), "{}", text(&output));
}
