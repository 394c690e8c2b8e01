//! Scores that the original published, beside which a report puts a run's own.
//!
//! # Source
//! EVAL.md of TinyLlama: zero-shot, fp32, lm-evaluation-harness of 2023. Per cent.

/// The tasks of the published table, in its order: acc_norm where the task has it, else acc.
pub const TASKS: [&str; 7] =
    ["hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa"];

/// A published row.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// The model.
    pub name: &'static str,
    /// Tokens it was trained on, where the source of this table says so.
    pub tokens: Option<f64>,
    /// Mean of the seven tasks, as published: that of the last row is 0.02 above its columns' mean.
    pub average: f64,
    /// Each of [`TASKS`], where it is known here.
    pub tasks: Option<[f64; 7]>,
}

/// Its rows, by tokens.
pub const ROWS: [Published; 6] = [
    Published { name: "Pythia-1.0B", tokens: None, average: 48.30, tasks: None },
    Published { name: TINYLLAMA, tokens: Some(105e9), average: 46.11, tasks: None },
    Published { name: TINYLLAMA, tokens: Some(503e9), average: 48.28, tasks: None },
    Published { name: TINYLLAMA, tokens: Some(1e12), average: 50.22, tasks: None },
    Published { name: TINYLLAMA, tokens: Some(2.5e12), average: 53.86, tasks: None },
    Published {
        name: TINYLLAMA,
        tokens: Some(3e12),
        average: 52.99,
        tasks: Some([59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29]),
    },
];

/// Its name in [`ROWS`].
pub const TINYLLAMA: &str = "TinyLlama-1.1B";

impl Published {
    /// The score of a task, zero-shot.
    pub fn task(&self, name: &str) -> Option<f64> {
        self.tasks?.get(TASKS.iter().position(|task| *task == name)?).copied()
    }
}

/// What guessing scores, in per cent.
pub fn chance(task: &str) -> Option<f64> {
    match task {
        "winogrande" | "boolq" | "piqa" => Some(50.0),
        "hellaswag" | "openbookqa" | "arc_challenge" | "arc_easy" | "mmlu" => Some(25.0),
        _ => task.starts_with("mmlu_").then_some(25.0),
    }
}
