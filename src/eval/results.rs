//! `results.json` and `samples_TASK.jsonl`, in lm-evaluation-harness's shape.

use super::question::{Question, Task};
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
    group: Option<String>,
    /// `METRIC,FILTER` and `METRIC_stderr,FILTER`.
    scores: Map<String, Value>,
    /// How they came about, under the names that [`Results::json`] takes from here.
    about: Value,
}

/// The files of an evaluation.
const FILE: &str = "results.json";

impl Results {
    /// In a folder, or in a file that ends with `.json`.
    ///
    /// # Errors
    /// Results that are there already, unless they are to be overwritten.
    pub fn create(out: &Path, overwrite: bool, config: Value) -> Result<Self> {
        let path = match out.extension().is_some_and(|extension| extension == "json") {
            true => out.to_owned(),
            false => out.join(FILE),
        };
        if path.exists() && !overwrite {
            return Err(anyhow!("`{}` exists", path.display()))
                .usage("choose another `--out`, or say `--overwrite`");
        }
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create `{}`", dir.display()))?;
        Ok(Self { path, config, tasks: Vec::new() })
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
            "config": task.file,
        });
        let (name, group) = (task.name.clone(), task.group.clone());
        self.tasks.push(Entry { name, group, scores, about });
        if samples {
            let path = self.path.with_file_name(format!("samples_{}.jsonl", task.name));
            write(&path, &lines(task, outcome)?)?;
        }
        write(&self.path, &(serde_json::to_string_pretty(&self.json())? + "\n"))
    }

    fn json(&self) -> Value {
        let mut all = Map::new();
        let (mut results, mut groups) = (Map::new(), Map::new());
        for task in &self.tasks {
            results.insert(task.name.clone(), Value::Object(task.scores.clone()));
        }
        let mut members: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, task) in self.tasks.iter().enumerate() {
            if let Some(group) = &task.group {
                members.entry(group).or_default().push(i);
            }
        }
        let mut subtasks = Map::new();
        for (group, tasks) in members {
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
        ] {
            let of = |task: &Entry| (task.name.clone(), task.about[from].clone());
            all.insert(key.into(), Value::Object(self.tasks.iter().map(of).collect()));
        }
        all.insert("config".into(), self.config.clone());
        Value::Object(all)
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

    /// A line for each task and group: samples, examples, and scores in per cent.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let json = self.json();
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
        for (name, scores) in json["groups"].as_object().into_iter().flatten() {
            line(&mut out, name, "all of them".into(), scores);
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
