//! Evaluation: the tasks that the original published scores of, as lm-evaluation-harness asks and judges them.
//!
//! A [`task`] is a file that makes a [`question`] of a row; [`prompt`] puts examples before it; [`score`] finds the
//! log-likelihoods of given answers, [`written`] has the model write them; [`judge`] says what they are worth; this module
//! makes a run of it and writes [`results`].
//!
//! # Source
//! lm-evaluation-harness 0.4.13: prompts, choice of examples, metrics and standard errors are its, so that scores compare.

pub mod judge;
pub mod prompt;
pub mod published;
pub mod question;
pub mod report;
pub mod results;
pub mod rows;
pub mod sandbox;
pub mod score;
pub mod task;
pub mod written;

use crate::bail_hint;
use crate::error::WithHint;
use crate::ffi::ProcessGroup;
use crate::generate::NetworkRef;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use prompt::{Pair, Sample};
use question::{Question, Request, Task};
use rayon::prelude::*;
use regex::Regex;
use sandbox::{Sandbox, Verdict};
use score::Likelihood;
use std::path::Path;
use task::{Filter, Form, Metric};

/// Seed of the choice of examples, the harness's.
pub const SEED: u64 = 1234;

/// What is evaluated.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// Weights.
    pub network: NetworkRef<'a>,
    /// Text to ids.
    pub tokenizer: &'a Tokenizer,
    /// Ids that end a text.
    pub eos: &'a [u32],
}

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
    /// Requests at a time; `None`: as many as run well.
    pub batch_size: Option<usize>,
    /// Where programs that the model wrote may run.
    pub sandbox: Option<&'a Sandbox>,
    /// Ranks that share likelihoods ([`score::log_likelihoods`]); none write texts together.
    pub ranks: Option<&'a ProcessGroup>,
}

/// What the model made of a sample.
#[derive(Clone, Debug)]
pub enum Response {
    /// Of each request.
    Likelihoods(Vec<Likelihood>),
    /// What it wrote, what each filter took of it, and what became of the program that it is.
    Written {
        /// As it came.
        text: String,
        /// One a filter.
        taken: Vec<String>,
        /// Where the task has programs.
        verdict: Option<Verdict>,
    },
}

/// A judged sample.
#[derive(Clone, Debug)]
pub struct Judged {
    /// What was asked.
    pub sample: Sample,
    /// What came.
    pub response: Response,
    /// A value for each of [`Outcome::scores`]; none in tasks of texts, where only all of them have one.
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
    /// For each filter, each of the task's metrics.
    pub scores: Vec<(Key, Score)>,
    /// Seconds that it took, data and tokens included.
    pub seconds: f64,
}

/// Names a score: `exact_match,strict-match` in results.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// What is measured ..
    pub metric: Metric,
    /// .. of what this filter took; `none` where there is no filter.
    pub filter: String,
}

/// A mean, or a perplexity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Of the samples' values.
    pub mean: f64,
    /// Its standard error: the samples' standard deviation over the root of their number; not a number for one sample and for
    /// a perplexity.
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

/// Refuses tasks that run programs of the model's where that was not allowed.
///
/// # Errors
/// Such a task.
pub fn check_programs(tasks: &[Task], allowed: bool) -> Result<()> {
    match tasks.iter().find(|task| task.file.runs_programs()) {
        Some(task) if !allowed => Err(anyhow!(
            "`{}` runs programs that the model writes",
            task.name
        ))
        .usage("say `--allow-code-execution`: they run without network, in an empty folder, with limits (docs/EVAL.md)"),
        _ => Ok(()),
    }
}

/// Runs one task. `done` is called with requests that are through, and all.
///
/// # Sync
/// The CPU waits once a row of requests, or once a step of answers.
///
/// # Errors
/// No such set; rows of another schema; a failure of the tokenizer or the model; a log-likelihood that is not finite.
pub fn evaluate(
    model: Model,
    task: &Task,
    options: Options,
    mut done: impl FnMut(usize, usize),
) -> Result<Outcome> {
    let started = std::time::Instant::now();
    let num_fewshot = options.num_fewshot.unwrap_or(task.file.num_fewshot);
    let found = prompt::samples(task, options.data, num_fewshot, options.limit, options.seed)?;
    let requests: Vec<&Request> = found.samples.iter().flat_map(|s| &s.requests).collect();
    let (responses, cut) = match task.form {
        Form::Choices | Form::Queries => {
            let (likelihoods, cut) = choices(model, task, &requests, options, &mut done)?;
            let mut rest = likelihoods.into_iter();
            let of = |sample: &Sample| rest.by_ref().take(sample.requests.len()).collect();
            (found.samples.iter().map(of).map(Response::Likelihoods).collect(), cut)
        }
        Form::Text => (texts(model, &requests, options, &mut done)?, 0),
        Form::Written => written(model, task, &found.samples, options, &mut done)?,
    };
    check_finite(task, &responses)?;

    let samples: Vec<Judged> = found
        .samples
        .into_iter()
        .zip(responses)
        .map(|(sample, response)| {
            let values = values(task, &sample, &response);
            Judged { sample, response, values }
        })
        .collect();
    let scores = scores(task, &samples);
    let seconds = started.elapsed().as_secs_f64();
    Ok(Outcome { num_fewshot, split: found.split, rows: found.rows, samples, cut, scores, seconds })
}

/// Refuses log-likelihoods that are not finite: of such choices the first would count as the likeliest.
fn check_finite(task: &Task, responses: &[Response]) -> Result<()> {
    for (sample, response) in responses.iter().enumerate() {
        let Response::Likelihoods(all) = response else { continue };
        let not_finite = |one: &&Likelihood| !one.log_likelihood.is_finite();
        if let Some(Likelihood { log_likelihood, .. }) = all.iter().find(not_finite) {
            bail_hint!(
                "weights that hold NaN or infinity give this, which `inspect --statistics` counts; else try `--precision 32-true`";
                "a log-likelihood of the task `{}` is not finite: {log_likelihood}, in sample {sample} (from 0)", task.name
            );
        }
    }
    Ok(())
}

/// Likelihoods of given answers.
fn choices(
    model: Model,
    task: &Task,
    requests: &[&Request],
    options: Options,
    done: &mut impl FnMut(usize, usize),
) -> Result<(Vec<Likelihood>, usize)> {
    let encode = |(context, continuation): &&Request| {
        prompt::encode(model.tokenizer, context, continuation)
            .with_context(|| format!("in the task `{}`", task.name))
    };
    let pairs: Vec<Pair> = requests.par_iter().map(encode).collect::<Result<_>>()?;
    let all = pairs.len();
    let Options { batch_size, ranks, .. } = options;
    score::log_likelihoods(model.network, &pairs, batch_size, ranks, |n| done(n, all))
}

/// Likelihoods of whole texts, from window to window.
fn texts(
    model: Model,
    requests: &[&Request],
    options: Options,
    done: &mut impl FnMut(usize, usize),
) -> Result<Vec<Response>> {
    // A quantised network scores as many tokens as it reads, the first of which is given.
    let whole = usize::from(matches!(model.network, NetworkRef::Quantised(_)));
    let context = model.network.config().block_size as usize - whole;
    let windows = |(_, text): &&Request| prompt::windows(model.tokenizer, text, context);
    let windows: Vec<Vec<Pair>> = requests.par_iter().map(windows).collect::<Result<_>>()?;
    let pairs: Vec<Pair> = windows.iter().flatten().cloned().collect();
    let all = pairs.len();
    let Options { batch_size, ranks, .. } = options;
    let (likelihoods, _) =
        score::log_likelihoods(model.network, &pairs, batch_size, ranks, |n| done(n, all))?;
    let mut rest = likelihoods.into_iter();
    let of =
        |windows: &Vec<Pair>| Response::Likelihoods(rest.by_ref().take(windows.len()).collect());
    Ok(windows.iter().map(of).collect())
}

/// Answers that the model writes, and programs that they are.
fn written(
    model: Model,
    task: &Task,
    samples: &[Sample],
    options: Options,
    done: &mut impl FnMut(usize, usize),
) -> Result<(Vec<Response>, usize)> {
    let generate = task.file.generate.as_ref().context("the task says not how to generate")?;
    let prompts: Vec<&str> = samples.iter().map(|s| s.requests[0].0.as_str()).collect();
    let all = prompts.len();
    let (texts, cut) =
        written::answers(model, &prompts, generate, options.batch_size, |n| done(n, all))?;
    let respond = |(sample, text): (&Sample, String)| -> Result<Response> {
        let filters = task.filters.iter().zip(&task.file.filters);
        let take = |(regex, filter): (&Option<Regex>, &Filter)| {
            judge::extract(regex.as_ref(), filter.take, &text)
        };
        let taken = filters.map(take).collect();
        let verdict = match (task.file.runs_programs(), options.sandbox) {
            (false, _) => None,
            (true, Some(sandbox)) => Some(sandbox.run(&task.program(&sample.row, &text)?)?),
            (true, None) => anyhow::bail!("programs of the task `{}` may not run", task.name),
        };
        Ok(Response::Written { text, taken, verdict })
    };
    let responses = samples.par_iter().zip(texts).map(respond).collect::<Result<_>>()?;
    Ok((responses, cut))
}

/// Of each filter, each metric of a sample.
fn values(task: &Task, sample: &Sample, response: &Response) -> Vec<f64> {
    let metrics = &task.file.metrics;
    match (&sample.question, response) {
        (Question::Choice(choice), Response::Likelihoods(likelihoods)) => {
            metrics.iter().map(|metric| judge::choice(*metric, choice, likelihoods)).collect()
        }
        (Question::Written { answers, .. }, Response::Written { text, taken, verdict }) => {
            let passed = f64::from(u8::from(*verdict == Some(Verdict::Passed)));
            let whole = [text.clone()];
            let texts = if taken.is_empty() { &whole[..] } else { taken.as_slice() };
            let ignore_case = task.file.exact_match.ignore_case;
            let of = |text: &String| -> Vec<f64> {
                let value = |metric: &Metric| match metric {
                    Metric::Em => judge::drop_scores(text, answers).0,
                    Metric::F1 => judge::drop_scores(text, answers).1,
                    Metric::PassAt1 => passed,
                    _ => judge::exact_match(&task.ignored, ignore_case, text, answers),
                };
                metrics.iter().map(value).collect()
            };
            texts.iter().flat_map(of).collect()
        }
        _ => Vec::new(),
    }
}

/// Means of all values, or perplexities.
fn scores(task: &Task, samples: &[Judged]) -> Vec<(Key, Score)> {
    let filters = task.file.filter_names();
    let keys = filters.iter().flat_map(|filter| {
        task.file.metrics.iter().map(|&metric| Key { metric, filter: filter.to_string() })
    });
    let score = |(i, key): (usize, Key)| {
        if key.metric.is_share() {
            let values: Vec<f64> = samples.iter().map(|sample| sample.values[i]).collect();
            return (key, Score::of(&values));
        }
        let log_likelihood = samples.iter().map(|sample| sum(&sample.response)).sum();
        let questions: Vec<&Question> = samples.iter().map(|s| &s.sample.question).collect();
        let mean = judge::perplexity(key.metric, log_likelihood, &questions);
        (key, Score { mean, stderr: f64::NAN })
    };
    keys.enumerate().map(score).collect()
}

/// Log-likelihood of a text, over its windows.
pub fn sum(response: &Response) -> f64 {
    match response {
        Response::Likelihoods(of_windows) => of_windows.iter().map(|l| l.log_likelihood).sum(),
        Response::Written { .. } => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_likelihood_that_is_not_finite_is_told_with_its_task_and_sample() {
        let task = task::find(&["piqa".into()]).unwrap().remove(0);
        let of = |values: &[f64]| {
            let one = |&log_likelihood| Likelihood { log_likelihood, is_greedy: None };
            Response::Likelihoods(values.iter().map(one).collect())
        };
        let good = of(&[-1.0, -2.5]);
        check_finite(&task, &[good.clone(), of(&[])]).unwrap();
        for bad in [f64::NAN, f64::NEG_INFINITY, f64::INFINITY] {
            let error = check_finite(&task, &[good.clone(), of(&[-1.0, bad])]).unwrap_err();
            let told = error.to_string();
            let want = format!("of the task `piqa` is not finite: {bad}, in sample 1 (from 0)");
            assert!(told.contains(&want), "{told}");
            assert!(crate::error::hint(&error).is_some());
        }
    }
}
