//! `eval`: validation, and tasks beside it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Validation.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Steps between validations; `null`: only at the start and the end as the two keys below say.
    pub interval: Option<u64>,
    /// Micro-batches of a validation during training; `null`: the whole set.
    pub max_iters: Option<u64>,
    /// Validate before the first step.
    pub initial_validation: bool,
    /// Validate over the whole set at the end, when the last checkpoint is saved; a signal ends it.
    pub final_validation: bool,
    /// Tasks of `evaluate` that are run with each validation, also where there is no validation set: names, groups and
    /// files of your own, judged by likelihoods, and in a single process also by what the model writes.
    pub tasks: Vec<String>,
    /// The first so many samples of each task; `null`: all.
    pub limit: Option<u64>,
    /// Examples before each question of a task; `null`: what the task says.
    pub num_fewshot: Option<u64>,
    /// The folder of the tasks' sets.
    pub data: PathBuf,
}

impl EvalConfig {
    /// `limit` as a number of rows.
    pub fn limit(&self) -> Option<usize> {
        self.limit.map(|n| n as usize)
    }
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            interval: Some(1000),
            max_iters: Some(100),
            initial_validation: false,
            final_validation: true,
            tasks: Vec::new(),
            limit: Some(100),
            num_fewshot: None,
            data: "data/eval".into(),
        }
    }
}
