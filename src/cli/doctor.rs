//! `tinyllama doctor`: versions, cards, machine, and what is wrong with this installation.

use crate::config::counted;
use crate::doctor::{self, Card, Driver, Problem, Report, Space};
use crate::error::exit;
use anyhow::Result;

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `doctor`: 0 where all is well, with a GPU or without, and 1 where something is wrong.
pub fn run(args: Args) -> Result<u8> {
    let report = doctor::examine();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_facts(&report);
        print_problems(&report.problems);
    }
    Ok(if report.problems.is_empty() { exit::OK } else { exit::FAILED })
}

fn print_facts(r: &Report) {
    let line = |name: &str, value: &str| println!("{name:<15}{value}");
    let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
    line("tinyllama", &format!("{}, built by rustc {}", r.tinyllama, r.rustc));
    let sees = if r.libtorch_sees_cuda { "sees CUDA" } else { "sees no CUDA card" };
    line("libtorch", &format!("{}, {sees}", r.libtorch));
    line("CUDA runtime", &or_none(&r.cuda_runtime));
    line("cuDNN", &or_none(&r.cudnn));
    line("NCCL", &or_none(&r.nccl));
    line("kernels for", &words(&r.compiled_archs, "sm_"));
    println!();
    line("driver", &driver(&r.driver));
    for card in &r.cards {
        line(&format!("cuda:{}", card.index), &card_text(card));
    }
    if r.cards.is_empty() {
        line("cards", "none: everything runs on the CPU");
    }
    println!();
    line("CPU", r.cpu.model.as_deref().unwrap_or(std::env::consts::ARCH));
    let cores = r.cpu.cores.map_or("?".into(), |n| n.to_string());
    line("cores", &format!("{cores}, libtorch uses {}", counted(r.torch_threads as u64, "thread")));
    line("CPU features", &words(&r.cpu.features, ""));
    line("RAM", &space(&r.ram));
    line("disk, here", &space(&r.disk));
    println!();
}

fn print_problems(problems: &[Problem]) {
    if problems.is_empty() {
        println!("no problems found");
        return;
    }
    println!("problems:");
    for Problem { what, fix } in problems {
        println!("- {what}\n  fix: {fix}");
    }
}

fn driver(d: &Driver) -> String {
    let version = d.version.clone().unwrap_or_else(|| "version unknown".into());
    match &d.cuda {
        Some(cuda) => format!("{version}, runs CUDA up to {cuda}"),
        None if d.loaded => version,
        None => "none".into(),
    }
}

fn card_text(card: &Card) -> String {
    let (major, minor) = card.capability;
    let memory = match card.free_bytes {
        Some(free) => format!("{} free of {}", gib(free), gib(card.total_bytes)),
        None => format!("{}, in use by another program", gib(card.total_bytes)),
    };
    let kernels = if card.has_kernels { "" } else { ", no kernels" };
    format!("{}, {memory}, compute capability {major}.{minor}{kernels}", card.name)
}

fn words(items: &[&str], prefix: &str) -> String {
    if items.is_empty() {
        return "none".into();
    }
    items.iter().map(|item| format!("{prefix}{item}")).collect::<Vec<_>>().join(", ")
}

fn space(space: &Option<Space>) -> String {
    let text = |s: &Space| format!("{} free of {}", gib(s.free_bytes), gib(s.total_bytes));
    space.as_ref().map_or("unknown".into(), text)
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}
