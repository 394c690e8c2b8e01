//! `tinyllama bench serve`.

use super::bench::at_least_one;
use super::model_args::{LoadArgs, name_of};
use super::serve::{EngineArgs, MAX_QUEUE};
use crate::bench::serve::{self, Load, Pace, Percentiles, Report};
use crate::bench::serve_client::Server;
use crate::error::WithHint;
use crate::generate::request::peak_memory;
use crate::generate::service::Service;
use crate::serve::{Background, Limits, Options};
use crate::{device, guard};
use anyhow::{Result, anyhow};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

/// Arguments of `bench serve`.
#[derive(clap::Args)]
pub struct Args {
    /// Serve this checkpoint folder here, on a free port, with the limits that `serve` has
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Or load the server that runs at this address already, such as http://127.0.0.1:8000
    #[arg(long, value_name = "URL", conflicts_with_all = ["precision", "quantize", "kv_cache_dtype",
          "device", "cache_gib", "max_sequences"])]
    url: Option<String>,
    /// The server's API key
    #[arg(long, value_name = "KEY", env = "TINYLLAMA_API_KEY", hide_env_values = true)]
    key: Option<String>,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Streams at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    clients: usize,
    /// Instead: requests a second on average, at random times, whether or not those before are done
    #[arg(long, value_name = "R", conflicts_with = "clients", value_parser = above_zero)]
    rate: Option<f64>,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    requests: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    new_tokens: usize,
    /// Temperature of the draws; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Of the prompts and the random times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn above_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err("expected a number above 0".into()),
    }
}

/// Runs `bench serve`.
pub fn run(args: &Args) -> Result<()> {
    let load = Load {
        requests: args.requests,
        pace: args.rate.map_or(Pace::Clients(args.clients), Pace::Rate),
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        temperature: args.temperature,
        seed: args.seed,
    };
    let key = args.key.clone().filter(|key| !key.is_empty());
    let report = match (&args.checkpoint, &args.url) {
        (Some(checkpoint), None) => {
            let device = device::resolve(&args.load.device)?;
            let lower = "lower `--cache-gib`, or use `--quantize int4` or `--precision bf16-true`";
            guard::catch("the benchmark", device, lower, || {
                serve_and_load(args, checkpoint, device, key, &load)
            })?
        }
        (None, Some(url)) => serve::run(&Arc::new(Server::new(url, key)?), &load)?,
        (checkpoint, _) => {
            let got = if checkpoint.is_some() { "both" } else { "neither" };
            return Err(anyhow!("expected one of `--checkpoint` and `--url`, got {got}")).usage(
                "`--checkpoint DIR` serves a model here; `--url http://HOST:PORT` loads a server that runs",
            );
        }
    };
    match args.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print(args, &report),
    }
    Ok(())
}

/// Loads a server of this process.
fn serve_and_load(
    args: &Args,
    checkpoint: &Path,
    device: Device,
    api_key: Option<String>,
    load: &Load,
) -> Result<Report> {
    let loaded = args.load.load(checkpoint, device, true)?;
    let sizes = args.engine.sizes(&loaded)?;
    let context = loaded.network.borrow().config().max_length() as usize;
    let options = Options {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: api_key.clone(),
        model: name_of(checkpoint),
        limits: Limits::within(context),
        drain: Duration::ZERO,
        log: false,
    };
    let service = Arc::new(Service::start(loaded, sizes, MAX_QUEUE)?);
    let server = Background::start(service, &options)?;
    let url = format!("http://{}", server.address());
    let mut report = serve::run(&Arc::new(Server::new(&url, api_key)?), load)?;
    report.peak_memory = peak_memory(device);
    Ok(report)
}

fn print(args: &Args, r: &Report) {
    let pace = match args.rate {
        Some(rate) => format!("{rate} a second"),
        None => format!("{} clients", args.clients),
    };
    let (prompt, new) = (args.prompt_tokens, args.new_tokens);
    println!("{} | {} requests of {prompt} + {new} tokens, {pace}", r.model, args.requests);
    println!(
        "{:>7} {:>7} {:>9} {:>11} {:>13} {:>13} {:>9}",
        "whole", "failed", "seconds", "requests/s", "prompt tok/s", "output tok/s", "peak GiB"
    );
    let peak = |bytes: u64| format!("{:.2}", bytes as f64 / (1u64 << 30) as f64);
    println!(
        "{:>7} {:>7} {:>9.1} {:>11.2} {:>13.1} {:>13.1} {:>9}",
        r.whole,
        r.failed,
        r.seconds,
        r.requests_per_sec,
        r.prompt_tokens_per_sec,
        r.new_tokens_per_sec,
        r.peak_memory.map_or("-".into(), peak),
    );
    println!("\n{:<15} {:>10} {:>10} {:>10}", "milliseconds", "p50", "p90", "p99");
    row("first token", r.first_token_ms);
    row("between tokens", r.per_token_ms);
    row("between pieces", r.between_pieces_ms);
    row("whole answer", r.whole_ms);
    for (why, count) in &r.failures {
        println!("failed, {count}: {why}");
    }
}

fn row(name: &str, times: Option<Percentiles>) {
    match times {
        Some(Percentiles { p50, p90, p99 }) => {
            println!("{name:<15} {p50:>10.2} {p90:>10.2} {p99:>10.2}")
        }
        None => println!("{name:<15} {:>10} {:>10} {:>10}", "-", "-", "-"),
    }
}
