//! Evaluation of what a model writes, of whole texts, and of programs.

use crate::common::alone;
use crate::eval::{Folder, told};
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind};
use tinyllama::checkpoint;
use tinyllama::eval::prompt;
use tinyllama::eval::sandbox::{Limits, Sandbox, Verdict};
use tinyllama::generate::{GenerateOptions, SamplingParams, generate_text, score::score_tokens};
use tinyllama::tokenizer::Tokenizer;

fn samples(folder: &Folder, task: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.path(&format!("out/samples_{task}.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A task's file and its rows.
fn task(folder: &Folder, yaml: &str, rows: &[Value]) -> String {
    std::fs::create_dir_all(folder.path("mine")).unwrap();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(folder.path("mine/test.jsonl"), lines).unwrap();
    let head = "task: mine\ndata: { folder: mine, test: test }\n";
    std::fs::write(folder.path("mine.yaml"), format!("{head}{yaml}")).unwrap();
    folder.path("mine.yaml")
}

#[test]
fn answers_are_what_generate_writes_up_to_a_stop() {
    let folder = Folder::new();
    let rows: Vec<Value> = ["One", "The second question", "x"]
        .map(|q| serde_json::json!({"q": q, "a": "no"}))
        .to_vec();
    let yaml = "query: '{{ q }}'\nanswers: '[a]'\ngenerate: { until: UNTIL, max_tokens: 12 }\nmetrics: [exact_match]\n\
                filters: [{ name: whole }, { name: word, regex: '([a-z]+)', take: last }]\n";
    let file = task(&folder, &yaml.replace("UNTIL", "['\u{2603}']"), &rows);
    let output = folder.evaluate(&file, &["--log-samples", "--batch-size", "2"]);
    assert!(output.status.success(), "{}", told(&output));
    let found = samples(&folder, "mine");
    assert_eq!(found.len(), 6, "a line a filter");

    let written = |i: usize| found[2 * i]["resps"][0][0].as_str().unwrap().to_owned();
    {
        let _alone = alone();
        let dir = folder.path("model");
        let model = checkpoint::load_model(dir.as_ref(), Kind::Float, Device::Cpu).unwrap();
        let tokenizer = Tokenizer::load(dir.as_ref()).unwrap();
        for (i, row) in rows.iter().enumerate() {
            let ids = tokenizer.encode_default(row["q"].as_str().unwrap()).unwrap();
            let options = GenerateOptions {
                max_new_tokens: 12,
                sampling: SamplingParams::greedy(),
                eos: tokenizer.eos_id().into_iter().collect(),
                ..Default::default()
            };
            let text = generate_text(&model, &tokenizer, &ids, &options, &[], &mut |_| Ok(()));
            assert_eq!(written(i).trim_start(), text.unwrap().text.trim_start());
        }
    }
    // A stop string from the middle of the first answer cuts it there.
    let whole = written(0);
    let middle: String = whole.chars().skip(whole.chars().count() / 2).take(2).collect();
    let until = serde_json::to_string(&[&middle]).unwrap();
    let file = task(&folder, &yaml.replace("UNTIL", &until), &rows);
    let output = folder.evaluate(&file, &["--log-samples", "--overwrite"]);
    assert!(output.status.success(), "{}", told(&output));
    let cut = samples(&folder, "mine")[0]["resps"][0][0].as_str().unwrap().to_owned();
    assert_eq!(Some(cut.as_str()), whole.split(&middle).next());
    assert_eq!(folder.results()["results"]["mine"]["exact_match,word"], 0.0);

    let file = task(&folder, &yaml.replace("UNTIL", "[]").replace("12", "128"), &rows);
    let output = folder.evaluate(&file, &["--overwrite"]);
    assert!(told(&output).contains("leave no room for a question"), "{}", told(&output));
}

#[test]
fn windows_predict_each_token_once() {
    let tokenizer = Tokenizer::load("data/quickstart/tokenizer".as_ref()).unwrap();
    let text = "A llama eats grass, and another llama eats hay. ".repeat(9);
    let ids = tokenizer.encode_default(&text).unwrap();
    for context in [7, 16, ids.len(), 1000] {
        let windows = prompt::windows(&tokenizer, &text, context).unwrap();
        assert_eq!(windows.len(), ids.len().div_ceil(context));
        let predicted: Vec<u32> = windows.iter().flat_map(|w| w.continuation.clone()).collect();
        assert_eq!(predicted, ids);
        let input = |w: &prompt::Pair| w.context.len() + w.continuation.len() - 1;
        assert!(windows.iter().all(|w| input(w) <= context && !w.context.is_empty()));
        // The last one begins as far to the left as fits.
        if let [.., last] = windows.as_slice()
            && windows.len() > 1
        {
            assert_eq!(input(last), context);
        }
    }
    assert!(prompt::windows(&tokenizer, "", 7).unwrap().is_empty());
}

#[test]
fn perplexities_are_of_all_texts_together() {
    let folder = Folder::new();
    let output = folder.evaluate("wikitext", &["--log-samples"]);
    assert!(output.status.success(), "{}", told(&output));
    let (found, json) = (samples(&folder, "wikitext"), folder.results());
    let of = |name: &str| json["results"]["wikitext"][format!("{name},none")].as_f64().unwrap();
    let sum = |of: &dyn Fn(&Value) -> f64| found.iter().map(of).sum::<f64>();
    let likelihood = sum(&|s| s["resps"][0][0].as_f64().unwrap());
    let words = sum(&|s| s["word_perplexity"][1].as_f64().unwrap());
    let bytes = sum(&|s| s["doc"]["page"].as_str().unwrap().len() as f64);
    assert!((of("word_perplexity").ln() + likelihood / words).abs() < 1e-9);
    assert!((of("byte_perplexity").ln() + likelihood / bytes).abs() < 1e-9);
    assert!((of("bits_per_byte") - of("byte_perplexity").log2()).abs() < 1e-9);
    assert_eq!(json["results"]["wikitext"]["bits_per_byte_stderr,none"], "N/A");

    // The first text fits the context: its likelihood is a plain score's.
    let _alone = alone();
    let dir = folder.path("model");
    let model = checkpoint::load_model(dir.as_ref(), Kind::Float, Device::Cpu).unwrap();
    let tokenizer = Tokenizer::load(dir.as_ref()).unwrap();
    let text = found[0]["arguments"][0][0].as_str().unwrap();
    let [window] = prompt::windows(&tokenizer, text, 128).unwrap().try_into().unwrap();
    let ids = [window.context, window.continuation].concat();
    let plain: f64 = score_tokens(&model, &ids).unwrap().iter().flatten().sum();
    let got = found[0]["resps"][0][0].as_f64().unwrap();
    assert!((got - plain).abs() < 1e-3, "{got} {plain}");
}

#[test]
fn programs_run_only_where_that_is_allowed() {
    let folder = Folder::new();
    let rows = [1, 0, 1].map(|ok| serde_json::json!({"q": "def f():", "ok": ok}));
    let yaml = "query: '{{ q }}'\nanswers: '[q]'\ngenerate: { until: [], max_tokens: 4 }\nmetrics: [pass@1]\n\
                program: \"# {{ written | length }} characters\\nassert {{ ok }} and 'f' in '{{ q }}'\"\n";
    let file = task(&folder, yaml, &rows);
    let output = folder.evaluate(&file, &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(told(&output).contains("--allow-code-execution"), "{}", told(&output));
    assert!(!Path::new(&folder.path("out/results.json")).exists());
    if !cfg!(target_os = "linux") {
        return;
    }
    let output = folder.evaluate(&file, &["--allow-code-execution", "--log-samples"]);
    assert!(output.status.success(), "{}", told(&output));
    let verdicts: Vec<String> = samples(&folder, "mine")
        .iter()
        .map(|s| s["verdict"].as_str().unwrap().split(':').next().unwrap().to_owned())
        .collect();
    assert_eq!(verdicts, ["passed", "failed", "passed"]);
    let mean = folder.results()["results"]["mine"]["pass@1,none"].as_f64().unwrap();
    assert!((mean - 2.0 / 3.0).abs() < 1e-12);
}

/// Needs `scripts/fetch_eval_data.py`.
#[test]
#[ignore = "needs data/eval/humaneval"]
fn humanevals_own_solutions_pass_and_empty_ones_fail() {
    let path = std::env::var("TINYLLAMA_EVAL_DATA").unwrap_or("data/eval".into());
    let dir = Path::new(&path).join("humaneval");
    let rows = tinyllama::eval::rows::read(&dir, "test").unwrap().expect("the set");
    let task = tinyllama::eval::task::find(&["humaneval".into()]).unwrap().remove(0);
    let program = env!("CARGO_BIN_EXE_tinyllama").into();
    let sandbox = Sandbox::new(program, "python3", Limits::default()).unwrap();
    let (mut canonical, mut empty) = (0, 0);
    for row in &rows {
        let run = |written: &str| sandbox.run(&task.program(row, written).unwrap()).unwrap();
        canonical +=
            usize::from(run(row["canonical_solution"].as_str().unwrap()) == Verdict::Passed);
        empty += usize::from(run("") == Verdict::Passed);
    }
    println!("{canonical} of {} canonical solutions passed, {empty} empty ones", rows.len());
    assert_eq!((canonical, empty), (164, 0));
}
