//! Problems of a run's data: sources, weights, preparations.

use crate::config::{AttentionBackend, DataOrder, RunConfig, Weight};
use crate::data::documents::Schema;
use crate::error;

/// What is wrong with `data`; whether files are there shows when they are opened.
pub(super) fn check(config: &RunConfig, problems: &mut Vec<String>) {
    let sources = &config.data.train;
    if sources.is_empty() && config.finetune.is_none() {
        problems.push("`data.train`: needs at least one source `{path, weight}`".into());
    }
    check_weights(config, problems);
    if config.data.epochs == Some(0) {
        problems.push("`data.epochs`: must be at least 1, or null, got 0".into());
    }
    if config.data.document_mask && config.tokenizer_dir.is_none() {
        problems.push(
            "`data.document_mask`: needs `tokenizer_dir`, whose tokenizer tells where documents end".into(),
        );
    }
    if config.data.document_mask && config.attention == AttentionBackend::Cudnn {
        problems.push(
            "`attention`: cuDNN's knows no documents; with `data.document_mask` say `auto` or `flash`".into(),
        );
    }
    let prefetch = config.data.prefetch;
    if prefetch > 1 << 16 {
        problems.push(format!("`data.prefetch`: must be at most 65,536, got {prefetch}"));
    }
    for (i, p) in config.data.prepare.iter().enumerate() {
        if let Err(error) = Schema::from_name(&p.kind) {
            let known = error::hint(&error).unwrap_or_default();
            problems.push(format!("`data.prepare.{i}.kind`: {error}; {known}"));
        }
        if p.chunk_tokens == 0 {
            problems.push(format!("`data.prepare.{i}.chunk_tokens`: must be at least 1, got 0"));
        }
        if !(0.0..1.0).contains(&p.validation_fraction) {
            problems.push(format!(
                "`data.prepare.{i}.validation_fraction`: must be in [0, 1), got {}",
                p.validation_fraction
            ));
        }
        if (p.validation_fraction > 0.0) != p.validation_out.is_some() {
            problems.push(format!(
                "`data.prepare.{i}`: `validation_fraction` and `validation_out` go together"
            ));
        }
        if !(p.percentage > 0.0 && p.percentage <= 1.0) {
            problems.push(format!(
                "`data.prepare.{i}.percentage`: must be above 0 and at most 1.0 (all), got {}",
                p.percentage
            ));
        }
        if config.tokenizer_dir.is_none() {
            problems.push(format!("`data.prepare.{i}`: preparing needs `tokenizer_dir`"));
        }
    }
}

/// Each weight alone; where all are right, whether some source has a share at each point.
fn check_weights(config: &RunConfig, problems: &mut Vec<String>) {
    let sources = &config.data.train;
    let before = problems.len();
    for (i, source) in sources.iter().enumerate() {
        let found = source.weight.problems();
        problems.extend(found.into_iter().map(|p| format!("`data.train.{i}.weight{p}")));
        if config.data.order == DataOrder::LitGpt && source.weight.constant().is_none() {
            problems.push(format!(
                "`data.train.{i}.weight`: `data.order: lit-gpt` takes one number, got a list of points"
            ));
        }
    }
    let weights: Vec<Weight> = sources.iter().map(|s| s.weight.clone()).collect();
    if problems.len() == before
        && config.finetune.is_none()
        && let Some(problem) = Weight::problem_together(&weights)
    {
        problems.push(format!("`data.train`: {problem}"));
    }
}
