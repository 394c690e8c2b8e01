//! `tinyllama bench`.

use crate::bench::kernels::{self, Report, Unit};
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
    device: PathBuf,
}

/// Runs `bench`.
pub fn run(args: Args) -> Result<u8> {
    let Kind::Kernels(args) = args.kind;
    let device = device::resolve(&args.device.to_string_lossy())?;
    let lower = "give fewer `--tokens`, or `--only` an op";
    let report = guard::catch("the benchmark", device, lower, || {
        kernels::run(device, &args.tokens, args.only.as_deref())
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(exit::OK)
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
