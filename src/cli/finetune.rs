//! `tinyllama finetune CONFIG`.

use super::pretrain;
use crate::config::{self, FinetuneConfig, RunConfig};
use crate::data::chat::{self, Encoded};
use crate::error::exit;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::Path;

/// Arguments of `finetune`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: pretrain::Args,
    /// Print the first N training conversations as JSON lines, their tokens and which of them are targets (-100: none), and
    /// stop
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
}

/// Runs `finetune`.
pub fn run(args: Args) -> Result<u8> {
    match args.samples {
        Some(n) => print_samples(&args.run.load(config::load_finetune)?, n),
        None if args.run.dry_run => pretrain::run(args.run, config::load_finetune),
        None => pretrain::run(args.run, load),
    }
}

/// The configuration, with a tokenizer written that has the tokens it adds.
fn load(path: &Path, sets: &[String]) -> Result<RunConfig> {
    chat::with_special_tokens(&config::load_finetune(path, sets)?)
}

fn print_samples(config: &RunConfig, n: usize) -> Result<u8> {
    let FinetuneConfig { data, .. } = config.finetune.as_ref().context("no `finetune`")?;
    let dir = config.tokenizer_dir.as_deref().context("no `tokenizer_dir`")?;
    let tokenizer = Tokenizer::load(dir)?;
    let template = chat::template(config, data, &tokenizer)?;
    for conversation in chat::read(&data.train, data.format)?.items.iter().take(n) {
        let Encoded { ids, trained } =
            chat::encode(conversation, &template, &tokenizer, data.loss_on)?;
        let label = |(id, trained): (&u32, &bool)| if *trained { i64::from(*id) } else { -100 };
        let labels: Vec<i64> = ids.iter().zip(&trained).map(label).collect();
        println!("{}", json!({ "ids": ids, "labels": labels }));
    }
    Ok(exit::OK)
}
