//! Arguments that name a model and say how it is loaded, the same in all verbs.

use crate::generate::load::{self, Form, Loaded};
use crate::generate::network::Network;
use crate::quant::{Scheme, parse_scheme};
use anyhow::Result;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// Which model, where, in which number format; shared by `generate`, `score`, `chat` and `serve`.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Checkpoint folder, or a run's `out_dir` for its newest checkpoint
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// Where a checkpoint goes and in which number format.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// Number format of weights and activations [default: bf16-true on a GPU, 32-true on the CPU]
    #[arg(long, conflicts_with = "quantize")]
    precision: Option<InferencePrecision>,
    /// Matrices in 4 or 8 bits: int4 or int8, with a group size as in int4:64, or `stored`, only for quantised files: as the
    /// file has them, which is their default
    #[arg(long, value_name = "SCHEME", value_parser = parse_scheme)]
    quantize: Option<Scheme>,
    /// Dtype of keys and values in the cache. Quantised weights on the CPU can have any, bf16 or quantised ones on a GPU
    /// bfloat16 or int8, others only their own
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub kv_cache_dtype: CacheDtype,
    /// `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// Dtype of the cache.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum CacheDtype {
    /// float16 with quantised weights, else that of the weights
    Auto,
    /// 4 bytes a value
    Float32,
    /// 2 bytes, 8 bits of them precision
    Bfloat16,
    /// 2 bytes, 11 bits of them precision
    Float16,
    /// 1 byte, and a scale for each head of a token
    Int8,
}

impl CacheDtype {
    /// Gives a network such a cache.
    ///
    /// # Errors
    /// It cannot have one.
    pub fn set(self, network: &mut Network) -> Result<()> {
        network.set_cache_kind(match self {
            Self::Auto => return Ok(()),
            Self::Float32 => Kind::Float,
            Self::Bfloat16 => Kind::BFloat16,
            Self::Float16 => Kind::Half,
            Self::Int8 => Kind::Int8,
        })
    }
}

/// Number format of weights and activations.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum InferencePrecision {
    /// fp32
    #[value(name = "32-true")]
    Fp32True,
    /// bf16
    #[value(name = "bf16-true")]
    Bf16True,
}

impl InferencePrecision {
    /// Its dtype.
    pub fn kind(self) -> Kind {
        match self {
            Self::Fp32True => Kind::Float,
            Self::Bf16True => Kind::BFloat16,
        }
    }
}

impl LoadArgs {
    /// What `--precision` and `--quantize` ask for.
    pub fn form(&self) -> Form {
        match (self.precision, self.quantize) {
            (Some(precision), _) => Form::Dense(precision.kind()),
            (None, Some(scheme)) => Form::Quantised(scheme),
            (None, None) => Form::Usual,
        }
    }

    /// Loads a checkpoint onto what [`LoadArgs::device`] names.
    pub fn load(&self, path: &Path, device: Device, with_tokenizer: bool) -> Result<Loaded> {
        let mut loaded = load::load(path, device, self.form(), with_tokenizer)?;
        self.kv_cache_dtype.set(&mut loaded.network)?;
        Ok(loaded)
    }
}

impl ModelArgs {
    /// Loads the checkpoint onto what [`LoadArgs::device`] names.
    pub fn load(&self, device: Device, with_tokenizer: bool) -> Result<Loaded> {
        self.load.load(&self.checkpoint, device, with_tokenizer)
    }

    /// The checkpoint.
    pub fn path(&self) -> &Path {
        &self.checkpoint
    }

    /// Name of the checkpoint's folder or file.
    pub fn name(&self) -> String {
        name_of(&self.checkpoint)
    }
}

/// Name of a checkpoint's folder or file.
pub fn name_of(checkpoint: &Path) -> String {
    let path = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.to_owned());
    path.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
}
