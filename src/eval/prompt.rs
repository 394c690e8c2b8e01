//! Questions with examples before them, as tokens.

use super::question::{Question, Request, Task};
use super::rows::{self, Row};
use super::task::Shots;
use crate::data::order::PythonRng;
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use rayon::prelude::*;
use std::path::Path;

/// A row to be judged, with what is asked of the model.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The row.
    pub row: Row,
    /// What it asks.
    pub question: Question,
    /// What is asked of the model.
    pub requests: Vec<Request>,
}

/// Samples of a task, and what is to be told of where they are from.
pub struct Samples {
    /// In the order of the set.
    pub samples: Vec<Sample>,
    /// Split that is judged.
    pub split: String,
    /// Rows of that split.
    pub rows: usize,
}

/// The first `limit` samples of a task, each with `shots` examples. Examples are drawn as the harness draws them: by
/// Python's generator of the seed, question after question; where they come from the split that is judged, the question
/// itself is none of them.
///
/// # Errors
/// No such set; a row that has not what the task's templates name; fewer examples than asked for.
pub fn samples(
    task: &Task,
    data: &Path,
    shots: usize,
    limit: Option<usize>,
    seed: u64,
) -> Result<Samples> {
    let splits = &task.file.data;
    let dir = data.join(&task.folder);
    let read = |split: &Option<String>| match split {
        Some(name) => Ok(rows::read(&dir, name)?.map(|rows| (name.clone(), rows))),
        None => Ok::<_, anyhow::Error>(None),
    };
    let judged = match read(&splits.test)? {
        Some(found) => Some(found),
        None => read(&splits.validation)?,
    };
    let (split, judged) = judged
        .filter(|(_, rows)| !rows.is_empty())
        .ok_or_else(|| no_rows(task, &dir))
        .hint("`scripts/fetch_eval_data.py` fetches the sets; `--data`, in a run `eval.data`, names the folder that has them")?;
    let n = limit.map_or(judged.len(), |limit| limit.min(judged.len()));
    let questions = judged[..n].par_iter().map(|row| task.question(row));
    let questions: Vec<Question> = questions.collect::<Result<_>>()?;

    let mut examples = Examples { rows: Vec::new(), apart: true, rng: PythonRng::new(seed) };
    if shots > 0 || task.wants_examples() {
        let apart = match read(&splits.fewshot)? {
            Some(found) => Some(found),
            None => read(&splits.train)?,
        };
        (examples.rows, examples.apart) = match apart {
            Some((_, rows)) => (rows, true),
            None => (judged.clone(), false),
        };
    }
    let description = task.description(&examples.rows)?;
    let delimiter = &task.file.delimiter;
    let mut samples = Vec::with_capacity(n);
    for (row, question) in judged[..n].iter().zip(questions) {
        let chosen = examples.draw(task, row, shots)?;
        let texts = chosen.iter().map(|row| Ok(task.question(row)?.shot(delimiter)));
        let before = description.clone() + &texts.collect::<Result<String>>()?;
        let requests = question.requests(&before, delimiter);
        samples.push(Sample { row: row.clone(), question, requests });
    }
    Ok(Samples { samples, split, rows: judged.len() })
}

fn no_rows(task: &Task, dir: &Path) -> anyhow::Error {
    let data = &task.file.data;
    let splits: Vec<&str> =
        [&data.test, &data.validation].into_iter().flatten().map(String::as_str).collect();
    anyhow!(
        "`{}` has no rows of the task `{}`: expected files of the split `{}` (.jsonl, .jsonl.gz, .parquet, .arrow)",
        dir.display(),
        task.name,
        splits.join("` or `")
    )
}

/// Where examples come from.
struct Examples {
    rows: Vec<Row>,
    /// From another split than the one that is judged.
    apart: bool,
    rng: PythonRng,
}

impl Examples {
    fn draw(&mut self, task: &Task, judged: &Row, shots: usize) -> Result<Vec<&Row>> {
        if shots == 0 {
            return Ok(Vec::new());
        }
        let (rows, apart) = (&self.rows, self.apart);
        let too_few =
            || anyhow!("the task `{}`: {shots} examples of {} rows", task.name, rows.len());
        let other = |row: &&Row| apart || *row != judged;
        let chosen: Vec<&Row> = match task.file.sampler {
            Shots::FirstN => rows.iter().filter(other).take(shots).collect(),
            Shots::Random => {
                let drawn = if apart { shots } else { shots + 1 };
                if drawn > rows.len() {
                    return Err(too_few()).usage("lower `--num-fewshot`");
                }
                let places = self.rng.sample(rows.len(), drawn);
                places.into_iter().map(|i| &rows[i]).filter(other).take(shots).collect()
            }
        };
        match chosen.len() == shots {
            true => Ok(chosen),
            false => Err(too_few()).usage("lower `--num-fewshot`"),
        }
    }
}

/// A context and its continuation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// At least one.
    pub context: Vec<u32>,
    /// At least one.
    pub continuation: Vec<u32>,
}

/// Both parts of a text whose second is to be judged. Spaces at the end of the context belong to the continuation; the whole
/// is encoded at once, and what it has beyond the context's own tokens is the continuation. An empty context is the
/// beginning of a text, or its end where the tokenizer has no beginning.
///
/// # Errors
/// The tokenizer's; a continuation of no tokens.
pub fn encode(tokenizer: &Tokenizer, context: &str, continuation: &str) -> Result<Pair> {
    if context.is_empty() {
        let continuation = tokenizer.encode(continuation, false, false)?;
        return Ok(Pair { context: vec![beginning(tokenizer)?], continuation });
    }
    let trimmed = context.trim_end();
    let whole = tokenizer.encode_default(&format!("{context}{continuation}"))?;
    let context = tokenizer.encode_default(trimmed)?;
    let tokens = whole.get(context.len()..).unwrap_or_default().to_vec();
    if tokens.is_empty() || context.is_empty() {
        return Err(anyhow!("the answer `{continuation}` of a question has no tokens of its own"))
            .hint("the tokenizer joins it with the question; the task's `query` may end with a space too many");
    }
    Ok(Pair { context, continuation: tokens })
}

/// A text in windows that fit the model's context, each token predicted once: the first window begins with the beginning of a
/// text, the others with as many tokens before them as fit. A text of no tokens has no windows.
///
/// # Errors
/// The tokenizer's.
pub fn windows(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<Vec<Pair>> {
    let mut ids = vec![beginning(tokenizer)?];
    ids.extend(tokenizer.encode_default(text)?);
    let mut windows = Vec::new();
    let mut predicted = 1; // the beginning is given
    while predicted < ids.len() {
        let end = (predicted + context).min(ids.len());
        // The last token is no input, so that one more than the context takes part.
        let from = end.saturating_sub(context + 1);
        let (context, continuation) = (ids[from..predicted].to_vec(), ids[predicted..end].to_vec());
        windows.push(Pair { context, continuation });
        predicted = end;
    }
    Ok(windows)
}

/// What a text begins with: the beginning of a text, or its end where the tokenizer has no beginning.
fn beginning(tokenizer: &Tokenizer) -> Result<u32> {
    let first = tokenizer.bos_id().or(tokenizer.eos_id());
    first.context("a tokenizer with neither `bos` nor `eos` cannot begin a text")
}
