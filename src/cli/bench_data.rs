//! `tinyllama bench data`.

use crate::bench::data::{self, Report};
use crate::config::{self, DataOrder, DataSource, Weight};
use crate::data::packed::Access;
use crate::data::{Borders, LoaderOptions};
use crate::tokenizer::Tokenizer;
use anyhow::Result;
use std::path::PathBuf;

/// Arguments of `bench data`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct Args {
    /// The data of a run's YAML
    #[arg(long, value_name = "CONFIG", group = "what")]
    config: Option<PathBuf>,
    /// One folder (or prefix) of packed files
    #[arg(long, value_name = "DIR", group = "what")]
    path: Option<PathBuf>,
    /// Override a key of the configuration (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    sets: Vec<String>,
    /// With --path: tokens of a sequence
    #[arg(long, value_name = "T", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..1 << 32))]
    block_size: u64,
    /// Time of each measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds, from 0.001 to 86400".into()),
    }
}

/// Runs `bench data`.
pub fn run(args: Args) -> Result<()> {
    let report = data::run(&options(&args)?, args.seconds)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn options(args: &Args) -> Result<LoaderOptions> {
    if let Some(path) = &args.config {
        let config = config::load(path, &args.sets)?;
        let model = config.model()?;
        let tokenizer = match (config.data.document_mask, &config.tokenizer_dir) {
            (true, Some(dir)) => Some(Tokenizer::load(dir)?),
            _ => None,
        };
        return Ok(LoaderOptions {
            sources: config.data.train.clone(),
            order: config.data.order,
            micro_batch_size: config.train.micro_batch_size as usize,
            block_size: config.sequence_length(&model) as usize,
            rank: 0,
            world: config.ranks() as usize,
            seed: config.seed,
            vocab_size: model.padded_vocab_size as usize,
            prefetch: config.data.prefetch,
            access: Access::Mapped,
            borders: tokenizer.as_ref().map(Borders::of).transpose()?,
        });
    }
    let path = args.path.clone().unwrap_or_default();
    Ok(LoaderOptions {
        sources: vec![DataSource { path, weight: Weight::default() }],
        order: DataOrder::Global,
        micro_batch_size: 8,
        block_size: args.block_size as usize,
        rank: 0,
        world: 1,
        seed: 0,
        vocab_size: 1 << 62,
        prefetch: 8,
        access: Access::Mapped,
        borders: None,
    })
}

fn print(r: &Report) {
    for source in &r.sources {
        println!("data      {source}");
    }
    println!("batches   {} x {} tokens", r.micro_batch_size, r.block_size);
    println!("  {:<8} {:>12} {:>14} {:>22}", "", "tok/s", "CPU ns/token", "% of a core at 100k/s");
    for row in &r.rows {
        println!(
            "  {:<8} {:>12.3e} {:>14.3} {:>22.4}",
            row.access,
            row.tokens_per_sec,
            row.cpu_ns_per_token,
            100.0 * row.core_at_100k
        );
    }
}
