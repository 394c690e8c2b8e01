//! `tinyllama bench`.

use crate::bench::kernels::{self, Report, Unit};
use crate::bench::train;
use crate::error::exit;
use crate::{device, guard};
use anyhow::Result;
use std::path::PathBuf;

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(clap::Subcommand)]
enum Kind {
    /// Each kernel of csrc/ against its plain reference and libtorch's best, on the shapes of
    /// TinyLlama-1.1B: time, speed, share of the card's copy or matrix-product speed, error
    Kernels(KernelArgs),
    /// Tokens a second, utilisation and memory of a run's configuration, on its own data
    Train(TrainArgs),
}

#[derive(clap::Args)]
struct TrainArgs {
    /// The run's YAML
    config: PathBuf,
    /// Override a key, e.g. --set train.micro_batch_size=4 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    steps: usize,
    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 10)]
    warmup: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct KernelArgs {
    /// Tokens in a micro-batch, rows of 2,048
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [8192, 16_384, 32_768])]
    tokens: Vec<i64>,
    /// Only ops whose name contains this word
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// The card
    #[arg(long, default_value = "auto")]
    device: String,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1; leave it out for 50".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

/// Runs `bench`.
pub fn run(args: Args) -> Result<u8> {
    match args.kind {
        Kind::Kernels(args) => run_kernels(args)?,
        Kind::Train(args) => run_train(args)?,
    }
    Ok(exit::OK)
}

fn run_kernels(args: KernelArgs) -> Result<()> {
    let device = device::resolve(&args.device)?;
    let lower = "give fewer `--tokens`, or `--only` an op";
    let report = guard::catch("the benchmark", device, lower, || {
        kernels::run(device, &args.tokens, args.only.as_deref())
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn run_train(args: TrainArgs) -> Result<()> {
    let r = train::run(&args.config, &args.sets, args.warmup, args.steps)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&r)?);
        return Ok(());
    }
    let percent = |x: Option<f64>| x.map_or("n/a".into(), |x| format!("{:.1} %", 100.0 * x));
    let [low, high] = r.tokens_per_sec_quartiles;
    println!("{} in {} on {}", r.model, r.precision, r.device);
    println!(
        "step      {} x {} = {} tokens",
        r.micro_batch_size, r.accumulation, r.tokens_per_step
    );
    println!("time      {:.4} s, median of {}", r.step_seconds, r.steps);
    println!("speed     {:.0} tok/s (quartiles {low:.0} to {high:.0})", r.tokens_per_sec);
    println!("mfu       {} full attention, {} causal", percent(r.mfu), percent(r.mfu_causal));
    if let Some(gib) = r.peak_memory_gib {
        println!("memory    {gib:.1} GiB peak");
    }
    println!("loss      {:.4} -> {:.4}", r.loss[0], r.loss[1]);
    Ok(())
}

fn print(report: &Report) {
    println!("{}, libtorch {}, cuDNN {}", report.card, report.libtorch, report.cudnn);
    println!(
        "copy {:.3} TB/s, matrix product {:.0} TFLOP/s",
        report.copy_tb_s, report.matmul_tflop_s
    );
    println!("share: of the copy speed, or of the matrix product's\n");
    let mut last = (0, "");
    for row in &report.rows {
        if (row.tokens, row.op.as_str()) != last {
            match row.tokens {
                0 => println!("{}", row.op),
                tokens => println!("{}, {tokens} tokens", row.op),
            }
            last = (row.tokens, &row.op);
        }
        let unit = match row.unit {
            Unit::Bandwidth => "TB/s",
            Unit::Arithmetic => "TFLOP/s",
        };
        let error = row.error.map_or_else(String::new, |e| format!("  error {e:.1e}"));
        println!(
            "  {:<26} {:>8.3} ms  {:>8.3} {unit:<7} {:>5.1} %{error}",
            row.kernel, row.ms, row.speed, row.share
        );
    }
}
