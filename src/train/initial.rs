//! The model that a run begins with: random weights or those of a checkpoint, with adapters where those are trained.

use super::optimizer::weight_kind;
use crate::bail_hint;
use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::{self, WeightReader};
use crate::config::RunConfig;
use crate::distributed::Fill;
use crate::model::{GPT, ModelConfig, fill_new_rows, init};
use anyhow::Result;
use std::path::Path;
use tch::Device;

/// The model; where ranks share all of its weights an outline, and what fills it, on rank 0. A process that trains alone
/// needs all weights at once, and so does a rank that trains adapters beside them or keeps them as a reference.
///
/// # Errors
/// No checkpoint, or one of another architecture or of other adapters.
pub fn model(
    config: &RunConfig,
    sizes: &ModelConfig,
    resume_from: Option<&Path>,
    device: Device,
    rank: Option<usize>,
) -> Result<(GPT, Option<Box<Fill<'static>>>)> {
    match rank {
        Some(rank) if config.lora().is_none() && config.dpo().is_none() => {
            let fill: Box<Fill<'static>> = match rank {
                0 => filler(config, sizes, resume_from)?,
                _ => Box::new(|_, _| Ok(())), // is given rank 0's
            };
            Ok((GPT::outline(sizes, device), Some(fill)))
        }
        _ => Ok((whole(config, sizes, resume_from, device)?, None)),
    }
}

fn whole(
    config: &RunConfig,
    sizes: &ModelConfig,
    resume_from: Option<&Path>,
    device: Device,
) -> Result<GPT> {
    let lora = config.lora();
    let mut model = match &config.initial_checkpoint_dir {
        Some(dir) if config.is_qlora() => {
            let (dir, kind) = (checkpoint::resolve(dir)?, weight_kind(config.precision));
            let mut model = checkpoint::load_model(&dir, kind, Device::Cpu)?;
            model.quantise_base(device, kind, true)?;
            model
        }
        _ => {
            let resume_from = resume_from.filter(|_| lora.is_none()); // adapters lie there
            let (model, fill) = (GPT::empty(sizes, device), filler(config, sizes, resume_from)?);
            model.named_parameters().iter().try_for_each(|(name, p)| fill(name, p))?;
            model
        }
    };
    if let Some(lora) = lora {
        let targets = adapter::targets(&lora.targets)?;
        model.add_lora(&targets, lora.r, lora.alpha, lora.dropout);
        if let Some(dir) = resume_from {
            let adapter = Adapter::open(dir)?;
            check_base(&adapter, config, dir)?;
            adapter.load_into(&model)?;
        }
    }
    Ok(model)
}

/// Adapters go on beside the weights that they were trained beside. Where those have moved, it is said.
fn check_base(adapter: &Adapter, config: &RunConfig, dir: &Path) -> Result<()> {
    let Some(ours) = &config.initial_checkpoint_dir else { return Ok(()) };
    let place = |path: &Path| checkpoint::resolve(path).ok()?.canonicalize().ok(); // of a run's folder too
    match (place(&adapter.base), place(ours)) {
        (Some(theirs), Some(ours)) if theirs != ours => bail_hint!(
            format!("set `initial_checkpoint_dir: {}`, or choose another `out_dir`", theirs.display());
            "the adapters of `{}` were trained beside `{}`, the configuration says `{}`",
            dir.display(), theirs.display(), ours.display()
        ),
        (None, _) => eprintln!(
            "base        the adapters were trained beside `{}`, which is not there; they go on beside `{}`",
            adapter.base.display(),
            ours.display()
        ),
        _ => {}
    }
    Ok(())
}

/// What writes the weights of a run's beginning, a parameter at a time in the model's order: of a checkpoint that is gone on
/// from, of an initial one, whose vocabulary may be smaller in a finetuning run, or random ones.
fn filler(
    config: &RunConfig,
    sizes: &ModelConfig,
    resume_from: Option<&Path>,
) -> Result<Box<Fill<'static>>> {
    if let Some(dir) = resume_from {
        let reader = WeightReader::open(sizes, dir)?;
        return Ok(Box::new(move |name, parameter| reader.read(name, parameter)));
    }
    let Some(dir) = &config.initial_checkpoint_dir else {
        let sizes = sizes.clone();
        return Ok(Box::new(move |name, parameter| {
            init::init_parameter(name, parameter, &sizes);
            Ok(())
        }));
    };
    let dir = checkpoint::resolve(dir)?;
    let mut theirs = sizes.clone();
    if config.finetune.is_some() {
        theirs.padded_vocab_size = checkpoint::load_config(&dir)?.padded_vocab_size;
    }
    let reader = WeightReader::open_initial(&theirs, &dir)?;
    let (have, rows) = (theirs.padded_vocab_size, sizes.padded_vocab_size);
    Ok(Box::new(move |name, parameter| {
        let of_tokens = ["transformer.wte.weight", "lm_head.weight"].contains(&name);
        if !of_tokens || have == rows {
            return reader.read(name, parameter);
        }
        reader.read(name, &parameter.narrow(0, 0, have))?;
        fill_new_rows(parameter, have);
        Ok(())
    }))
}
