//! The networks that can be run: one of fp32 or 16 bits, or one of quantised matrices on the CPU.

use super::card::covers;
use crate::error::WithHint;
use crate::model::paged_cache::Batch;
use crate::model::{GPT, ModelConfig, PagedCache};
use crate::quant::{self, QuantLlama};
use anyhow::{Result, anyhow};
use tch::{Device, Kind, Tensor};

/// A network with its weights.
#[derive(Debug)]
pub enum Network {
    /// Weights of one float dtype, or on a card some of them in 4 to 8 bits.
    Dense(Box<GPT>),
    /// Weights of 4 to 8 bits on the CPU.
    Quantised(Box<QuantLlama>),
}

/// A borrowed [`Network`].
#[derive(Clone, Copy, Debug)]
pub enum NetworkRef<'m> {
    /// See [`Network::Dense`].
    Dense(&'m GPT),
    /// See [`Network::Quantised`].
    Quantised(&'m QuantLlama),
}

impl Network {
    /// Borrows it.
    pub fn borrow(&self) -> NetworkRef<'_> {
        match self {
            Self::Dense(model) => NetworkRef::Dense(model),
            Self::Quantised(model) => NetworkRef::Quantised(model),
        }
    }

    /// Quantised weights where they run: on the CPU as they are, on a card packed for its kernels.
    ///
    /// # Errors
    /// A card, and a program without kernels.
    pub fn quantised(llama: QuantLlama, device: Device) -> Result<Self> {
        if !device.is_cuda() {
            return Ok(Self::Quantised(Box::new(llama)));
        }
        let hint = "give `--device cpu`, or leave `--quantize` out";
        Ok(Self::Dense(Box::new(quant::to_card(llama, device).usage(hint)?)))
    }

    /// Chooses the dtype of the cache: fp32, bf16, fp16 or int8 for quantised weights, their own for others.
    ///
    /// # Errors
    /// Another dtype for weights that are not quantised.
    pub fn set_cache_kind(&mut self, kind: Kind) -> Result<()> {
        match self {
            Self::Quantised(model) => model.cache_kind = kind,
            Self::Dense(model) if model.kind() == kind => model.cache_kind = None,
            Self::Dense(model) if kind == Kind::Int8 && covers(model) => {
                model.cache_kind = Some(kind);
            }
            Self::Dense(model) => {
                let own = model.kind();
                return Err(anyhow!(
                    "a cache of {kind:?} needs quantised weights on the CPU, or where it is Int8 weights of \
                     bf16 on a GPU: expected {own:?}, the dtype of these weights"
                ))
                .usage("leave `--kv-cache-dtype` out, or quantise: `--quantize int8 --device cpu`");
            }
        }
        Ok(())
    }
}

impl<'m> From<&'m GPT> for NetworkRef<'m> {
    fn from(model: &'m GPT) -> Self {
        Self::Dense(model)
    }
}

impl<'m> From<&'m Network> for NetworkRef<'m> {
    fn from(network: &'m Network) -> Self {
        network.borrow()
    }
}

impl<'m> NetworkRef<'m> {
    /// Sizes and switches.
    pub fn config(self) -> &'m ModelConfig {
        match self {
            Self::Dense(model) => &model.config,
            Self::Quantised(model) => &model.config,
        }
    }

    /// Where the weights are.
    pub fn device(self) -> Device {
        match self {
            Self::Dense(model) => model.device(),
            Self::Quantised(_) => Device::Cpu,
        }
    }

    /// Dtype of the cache, and of activations where weights are not quantised (those of others are fp32).
    pub fn kind(self) -> Kind {
        match self {
            Self::Dense(model) => model.cache_kind.unwrap_or(model.kind()),
            Self::Quantised(model) => model.cache_kind,
        }
    }

    /// The residual stream after the final norm of a batch's tokens.
    ///
    /// # Shapes
    /// -> (N, C).
    pub fn hidden(self, batch: &Batch, cache: &mut PagedCache) -> Tensor {
        match self {
            Self::Dense(model) => model.hidden_paged(batch, cache),
            Self::Quantised(model) => model.hidden_paged(batch, cache),
        }
    }

    /// Logits from it.
    ///
    /// # Shapes
    /// x (N, C) -> (N, V).
    pub fn head(self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(model) => model.head(x),
            Self::Quantised(model) => model.head(x),
        }
    }

    /// Number of parameters; a tied head counts once.
    pub fn n_params(self) -> u64 {
        self.config().n_params()
    }

    /// Bytes of weights that a step reads: all but the embedding, of which a token reads one row, unless it is the head
    /// too.
    pub fn step_bytes(self) -> u64 {
        match self {
            Self::Quantised(model) => {
                model.bytes() - model.lm_head.as_ref().map_or(0, |_| model.wte.bytes())
            }
            Self::Dense(model) => {
                let tied = model.lm_head.is_none();
                let read = |name: &str| tied || name != "transformer.wte.weight";
                let bytes = |p: &Tensor| p.numel() as u64 * p.kind().elt_size_in_bytes() as u64;
                let all = model.named_parameters();
                let packed: u64 = model.packed().map(|w| w.data.numel() as u64).sum();
                packed
                    + all.iter().filter(|(name, _)| read(name)).map(|(_, p)| bytes(p)).sum::<u64>()
            }
        }
    }
}
