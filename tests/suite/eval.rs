//! Evaluation: prompts are the harness's, likelihoods those of plain passes, and nothing that was computed is lost.

use crate::common::{alone, card, quickstart_like, tiny_llama, tiny_neox};
use serde_json::Value::{self, Null};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;
use tch::Device;
use tinyllama::checkpoint;
use tinyllama::eval::prompt::{self, Pair};
use tinyllama::eval::score::log_likelihoods;
use tinyllama::eval::{Score, task};
use tinyllama::generate::NetworkRef;
use tinyllama::generate::score::score_tokens;
use tinyllama::model::GPT;
use tinyllama::tokenizer::Tokenizer;

pub const GOLDEN: &str = "tests/golden/eval";

/// Row, context, continuation.
type Asked = Vec<(usize, String, String)>;

#[test]
fn prompts_are_those_of_the_harness() {
    let text = std::fs::read_to_string(format!("{GOLDEN}/requests.json")).unwrap();
    let all: BTreeMap<String, BTreeMap<usize, Asked>> = serde_json::from_str(&text).unwrap();
    assert_eq!(all.len(), 10);
    for (name, of_shots) in all {
        let task = task::find(std::slice::from_ref(&name)).unwrap().remove(0);
        for (shots, want) in of_shots {
            let found = prompt::samples(&task, GOLDEN.as_ref(), shots, None, 1234).unwrap();
            let got = found.samples.iter().enumerate().flat_map(|(i, sample)| {
                sample.requests.iter().map(move |(a, b)| (i, a.clone(), b.clone()))
            });
            let got: Asked = got.collect();
            assert_eq!(got, want, "{name}, {shots} examples");
        }
    }
}

#[test]
fn texts_with_one_beginning_have_the_likelihoods_that_each_has_alone() {
    let _alone = alone();
    tch::manual_seed(3);
    for config in [tiny_llama(), tiny_neox()] {
        let model = GPT::new(&config, Device::Cpu);
        let v = config.vocab_size as u32;
        let id = |i: usize, j: usize| ((i * 7919 + j * 104_729 + i * j) as u32) % v;
        let text = |seed: usize, n: usize| (0..n).map(|j| id(seed, j)).collect::<Vec<u32>>();
        let (mut pairs, limit) = (Vec::new(), config.block_size as usize);
        for question in 0..40 {
            // Questions behind the same examples, or none, with answers of several lengths; one is like another's begin.
            let mut context = if question % 3 == 0 { text(1, 9) } else { Vec::new() };
            context.extend(text(question + 2, 1 + question % 12));
            let long = text(question + 50, 6);
            for answer in [long[..1].to_vec(), long[..3].to_vec(), long, text(question + 99, 4)] {
                pairs.push(Pair { context: context.clone(), continuation: answer });
            }
        }
        // Longer than the model's context: cut from the left.
        pairs.push(Pair { context: text(5, limit + 7), continuation: text(6, 3) });
        pairs.push(pairs[0].clone());
        let mut last = 0;
        let (got, cut) =
            log_likelihoods(NetworkRef::Dense(&model), &pairs, None, None, |n| last = n).unwrap();
        assert_eq!((last, cut), (pairs.len(), 1));
        for (pair, got) in pairs.iter().zip(got) {
            let whole: Vec<u32> = pair.context.iter().chain(&pair.continuation).copied().collect();
            let whole = &whole[whole.len().saturating_sub(limit + 1)..];
            let (last, input) = whole.split_last().unwrap();
            // The last token follows all that fit: by hand, since a plain score takes no more than the context.
            let ids: Vec<i64> = input.iter().map(|&id| i64::from(id)).collect();
            let logits = tch::no_grad(|| {
                model.forward(&tch::Tensor::from_slice(&ids).unsqueeze(0), None).squeeze_dim(0)
            });
            let of_last = logits.get(-1).log_softmax(-1, tch::Kind::Float);
            let plain = score_tokens(&model, input).unwrap();
            let before = &plain[input.len() + 1 - pair.continuation.len()..];
            let want =
                before.iter().flatten().sum::<f64>() + of_last.double_value(&[i64::from(*last)]);
            assert!((got.log_likelihood - want).abs() < 1e-4, "{got:?} {want}");
            let greedy = logits.argmax(-1, false);
            let from = input.len() - pair.continuation.len();
            let is_greedy = pair
                .continuation
                .iter()
                .enumerate()
                .all(|(i, &id)| greedy.int64_value(&[(from + i) as i64]) == i64::from(id));
            assert_eq!(got.is_greedy, Some(is_greedy));
        }
        let too_long = Pair { context: vec![1], continuation: text(1, limit + 1) };
        let error = log_likelihoods(NetworkRef::Dense(&model), &[too_long], None, None, |_| {})
            .unwrap_err();
        assert!(error.to_string().contains("does not fit the model's context"), "{error}");
    }
}

#[test]
fn on_the_card_likelihoods_are_those_of_the_cpu() {
    let Some((device, _card)) = card("on_the_card_likelihoods_are_those_of_the_cpu") else {
        return;
    };
    tch::manual_seed(3);
    let (config, dir) = (tiny_llama(), tempfile::tempdir().unwrap());
    let model = GPT::new(&config, Device::Cpu);
    checkpoint::save(dir.path(), &model).unwrap();
    let v = config.vocab_size as u32;
    let text = |seed: u32, n: u32| {
        (0..n).map(|j| (seed * 7919 + j * 104_729 + seed * j) % v).collect::<Vec<u32>>()
    };
    let pair = |i: u32| Pair {
        context: [text(1, 5), text(i / 4 + 2, 1 + i % 9)].concat(),
        continuation: text(i + 50, 1 + i % 5),
    };
    let pairs: Vec<Pair> = (0..200).map(pair).collect();
    let of = |model: &GPT| {
        log_likelihoods(NetworkRef::Dense(model), &pairs, None, None, |_| {}).unwrap().0
    };
    let want = of(&model);
    for (kind, off) in [(tch::Kind::Float, 1e-3), (tch::Kind::BFloat16, 0.2)] {
        let there = checkpoint::load_model(dir.path(), kind, device).unwrap();
        for (got, want) in of(&there).iter().zip(&want) {
            assert!(
                (got.log_likelihood - want.log_likelihood).abs() < off,
                "{kind:?}: {got:?} {want:?}"
            );
        }
    }
}

#[test]
fn spaces_before_an_answer_are_the_answers() {
    let tokenizer = Tokenizer::load("data/quickstart/tokenizer".as_ref()).unwrap();
    let plain = prompt::encode(&tokenizer, "What is it?", " A llama").unwrap();
    let moved = prompt::encode(&tokenizer, "What is it? ", "A llama").unwrap();
    assert_eq!(plain, moved);
    let whole = tokenizer.encode_default("What is it? A llama").unwrap();
    assert_eq!([plain.context, plain.continuation].concat(), whole);
    let alone = prompt::encode(&tokenizer, "", "A llama").unwrap();
    assert_eq!(alone.context.len(), 1);
}

#[test]
fn a_mean_has_the_error_of_its_sample() {
    let score = Score::of(&[1.0, 0.0, 0.0, 1.0, 1.0]);
    assert!((score.mean - 0.6).abs() < 1e-12);
    assert!((score.stderr - 0.244_948_974_278_317_8).abs() < 1e-12, "numpy's std(ddof=1)/sqrt(5)");
}

/// A model of random weights with the quickstart's tokenizer.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        quickstart_like(&dir.path().join("model"));
        Self(dir)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }

    pub fn evaluate(&self, tasks: &str, more: &[&str]) -> Output {
        let (model, out) = (self.path("model"), self.path("out"));
        let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
        command.args(["evaluate", "--checkpoint", &model, "--device", "cpu", "--tasks", tasks]);
        let data: &[&str] = if more.contains(&"--data") { &[] } else { &["--data", GOLDEN] };
        let out: &[&str] = if more.contains(&"--out") { &[] } else { &["--out", &out] };
        command.args(out).args(data).args(more).output().unwrap()
    }

    pub fn results(&self) -> Value {
        let text = std::fs::read_to_string(self.path("out/results.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

pub fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn results_have_the_harness_shape_and_are_kept() {
    let folder = Folder::new();
    let output = folder.evaluate(
        "hellaswag,mmlu_elementary_mathematics",
        &["--log-samples", "--num-fewshot", "1"],
    );
    assert!(output.status.success(), "{}", told(&output));
    let json = folder.results();
    let samples = std::fs::read_to_string(folder.path("out/samples_hellaswag.jsonl")).unwrap();
    let samples: Vec<Value> =
        samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.len(), 4);
    let mean = samples.iter().map(|s| s["acc_norm"].as_f64().unwrap()).sum::<f64>() / 4.0;
    assert_eq!(json["results"]["hellaswag"]["acc_norm,none"], mean);
    assert_eq!(json["n-samples"]["hellaswag"]["effective"], 4);
    assert_eq!(json["n-shot"]["hellaswag"], 1);
    assert_eq!((&json["results"]["mmlu"], &json["group_subtasks"]["mmlu"]), (&Null, &Null));
    let form = |json: &Value| {
        ["precision", "quantize", "kv_cache_dtype"].map(|key| json["config"][key].clone())
    };
    assert_eq!(form(&json), ["32-true".into(), Null, "auto".into()]);
    assert_eq!(samples[3]["arguments"].as_array().unwrap().len(), 4);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("hellaswag") && table.contains("4 samples, 1-shot"), "{table}");
    assert!(table.contains("mean of 1 of 57"), "one subject is no MMLU: {table}");

    // Weights in 8 bits on the CPU know no branches; five examples are longer than the context.
    let out = format!("{}/quantised", folder.path("out"));
    let more = ["--quantize", "int8:32", "--num-fewshot", "5", "--log-samples", "--out", &out];
    let output = folder.evaluate("mmlu_elementary_mathematics", &more);
    assert!(output.status.success(), "{}", told(&output));
    assert!(
        told(&output).contains("contexts of `mmlu_elementary_mathematics` from the left"),
        "{}",
        told(&output)
    );
    let samples =
        std::fs::read_to_string(format!("{out}/samples_mmlu_elementary_mathematics.jsonl"))
            .unwrap();
    assert!(samples.lines().count() == 2 && samples.contains(",null]]"), "greedy is not known");
    let json_of_it = std::fs::read_to_string(format!("{out}/results.json")).unwrap();
    let json_of_it: Value = serde_json::from_str(&json_of_it).unwrap();
    assert_eq!(form(&json_of_it), [Null, "int8:32".into(), "auto".into()]);

    // They are not written over, unless asked for; what was through before a failure is kept.
    let again = folder.evaluate("piqa", &[]);
    assert_eq!(again.status.code(), Some(2));
    assert!(
        told(&again).contains("exists") && told(&again).contains("--overwrite"),
        "{}",
        told(&again)
    );
    assert_eq!(folder.results(), json);
    // Nor are samples by an evaluation that has another file for its results.
    let beside = folder.path("out/beside.json");
    let again = folder.evaluate("piqa,hellaswag", &["--log-samples", "--out", &beside]);
    assert_eq!(again.status.code(), Some(2));
    assert!(told(&again).contains("samples_hellaswag.jsonl` exists"), "{}", told(&again));
    assert!(!Path::new(&beside).exists());
    let failed = folder.evaluate("piqa,mmlu_virology", &["--overwrite"]);
    assert_eq!(failed.status.code(), Some(1), "{}", told(&failed));
    let told = told(&failed);
    assert!(told.contains("1 task(s) were finished") && told.contains("has no rows"), "{told}");
    assert!(folder.results()["results"]["piqa"]["acc,none"].is_number());
}

#[test]
fn a_model_whose_logits_are_not_finite_has_no_score() {
    let folder = Folder::new();
    let dir = folder.path("model");
    {
        let _alone = alone();
        let model = checkpoint::load_model(dir.as_ref(), tch::Kind::Float, Device::Cpu).unwrap();
        let _ = model.ln_f.weight.detach().narrow(0, 0, 1).fill_(f64::NAN);
        checkpoint::save(dir.as_ref(), &model).unwrap();
    }
    for (task, more) in [
        ("hellaswag", &[][..]),
        ("wikitext", &[]),
        ("boolq", &["--quantize", "int8:32", "--overwrite"]),
    ] {
        let output = folder.evaluate(task, more);
        assert_eq!(output.status.code(), Some(1), "{task}: {}", told(&output));
        let want = format!("a log-likelihood of the task `{task}` is not finite: NaN, in sample 0");
        assert!(told(&output).contains(&want), "{}", told(&output));
        assert!(told(&output).contains("hint: weights that hold NaN"), "{}", told(&output));
    }
    assert!(!Path::new(&folder.path("out/results.json")).exists());
}

#[test]
fn a_task_of_ones_own_is_a_file() {
    let folder = Folder::new();
    let rows: String = (0..5)
        .map(|i| {
            format!(
                "{{\"q\": \"After {i}\", \"a\": [\"{}\", \"none\"], \"right\": {}}}\n",
                i + 1,
                i % 2 == 1
            )
        })
        .collect();
    std::fs::create_dir(folder.path("mine")).unwrap();
    std::fs::write(folder.path("mine/test.jsonl"), rows).unwrap();
    let yaml = "task: mine\ndata: { folder: mine, test: test }\nquery: '{{ q }} comes'\nchoices: a\ntarget: right\nmetrics: [acc]\n";
    let file = folder.path("mine.yaml");
    std::fs::write(&file, yaml).unwrap();
    let output = folder.evaluate(&file, &["--limit", "3", "--num-fewshot", "2"]);
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(folder.results()["n-samples"]["mine"]["effective"], 3);
    assert_eq!(folder.results()["task_arguments"]["mine"], file.as_str());

    for (from, to, said) in [
        ("target: right", "target: wrong", "a row has the fields `q`, `a`, `right`"),
        ("target: right", "target: 7", "is 7, of 2 choices"),
        ("choices: a", "choices: a +", "`choices` of the task `mine`"),
        ("choices: a", "chices: a", "chices"),
        ("metrics: [acc]", "metrics: [accuracy]", "accuracy"),
        ("query: '{{ q }} comes'\n", "", "got `choices`, `target`"),
        ("test: test", "test: exam", "has no rows of the task `mine`"),
    ] {
        std::fs::write(&file, yaml.replace(from, to)).unwrap();
        let output = folder.evaluate(&file, &["--overwrite"]);
        assert!(!output.status.success());
        assert!(told(&output).contains(said), "{said}: {}", told(&output));
    }
    let output = folder.evaluate("hellaswg", &["--overwrite"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(told(&output).contains("near are `hellaswag`"), "{}", told(&output));
    let output = folder.evaluate("boolq", &["--overwrite", "--num-fewshot", "3"]);
    assert!(told(&output).contains("3 examples of 3 rows"), "{}", told(&output));
    assert!(Path::new(&folder.path("out/results.json")).is_file());
}
