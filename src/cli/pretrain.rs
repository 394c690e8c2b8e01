//! `tinyllama pretrain CONFIG`.

use crate::config;
use crate::train;
use anyhow::Result;
use std::path::PathBuf;

/// Arguments of `pretrain`.
#[derive(clap::Args)]
pub struct Args {
    /// The run's YAML, e.g. configs/quickstart.yaml
    config: PathBuf,
    /// Override a key, e.g. --set train.micro_batch_size=4 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// `auto` (newest checkpoint in out_dir, or start), `false`, or a checkpoint folder
    #[arg(long, value_name = "auto|false|PATH")]
    resume: Option<String>,
}

/// Runs `pretrain`.
pub fn run(args: Args) -> Result<u8> {
    let mut sets = args.sets;
    match args.resume.as_deref() {
        None => {}
        Some("false") => sets.push("resume=false".into()),
        // Quoted as JSON, which is YAML: a path may look like a number.
        Some(text) => sets.push(format!("resume={}", serde_json::to_string(text)?)),
    }
    train::pretrain(&config::load(&args.config, &sets)?)
}
