//! `tinyllama finetune CONFIG`.

use super::pretrain;
use crate::config::{self, FinetuneConfig, LossOn, RunConfig};
use crate::data::chat::{self, Conversation, Encoded, Pair};
use crate::error::exit;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;

/// Arguments of `finetune`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: pretrain::Args,
    /// Print the first N rows of `finetune.data.train` as JSON lines, their tokens and which of them are targets (-100: none),
    /// of preferences both answers, before any is cut at `train.max_seq_length`; and stop
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
    // The tokenizer of the run, which may have more tokens than the checkpoint's.
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let config = RunConfig { out_dir: folder.path().to_owned(), ..config.clone() };
    let config = &chat::with_special_tokens(&config)?;
    let FinetuneConfig { data, .. } = config.finetune.as_ref().context("no `finetune`")?;
    let dir = config.tokenizer_dir.as_deref().context("no `tokenizer_dir`")?;
    let tokenizer = Tokenizer::load(dir)?;
    let template = chat::template(config, data, &tokenizer)?;
    let sample = |conversation: &Conversation, loss_on: LossOn| -> Result<Value> {
        let Encoded { ids, trained } = chat::encode(conversation, &template, &tokenizer, loss_on)?;
        let label = |(id, trained): (&u32, &bool)| if *trained { i64::from(*id) } else { -100 };
        let labels: Vec<i64> = ids.iter().zip(&trained).map(label).collect();
        Ok(json!({ "ids": ids, "labels": labels }))
    };
    // What a run leaves out is told, and the others are shown.
    let print = |of: Result<Value>| -> Result<()> {
        match of {
            Ok(row) => println!("{row}"),
            Err(e) if chat::is_refused(&e) => eprintln!("left out: {e:#}"),
            Err(e) => return Err(e),
        }
        Ok(())
    };
    if config.dpo().is_some() {
        for Pair { chosen, rejected } in chat::read_pairs(&data.train)?.items.iter().take(n) {
            let answer = |of| sample(of, LossOn::Assistant);
            let both = || Ok(json!({ "chosen": answer(chosen)?, "rejected": answer(rejected)? }));
            print(both())?;
        }
        return Ok(exit::OK);
    }
    for conversation in chat::read(&data.train, data.format)?.items.iter().take(n) {
        print(sample(conversation, data.loss_on))?;
    }
    Ok(exit::OK)
}
