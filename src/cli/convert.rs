//! `tinyllama convert SRC DST --to FORMAT`.

use crate::checkpoint::{self, MAX_SHARD_BYTES, Source, Target};
use crate::error::exit;
use crate::train::progress::{bytes, count};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::PathBuf;
use tch::Kind;

/// Arguments of `convert`.
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint: a folder, a run's out_dir (the newest), or a file in it
    from: PathBuf,
    /// Folder to make; it must not exist
    to: PathBuf,
    /// Format to write
    #[arg(long = "to", value_enum)]
    target: Format,
    /// Dtype of the weights; default: what they have
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
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
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Dtype {
    Fp32,
    Bf16,
    Fp16,
}

/// Runs `convert`.
pub fn run(args: Args) -> Result<u8> {
    let source = Source::open(&checkpoint::resolve(&args.from)?)?;
    let target = match args.target {
        Format::Hf => Target::HuggingFace { max_shard_bytes: args.max_shard_size },
        Format::Litgpt => Target::LitGpt,
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
    Ok(exit::OK)
}
