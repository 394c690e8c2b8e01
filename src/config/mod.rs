//! The YAML of a run: structs with a doc line on every key, loading, overrides, validation.
//!
//! The doc comments of the fields are what `tinyllama config explain KEY` prints.

pub mod check;
mod eval;
mod explain;
mod finetune;
mod load;
mod prepare;
mod run;
mod validate;
mod weight;

pub use eval::EvalConfig;
pub use explain::{Key, explain, keys};
pub use finetune::{
    ChatDataConfig, ChatFormat, DpoConfig, FinetuneConfig, LoraConfig, LossOn, Method, Reference,
};
pub use load::{
    diff, load, load_either, load_finetune, parse, parse_finetune, save_resolved, to_yaml,
};
pub use prepare::{OnError, PrepareConfig, TokenDtype, chunk_tokens};
pub use run::*;
pub use validate::{BatchPlan, counted, with_commas};
pub use weight::{Weight, WeightPoint};

/// Everything that is wrong with a configuration, found before anything is allocated.
#[derive(Debug, thiserror::Error)]
#[error("{} problem(s) in the configuration:\n{}", problems.len(), problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError {
    /// One line a problem: key path, what was expected, what was found, the nearest valid key.
    pub problems: Vec<String>,
}
