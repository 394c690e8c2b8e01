//! `tinyllama convert SRC DST --to FORMAT`.

use crate::checkpoint::gguf::mix::Mix;
use crate::checkpoint::{self, MAX_SHARD_BYTES, Source, Target};
use crate::error::{WithHint, exit};
use crate::quant::{Scheme, parse_scheme};
use crate::train::progress::{bytes, count};
use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::PathBuf;
use tch::Kind;

/// Arguments of `convert`.
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint of any format: a folder, a run's out_dir (the newest), or a file
    from: PathBuf,
    /// Folder to make, or file for --to gguf; it must not exist
    to: PathBuf,
    /// Format to write
    #[arg(long = "to", value_enum)]
    target: Format,
    /// Folder of LoRA adapters, as PEFT saves them, to add to the weights; a folder of adapters given as FROM is merged
    /// with the base that it names
    #[arg(long, value_name = "ADAPTERS")]
    merge: Option<PathBuf>,
    /// Dtype of the weights; default: what they have
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// How matrices are stored; default: in their dtype. Of --to gguf: F32, F16, BF16, Q8_0, Q6_K, Q4_K_M or Q4_0. Of
    /// --to hf, for this program alone: int4 or int8, with a group size as in int4:32
    #[arg(long, value_name = "SCHEME", conflicts_with = "dtype")]
    quantize: Option<String>,
    /// Largest weights file in bytes, of --to hf
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SHARD_BYTES, value_parser = shard_bytes)]
    max_shard_size: u64,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// config.json and model.safetensors: transformers and all that read its folders
    Hf,
    /// model_config.yaml and lit_model.safetensors: litgpt's names and packing
    Litgpt,
    /// One file with vocabulary and settings: llama.cpp and all that build on it
    Gguf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Dtype {
    Fp32,
    Bf16,
    Fp16,
}

/// `5000000000`, `5GB` (as transformers') or `5GiB`, from 1 MiB.
fn shard_bytes(text: &str) -> Result<u64, String> {
    let units =
        [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("KB", 1000), ("MB", 1_000_000)];
    let units = units.into_iter().chain([("GB", 1_000_000_000), ("", 1)]);
    let found = units.into_iter().find_map(|(unit, bytes): (&str, u64)| {
        text.trim().strip_suffix(unit)?.trim().parse::<u64>().ok()?.checked_mul(bytes)
    });
    match found {
        Some(bytes) if bytes >= 1 << 20 => Ok(bytes),
        _ => Err("expected bytes from 1048576, such as 5000000000, 5GB or 5GiB".into()),
    }
}

/// Runs `convert`.
pub fn run(args: Args) -> Result<u8> {
    let target = target(&args)?;
    let mut source = Source::open(&checkpoint::resolve(&args.from)?)?;
    let kind = args.dtype.map(|dtype| match dtype {
        Dtype::Fp32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp16 => Kind::Half,
    });
    eprintln!("from        {}, {}", source.path.display(), source.format());
    if let Some(adapters) = &args.merge {
        source.merge(&checkpoint::resolve(adapters)?)?;
        eprintln!("adapters    {}", adapters.display());
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}",
    )?);
    let tick = |bytes: u64, all: u64| {
        bar.set_length(all);
        bar.inc(bytes);
    };
    let done = checkpoint::convert(&source, &args.to, target, kind, &tick)?;
    bar.finish_and_clear();
    eprintln!(
        "wrote       {}: {} parameters, {}, {} other file(s)",
        done.path.display(),
        count(done.parameters as f64),
        bytes(done.bytes),
        done.other_files
    );
    if let Some(step) = done.step {
        eprintln!(
            "training    the optimizer's state at step {step} is in `train_state/`; continue with `--resume {}`",
            done.path.display()
        );
    }
    Ok(exit::OK)
}

/// What is written, and how its matrices are stored.
fn target(args: &Args) -> Result<Target> {
    let scheme = args.quantize.as_deref();
    let refused = |expected: String| {
        let scheme = scheme.unwrap_or_default();
        Err(anyhow!("`--quantize {scheme}`: expected {expected}"))
            .usage("leave it out for the dtype of the weights, or take `--dtype` for another")
    };
    Ok(match args.target {
        Format::Hf => {
            let quantise = scheme.map(parse_scheme).transpose();
            match quantise {
                Ok(quantise) if quantise != Some(Scheme::Stored) => {
                    Target::HuggingFace { max_shard_bytes: args.max_shard_size, quantise }
                }
                _ => {
                    return refused(
                        "`int4` or `int8`, with groups of 32, 64 or 128 as in `int4:32`, for \
                         `--to hf`"
                            .into(),
                    );
                }
            }
        }
        Format::Litgpt if scheme.is_some() => {
            return refused("nothing: it is for `--to hf` and `--to gguf`".into());
        }
        Format::Litgpt => Target::LitGpt,
        Format::Gguf => {
            let known = |name: &str| Mix::from_name(&name.to_ascii_uppercase());
            let mix = scheme.and_then(known);
            if scheme.is_some() && mix.is_none() {
                return refused(format!("one of {} for `--to gguf`", Mix::NAMES.join(", ")));
            }
            Target::Gguf { mix }
        }
    })
}
