//! `tinyllama prepare KIND`.

use crate::config::{PrepareConfig, chunk_tokens};
use crate::data::prepare;
use crate::tokenizer::Tokenizer;
use anyhow::Result;
use std::path::PathBuf;

/// Arguments of `prepare`.
#[derive(clap::Args)]
pub struct Args {
    /// Schema of the source: text, jsonl, parquet, slimpajama, starcoder
    kind: String,
    /// File, folder or pattern, e.g. 'corpus/*.jsonl.zst'; plain, .gz or .zst
    #[arg(long)]
    source: String,
    /// Folder with tokenizer.json or tokenizer.model
    #[arg(long)]
    tokenizer: PathBuf,
    /// Folder of the packed files
    #[arg(long)]
    out: PathBuf,
    /// Key or column of the text
    #[arg(long)]
    text_field: Option<String>,
    /// Prefix of the files; of SlimPajama also the folder that is read
    #[arg(long, default_value = "train")]
    split: String,
    /// Share of documents that goes to --validation-out, by a checksum of the text
    #[arg(long, default_value_t = 0.0, requires = "validation_out")]
    validation_fraction: f64,
    /// Folder of the validation files
    #[arg(long, requires = "validation_fraction")]
    validation_out: Option<PathBuf>,
    /// Tokens in one file
    #[arg(long, default_value_t = chunk_tokens())]
    chunk_tokens: u64,
    /// Begin each document with the beginning-of-text id
    #[arg(long)]
    bos: bool,
    /// Do not end each document with the end-of-text id
    #[arg(long)]
    no_eos: bool,
    /// Share of documents to use, above 0 and up to 1.0 (all)
    #[arg(long, default_value_t = 1.0)]
    percentage: f64,
    /// Picks the documents of a --percentage below 1.0
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; default: every core
    #[arg(long)]
    workers: Option<usize>,
}

/// Runs `prepare`.
pub fn run(args: Args) -> Result<u8> {
    if let Some(workers) = args.workers {
        rayon::ThreadPoolBuilder::new().num_threads(workers).build_global()?;
    }
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let manifest = prepare::prepare(
        &PrepareConfig {
            kind: args.kind,
            source: args.source,
            out: args.out,
            split: args.split,
            validation_fraction: args.validation_fraction,
            validation_out: args.validation_out,
            chunk_tokens: args.chunk_tokens,
            text_field: args.text_field,
            bos: args.bos,
            eos: !args.no_eos,
            percentage: args.percentage,
            seed: args.seed,
        },
        &tokenizer,
    )?;
    println!("{}", serde_json::to_string(&manifest)?);
    Ok(0)
}
