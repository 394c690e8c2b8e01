//! The data of a run: opened, told of, and where they end.

use crate::config::{BatchPlan, DataConfig, DataSource, RunConfig, Weight, counted};
use crate::data::packed::Access;
use crate::data::{Borders, DataLoader, LoaderOptions, ValidationSet, chat};
use crate::error::WithHint;
use crate::model::ModelConfig;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use anyhow::{Context, Result, anyhow};
use std::path::PathBuf;

/// The data of a rank.
pub struct Opened {
    /// Training batches.
    pub loader: DataLoader,
    /// The validation set, if any.
    pub val: Option<ValidationSet>,
    /// What they are, a line each.
    pub told: Vec<String>,
    /// What makes a text of a conversation, of a finetuning run.
    pub template: Option<ChatTemplate>,
}

/// Training batches of one rank, and the validation set. `packed` is the run's `data` with packed files alone
/// ([`crate::data::prepare::with_raw_prepared`]).
pub fn open(
    config: &RunConfig,
    packed: &DataConfig,
    model: &ModelConfig,
    tokenizer: Option<&Tokenizer>,
    sequence: i64,
    (rank, world): (usize, usize),
) -> Result<Opened> {
    let micro_batch_size = config.train.micro_batch_size as usize;
    let vocab_size = model.padded_vocab_size as usize;
    let options = |sources: Vec<DataSource>, borders| LoaderOptions {
        sources,
        order: config.data.order,
        micro_batch_size,
        block_size: sequence as usize,
        rank,
        world,
        seed: config.seed,
        vocab_size,
        prefetch: config.data.prefetch,
        access: Access::Mapped,
        borders,
    };
    if let Some(finetune) = &config.finetune {
        let tokenizer = tokenizer.context("finetuning needs `tokenizer_dir`")?;
        let template = chat::template(config, &finetune.data, tokenizer)?;
        let sizes = (sequence as usize, micro_batch_size);
        let open = if config.dpo().is_some() { chat::open_pairs } else { chat::open };
        let sets = open(&finetune.data, &template, tokenizer, sizes, config.seed)?;
        let source = DataSource { path: finetune.data.train.clone(), weight: Weight::default() };
        let loader = DataLoader::chat(options(vec![source], None), sets.train)?;
        let val = sets.val.map(|set| ValidationSet::chat(set, micro_batch_size));
        return Ok(Opened { loader, val, told: sets.told, template: Some(template) });
    }
    let tokenizer = tokenizer.filter(|_| config.data.document_mask);
    let borders = tokenizer.map(Borders::of).transpose()?;
    let loader = DataLoader::train(options(packed.train.clone(), borders))?;
    let open = |path: &PathBuf| -> Result<ValidationSet> {
        let t = sequence as usize;
        let mut set = ValidationSet::open(path, t, micro_batch_size, vocab_size)?;
        set.borders = borders;
        Ok(set)
    };
    let (val, told) = (packed.val.as_ref().map(open).transpose()?, loader.describe());
    Ok(Opened { loader, val, told, template: None })
}

/// Ends the run at the last whole step before a source would begin epoch `data.epochs` + 1, and says why; `None` where
/// it ends before that anyway. `step`: steps done. The same on all ranks: it follows from the configuration, the files
/// and what was read of them.
///
/// # Errors
/// That leaves no step, or none after the warmup.
pub fn end_with(
    config: &RunConfig,
    plan: &mut BatchPlan,
    loader: &DataLoader,
    step: u64,
) -> Result<Option<String>> {
    let Some(epochs) = config.data.epochs else { return Ok(None) };
    let consumed = loader.consumed();
    let ahead = |steps: u64| steps.saturating_sub(step).saturating_mul(plan.global);
    let at_most = plan.total_steps.map_or(u64::MAX, |n| consumed.saturating_add(ahead(n)));
    let Some(end) = loader.end(epochs, at_most) else { return Ok(None) };
    plan.limit_samples(step, end.samples.saturating_sub(consumed));
    let told = counted(epochs, "epoch");
    let (name, steps) = (loader.name(end.source), plan.total_steps.unwrap_or(0));
    if steps == 0 {
        let samples = end.samples;
        return Err(anyhow!(
            "`data.epochs`: `{name}` is through {told} after {samples} samples, a step takes {}",
            plan.global
        ))
        .usage("prepare more text, lower `train.global_batch_size`, or leave `data.epochs` out");
    }
    let warmup = config.train.lr_warmup_steps;
    if warmup > steps {
        return Err(anyhow!(
            "`train.lr_warmup_steps`: {warmup} is longer than the run of {steps} (`data.epochs`: {epochs})"
        ))
        .usage("lower it, prepare more text, or raise `data.epochs`");
    }
    Ok(Some(format!("`{name}` is through {told} (`data.epochs`)")))
}
