//! Evaluation: the tasks that the original published scores of, as lm-evaluation-harness asks and judges them.
//!
//! A [`task`] is a file that makes a question of a row; [`prompt`] puts examples before it; [`score`] finds the
//! log-likelihoods of the answers; this module judges them and writes [`results`]. [`report`] draws those
//! of many checkpoints over tokens.
//!
//! # Source
//! lm-evaluation-harness 0.4.13: prompts, choice of examples, metrics and standard errors are its, so that scores compare.

pub mod prompt;
pub mod published;
pub mod report;
pub mod results;
pub mod rows;
pub mod score;
pub mod task;

use crate::generate::NetworkRef;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use prompt::{Pair, Sample};
use rayon::prelude::*;
use score::Likelihood;
use std::path::Path;
use task::{Metric, Task};

/// What is asked of all tasks.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// The folder of the sets.
    pub data: &'a Path,
    /// Examples before each question; `None`: what the task's file says.
    pub num_fewshot: Option<usize>,
    /// The first so many samples of each set.
    pub limit: Option<usize>,
    /// Seed of the choice of examples.
    pub seed: u64,
}

/// A judged sample.
#[derive(Clone, Debug)]
pub struct Judged {
    /// What was asked.
    pub sample: Sample,
    /// What the model made of each request.
    pub likelihoods: Vec<Likelihood>,
    /// A value for each of the task's metrics.
    pub values: Vec<f64>,
}

/// What became of a task.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Examples before each question.
    pub num_fewshot: usize,
    /// Split that was judged.
    pub split: String,
    /// Its rows, of which `samples` may be the first.
    pub rows: usize,
    /// One a row.
    pub samples: Vec<Judged>,
    /// Contexts that were cut from the left to fit the model's.
    pub cut: usize,
    /// Means and their standard errors, for each of the task's metrics.
    pub scores: Vec<(Metric, Score)>,
    /// Seconds that it took, data and tokens included.
    pub seconds: f64,
}

/// A mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Of the samples' values.
    pub mean: f64,
    /// Its standard error: the samples' standard deviation over the root of their number; not a number for one sample.
    pub stderr: f64,
}

impl Score {
    /// Of these values.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Self { mean, stderr: (variance / n).sqrt() }
    }
}

/// Runs one task. `done` is called with requests that are through, and all.
///
/// # Errors
/// No such set; rows of another schema; a failure of the tokenizer or the model.
pub fn evaluate(
    network: NetworkRef,
    tokenizer: &Tokenizer,
    task: &Task,
    options: Options,
    mut done: impl FnMut(usize, usize),
) -> Result<Outcome> {
    let started = std::time::Instant::now();
    let num_fewshot = options.num_fewshot.unwrap_or(task.file.num_fewshot);
    let found = prompt::samples(task, options.data, num_fewshot, options.limit, options.seed)?;
    let requests: Vec<&(String, String)> =
        found.samples.iter().flat_map(|sample| &sample.requests).collect();
    let encode = |(context, continuation): &&(String, String)| {
        prompt::encode(tokenizer, context, continuation)
            .with_context(|| format!("in the task `{}`", task.name))
    };
    let pairs: Vec<Pair> = requests.par_iter().map(encode).collect::<Result<_>>()?;
    let all = pairs.len();
    let (likelihoods, cut) = score::log_likelihoods(network, &pairs, |n| done(n, all))?;

    let mut likelihoods = likelihoods.into_iter();
    let mut samples = Vec::with_capacity(found.samples.len());
    for sample in found.samples {
        let likelihoods: Vec<Likelihood> =
            likelihoods.by_ref().take(sample.requests.len()).collect();
        let values = task.file.metrics.iter().map(|m| judge(*m, &sample, &likelihoods)).collect();
        samples.push(Judged { sample, likelihoods, values });
    }
    let score = |(i, metric): (usize, &Metric)| {
        let values: Vec<f64> = samples.iter().map(|sample| sample.values[i]).collect();
        (*metric, Score::of(&values))
    };
    let scores = task.file.metrics.iter().enumerate().map(score).collect();
    let seconds = started.elapsed().as_secs_f64();
    Ok(Outcome { num_fewshot, split: found.split, rows: found.rows, samples, cut, scores, seconds })
}

/// 1 where the choice is right, else 0.
fn judge(metric: Metric, sample: &Sample, likelihoods: &[Likelihood]) -> f64 {
    let of = |(i, l): (usize, &Likelihood)| match metric {
        Metric::Acc => l.log_likelihood,
        Metric::AccNorm => {
            l.log_likelihood / sample.question.choices[i].chars().count().max(1) as f64
        }
    };
    let scores: Vec<f64> = likelihoods.iter().enumerate().map(of).collect();
    f64::from(u8::from(first_largest(&scores) == sample.question.target))
}

/// Where the largest value is; of equal ones the first.
fn first_largest(values: &[f64]) -> usize {
    let larger = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
    (0..values.len()).reduce(larger).unwrap_or(0)
}
