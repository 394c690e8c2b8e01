//! A checkpoint -> a Llama of quantised matrices, one parameter in memory at a time.

use super::llama::{QuantBlock, QuantLlama, Stack, obstacle};
use super::matrix::{Format, QuantMatrix};
use crate::checkpoint::{BlockValues, Blocks, Parameters, Source, outline};
use crate::error::WithHint;
use crate::ffi;
use crate::model::rope::Rope;
use crate::model::{GPT, ModelConfig};
use anyhow::{Context, Result, anyhow};
use std::collections::HashMap;
use std::fmt;
use tch::{Device, Kind, Tensor};

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// As a quantised checkpoint has them; those of its matrices that are not quantised, in 8 bits.
    Stored,
    /// All in 4 bits, an embedding in groups of 32; in 8 bits one that is the head too.
    Int4 {
        /// Values that share a scale and a minimum: 32, 64 or 128.
        group: usize,
    },
    /// All in 8 bits.
    Int8 {
        /// Values that share a scale.
        group: usize,
    },
}

/// As [`super::parse_scheme`] takes it.
impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stored => f.write_str("stored"),
            Self::Int4 { group } => write!(f, "int4:{group}"),
            Self::Int8 { group } => write!(f, "int8:{group}"),
        }
    }
}

/// Values that share a scale where nothing else is said.
const GROUP: usize = 32;
/// The sizes of groups that there are.
const GROUPS: [usize; 3] = [32, 64, 128];

impl Scheme {
    /// How the matrix with this lit-gpt name is rounded, unless it is used as it is stored.
    pub fn format(self, name: &str, config: &ModelConfig) -> Format {
        let is_embedding = name == "transformer.wte.weight";
        match self {
            Self::Stored => Format::Int8 { group: GROUP },
            Self::Int8 { group } => Format::Int8 { group },
            // Of an embedding a token reads one row, which costs no time in finer groups; as a head it is worth 8 bits.
            Self::Int4 { .. } if is_embedding && config.tie_embeddings => {
                Format::Int8 { group: GROUP }
            }
            Self::Int4 { .. } if is_embedding => Format::Int4 { group: GROUP },
            Self::Int4 { group } => Format::Int4 { group },
        }
    }
}

/// Rounds a matrix (N, K) of any float dtype on the CPU.
///
/// # Errors
/// K is no multiple of the group; `name` is told.
pub fn round_matrix(name: &str, weight: &Tensor, format: Format) -> Result<QuantMatrix> {
    let (n, k) = weight.size2()?;
    let told = || format!("`{name}` of shape [{n}, {k}]");
    let mut weight = weight.to_kind(Kind::Float).contiguous();
    let values = ffi::floats_of_mut(&mut weight).with_context(told)?;
    QuantMatrix::pack(format, values, k as usize).with_context(told)
}

/// Refuses groups that do not divide the rows of a matrix.
///
/// # Errors
/// The first such matrix, with the groups that divide all.
fn check_groups(config: &ModelConfig, scheme: Scheme) -> Result<()> {
    let odd = |scheme: Scheme| {
        let matrices = outline(config).into_iter().filter(|(_, shape)| shape.len() == 2);
        let mut sized = matrices.map(|(name, shape)| {
            let group = scheme.format(&name, config).group() as i64;
            (name, shape[1], group)
        });
        sized.find(|(_, row, group)| row % group != 0)
    };
    let Some((name, row, group)) = odd(scheme) else { return Ok(()) };
    let schemes = GROUPS.map(|group| match scheme {
        Scheme::Int4 { .. } => Scheme::Int4 { group },
        _ => Scheme::Int8 { group },
    });
    // Groups of 32 always do: see [`obstacle`].
    let fit = schemes.iter().filter(|scheme| odd(**scheme).is_none());
    let fit: Vec<String> = fit.map(|scheme| format!("`{scheme}`")).collect();
    Err(anyhow!("`{name}`: rows of {row} values, expected a multiple of {group}, the group"))
        .usage(format!("take `--quantize` with groups that divide all rows: {}", fit.join(", ")))
}

/// Loads a checkpoint of any format.
///
/// # Errors
/// An architecture that has no quantised form here; widths that the groups do not divide; [`Scheme::Stored`] of weights
/// that are not quantised, or that adapters change; as [`Source::check`].
pub fn load(source: &Source, scheme: Scheme) -> Result<QuantLlama> {
    let config = &source.config;
    if let Some(problem) = obstacle(config) {
        return Err(anyhow!("this model cannot be quantised: {problem}"))
            .usage("leave `--quantize` out");
    }
    match scheme {
        Scheme::Stored if !source.is_quantised() => {
            return Err(anyhow!(
                "`--quantize stored`: expected quantised matrices without adapters, got the format {} of `{}`",
                source.format(),
                source.path.display()
            ))
            .usage("leave `--quantize` out, or round the matrices: `--quantize int8` or `int4`");
        }
        Scheme::Stored => {}
        _ => check_groups(config, scheme)?,
    }
    let parameters = source.parameters(Some(Kind::Float))?;
    let names = parameters.entries.iter().enumerate().map(|(i, e)| (e.name.clone(), i)).collect();
    let reader = Reader { source, scheme, parameters, names };
    build(config, &|name| reader.matrices(name), &|name| reader.vector(name))
}

/// Rounds a model's matrices; [`Scheme::Stored`] has no meaning here and rounds to 8 bits.
///
/// # Errors
/// As [`load`].
pub fn quantise(model: &GPT, scheme: Scheme) -> Result<QuantLlama> {
    let config = &model.config;
    if let Some(problem) = obstacle(config) {
        return Err(anyhow!("this model cannot be quantised: {problem}"))
            .usage("leave `--quantize` out");
    }
    let parameters: HashMap<String, Tensor> = model.named_parameters().into_iter().collect();
    let tensor = |name: &str| {
        let found = parameters.get(name).with_context(|| format!("no parameter `{name}`"))?;
        anyhow::Ok(found.to_device(Device::Cpu).to_kind(Kind::Float))
    };
    let matrices =
        |name: &str| Ok(vec![round_matrix(name, &tensor(name)?, scheme.format(name, config))?]);
    let vector = |name: &str| Ok(Vec::try_from(&tensor(name)?)?);
    build(config, &matrices, &vector)
}

/// A network from its matrices, in one or several parts, and its norms.
fn build(
    config: &ModelConfig,
    matrices: &dyn Fn(&str) -> Result<Vec<QuantMatrix>>,
    vector: &dyn Fn(&str) -> Result<Vec<f32>>,
) -> Result<QuantLlama> {
    let matrix = |name: &str| {
        let mut parts = matrices(name)?;
        let one = parts.pop().filter(|_| parts.is_empty());
        one.with_context(|| format!("`{name}` is stored in parts"))
    };
    let layer = |i: i64| {
        let name = |leaf: &str| format!("transformer.h.{i}.{leaf}.weight");
        let (gate, up) = (matrices(&name("mlp.fc_1"))?, matrices(&name("mlp.fc_2"))?);
        Ok(QuantBlock {
            norm_1: vector(&name("norm_1"))?,
            qkv: Stack(matrices(&name("attn.qkv"))?),
            proj: matrix(&name("attn.proj"))?,
            norm_2: vector(&name("norm_2"))?,
            gate_up: Stack(gate.into_iter().chain(up).collect()),
            down: matrix(&name("mlp.proj"))?,
        })
    };
    let head = (!config.tie_embeddings).then(|| matrix("lm_head.weight")).transpose()?;
    Ok(QuantLlama {
        wte: matrix("transformer.wte.weight")?,
        h: (0..config.n_layer).map(layer).collect::<Result<_>>()?,
        ln_f: vector("transformer.ln_f.weight")?,
        lm_head: head,
        rope: Rope::new(config, Device::Cpu),
        cache_kind: Kind::Half,
        config: config.clone(),
    })
}

struct Reader<'a> {
    source: &'a Source,
    scheme: Scheme,
    parameters: Parameters<'a>,
    names: HashMap<String, usize>,
}

impl Reader<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let &i = self.names.get(name).with_context(|| format!("no parameter `{name}`"))?;
        self.parameters.get(i)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(Vec::try_from(&self.tensor(name)?)?)
    }

    fn matrices(&self, name: &str) -> Result<Vec<QuantMatrix>> {
        let stored = match self.scheme {
            Scheme::Stored => self.source.blocks(name)?,
            _ => None,
        };
        if let Some(parts) = stored {
            return parts.iter().map(from_blocks).collect();
        }
        let format = self.scheme.format(name, &self.source.config);
        Ok(vec![round_matrix(name, &self.tensor(name)?, format)?])
    }
}

/// Directly where there are kernels for the type; else by fp32 and 8 bits.
fn from_blocks(blocks: &Blocks) -> Result<QuantMatrix> {
    let (kind, bytes) = match &blocks.values {
        BlockValues::Grouped(groups) => return QuantMatrix::from_groups(groups),
        BlockValues::Gguf { kind, bytes } => (*kind, bytes),
    };
    if let Some(matrix) = QuantMatrix::from_gguf(kind, blocks.columns, bytes)? {
        return Ok(matrix);
    }
    let mut values = vec![0.0; blocks.rows * blocks.columns];
    crate::checkpoint::gguf::quants::dequantize(kind, bytes, &mut values)?;
    QuantMatrix::pack(Format::Int8 { group: GROUP }, &values, blocks.columns)
}
