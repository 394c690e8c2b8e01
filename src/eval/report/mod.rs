//! `report`: the scores of a run's checkpoints over tokens, beside the published ones.
//!
//! [`collect`] finds what `evaluate` and training wrote, [`markdown`] makes a table of it and
//! [`picture`] a PNG. Here: what was found, and which tasks are averaged.

pub mod collect;
mod frame;
mod legend;
pub mod markdown;
mod notes;
pub mod picture;
mod read;
mod scene;

use super::published::{self, Published};
use crate::picture::trim_zeros;
use crate::train::progress::count;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// All that was found below the folders.
#[derive(Debug, Default)]
pub struct Report {
    /// Those that were named.
    pub dirs: Vec<PathBuf>,
    /// In the order of the folders.
    pub series: Vec<Series>,
    /// What a reader must know before comparing rows.
    pub notes: Vec<String>,
    /// Files that could not be used, and why.
    pub warnings: Vec<String>,
}

/// Checkpoints of one run, evaluated in one way.
#[derive(Clone, Debug)]
pub struct Series {
    /// The run.
    pub run: String,
    /// How it was evaluated.
    pub source: Source,
    /// In what form.
    pub form: Form,
    /// By tokens, those without last.
    pub rows: Vec<Row>,
}

/// How scores came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// `evaluate`, on whole sets or the first so many samples of each.
    Evaluation(Option<u64>),
    /// During training, on at most so many samples of each set.
    InTraining(Option<u64>),
}

/// In what form weights and cache were, in the words of `evaluate`'s arguments; nothing of what a file does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Form {
    /// `--precision`, of weights that are not quantised.
    pub precision: Option<String>,
    /// `--quantize`, of others.
    pub quantize: Option<String>,
    /// `--kv-cache-dtype`, where it is not the usual one.
    pub kv_cache_dtype: Option<String>,
}

/// A checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Its path; of scores during training, the folder of the run.
    pub checkpoint: String,
    /// Optimizer steps.
    pub step: Option<u64>,
    /// Tokens that it was trained on.
    pub tokens: Option<u64>,
    /// What it scored.
    pub scores: BTreeMap<Column, Score>,
}

/// What is measured: a task with so many examples, by one metric.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Column {
    /// Place of the task in the published table; the others behind it, by name.
    place: usize,
    /// Task or group.
    pub task: String,
    /// Examples before each question.
    pub shots: u64,
    /// A perplexity: shown, but neither averaged nor drawn.
    pub perplexity: bool,
}

/// A score and where it comes from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// As the file names it: `acc_norm`.
    pub metric: String,
    /// In per cent; a perplexity as it is.
    pub mean: f64,
    /// Standard error, in the same unit.
    pub stderr: Option<f64>,
    /// Samples that were judged.
    pub samples: Option<u64>,
    /// Of a task of one's own, its file.
    pub file: Option<String>,
}

impl Column {
    /// Of a task.
    pub fn new(task: &str, shots: u64, perplexity: bool) -> Self {
        let place = published::TASKS.iter().position(|name| *name == task);
        let place = place.unwrap_or(published::TASKS.len());
        Self { place, task: task.to_owned(), shots, perplexity }
    }

    /// What guessing scores.
    pub fn chance(&self) -> Option<f64> {
        published::chance(&self.task).filter(|_| !self.perplexity)
    }

    /// What a published row scored here: those are zero-shot.
    pub fn published(&self, row: &Published) -> Option<f64> {
        row.task(&self.task).filter(|_| self.shots == 0 && !self.perplexity)
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.task)?;
        if self.shots > 0 {
            write!(f, ", {}-shot", self.shots)?;
        }
        if self.perplexity { f.write_str(", perplexity") } else { Ok(()) }
    }
}

impl Series {
    /// The run, and what is special about its scores.
    pub fn label(&self) -> String {
        let Form { precision, quantize, kv_cache_dtype } = &self.form;
        let mut label = self.run.clone();
        for weights in precision.iter().chain(quantize) {
            label += &format!(", {weights}");
        }
        if let Some(dtype) = kv_cache_dtype {
            label += &format!(", {dtype} cache");
        }
        match self.source {
            Source::Evaluation(None) => label,
            Source::Evaluation(Some(n)) => format!("{label}, first {n} samples"),
            Source::InTraining(None) => format!("{label}, in training"),
            Source::InTraining(Some(n)) => format!("{label}, in training, {n} samples"),
        }
    }

    /// What has a colour of its own in the picture: a run, and each way in which it was quantised.
    pub fn coloured(&self) -> String {
        let quantised = self.form.quantize.iter().map(|scheme| format!(", {scheme}"));
        self.run.clone() + &quantised.collect::<String>()
    }

    /// What its row is called where the number of tokens is not known, or several models are in one series.
    pub fn row_label(&self, row: &Row) -> String {
        let name = row.checkpoint.rsplit(['/', '\\']).find(|part| !part.is_empty());
        match name {
            Some(name) if row.tokens.is_none() && name != self.run => {
                format!("{}: {name}", self.label())
            }
            _ => self.label(),
        }
    }
}

impl Report {
    /// All columns that have a score.
    pub fn columns(&self) -> Vec<Column> {
        let all = self.rows().flat_map(|(_, row)| row.scores.keys().cloned());
        let mut columns: Vec<Column> = all.collect();
        columns.sort();
        columns.dedup();
        columns
    }

    /// All rows, with their series.
    pub fn rows(&self) -> impl Iterator<Item = (&Series, &Row)> {
        self.series.iter().flat_map(|series| series.rows.iter().map(move |row| (series, row)))
    }

    /// The tasks that are averaged.
    pub fn basis(&self) -> Basis {
        let has = |row: &Row, shots| {
            let all = published::TASKS.map(|task| Column::new(task, shots, false));
            all.iter().all(|column| row.scores.contains_key(column)).then(|| all.to_vec())
        };
        let mut shots: Vec<u64> = self.columns().iter().map(|column| column.shots).collect();
        shots.sort();
        shots.dedup();
        let seven = shots.iter().find_map(|&n| self.rows().find_map(|(_, row)| has(row, n)));
        let shares = |row: &Row| -> Vec<Column> {
            row.scores.keys().filter(|column| !column.perplexity).cloned().collect()
        };
        let longer = |best: Vec<Column>, next: Vec<Column>| {
            if next.len() > best.len() { next } else { best }
        };
        let most = || self.rows().map(|(_, row)| shares(row)).reduce(longer).unwrap_or_default();
        Basis { columns: seven.unwrap_or_else(most) }
    }
}

/// The tasks that are averaged, the same ones for every row.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// The seven published ones where a row has them, else all of the row that has most.
    pub columns: Vec<Column>,
}

impl Basis {
    /// Whether it is that of the published averages.
    pub fn is_published(&self) -> bool {
        self.columns.len() == published::TASKS.len()
            && self.columns.iter().all(|c| c.place < published::TASKS.len() && c.shots == 0)
    }

    /// `average of 7 tasks`, or the only task.
    pub fn name(&self) -> String {
        match &self.columns[..] {
            [] => "no score in per cent".into(),
            [one] => one.to_string(),
            all => format!("average of {} tasks", all.len()),
        }
    }

    /// Mean of a row's scores and its standard error, if it has all of them.
    pub fn of(&self, row: &Row) -> Option<(f64, Option<f64>)> {
        let scores: Option<Vec<&Score>> =
            self.columns.iter().map(|column| row.scores.get(column)).collect();
        let scores = scores.filter(|scores| !scores.is_empty())?;
        let n = scores.len() as f64;
        let mean = scores.iter().map(|score| score.mean).sum::<f64>() / n;
        let variance: Option<f64> = scores.iter().map(|s| Some(s.stderr?.powi(2))).sum();
        Some((mean, variance.map(|sum| sum.sqrt() / n)))
    }

    /// Of a published row.
    pub fn published(&self, row: &Published) -> Option<f64> {
        if self.is_published() {
            return Some(row.average);
        }
        let scores: Option<Vec<f64>> = self.columns.iter().map(|c| c.published(row)).collect();
        let scores = scores.filter(|scores| !scores.is_empty())?;
        Some(scores.iter().sum::<f64>() / scores.len() as f64)
    }

    /// What guessing scores on average.
    pub fn chance(&self) -> Option<f64> {
        let all: Option<f64> = self.columns.iter().map(Column::chance).sum();
        all.filter(|_| !self.columns.is_empty()).map(|sum| sum / self.columns.len() as f64)
    }
}

/// `105B`, `1T`, `983k`, `?`.
fn tokens(n: Option<f64>) -> String {
    n.map_or("?".into(), |n| trim_zeros(&count(n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tasks: &[(&str, u64)]) -> Row {
        let score = |i: usize| Score {
            metric: "acc".into(),
            mean: 10.0 * i as f64,
            stderr: Some(3.0),
            samples: None,
            file: None,
        };
        let scores = tasks.iter().enumerate();
        let scores = scores.map(|(i, (task, shots))| (Column::new(task, *shots, false), score(i)));
        Row { tokens: Some(1), scores: scores.collect(), ..Default::default() }
    }

    fn report(rows: Vec<Row>) -> Report {
        let (run, source) = ("mine".to_owned(), Source::Evaluation(None));
        let series = Series { run, source, form: Form::default(), rows };
        Report { series: vec![series], ..Default::default() }
    }

    #[test]
    fn the_average_is_of_the_seven_where_a_row_has_them() {
        let seven = published::TASKS.map(|task| (task, 0));
        let more: Vec<_> = seven.into_iter().chain([("mmlu", 5), ("lambada", 0)]).collect();
        let all = report(vec![row(&[("piqa", 0)]), row(&more)]);
        let basis = all.basis();
        assert!(basis.is_published());
        assert_eq!(basis.name(), "average of 7 tasks");
        assert!((basis.chance().unwrap() - 250.0 / 7.0).abs() < 1e-9);
        let (mean, error) = basis.of(&all.series[0].rows[1]).unwrap();
        assert!((mean - 30.0).abs() < 1e-9 && (error.unwrap() - 3.0 / 7f64.sqrt()).abs() < 1e-9);
        assert_eq!(basis.of(&all.series[0].rows[0]), None);
        let averages: Vec<f64> =
            published::ROWS.iter().filter_map(|row| basis.published(row)).collect();
        assert_eq!(averages, [48.30, 46.11, 48.28, 50.22, 53.86, 52.99]);
    }

    #[test]
    fn else_it_is_of_what_the_fullest_row_has_and_published_rows_need_the_same_tasks() {
        let basis =
            report(vec![row(&[("piqa", 0)]), row(&[("hellaswag", 0), ("piqa", 0)])]).basis();
        assert_eq!(basis.name(), "average of 2 tasks");
        let known: Vec<Option<f64>> =
            published::ROWS.iter().map(|row| basis.published(row)).collect();
        assert_eq!(known[..5], [None; 5]);
        assert!((known[5].unwrap() - (59.20 + 73.29) / 2.0).abs() < 1e-9);
        for other in [&[("piqa", 0), ("mmlu", 0)][..], &[("piqa", 5)], &[]] {
            let basis = report(vec![row(other)]).basis();
            assert!(published::ROWS.iter().all(|row| basis.published(row).is_none()));
        }
        // With examples, the seven are averaged, but are not those of the published rows.
        let seven = report(vec![row(&published::TASKS.map(|task| (task, 5)))]).basis();
        assert!(seven.columns.len() == 7 && !seven.is_published());
    }
}
