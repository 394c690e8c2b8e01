//! `results.json` and `samples_TASK.jsonl`, in lm-evaluation-harness's shape.

use super::question::{Group, Question, Task};
use super::task::Metric;
use super::{Judged, Key, Outcome, Response, Score, sum};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The tasks that are through, and where they are written.
pub struct Results {
    path: PathBuf,
    /// What was evaluated, and how.
    config: Value,
    tasks: Vec<Entry>,
}

/// A task that is through.
struct Entry {
    name: String,
    group: Option<Group>,
    /// `METRIC,FILTER` and `METRIC_stderr,FILTER`.
    scores: Map<String, Value>,
    /// How they came about, under the names that [`Results::json`] takes from here.
    about: Value,
}

/// The file of an evaluation.
const FILE: &str = "results.json";

/// The file of a task's samples beside it.
fn samples_file(results: &Path, task: &Task) -> PathBuf {
    results.with_file_name(format!("samples_{}.jsonl", task.name))
}

impl Results {
    /// In a folder, or in a file that ends with `.json`. `logged`: the tasks whose samples are to be written, too.
    ///
    /// # Errors
    /// Results or samples that are there already, unless they are to be overwritten.
    pub fn create(out: &Path, overwrite: bool, logged: &[Task]) -> Result<Self> {
        let path = match out.extension().is_some_and(|extension| extension == "json") {
            true => out.to_owned(),
            false => out.join(FILE),
        };
        let mut files = logged.iter().map(|task| samples_file(&path, task));
        let there = if path.exists() { Some(path.clone()) } else { files.find(|f| f.exists()) };
        if let Some(file) = there.filter(|_| !overwrite) {
            return Err(anyhow!("`{}` exists", file.display()))
                .usage("choose another folder for `--out`, or say `--overwrite`");
        }
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create `{}`", dir.display()))?;
        Ok(Self { path, config: Value::Null, tasks: Vec::new() })
    }

    /// Says what is evaluated, and how; it is written with the next task.
    pub fn set_config(&mut self, config: Value) {
        self.config = config;
    }

    /// Where `results.json` is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a task and writes what there is by now, so that a later failure loses nothing.
    pub fn add(&mut self, task: &Task, outcome: &Outcome, samples: bool) -> Result<()> {
        let mut scores = Map::new();
        scores.insert("alias".into(), task.name.clone().into());
        for (Key { metric, filter }, Score { mean, stderr }) in &outcome.scores {
            scores.insert(format!("{},{filter}", metric.name()), json!(mean));
            scores.insert(format!("{}_stderr,{filter}", metric.name()), or_na(*stderr));
        }
        let about = json!({
            "version": task.file.version,
            "n-shot": outcome.num_fewshot,
            "n-samples": {"original": outcome.rows, "effective": outcome.samples.len()},
            "split": outcome.split,
            "cut": outcome.cut,
            "seconds": outcome.seconds,
            "argument": task.argument,
            "config": task.file,
        });
        let (name, group) = (task.name.clone(), task.group.clone());
        self.tasks.push(Entry { name, group, scores, about });
        if samples {
            write(&samples_file(&self.path, task), &lines(task, outcome)?)?;
        }
        write(&self.path, &(serde_json::to_string_pretty(&self.json())? + "\n"))
    }

    fn json(&self) -> Value {
        let mut all = Map::new();
        let (mut results, mut groups) = (Map::new(), Map::new());
        for task in &self.tasks {
            results.insert(task.name.clone(), Value::Object(task.scores.clone()));
        }
        let mut subtasks = Map::new();
        // A group whose tasks are not all there has no score: some subjects are no MMLU.
        for (group, tasks) in self.groups().into_iter().filter(|(g, t)| t.len() == g.size) {
            let group = &group.name;
            let names: Vec<&String> = tasks.iter().map(|&i| &self.tasks[i].name).collect();
            subtasks.insert(group.to_owned(), json!(names));
            let mean = self.group(&tasks);
            groups.insert(group.to_owned(), mean.clone());
            results.insert(group.to_owned(), mean);
        }
        all.insert("results".into(), Value::Object(results));
        if !groups.is_empty() {
            all.insert("groups".into(), Value::Object(groups));
        }
        all.insert("group_subtasks".into(), Value::Object(subtasks));
        for (key, from) in [
            ("configs", "config"),
            ("versions", "version"),
            ("n-shot", "n-shot"),
            ("n-samples", "n-samples"),
            ("cut_contexts", "cut"),
            ("evaluation_seconds", "seconds"),
            ("task_arguments", "argument"),
        ] {
            let of = |task: &Entry| (task.name.clone(), task.about[from].clone());
            all.insert(key.into(), Value::Object(self.tasks.iter().map(of).collect()));
        }
        all.insert("config".into(), self.config.clone());
        Value::Object(all)
    }

    /// The groups, each with its tasks that are through, by name.
    fn groups(&self) -> Vec<(&Group, Vec<usize>)> {
        let mut groups: BTreeMap<&str, (&Group, Vec<usize>)> = BTreeMap::new();
        for (i, task) in self.tasks.iter().enumerate() {
            if let Some(group) = &task.group {
                let (_, tasks) = groups.entry(&group.name).or_insert((group, Vec::new()));
                tasks.push(i);
            }
        }
        groups.into_values().collect()
    }

    /// Scores of a group: means over all samples of its tasks, and the error of such a pool.
    fn group(&self, tasks: &[usize]) -> Value {
        let size = |i: usize| self.tasks[i].about["n-samples"]["effective"].as_f64().unwrap_or(0.0);
        let total: f64 = tasks.iter().map(|&i| size(i)).sum();
        let mut out = Map::new();
        let keys = self.tasks[tasks[0]].scores.keys().filter(|key| key.contains(','));
        for key in keys.filter(|key| !key.contains("_stderr,")) {
            let number = |i: usize, key: &str| self.tasks[i].scores[key].as_f64();
            let mean =
                tasks.iter().filter_map(|&i| Some(number(i, key)? * size(i))).sum::<f64>() / total;
            let error = key.replace(',', "_stderr,");
            // Each task's variance of a sample is its squared error times its size.
            let pooled = tasks
                .iter()
                .map(|&i| number(i, &error).map(|e| (size(i) - 1.0) * e * e * size(i)))
                .sum::<Option<f64>>()
                .map(|sum| (sum / (total - tasks.len() as f64) / total).sqrt());
            out.insert(key.clone(), json!(mean));
            out.insert(error, pooled.map_or_else(|| "N/A".into(), or_na));
        }
        Value::Object(out)
    }

    /// A line for each task and group: samples, examples, and scores in per cent; of a group that is not all there, how
    /// many tasks are.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let line = |out: &mut String, name: &str, about: String, scores: &Value| {
            let of = |(key, value): (&String, &Value)| -> Option<String> {
                let (metric, filter) =
                    key.split_once(',').filter(|(m, _)| !m.ends_with("_stderr"))?;
                let error = scores[format!("{metric}_stderr,{filter}")].as_f64();
                let (x, metric) = (value.as_f64()?, metric_of(metric, filter));
                Some(match error {
                    Some(e) => format!("{metric} {:.2} ± {:.2}", x * 100.0, e * 100.0),
                    None if !is_share(key) => format!("{metric} {x:.4}"),
                    None => format!("{metric} {:.2}", x * 100.0),
                })
            };
            let scores: Vec<String> =
                scores.as_object().into_iter().flatten().filter_map(of).collect();
            let _ = writeln!(out, "{name:<40} {about:<22} {}", scores.join("   "));
        };
        for task in &self.tasks {
            let (shots, n) = (&task.about["n-shot"], &task.about["n-samples"]["effective"]);
            let about = format!("{n} samples, {shots}-shot");
            line(&mut out, &task.name, about, &Value::Object(task.scores.clone()));
        }
        for (Group { name, size }, tasks) in self.groups() {
            let about = match tasks.len() {
                n if n == *size => "all of them".to_owned(),
                n => format!("mean of {n} of {size}"),
            };
            line(&mut out, name, about, &self.group(&tasks));
        }
        out
    }
}

/// Whether a score is a share of the samples, and shown in per cent.
fn is_share(key: &str) -> bool {
    let name = key.split(',').next().unwrap_or(key);
    serde_json::from_value(json!(name)).map_or(true, Metric::is_share)
}

/// A score's name for people.
fn metric_of(metric: &str, filter: &str) -> String {
    match filter {
        "none" => metric.to_owned(),
        filter => format!("{metric} ({filter})"),
    }
}

fn or_na(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { "N/A".into() }
}

/// A line a sample and filter.
fn lines(task: &Task, outcome: &Outcome) -> Result<String> {
    let mut out = String::new();
    for (i, judged) in outcome.samples.iter().enumerate() {
        let n = task.file.metrics.len();
        for (at, filter) in task.file.filter_names().into_iter().enumerate() {
            let mut line = line(task, i, judged, at);
            line["filter"] = json!(filter);
            line["metrics"] = task.file.metrics.iter().map(|m| m.name()).collect();
            for (metric, value) in task.file.metrics.iter().zip(judged.values.iter().skip(at * n)) {
                line[metric.name()] = json!(value);
            }
            if let Question::Text { words, bytes, .. } = &judged.sample.question {
                for metric in &task.file.metrics {
                    let count = if *metric == Metric::WordPerplexity { words } else { bytes };
                    line[metric.name()] = json!([sum(&judged.response), count]);
                }
            }
            out += &(serde_json::to_string(&line)? + "\n");
        }
    }
    Ok(out)
}

/// What was asked and what came, as filter number `at` took it.
fn line(task: &Task, doc_id: usize, judged: &Judged, at: usize) -> Value {
    let sample = &judged.sample;
    let generate = task.file.generate.as_ref();
    let until = generate.map(|g| json!({"until": g.until, "max_gen_toks": g.max_tokens}));
    let arguments: Value = match (&sample.question, until) {
        (Question::Written { .. }, Some(until)) => json!([[sample.requests[0].0, until]]),
        (Question::Text { text, .. }, _) => json!([[text]]),
        _ => json!(sample.requests),
    };
    let mut line = json!({
        "doc_id": doc_id,
        "doc": sample.row,
        "target": sample.question.target(),
        "arguments": arguments,
    });
    match &judged.response {
        Response::Likelihoods(_) if matches!(sample.question, Question::Text { .. }) => {
            line["resps"] = json!([[sum(&judged.response)]]);
        }
        Response::Likelihoods(all) => {
            let pairs = all.iter().map(|l| json!([[l.log_likelihood, l.is_greedy]]));
            line["resps"] = pairs.collect();
        }
        Response::Written { text, taken, verdict } => {
            line["resps"] = json!([[text]]);
            line["filtered_resps"] = json!([taken.get(at).unwrap_or(text)]);
            if let Some(verdict) = verdict {
                line["verdict"] = verdict.to_string().into();
            }
        }
    }
    line
}

/// Writes a file as a whole or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write `{}`", path.display());
    let beside = path.with_extension("tmp");
    std::fs::write(&beside, text).with_context(cannot)?;
    std::fs::rename(&beside, path).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use super::super::prompt::Sample;
    use super::super::task;
    use super::*;
    use crate::error;

    fn tasks(name: &str) -> Vec<Task> {
        task::find(&[name.into()]).unwrap()
    }

    /// Of two samples, one of them right.
    fn outcome() -> Outcome {
        let question = Question::Text { text: String::new(), words: 1, bytes: 1 };
        let sample = Sample { row: Map::new(), question, requests: Vec::new() };
        let judged = |x| Judged {
            sample: sample.clone(),
            response: Response::Likelihoods(Vec::new()),
            values: vec![x],
        };
        let samples = vec![judged(0.0), judged(1.0)];
        let key = Key { metric: Metric::Acc, filter: "none".into() };
        let scores = vec![(key, Score::of(&[0.0, 1.0]))];
        let split = "test".to_owned();
        Outcome { num_fewshot: 0, split, rows: 2, samples, cut: 0, scores, seconds: 1.0 }
    }

    #[test]
    fn a_group_has_a_score_where_all_of_its_tasks_are_there() {
        let (dir, tasks) = (tempfile::tempdir().unwrap(), tasks("mmlu"));
        let mut results = Results::create(dir.path(), false, &[]).unwrap();
        tasks[..5].iter().for_each(|task| results.add(task, &outcome(), false).unwrap());
        let json = results.json();
        assert!(json["results"].get("mmlu").is_none() && json.get("groups").is_none(), "{json}");
        assert_eq!(json["group_subtasks"], json!({}));
        assert_eq!(json["task_arguments"]["mmlu_anatomy"], "mmlu");
        let last = |results: &Results| results.table().lines().last().unwrap().to_owned();
        let told = last(&results);
        assert!(told.starts_with("mmlu ") && told.contains("mean of 5 of 57"), "{told}");
        assert!(told.contains("acc 50.00"), "{told}");
        tasks[5..].iter().for_each(|task| results.add(task, &outcome(), false).unwrap());
        let json = results.json();
        assert_eq!(json["groups"]["mmlu"]["acc,none"], 0.5);
        assert_eq!(json["results"]["mmlu"], json["groups"]["mmlu"]);
        assert_eq!(json["group_subtasks"]["mmlu"].as_array().unwrap().len(), 57);
        assert!(last(&results).contains("all of them"), "{}", last(&results));
    }

    #[test]
    fn samples_of_another_evaluation_are_not_written_over() {
        let (dir, tasks) = (tempfile::tempdir().unwrap(), tasks("piqa"));
        let out = |name: &str| dir.path().join(name);
        let mut first = Results::create(&out("a.json"), false, &tasks).unwrap();
        first.add(&tasks[0], &outcome(), true).unwrap();
        let error = Results::create(&out("b.json"), false, &tasks).err().unwrap();
        assert!(error.to_string().contains("samples_piqa.jsonl` exists"), "{error}");
        assert_eq!(error::exit_code(&error), 2);
        let error = Results::create(&out("a.json"), false, &tasks).err().unwrap();
        assert!(error.to_string().contains("a.json` exists"), "{error}");
        Results::create(&out("b.json"), false, &[]).unwrap();
        Results::create(&out("b.json"), true, &tasks).unwrap();
        Results::create(&out("b.json"), false, &self::tasks("boolq")).unwrap();
    }
}
