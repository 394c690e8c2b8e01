//! One file a verb: arguments in, one library call, an exit code out.

mod bench;
mod bench_data;
mod bench_decode;
mod bench_serve;
mod chat;
mod config;
mod convert;
mod doctor;
mod evaluate;
mod finetune;
mod generate;
mod inspect;
mod inspect_checkpoint;
mod model_args;
mod prepare;
mod pretrain;
mod report;
mod score;
mod serve;
mod tokenizer;

use crate::config as run_config;
use crate::eval::sandbox;
use anyhow::Result;
use clap::{Parser, Subcommand};

/// Pretrain, finetune, evaluate and run Llama-family models.
#[derive(Parser)]
#[command(name = "tinyllama", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs. Each has its own `--help`.
#[derive(Subcommand)]
pub enum Verb {
    /// Train a model from scratch, from a checkpoint's weights, or resume a run
    Pretrain(pretrain::Args),
    /// Train a checkpoint on conversations: all weights, or adapters
    Finetune(finetune::Args),
    /// Tokenize a corpus into packed files that training reads
    Prepare(prepare::Args),
    /// Say what a packed dataset or a checkpoint holds, show samples, verify every byte
    Inspect(inspect::Args),
    /// Write a checkpoint in another format or dtype
    Convert(convert::Args),
    /// Train a tokenizer, encode, decode, show what a tokenizer is
    Tokenizer(tokenizer::Args),
    /// Continue a prompt with a trained model
    Generate(generate::Args),
    /// Talk with a model in the terminal
    Chat(chat::Args),
    /// Answer over HTTP as OpenAI's API does, with a chat page
    Serve(serve::Args),
    /// Log-probability of each token of a text under a model
    Score(score::Args),
    /// Scores of benchmarks, as lm-evaluation-harness finds them
    Evaluate(evaluate::Args),
    /// Draw the scores of a run's checkpoints over tokens, beside the published ones
    Report(report::Args),
    /// Measure kernels against their peers and the card's own limits
    Bench(bench::Args),
    /// Explain configuration keys, or check and print a resolved configuration
    Config(config::Args),
    /// Print versions and cards, and say what is wrong with this installation
    Doctor(doctor::Args),
    /// Become a program that a model wrote: `evaluate` starts this
    #[command(name = sandbox::VERB, hide = true)]
    RunSandboxed {
        /// Folder, interpreter and limits as JSON
        order: String,
    },
}

/// Runs one command line; the returned code is the process's exit code (see [`crate::error::exit`]).
pub fn run(cli: Cli) -> Result<u8> {
    match cli.verb {
        Verb::Pretrain(args) => pretrain::run(args, run_config::load),
        Verb::Finetune(args) => finetune::run(args),
        Verb::Prepare(args) => prepare::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Convert(args) => convert::run(args),
        Verb::Tokenizer(args) => tokenizer::run(args),
        Verb::Generate(args) => generate::run(args),
        Verb::Chat(args) => chat::run(args),
        Verb::Serve(args) => serve::run(args),
        Verb::Score(args) => score::run(args),
        Verb::Evaluate(args) => evaluate::run(args),
        Verb::Report(args) => report::run(args),
        Verb::Bench(args) => bench::run(args),
        Verb::Config(args) => config::run(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::RunSandboxed { order } => match sandbox::enter(&order)? {},
    }
}
