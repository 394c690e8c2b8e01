//! The blocks' matrix products in e4m3.
//!
//! Every layer of a block keeps e4m3 copies of its weight in both orientations, cast anew after each optimizer step,
//! and three scales: of its input, its weight and its output's gradient. A scale comes from the largest magnitudes of
//! the micro-batches before (`csrc/fp8.cu`). Head, embedding, norms, attention and the residual stream stay bf16.

use super::config::{MlpClass, ModelConfig, NormClass};
use super::gpt::GPT;
use super::mlp::Mlp;
use crate::bail_hint;
use crate::ffi::{self, Fp8Linear};
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// Scales of all layers of a model.
#[derive(Debug)]
pub struct Fp8 {
    /// (layers, 2, 8) fp32: of inputs and of output gradients
    pub scales: Tensor,
    /// (layers, 8) fp32: of weights
    pub weight_scales: Tensor,
    /// Layers in the order of the scales, e.g. `h.0.attn.qkv`.
    pub names: Vec<String>,
}

/// Layers of a block, in the order of their scales.
const LAYERS: [&str; 4] = ["attn.qkv", "attn.proj", "mlp.gate_up", "mlp.proj"];

/// Numbers of one scale: see `Fp8Slot` in `csrc/kernels.h`.
const SLOT: i64 = 8;

/// What one scale stood at.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Fp8Record {
    /// Layer, and `input`, `gradient` or `weight`.
    pub name: String,
    /// Largest magnitude at the last update.
    pub amax: f64,
    /// Values are multiplied by it.
    pub scale: f64,
    /// Micro-batches in which a value was saturated, so far.
    pub overflows: f64,
}

/// Why a model cannot run in fp8 on a device; `None`: it can.
pub fn obstacle(config: &ModelConfig, device: Device) -> Result<Option<String>> {
    let Device::Cuda(index) = device else {
        return Ok(Some("it needs a CUDA card, and the run is on the CPU".into()));
    };
    let (major, minor) = ffi::cuda_device(index)?.capability;
    let width = config.n_head * config.head_size;
    let sizes = [config.n_embd, config.qkv_rows(), width, config.intermediate_size];
    Ok(if (major, minor) < (8, 9) {
        Some(format!(
            "it needs compute capability 8.9 or later (RTX 4090, H100), got {major}.{minor}"
        ))
    } else if config.mlp_class != MlpClass::LLaMAMLP
        || config.norm_class != NormClass::RMSNorm
        || config.bias
        || config.attn_bias
    {
        Some(format!("it needs a Llama without biases, got `{}`", config.name))
    } else {
        let odd = sizes.into_iter().find(|size| size % 16 != 0);
        odd.map(|size| format!("it needs sizes that are multiples of 16, got {size}"))
    })
}

/// Refuses `fp8-mixed` where there is an [`obstacle`].
pub fn require_fp8(config: &ModelConfig, device: Device) -> Result<()> {
    if let Some(reason) = obstacle(config, device)? {
        bail_hint!("use `precision: bf16-mixed`"; "`precision: fp8-mixed`: {reason}");
    }
    Ok(())
}

impl GPT {
    /// Gives the layers of a bf16 model their e4m3 weights and scales.
    ///
    /// # Errors
    /// The card or the architecture cannot do it.
    pub fn enable_fp8(&mut self) -> Result<()> {
        let device = self.device();
        require_fp8(&self.config, device)?;
        let n = (self.h.len() * LAYERS.len()) as i64;
        let one = |shape: &[i64]| {
            let scales = Tensor::zeros(shape, (Kind::Float, device));
            let _ = scales.narrow(-1, 0, 2).fill_(1.0); // inverse and scale
            scales
        };
        let (scales, weight_scales) = (one(&[n, 2, SLOT]), one(&[n, SLOT]));
        let mut names = vec![];
        for (i, block) in self.h.iter_mut().enumerate() {
            let layer = |j: usize, outputs: i64, inputs: i64| {
                let at = (i * LAYERS.len() + j) as i64;
                let fp8 = (Kind::Float8e4m3fn, device);
                Some(Fp8Linear {
                    weight: Tensor::empty([outputs, inputs], fp8),
                    weight_t: Tensor::empty([inputs, outputs], fp8),
                    scales: scales.get(at),
                    weight_scale: weight_scales.get(at),
                })
            };
            let (c, f) = (self.config.n_embd, self.config.intermediate_size);
            let width = self.config.n_head * self.config.head_size;
            block.attn.qkv.fp8 = layer(0, self.config.qkv_rows(), c);
            block.attn.proj.fp8 = layer(1, c, width);
            if let Mlp::LLaMA(mlp) = &mut block.mlp {
                mlp.gate_up_fp8 = layer(2, 2 * f, c);
                mlp.proj.fp8 = layer(3, c, f);
            }
            names.extend(LAYERS.map(|name| format!("h.{i}.{name}")));
        }
        self.fp8 = Some(Fp8 { scales, weight_scales, names });
        // Once to see the largest weights, once with the scales that follow from them.
        self.refresh_fp8_weights()?;
        self.refresh_fp8_weights()
    }

    /// Casts all weights anew with new scales; call when they have changed. The CPU does not wait.
    pub fn refresh_fp8_weights(&self) -> Result<()> {
        let Some(fp8) = &self.fp8 else { return Ok(()) };
        ffi::fp8_update(&fp8.weight_scales)?;
        self.cast_fp8_weights()
    }

    fn cast_fp8_weights(&self) -> Result<()> {
        let cast = |weight: &Tensor, second: Option<&Tensor>, layer: &Option<Fp8Linear>| {
            let layer = layer.as_ref().map(|layer| ffi::fp8_cast_weight(weight, second, layer));
            layer.unwrap_or(Ok(()))
        };
        for block in &self.h {
            cast(&block.attn.qkv.weight, None, &block.attn.qkv.fp8)?;
            cast(&block.attn.proj.weight, None, &block.attn.proj.fp8)?;
            if let Mlp::LLaMA(mlp) = &block.mlp {
                cast(&mlp.fc_1.weight, Some(&mlp.fc_2.weight), &mlp.gate_up_fp8)?;
                cast(&mlp.proj.weight, None, &mlp.proj.fp8)?;
            }
        }
        Ok(())
    }

    /// Continues with the scales of a checkpoint ([`Fp8::state`]); `false` where it has none.
    pub fn restore_fp8(&self, saved: &[(String, Tensor)]) -> Result<bool> {
        let Some(fp8) = &self.fp8 else { return Ok(false) };
        for (name, mut ours) in fp8.state() {
            let Some((_, theirs)) = saved.iter().find(|(saved, _)| *saved == name) else {
                return Ok(false);
            };
            ours.copy_(theirs);
        }
        self.cast_fp8_weights()?;
        Ok(true)
    }

    /// New scales of inputs and gradients from the last micro-batch; call between two. The CPU does not wait.
    pub fn update_fp8_scales(&self) -> Result<()> {
        self.fp8.as_ref().map_or(Ok(()), |fp8| ffi::fp8_update(&fp8.scales))
    }
}

impl Fp8 {
    /// A first guess at the scale of gradients of a mean over so many tokens: too small a scale would make zeros of
    /// them, from which nothing is learned; one too large saturates and is put right by the next micro-batch.
    pub fn guess_gradients(&self, n_targets: f64) {
        let scale = 512.0 * n_targets;
        let gradients = self.scales.select(1, 1); // (layers, 8)
        let _ = gradients.narrow(-1, 0, 1).fill_(1.0 / scale);
        let _ = gradients.narrow(-1, 1, 1).fill_(scale);
    }

    /// The scales under the names that a checkpoint has them, sharing storage.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let both = [("fp8.scales", &self.scales), ("fp8.weight_scales", &self.weight_scales)];
        both.map(|(name, t)| (name.to_owned(), t.shallow_clone())).into()
    }

    /// All scales as one row of numbers, for [`Fp8::records`].
    pub fn numbers(&self) -> Tensor {
        Tensor::cat(&[self.scales.view([-1]), self.weight_scales.view([-1])], 0)
    }

    /// What [`Fp8::numbers`] say.
    pub fn records(&self, numbers: &[f64]) -> Vec<Fp8Record> {
        let kinds = |kinds: &'static [&'static str]| {
            self.names
                .iter()
                .flat_map(move |name| kinds.iter().map(move |kind| format!("{name} {kind}")))
        };
        let names = kinds(&["input", "gradient"]).chain(kinds(&["weight"]));
        names
            .zip(numbers.chunks_exact(SLOT as usize))
            .map(|(name, slot)| Fp8Record {
                name,
                amax: slot[4],
                scale: slot[1],
                overflows: slot[5],
            })
            .collect()
    }
}
