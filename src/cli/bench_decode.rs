//! `tinyllama bench decode`.

use super::model_args::LoadArgs;
use crate::bench::decode::{self, Case, Report};
use crate::config::counted;
use crate::error::WithHint;
use crate::generate::load::Form;
use crate::generate::network::Network;
use crate::generate::sampler::SamplingParams;
use crate::model::{GPT, ModelConfig};
use crate::quant;
use crate::{device, guard};
use anyhow::{Result, anyhow};
use std::path::PathBuf;
use tch::{Device, Kind};

/// Arguments of `bench decode`.
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    #[arg(long, value_name = "DIR", conflicts_with = "preset", required_unless_present = "preset")]
    checkpoint: Option<PathBuf>,
    /// Random weights of a published model's sizes, such as tiny-llama-1.1b
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    #[command(flatten)]
    load: LoadArgs,
    /// Prompts at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    prompts: usize,
    /// Continuations of each
    #[arg(long, value_name = "N", default_value_t = 1)]
    samples: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [16, 900])]
    prompt_tokens: Vec<usize>,
    /// Tokens of a continuation
    #[arg(long, value_name = "N", default_value_t = 100)]
    new_tokens: usize,
    /// Temperature of the draws; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Timed runs, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeats: usize,
    /// Print one JSON object a case
    #[arg(long)]
    json: bool,
}

/// Runs `bench decode`.
pub fn run(args: &Args) -> Result<()> {
    let device = device::resolve(&args.load.device)?;
    let sampling =
        SamplingParams { temperature: args.temperature, top_k: None, ..Default::default() };
    sampling.validate()?;
    for n in [args.prompts, args.samples, args.new_tokens, args.repeats] {
        if !(1..=1 << 20).contains(&n) {
            return Err(anyhow!("a number is {n}")).usage("give from 1 to 1,048,576 of everything");
        }
    }
    let lower = "fewer prompts, samples or tokens";
    guard::catch("the benchmark", device, lower, || measure(args, device, &sampling))
}

fn measure(args: &Args, device: Device, sampling: &SamplingParams) -> Result<()> {
    let network = match (&args.checkpoint, &args.preset) {
        (Some(dir), _) => args.load.load(dir, device, false)?.network,
        (None, name) => {
            let name = name.as_deref().unwrap_or_default();
            let mut network = random_model(name, args.load.form(), device)?;
            args.load.kv_cache_dtype.set(&mut network)?;
            network
        }
    };
    let model = network.borrow();
    if !args.json {
        let threads = counted(tch::get_num_threads() as u64, "thread");
        let place = if device.is_cuda() { String::new() } else { format!(", {threads}") };
        println!(
            "{} | {:.0} M parameters, {:.0} MB a step, cache {:?} | {device:?}{place}",
            model.config().name,
            model.n_params() as f64 / 1e6,
            model.step_bytes() as f64 / 1e6,
            model.kind(),
        );
        println!(
            "{:>9} {:>7} {:>6} {:>15} {:>14} {:>9} {:>9} {:>14} {:>9}",
            "sequences",
            "prompt",
            "new",
            "prefill tok/s",
            "decode tok/s",
            "p50 ms",
            "p99 ms",
            "of the limit",
            "peak GiB"
        );
    }
    for &prompt_tokens in &args.prompt_tokens {
        let case = Case {
            prompts: args.prompts,
            samples: args.samples,
            prompt_tokens,
            new_tokens: args.new_tokens,
        };
        let report = decode::run(model, case, sampling, args.repeats)?;
        match args.json {
            true => println!("{}", serde_json::to_string(&report)?),
            false => print(&report),
        }
    }
    Ok(())
}

fn print(r: &Report) {
    let peak = r.peak_memory.map_or(0.0, |bytes| bytes as f64 / (1u64 << 30) as f64);
    println!(
        "{:>9} {:>7} {:>6} {:>15.1} {:>14.1} {:>9.2} {:>9.2} {:>6.1} % {:>5.0} {peak:>9.2}",
        r.sequences,
        r.prompt_tokens,
        r.new_tokens,
        r.prefill_tokens_per_sec,
        r.decode_tokens_per_sec,
        r.step_ms_p50,
        r.step_ms_p99,
        100.0 * r.share_of_limit,
        r.limit_tokens_per_sec,
    );
}

fn random_model(name: &str, form: Form, device: Device) -> Result<Network> {
    let config = ModelConfig::preset(name)
        .ok_or_else(|| anyhow!("`{name}` is no model that is known here"))
        .usage(format!("one of {}", ModelConfig::preset_names().join(", ")))?;
    let mut model = GPT::new(&config, device);
    if let Form::Quantised(scheme) = form {
        return Network::quantised(quant::quantise(&model, scheme)?, device);
    }
    model.to_kind(match form {
        Form::Dense(kind) => kind,
        _ if device.is_cuda() => Kind::BFloat16,
        _ => Kind::Float,
    });
    Ok(Network::Dense(Box::new(model)))
}
