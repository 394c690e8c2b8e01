//! The two kinds of files that have scores: `results.json` of `evaluate`, and `metrics.jsonl` of training.

use super::{Column, Form, Row, Score};
use crate::eval::task;
use anyhow::{Context, Result, bail};
use memchr::memmem;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Scores that stand for a task, the first that it has. All are shares of one.
const SHARES: [&str; 6] = ["acc_norm", "acc", "exact_match", "f1", "em", "pass@1"];
/// Its perplexity, the first that it has.
const PERPLEXITIES: [&str; 3] = ["word_perplexity", "perplexity", "byte_perplexity"];
/// Of a group with more members than this that are all there, the group is shown in their place; of others the members.
const FEW: usize = 4;

/// What a `results.json` says.
pub struct Results {
    /// The checkpoint and its scores.
    pub row: Row,
    /// Only the first so many samples of larger sets were judged.
    pub first: Option<u64>,
    /// In what form the model was.
    pub form: Form,
}

/// Reads a `results.json`.
///
/// # Errors
/// A file that is none: which field, what was expected there, and what is there.
pub fn results(path: &Path) -> Result<Results> {
    let bytes = fs::read(path)?;
    let json: Value = serde_json::from_slice(&bytes).context("expected JSON")?;
    let tasks = match json.get("results") {
        Some(Value::Object(tasks)) => tasks,
        other => bail!("field `results`: expected an object of tasks, got {}", kind(other)),
    };
    let config = json.get("config").filter(|config| !config.is_null());
    if let Some(config) = config.filter(|config| !config.is_object()) {
        bail!("field `config`: expected an object, got {}", kind(Some(config)));
    }
    let whole = |key: &str| match config.and_then(|config| config.get(key)) {
        None | Some(Value::Null) => Ok(None),
        Some(value) if value.is_u64() => Ok(value.as_u64()),
        other => {
            bail!("field `config.{key}`: expected a whole number or null, got {}", kind(other))
        }
    };
    let (step, tokens) = (whole("step")?, whole("tokens")?);
    let form = form(config)?;
    let checkpoint = match config.and_then(|config| config.get("model_args")?.as_str()) {
        Some(checkpoint) => checkpoint.to_owned(),
        // Another program's: the folder of the file stands for it.
        None => path.parent().unwrap_or(path).display().to_string(),
    };

    let members = members(&json);
    let large = large(&members, tasks)?;
    let hidden: Vec<String> = large.iter().flat_map(|name| below(&members, name)).collect();
    let (mut scores, mut first) = (BTreeMap::new(), None);
    for (name, task) in tasks {
        let Value::Object(task) = task else {
            bail!("field `results.{name}`: expected an object of scores, got {}", kind(Some(task)));
        };
        if hidden.contains(name) || (members.contains_key(name) && !large.contains(name)) {
            continue;
        }
        let leaves = leaves(&members, name);
        let shots = leaves.first().and_then(|leaf| json["n-shot"][leaf].as_u64()).unwrap_or(0);
        let of = |leaf: &String, key: &str| json["n-samples"][leaf][key].as_u64();
        let samples = leaves.iter().map(|leaf| of(leaf, "effective")).sum();
        let argument = leaves.first().and_then(|leaf| json["task_arguments"][leaf].as_str());
        let file = argument.filter(|argument| task::is_file(argument)).map(str::to_owned);
        for leaf in &leaves {
            let (judged, all) = (of(leaf, "effective"), of(leaf, "original"));
            first = first.max(judged.filter(|n| all.is_some_and(|all| *n < all)));
        }
        let about = Score { samples, file, ..Default::default() };
        add(&mut scores, name, shots, &about, task);
    }
    // Without counts of samples the limit alone says that sets were not judged as a whole.
    if json.get("n-samples").is_none() {
        first = config.and_then(|config| config.get("limit")?.as_u64());
    }
    if scores.is_empty() {
        let known = SHARES.map(|metric| format!("`{metric}`")).join(", ");
        bail!("field `results`: expected a task with one of {known}, got none in {}", tasks.len());
    }
    Ok(Results { row: Row { checkpoint, step, tokens, scores }, first, form })
}

/// In what form the model was; files of older versions and of other programs do not say it.
fn form(config: Option<&Value>) -> Result<Form> {
    let text = |key: &str| match config.and_then(|config| config.get(key)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        other => bail!("field `config.{key}`: expected a text or null, got {}", kind(other)),
    };
    Ok(Form {
        precision: text("precision")?,
        quantize: text("quantize")?,
        kv_cache_dtype: text("kv_cache_dtype")?.filter(|dtype| dtype != "auto"),
    })
}

/// Reads the scores in a run's `metrics.jsonl`: a row for each step that has some. Lines that do not
/// parse (a torn last one) are skipped; of a step that was done twice the later line counts.
///
/// # Errors
/// A file that cannot be read.
pub fn metrics(path: &Path) -> Result<Vec<Row>> {
    let mut steps: BTreeMap<u64, Row> = BTreeMap::new();
    let has_task = memmem::Finder::new(b"\"task\"");
    for line in BufReader::new(File::open(path)?).split(b'\n') {
        let line = line?;
        if has_task.find(&line).is_none() {
            continue;
        }
        let Ok(line) = serde_json::from_slice::<Line>(&line) else { continue };
        let row = steps.entry(line.step).or_default();
        (row.step, row.tokens) = (Some(line.step), line.tokens.or(row.tokens));
        let shots = line.num_fewshot.unwrap_or(0);
        let about = Score { samples: line.samples, ..Default::default() };
        add(&mut row.scores, &line.task, shots, &about, &line.scores);
    }
    let subjects = task::subjects("mmlu")?;
    let mmlu = |row: Row| Row { scores: with_mmlu(row.scores, &subjects), ..row };
    let rows = steps.into_values().map(mmlu);
    Ok(rows.filter(|row| !row.scores.is_empty()).collect())
}

/// A line of `metrics.jsonl` with the scores of a task.
#[derive(Deserialize)]
struct Line {
    step: u64,
    tokens: Option<u64>,
    task: String,
    samples: Option<u64>,
    num_fewshot: Option<u64>,
    #[serde(flatten)]
    scores: Map<String, Value>,
}

/// Adds a task's headline score and its perplexity; `about` says the rest of both.
fn add(
    scores: &mut BTreeMap<Column, Score>,
    task: &str,
    shots: u64,
    about: &Score,
    values: &Map<String, Value>,
) {
    let share = SHARES.iter().find_map(|metric| find(values, metric, 100.0, about));
    let perplexity = PERPLEXITIES.iter().find_map(|metric| find(values, metric, 1.0, about));
    for (score, is_perplexity) in [(share, false), (perplexity, true)] {
        if let Some(score) = score {
            scores.insert(Column::new(task, shots, is_perplexity), score);
        }
    }
}

/// The first of `METRIC` and `METRIC,FILTER` that is a number, with its `METRIC_stderr,FILTER`.
fn find(values: &Map<String, Value>, metric: &str, unit: f64, about: &Score) -> Option<Score> {
    // A share of one becomes per cent; what is larger is some other metric of this name.
    let fits = |mean: &f64| *mean >= 0.0 && (unit == 1.0 || *mean <= 1.0);
    let named = |key: &str| key.split(',').next() == Some(metric);
    let number = |(key, value): (&String, &Value)| Some((key.clone(), value.as_f64()?));
    let (key, mean) =
        values.iter().filter(|(key, _)| named(key)).filter_map(number).find(|(_, x)| fits(x))?;
    let error = format!("{metric}_stderr{}", &key[metric.len()..]);
    let stderr = values.get(&error).and_then(Value::as_f64).map(|error| error * unit);
    Some(Score { metric: metric.to_owned(), mean: mean * unit, stderr, ..about.clone() })
}

/// All subjects of MMLU in training become `mmlu`, the mean over all their questions, as `evaluate`
/// finds it; fewer stay what they are.
fn with_mmlu(scores: BTreeMap<Column, Score>, names: &[String]) -> BTreeMap<Column, Score> {
    let is_subject = |c: &Column| {
        let name = c.task.strip_prefix("mmlu_").filter(|_| !c.perplexity);
        name.is_some_and(|name| names.iter().any(|other| other == name))
    };
    let subjects: Vec<(&Column, &Score)> = scores.iter().filter(|(c, _)| is_subject(c)).collect();
    let of_all = |shots: &u64| scores.contains_key(&Column::new("mmlu", *shots, false));
    let Some((shots, metric)) = subjects.first().map(|(c, s)| (c.shots, s.metric.clone())) else {
        return scores;
    };
    if subjects.len() < names.len()
        || subjects.iter().any(|(c, _)| c.shots != shots)
        || of_all(&shots)
    {
        return scores;
    }
    let size = |score: &Score| score.samples.unwrap_or(1) as f64;
    let total: f64 = subjects.iter().map(|(_, score)| size(score)).sum();
    let mean = subjects.iter().map(|(_, s)| s.mean * size(s)).sum::<f64>() / total;
    // The error of a sum of independent means.
    let variance: Option<f64> =
        subjects.iter().map(|(_, s)| Some((s.stderr? * size(s) / total).powi(2))).sum();
    let samples = subjects.iter().map(|(_, s)| s.samples).sum();
    let score = Score { metric, mean, stderr: variance.map(f64::sqrt), samples, file: None };
    let mut all = scores.clone();
    all.retain(|column, _| !is_subject(column));
    all.insert(Column::new("mmlu", shots, false), score);
    all
}

/// `group_subtasks`: the members of each group.
fn members(json: &Value) -> BTreeMap<String, Vec<String>> {
    let groups = json.get("group_subtasks").and_then(Value::as_object);
    let names = |value: &Value| -> Vec<String> {
        let names = value.as_array().into_iter().flatten();
        names.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let groups = groups.into_iter().flatten().map(|(group, value)| (group.clone(), names(value)));
    groups.filter(|(_, names)| !names.is_empty()).collect()
}

/// The groups that are shown in place of their members. One of this crate has to have all of its subjects: older files
/// have the mean of some under its name.
fn large<'a>(
    members: &'a BTreeMap<String, Vec<String>>,
    tasks: &Map<String, Value>,
) -> Result<BTreeSet<&'a String>> {
    let mut large = BTreeSet::new();
    for name in members.keys().filter(|name| tasks.contains_key(*name)) {
        let there = leaves(members, name).len();
        if there > FEW && there >= task::subjects(name)?.len() {
            large.insert(name);
        }
    }
    Ok(large)
}

/// All that is in a group, groups in it included.
fn below(members: &BTreeMap<String, Vec<String>>, group: &str) -> Vec<String> {
    let mut all: Vec<String> = members.get(group).cloned().unwrap_or_default();
    let mut next = 0;
    while next < all.len() {
        let inner = members.get(&all[next]).into_iter().flatten();
        let new: Vec<String> =
            inner.filter(|name| *name != group && !all.contains(name)).cloned().collect();
        all.extend(new);
        next += 1;
    }
    all
}

/// The tasks of a group; of a task itself.
fn leaves(members: &BTreeMap<String, Vec<String>>, name: &str) -> Vec<String> {
    if !members.contains_key(name) {
        return vec![name.to_owned()];
    }
    below(members, name).into_iter().filter(|name| !members.contains_key(name)).collect()
}

/// What a value is, in words.
fn kind(value: Option<&Value>) -> String {
    match value {
        None => "nothing".into(),
        Some(Value::Array(_)) => "a list".into(),
        Some(Value::Object(_)) => "an object".into(),
        Some(Value::String(text)) => {
            format!("the text `{}`", text.chars().take(40).collect::<String>())
        }
        Some(other) => format!("`{other}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(json: &Value) -> Result<Results> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        fs::write(&path, json.to_string()).unwrap();
        results(&path)
    }

    #[test]
    fn the_headline_is_acc_norm_where_there_is_one_and_a_perplexity_is_apart() {
        let json = json!({
            "results": {
                "piqa": {"alias": "piqa", "acc,none": 0.6, "acc_norm,none": 0.625, "acc_norm_stderr,none": 0.01},
                "boolq": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
                "gsm8k": {"exact_match,strict-match": 0.02, "exact_match,flexible-extract": 0.03},
                "drop": {"em,none": 0.1, "f1,none": 0.2},
                "humaneval": {"pass@1,create_test": 0.125},
                "wikitext": {"word_perplexity,none": 17.5, "bits_per_byte,none": 0.8},
                "squad": {"f1": 55.0},
            },
            "n-shot": {"gsm8k": 5},
            "n-samples": {"piqa": {"original": 1838, "effective": 200}},
            "config": {"model_args": "out/mine/step-00000010", "step": 10, "tokens": 4096},
        });
        let got = read(&json).unwrap();
        assert_eq!((got.first, got.row.step, got.row.tokens), (Some(200), Some(10), Some(4096)));
        let bare = json!({"results": {"piqa": {"acc": 0.5}}, "config": {"limit": 20}});
        assert_eq!(read(&bare).unwrap().first, Some(20));
        let told: Vec<String> = got
            .row
            .scores
            .iter()
            .map(|(c, s)| format!("{c}: {} {:.2} {:?}", s.metric, s.mean, s.stderr))
            .collect();
        assert_eq!(
            told,
            [
                "boolq: acc 50.00 None",
                "piqa: acc_norm 62.50 Some(1.0)",
                "drop: f1 20.00 None",
                "gsm8k, 5-shot: exact_match 2.00 None",
                "humaneval: pass@1 12.50 None",
                "wikitext, perplexity: word_perplexity 17.50 None",
            ]
        );
    }

    #[test]
    fn a_large_group_stands_for_its_members_and_the_members_of_a_small_one_for_it() {
        let with = |n: usize| {
            let names: Vec<String> = (0..n).map(|i| format!("mmlu_{i}")).collect();
            let mut json = json!({"results": {"mmlu": {"acc,none": 0.3}}, "n-shot": {"mmlu_0": 5}});
            for name in &names {
                json["results"][name] = json!({"acc,none": 0.3});
                json["n-samples"][name] = json!({"original": 9, "effective": 9});
            }
            json["group_subtasks"] = json!({"mmlu": ["stem"], "stem": names});
            read(&json).unwrap().row.scores
        };
        let large = with(57);
        assert_eq!(large.keys().map(Column::to_string).collect::<Vec<_>>(), ["mmlu, 5-shot"]);
        assert_eq!(large.values().next().unwrap().samples, Some(57 * 9));
        for few in [2, 5, 56] {
            let scores = with(few);
            assert!(scores.len() == few && scores.keys().all(|c| c.task.starts_with("mmlu_")));
        }
    }

    #[test]
    fn a_file_says_the_form_of_the_model_and_where_a_task_is_from_or_not() {
        let mut json = json!({
            "results": {"piqa": {"acc,none": 0.5}, "mine_a": {"acc,none": 0.5}},
            "config": {"quantize": "int4:64", "precision": null, "kv_cache_dtype": "auto"},
            "task_arguments": {"piqa": "commonsense", "mine_a": "my/own.yaml"},
        });
        let got = read(&json).unwrap();
        assert_eq!(got.form, Form { quantize: Some("int4:64".into()), ..Default::default() });
        let file = |task: &str| got.row.scores[&Column::new(task, 0, false)].file.clone();
        assert_eq!((file("piqa"), file("mine_a")), (None, Some("my/own.yaml".into())));
        json["config"] = json!({"kv_cache_dtype": "int8"});
        json.as_object_mut().unwrap().remove("task_arguments");
        let got = read(&json).unwrap();
        assert_eq!(got.form, Form { kv_cache_dtype: Some("int8".into()), ..Default::default() });
        assert!(got.row.scores.values().all(|score| score.file.is_none()));
    }

    #[test]
    fn a_file_that_is_no_results_says_which_field() {
        for (json, said) in [
            (json!([1]), "field `results`: expected an object of tasks, got nothing"),
            (json!({"results": [1]}), "got a list"),
            (
                json!({"results": {"piqa": 0.5}}),
                "field `results.piqa`: expected an object of scores, got `0.5`",
            ),
            (json!({"results": {"piqa": {"alias": "piqa"}}}), "got none in 1"),
            (
                json!({"results": {}, "config": {"tokens": "9B"}}),
                "field `config.tokens`: expected a whole number or null, got the text `9B`",
            ),
            (
                json!({"results": {}, "config": {"quantize": 4}}),
                "field `config.quantize`: expected a text or null, got `4`",
            ),
            (json!({"results": {}, "config": 3}), "field `config`: expected an object, got `3`"),
        ] {
            let error = read(&json).err().unwrap().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn training_lines_become_rows_and_a_torn_one_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut text = String::from("{\"step\":1,\"tokens\":10,\"loss\":3.0,\"lr\":1.0}\n");
        for (step, acc) in [(1, 0.25), (2, 0.5), (2, 0.75)] {
            text += &format!(
                "{{\"step\":{step},\"tokens\":{}0,\"task\":\"piqa\",\"samples\":20,\"acc\":{acc},\"acc_stderr\":0.1}}\n",
                step
            );
        }
        let subjects = task::subjects("mmlu").unwrap();
        let line = |step: u64, i: usize| {
            let (subject, acc) = (&subjects[i], i as f64 / 56.0);
            format!(
                "{{\"step\":{step},\"task\":\"mmlu_{subject}\",\"samples\":10,\"acc\":{acc},\"acc_stderr\":0.06}}\n"
            )
        };
        text += &(0..57).map(|i| line(2, i)).collect::<String>();
        text += &(0..56).map(|i| line(1, i)).collect::<String>();
        text += "{\"step\":3,\"task\":\"piqa\",\"ac";
        fs::write(&path, text).unwrap();
        let rows = metrics(&path).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].scores.len(), 1 + 56, "one subject is missing");
        assert_eq!((rows[1].step, rows[1].tokens, rows[1].scores.len()), (Some(2), Some(20), 2));
        assert_eq!(rows[1].scores[&Column::new("piqa", 0, false)].mean, 75.0);
        let mmlu = &rows[1].scores[&Column::new("mmlu", 0, false)];
        assert!((mmlu.mean - 50.0).abs() < 1e-9 && mmlu.samples == Some(570));
        assert!((mmlu.stderr.unwrap() - 6.0 / 57f64.sqrt()).abs() < 1e-9);
    }
}
