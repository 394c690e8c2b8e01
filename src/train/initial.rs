//! The model that a run begins with: random weights or those of a checkpoint, with adapters where those are trained.

use super::optimizer::weight_kind;
use crate::checkpoint::{self, WeightReader, adapter};
use crate::config::RunConfig;
use crate::model::{GPT, ModelConfig, fill_new_rows, init};
use anyhow::Result;
use std::path::Path;
use tch::{Device, Tensor};

/// Writes one parameter of a model that ranks share ([`crate::distributed::Fill`]).
pub type Fill = Box<dyn Fn(&str, &Tensor) -> Result<()>>;

/// The model, and where ranks share all of its weights, what fills it on rank 0: it is an outline then. A process that
/// trains alone needs all weights at once, and so does a rank that trains adapters beside them or keeps them as a reference.
///
/// # Errors
/// No checkpoint, or one of another architecture or of other adapters.
pub fn model(
    config: &RunConfig,
    sizes: &ModelConfig,
    resume_from: Option<&Path>,
    device: Device,
    rank: Option<usize>,
) -> Result<(GPT, Option<Fill>)> {
    match rank {
        Some(rank) if config.lora().is_none() && config.dpo().is_none() => {
            let fill: Fill = match rank {
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
    let mut model = match (resume_from, &config.initial_checkpoint_dir) {
        (Some(dir), _) if lora.is_none() => {
            let model = GPT::empty(sizes, device);
            checkpoint::load_weights(&model, dir)?;
            model
        }
        (_, Some(dir)) if config.is_qlora() => {
            let (dir, kind) = (checkpoint::resolve(dir)?, weight_kind(config.precision));
            let mut model = checkpoint::load_model(&dir, kind, Device::Cpu)?;
            model.quantise_base(device, kind, true)?;
            model
        }
        (_, Some(dir)) => {
            let dir = checkpoint::resolve(dir)?;
            let theirs = stored(config, sizes, &dir)?;
            let mut model = GPT::empty(&theirs, device);
            checkpoint::load_initial_weights(&model, &dir)?;
            model.grow_vocabulary(sizes.padded_vocab_size);
            model
        }
        (_, None) => GPT::new(sizes, device),
    };
    if let Some(lora) = lora {
        let targets = adapter::targets(&lora.targets)?;
        model.add_lora(&targets, lora.r, lora.alpha, lora.dropout);
        if let Some(dir) = resume_from {
            adapter::Adapter::open(dir)?.load_into(&model)?;
        }
    }
    Ok(model)
}

/// The weights of [`whole`], a parameter at a time.
fn filler(config: &RunConfig, sizes: &ModelConfig, resume_from: Option<&Path>) -> Result<Fill> {
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
    let theirs = stored(config, sizes, &dir)?;
    let reader = WeightReader::open_initial(&theirs, &dir)?;
    let have = theirs.padded_vocab_size;
    Ok(Box::new(move |name, parameter| {
        let of_tokens = ["transformer.wte.weight", "lm_head.weight"].contains(&name);
        if !of_tokens || parameter.size()[0] <= have {
            return reader.read(name, parameter);
        }
        reader.read(name, &parameter.narrow(0, 0, have))?;
        fill_new_rows(parameter, have);
        Ok(())
    }))
}

/// The architecture of an initial checkpoint: where a run finetunes it, it may have fewer tokens.
fn stored(config: &RunConfig, sizes: &ModelConfig, dir: &Path) -> Result<ModelConfig> {
    let mut theirs = sizes.clone();
    if config.finetune.is_some() {
        let rows = checkpoint::load_config(dir)?.padded_vocab_size;
        theirs.padded_vocab_size = rows.min(sizes.padded_vocab_size);
    }
    Ok(theirs)
}
