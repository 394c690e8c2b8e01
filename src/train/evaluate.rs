//! Scores of tasks while a model is trained.

use super::metrics::TaskRecord;
use super::run::Run;
use crate::config::RunConfig;
use crate::distributed::Job;
use crate::error::WithHint;
use crate::eval::question::Task;
use crate::eval::task::Form;
use crate::eval::{self, Model, Options, Outcome, SEED, prompt, task, written};
use crate::generate::NetworkRef;
use crate::guard;
use crate::model::ModelConfig;
use anyhow::{Context, Result, anyhow};

/// The tasks of `eval.tasks`, looked at once before training: a set that is missing is told now, not after the first
/// thousand steps.
///
/// # Errors
/// An unknown task; one that runs programs, has several ranks write texts, or has answers longer than the context; no
/// tokenizer; no such set.
pub fn tasks(config: &RunConfig, model: &ModelConfig, ranks: usize) -> Result<Vec<Task>> {
    let eval = &config.eval;
    if eval.tasks.is_empty() {
        return Ok(Vec::new());
    }
    if config.tokenizer_dir.is_none() {
        return Err(anyhow!("`eval.tasks` are texts, and the run has no tokenizer"))
            .usage("set `tokenizer_dir`, or leave `eval.tasks` out");
    }
    let tasks = task::find(&eval.tasks).context("in `eval.tasks`")?;
    for task in &tasks {
        if task.file.runs_programs() {
            return Err(anyhow!(
                "`eval.tasks`: `{}` runs programs that the model writes",
                task.name
            ))
            .usage("run it on a checkpoint: `tinyllama evaluate --allow-code-execution`");
        }
        if task.form == Form::Written && ranks > 1 {
            return Err(anyhow!("`eval.tasks`: the model writes the answers of `{}`, which {ranks} ranks cannot together", task.name))
                .usage("run it on a checkpoint with `tinyllama evaluate`, and keep tasks with choices here");
        }
        if task.form == Form::Written {
            let generate = task.file.generate.as_ref();
            written::room(generate.map_or(0, |g| g.max_tokens), model.block_size as usize)
                .with_context(|| format!("`eval.tasks`: `{}`", task.name))?;
        }
        let shots = eval.num_fewshot.map_or(task.file.num_fewshot, |n| n as usize);
        prompt::samples(task, &eval.data, shots, eval.limit(), SEED).context("in `eval.tasks`")?;
    }
    Ok(tasks)
}

impl Run<'_> {
    /// Runs the tasks of `eval.tasks` and logs their scores; ranks share the requests. In a single process a task that fails,
    /// such as for lack of memory, is told and does not end the run.
    ///
    /// # Sync
    /// As [`eval::evaluate`].
    ///
    /// # Errors
    /// Those of a task where there are several ranks: they may not be at the same place any more.
    pub fn run_tasks(&mut self) -> Result<()> {
        let tasks = std::mem::take(&mut self.tasks);
        for task in &tasks {
            match self.run_task(task) {
                Err(error) if self.job.is_some() => return Err(error),
                Err(error) => self.note(&format!("task        {error:#}; training goes on")),
                Ok(()) => {}
            }
        }
        self.tasks = tasks;
        Ok(())
    }

    fn run_task(&mut self, task: &Task) -> Result<()> {
        let (job, step) = (self.job, self.progress.step);
        let tick = |_, _| {
            if let Some(job) = job {
                job.tick(step + 1, "a task");
            }
        };
        let eval = &self.config.eval;
        let options = Options {
            data: &eval.data,
            num_fewshot: eval.num_fewshot.map(|n| n as usize),
            limit: eval.limit(),
            seed: SEED,
            batch_size: None,
            sandbox: None,
            ranks: job.map(Job::host_group),
        };
        let tokenizer = self.tokenizer.as_deref().context("the run has no tokenizer")?;
        let eos: Vec<u32> = tokenizer.eos_id().into_iter().collect();
        let model = Model { network: NetworkRef::Dense(&self.model), tokenizer, eos: &eos };
        let was_training = self.model.training.replace(false);
        let outcome = guard::catch("a task", self.device, super::LOWER, || {
            eval::evaluate(model, task, options, tick)
        });
        self.model.training.set(was_training);
        let outcome = outcome.with_context(|| format!("task `{}`", task.name))?;
        if let Some(ranks) = &self.ranks {
            ranks.check()?; // what a failed collective left is garbage
        }
        let record = record(task, &outcome, step, self.progress.tokens);
        self.log.as_mut().map_or(Ok(()), |log| log.task(&record))
    }
}

/// What is logged of a task: where several filters measure the same, the first.
fn record(task: &Task, outcome: &Outcome, step: u64, tokens: u64) -> TaskRecord {
    let mut scores = serde_json::Map::new();
    for (key, score) in &outcome.scores {
        let name = key.metric.name();
        if !scores.contains_key(name) {
            scores.insert(name.into(), score.mean.into());
            if score.stderr.is_finite() {
                scores.insert(format!("{name}_stderr"), score.stderr.into());
            }
        }
    }
    TaskRecord {
        step,
        tokens,
        task: task.name.clone(),
        samples: outcome.samples.len() as u64,
        num_fewshot: outcome.num_fewshot as u64,
        scores,
    }
}
