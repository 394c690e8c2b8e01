//! A checkpoint folder -> model, tokenizer and the ids that end a text.

use super::network::Network;
use crate::checkpoint::{self, Source};
use crate::error::WithHint;
use crate::model::{GPT, ModelConfig};
use crate::quant::{self, Scheme, obstacle};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::{ChatTemplate, SpecialTokens};
use anyhow::{Result, anyhow};
use std::path::Path;
use tch::{Device, Kind};

/// What generation and scoring need.
pub struct Loaded {
    /// Weights on their device.
    pub network: Network,
    /// Absent where token ids are enough.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a text: the tokenizer's eos and those that the checkpoint names ([`Source::end_ids`]).
    pub eos: Vec<u32>,
}

/// In what form weights are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Form {
    /// As they are stored where that is quantised; else in bf16 on a GPU, in fp32 on the CPU.
    #[default]
    Usual,
    /// All in this dtype.
    Dense(Kind),
    /// Matrices quantised.
    Quantised(Scheme),
}

impl Loaded {
    /// The model in one float dtype, for what does not work with quantised weights.
    ///
    /// # Errors
    /// The weights are quantised; `what` is named.
    pub fn dense(&self, what: &str) -> Result<&GPT> {
        match &self.network {
            Network::Dense(model) => Ok(model),
            Network::Quantised(_) => Err(anyhow!("{what} does not work with quantised weights"))
                .usage("name a number format, as `--precision 32-true`"),
        }
    }
}

/// Loads a checkpoint folder (or the newest of a run's `out_dir`).
///
/// # Errors
/// No checkpoint there, a tokenizer that is missing or does not fit the model, quantised weights on a GPU.
pub fn load(path: &Path, device: Device, form: Form, with_tokenizer: bool) -> Result<Loaded> {
    let source = Source::open(&checkpoint::resolve(path)?)?;
    let tokenizer = match with_tokenizer {
        true => Some(source.read_tokenizer(Tokenizer::load).hint(format!(
            "put `tokenizer.json` or `tokenizer.model` into {}, or give token ids instead of text",
            source.folder().display()
        ))?),
        false => None,
    };
    let network = load_network(&source, device, form)?;
    if let Some(tokenizer) = &tokenizer {
        check_vocabulary(tokenizer, network.borrow().config())?;
    }
    let mut eos = source.end_ids()?;
    eos.extend(tokenizer.as_ref().and_then(|t| t.eos_id()));
    Ok(Loaded { network, tokenizer, eos })
}

/// The chat template of a checkpoint, or the built-in one of this name; `None` where the checkpoint has none.
///
/// # Errors
/// A template that is no Jinja, a name that is not known.
pub fn chat_template(
    path: &Path,
    tokenizer: &Tokenizer,
    name: Option<&str>,
) -> Result<Option<ChatTemplate>> {
    let source = Source::open(&checkpoint::resolve(path)?)?;
    source.read_tokenizer(|dir| match name {
        Some(name) => ChatTemplate::named(name, SpecialTokens::load(dir, tokenizer)?).map(Some),
        None => ChatTemplate::load(dir, tokenizer),
    })
}

fn load_network(source: &Source, device: Device, form: Form) -> Result<Network> {
    let scheme = match form {
        Form::Quantised(scheme) => Some(scheme),
        Form::Dense(_) => None,
        Form::Usual => {
            let direct = source.is_quantised() && obstacle(&source.config).is_none();
            (direct && (!device.is_cuda() || cfg!(cuda_kernels))).then_some(Scheme::Stored)
        }
    };
    if let Some(scheme) = scheme {
        return Network::quantised(quant::load(source, scheme)?, device);
    }
    let kind = match form {
        Form::Dense(kind) => kind,
        _ if device.is_cuda() => Kind::BFloat16,
        _ => Kind::Float,
    };
    Ok(Network::Dense(Box::new(source.load_model(kind, device)?)))
}

/// Refuses a tokenizer that makes ids which the model has no embedding for.
///
/// # Errors
/// Both numbers. The model's is `padded_vocab_size`, the rows of its embedding.
pub fn check_vocabulary(tokenizer: &Tokenizer, config: &ModelConfig) -> Result<()> {
    let (ids, rows) = (tokenizer.vocab_size() as i64, config.padded_vocab_size);
    if ids <= rows {
        return Ok(());
    }
    Err(anyhow!(
        "the tokenizer's vocabulary is larger than the model's: {ids} ids, the model has {rows}"
    ))
    .usage(format!(
        "use the tokenizer that the model was trained with, or a model with `vocab_size` of at \
             least {ids}"
    ))
}
