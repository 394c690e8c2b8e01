//! `tinyllama prepare KIND`.

use crate::config::{OnError, PrepareConfig, TokenDtype, chunk_tokens};
use crate::data::{hub::HubSource, prepare};
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::Result;
use std::path::PathBuf;

/// Arguments of `prepare`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("corpus").args(["source", "hub"]).required(true))]
pub struct Args {
    /// Schema of the source: text, jsonl (and .json), csv, parquet, slimpajama, redpajama, starcoder, sft
    kind: String,
    /// File, folder or pattern, e.g. 'corpus/*.jsonl.zst'; plain, .gz or .zst
    #[arg(long)]
    source: Option<String>,
    /// Instead a dataset on the Hugging Face Hub, e.g. cerebras/SlimPajama-627B: its files are downloaded
    /// once, into the Hub's own cache (HF_HOME). HF_TOKEN, or the token of `hf auth login`, opens private ones
    #[arg(long, value_name = "OWNER/NAME")]
    hub: Option<String>,
    /// Branch, tag or commit of --hub
    #[arg(long, requires = "hub", conflicts_with = "source", default_value = "main")]
    revision: String,
    /// Files of --hub, e.g. 'train/chunk1/*.jsonl.zst' (repeatable); default: all that KIND reads
    #[arg(long = "pattern", value_name = "PATTERN", requires = "hub", conflicts_with = "source")]
    patterns: Vec<String>,
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
    /// Integers of the files: auto (uint16 below 65,500 ids, else int32), uint16, int32
    #[arg(long, default_value = "auto")]
    dtype: String,
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
    /// Only this subset (repeatable): a folder, of SlimPajama the redpajama_set_name of a row
    #[arg(long = "subset", value_name = "NAME")]
    subsets: Vec<String>,
    /// Without this subset (repeatable)
    #[arg(long = "exclude-subset", value_name = "NAME")]
    exclude_subsets: Vec<String>,
    /// What a damaged row or file does: skip-rows leaves rows out and stops at a damaged file, skip leaves out
    /// its rest too, stop stops at the first
    #[arg(long, default_value = "skip-rows")]
    on_error: String,
    /// Threads; default: every core
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    /// Print what OUT/manifest.json holds: options, sources, counts
    #[arg(long)]
    json: bool,
}

/// Runs `prepare`.
pub fn run(args: Args) -> Result<u8> {
    let on_error: OnError = serde_json::from_value(args.on_error.as_str().into())
        .usage("`--on-error` is one of `skip-rows`, `skip`, `stop`")?;
    let dtype: TokenDtype = serde_json::from_value(args.dtype.as_str().into())
        .usage("`--dtype` is one of `auto`, `uint16`, `int32`")?;
    let source = match args.hub {
        Some(hub) => HubSource::new(&hub, &args.revision, &args.patterns)?.to_string(),
        None => args.source.unwrap_or_default(),
    };
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let manifest = prepare::prepare(
        &PrepareConfig {
            kind: args.kind,
            source,
            out: args.out,
            split: args.split,
            validation_fraction: args.validation_fraction,
            validation_out: args.validation_out,
            chunk_tokens: args.chunk_tokens,
            dtype,
            text_field: args.text_field,
            bos: args.bos,
            eos: !args.no_eos,
            percentage: args.percentage,
            seed: args.seed,
            subsets: args.subsets,
            exclude_subsets: args.exclude_subsets,
            on_error,
        },
        &tokenizer,
        args.workers.map(usize::from),
    )?;
    if args.json {
        println!("{}", serde_json::to_string(&manifest)?);
    }
    Ok(0)
}
