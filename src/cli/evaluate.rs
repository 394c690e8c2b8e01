//! `tinyllama evaluate`.

use super::generate::{is_broken_pipe, write_stdout};
use super::model_args::{InferencePrecision, ModelArgs};
use crate::checkpoint::{self, TrainState};
use crate::error::exit;
use crate::eval::results::Results;
use crate::eval::sandbox::{Limits, Sandbox};
use crate::eval::{self, Model, Options, task};
use crate::generate::load::Form;
use crate::generate::network::Network;
use crate::model::GPT;
use crate::quant::Scheme;
use crate::{device, guard};
use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tch::Device;

/// Arguments of `evaluate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tasks, groups (`commonsense`, `mmlu`) and files of tasks of your own (`mine.yaml`)
    #[arg(long, value_delimiter = ',', required = true, value_name = "TASKS")]
    tasks: Vec<String>,
    /// Examples before each question [default: what the task says]
    #[arg(long, value_name = "N")]
    num_fewshot: Option<usize>,
    /// Take the first N samples of each task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Folder of the sets
    #[arg(long, value_name = "DIR", default_value = "data/eval")]
    data: PathBuf,
    /// Folder for `results.json`, or that file
    #[arg(long, value_name = "PATH", default_value = "out/evaluate")]
    out: PathBuf,
    /// Write over results and samples that are there
    #[arg(long)]
    overwrite: bool,
    /// Write each sample, with prompts and log-likelihoods, to `samples_TASK.jsonl`
    #[arg(long)]
    log_samples: bool,
    /// Seed of the choice of examples
    #[arg(long, default_value_t = eval::SEED)]
    seed: u64,
    /// Requests at a time: `auto` fills rows with as many as run well
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = batch_size)]
    batch_size: BatchSize,
    /// Run programs that the model writes (`humaneval`): without network, in an empty folder, with limits
    #[arg(long)]
    allow_code_execution: bool,
}

/// `None`: as many as run well.
#[derive(Clone, Copy)]
struct BatchSize(Option<usize>);

fn batch_size(text: &str) -> Result<BatchSize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(BatchSize(Some(n))),
        _ if text == "auto" => Ok(BatchSize(None)),
        _ => Err("expected `auto` or a number from 1".into()),
    }
}

/// Runs `evaluate`.
pub fn run(args: Args) -> Result<u8> {
    let device = device::resolve(&args.model.load.device)?;
    let lower = "use `--precision bf16-true` or `--device cpu`";
    guard::catch("evaluation", device, lower, || evaluate(&args, device))
}

fn evaluate(args: &Args, device: Device) -> Result<u8> {
    let tasks = task::find(&args.tasks)?;
    eval::check_programs(&tasks, args.allow_code_execution)?;
    let logged = if args.log_samples { &tasks[..] } else { &[] };
    let mut results = Results::create(&args.out, args.overwrite, logged)?;
    let sandbox = match tasks.iter().any(|task| task.file.runs_programs()) {
        true => Some(open_sandbox()?),
        false => None,
    };
    let loaded = args.model.load(device, true)?;
    results.set_config(config(args, &loaded.network));
    let tokenizer = loaded.tokenizer.as_ref().context("the checkpoint has no tokenizer")?;
    let options = Options {
        data: &args.data,
        num_fewshot: args.num_fewshot,
        limit: args.limit.map(|n| n as usize),
        seed: args.seed,
        batch_size: args.batch_size.0,
        sandbox: sandbox.as_ref(),
        ranks: None,
    };
    let model = Model { network: loaded.network.borrow(), tokenizer, eos: &loaded.eos };
    for (i, task) in tasks.iter().enumerate() {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template(&format!(
            "{} ({} of {})  {{bar:30}} {{pos}} of {{len}} requests, {{eta}}",
            task.name,
            i + 1,
            tasks.len()
        ))?);
        let tick = |done: usize, all: usize| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        };
        let outcome =
            eval::evaluate(model, task, options, tick).with_context(|| kept(i, &results))?;
        bar.finish_and_clear();
        if outcome.cut > 0 {
            eprintln!(
                "cut         {} contexts of `{}` from the left, to the model's length",
                outcome.cut, task.name
            );
        }
        results.add(task, &outcome, args.log_samples)?;
        eprintln!(
            "{:<40} {} samples of `{}`, {:.1} a second",
            task.name,
            outcome.samples.len(),
            outcome.split,
            outcome.samples.len() as f64 / outcome.seconds
        );
    }
    eprintln!("results     {}", results.path().display());
    match write_stdout(&results.table()) {
        Err(e) if !is_broken_pipe(&e) => Err(e),
        _ => Ok(exit::OK),
    }
}

/// What is evaluated, and how.
fn config(args: &Args, network: &Network) -> Value {
    let trained = trained(args.model.path());
    let (precision, quantize) = form(args.model.load.form(), network);
    json!({
        "model": "tinyllama",
        "model_args": args.model.path(),
        "tokens": trained.as_ref().map(|state| state.tokens),
        "step": trained.as_ref().map(|state| state.step),
        "precision": precision,
        "quantize": quantize,
        "kv_cache_dtype": name(&args.model.load.kv_cache_dtype),
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "fewshot_seed": args.seed,
    })
}

/// What `--precision` and `--quantize` came to, one of them: what is usual depends on the device and on the file.
fn form(asked: Form, network: &Network) -> (Option<String>, Option<String>) {
    let is_packed = |model: &GPT| model.h.iter().any(|block| block.attn.proj.packed.is_some());
    match (asked, network) {
        (Form::Quantised(scheme), _) => (None, Some(scheme.to_string())),
        (_, Network::Dense(model)) if !is_packed(model) => {
            let all = InferencePrecision::value_variants().iter();
            (all.filter(|one| one.kind() == model.kind()).find_map(name), None)
        }
        _ => (None, Some(Scheme::Stored.to_string())),
    }
}

/// An argument's value as the command line takes it.
fn name<T: ValueEnum>(value: &T) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_owned())
}

/// How far a checkpoint of a training run is; `None` of other checkpoints.
fn trained(checkpoint: &Path) -> Option<TrainState> {
    checkpoint::load_counters(&checkpoint::resolve(checkpoint).ok()?).ok()
}

/// Where programs that the model writes run.
fn open_sandbox() -> Result<Sandbox> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let sandbox = Sandbox::new(program, "python3", Limits::default())?;
    if !sandbox.landlock {
        eprintln!(
            "sandbox     this kernel has no Landlock of Linux 6.2: programs may read what you may read, and write nothing"
        );
    }
    Ok(sandbox)
}

/// What is not lost by a failure.
fn kept(through: usize, results: &Results) -> String {
    match through {
        0 => "no task was finished".into(),
        n => format!("{n} task(s) were finished and are in `{}`", results.path().display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::parse_scheme;

    #[test]
    fn a_schemes_name_is_what_the_argument_takes() {
        let groups = [32, 64, 128];
        let all = groups.map(|group| [Scheme::Int4 { group }, Scheme::Int8 { group }]).concat();
        for scheme in all.into_iter().chain([Scheme::Stored]) {
            assert_eq!(parse_scheme(&scheme.to_string()), Ok(scheme));
        }
    }
}
