//! `tinyllama convert SRC DST --to FORMAT`.

use crate::checkpoint::gguf::mix::Mix;
use crate::checkpoint::{self, MAX_SHARD_BYTES, Source, Target};
use crate::error::{WithHint, exit};
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
    /// Dtype of the weights; default: what they have
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// How --to gguf stores matrices; default: in their dtype
    #[arg(long, value_name = "SCHEME", value_parser = clap::builder::PossibleValuesParser::new(Mix::NAMES), ignore_case = true, conflicts_with = "dtype")]
    quantize: Option<String>,
    /// Largest weights file in bytes, of --to hf
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SHARD_BYTES, value_parser = clap::value_parser!(u64).range(1 << 20..))]
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

/// Runs `convert`.
pub fn run(args: Args) -> Result<u8> {
    if args.quantize.is_some() && !matches!(args.target, Format::Gguf) {
        return Err(anyhow!("`--quantize` is for `--to gguf`"))
            .usage("take `--dtype` for the dtype of other formats");
    }
    let source = Source::open(&checkpoint::resolve(&args.from)?)?;
    let target = match args.target {
        Format::Hf => Target::HuggingFace { max_shard_bytes: args.max_shard_size },
        Format::Litgpt => Target::LitGpt,
        Format::Gguf => {
            let scheme = args.quantize.as_deref().map(str::to_ascii_uppercase);
            Target::Gguf { mix: scheme.as_deref().and_then(Mix::from_name) }
        }
    };
    let kind = args.dtype.map(|dtype| match dtype {
        Dtype::Fp32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp16 => Kind::Half,
    });
    eprintln!("from        {}, {}", source.path.display(), source.format());
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
