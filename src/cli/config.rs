//! `tinyllama config explain | check | models`.

use crate::config::{self, BatchPlan, Key, counted, with_commas};
use crate::model::ModelConfig;
use anyhow::Result;
use clap::Subcommand;
use std::path::{Path, PathBuf};

/// Arguments of `config`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Meaning, type and default of a key and the keys below it; of all keys without one
    Explain {
        /// E.g. `train.max_norm`, `optimizer`, `model_config`
        key: Option<String>,
    },
    /// Check a configuration; print it fully resolved (stdout) and its arithmetic (stderr)
    Check {
        /// The run's YAML
        config: PathBuf,
        /// Override a key (repeatable)
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Workers on each node, to do the arithmetic for (the key `devices`, times `num_nodes`)
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        devices: Option<u64>,
    },
    /// List the model presets
    Models,
}

/// Runs `config`.
pub fn run(args: Args) -> Result<u8> {
    match args.what {
        What::Explain { key: None } => print_table(&config::keys()),
        What::Explain { key: Some(key) } => print_keys(&config::explain(&key)?),
        What::Check { config, sets, devices } => check(&config, sets, devices)?,
        What::Models => print_models(),
    }
    Ok(0)
}

fn print_table(keys: &[Key]) {
    let width = keys.iter().map(|k| k.path.len()).max().unwrap_or(0);
    for key in keys {
        println!("{:width$}  {}", key.path, key.doc);
    }
}

fn print_keys(keys: &[Key]) {
    for key in keys {
        println!("{}\n    {}\n    type     {}", key.path, key.doc, key.kind);
        if !key.default.is_empty() {
            println!("    default  {}", key.default);
        }
        if !key.finetune.is_empty() {
            println!("    finetune {}", key.finetune);
        }
        for (name, doc) in &key.choices {
            println!("    {name:12} {doc}");
        }
    }
}

fn check(path: &Path, mut sets: Vec<String>, devices: Option<u64>) -> Result<()> {
    sets.extend(devices.map(|n| format!("devices={n}")));
    let config = config::load_either(path, &sets)?;
    let model = config.model()?;
    let plan = BatchPlan::new(&config, config.sequence_length(&model), config.ranks())?;
    print!("{}", config::to_yaml(&config)?);
    eprintln!(
        "model   {} with {} parameters",
        config.model_told(&model),
        with_commas(model.n_params())
    );
    eprintln!("batch   {plan}");
    if let (Some(steps), Some(tokens)) = (plan.total_steps, plan.total_tokens()) {
        eprintln!("length  {} = {}", counted(steps, "step"), counted(tokens, "token"));
    }
    if let Some(n) = config.data.epochs {
        let n = counted(n, "epoch");
        eprintln!("length  until a source is through {n}, which shows when its files are read");
    }
    Ok(())
}

fn print_models() {
    println!(
        "{:20} {:>14} {:>6} {:>6} {:>5} {:>6} {:>7} {:>7} {:>7}",
        "name", "parameters", "layers", "width", "heads", "groups", "mlp", "vocab", "context"
    );
    for name in ModelConfig::preset_names() {
        let Some(m) = ModelConfig::preset(&name) else { continue };
        println!(
            "{:20} {:>14} {:>6} {:>6} {:>5} {:>6} {:>7} {:>7} {:>7}",
            m.name,
            with_commas(m.n_params()),
            m.n_layer,
            m.n_embd,
            m.n_head,
            m.n_query_groups,
            m.intermediate_size,
            m.padded_vocab_size,
            m.block_size
        );
    }
}
