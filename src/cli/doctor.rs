//! `tinyllama doctor`: versions, cards, and what is wrong with this installation.

use crate::ffi;
use anyhow::Result;
use serde_json::{Value, json};
use std::fs;

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Oldest driver that runs CUDA 13.0.
const OLDEST_DRIVER: u32 = 580;

/// Runs `doctor`. A machine without a GPU is fine; 1 where something is wrong.
pub fn run(args: Args) -> Result<u8> {
    let facts = facts()?;
    let problems = problems(&facts);
    if args.json {
        let mut out = facts;
        out["problems"] = json!(problems);
        println!("{}", serde_json::to_string_pretty(&out)?);
    } else {
        print_facts(&facts);
        print_problems(&problems);
    }
    Ok(u8::from(!problems.is_empty()))
}

/// Everything that can be found out, in the order of printing.
fn facts() -> Result<Value> {
    let versions = ffi::versions()?;
    let cards =
        (0..tch::Cuda::device_count().max(0) as usize).map(card).collect::<Result<Vec<_>>>()?;
    let (memory_free, memory_total) = memory();
    Ok(json!({
        "tinyllama": env!("CARGO_PKG_VERSION"),
        "libtorch": versions.libtorch,
        "cuda_runtime": versions.cuda,
        "cudnn": versions.cudnn,
        "nccl": versions.nccl,
        "driver": driver_version(),
        "driver_cuda": driver_cuda(),
        "compiled_archs": ffi::compiled_archs(),
        "cards": cards,
        "cpu": cpu_field("model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
        "cpu_features": cpu_features(),
        "threads": tch::get_num_threads(),
        "memory_gib": { "free": memory_free, "total": memory_total },
        "disk_free_gib": disk_free(),
    }))
}

fn card(index: usize) -> Result<Value> {
    let card = ffi::cuda_device(index)?;
    Ok(json!({
        "index": index,
        "name": card.name,
        "memory_gib": (card.total_memory as f64 / (1u64 << 30) as f64 * 10.0).round() / 10.0,
        "capability": format!("{}.{}", card.capability.0, card.capability.1),
        "has_kernels": crate::device::has_kernels(card.capability, &ffi::compiled_archs()),
    }))
}

/// Version of the kernel driver, e.g. `580.65.06`.
fn driver_version() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let version =
        |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    text.lines().next()?.split_whitespace().find(version).map(str::to_owned)
}

/// Newest CUDA that the driver runs, e.g. `13.0`; asked of the driver library where it is there.
fn driver_cuda() -> Option<String> {
    let version = ffi::cuda_driver_version()?;
    Some(format!("{}.{}", version / 1000, version % 1000 / 10))
}

fn cpu_field(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

/// The instruction sets that matrix products profit from.
fn cpu_features() -> Vec<&'static str> {
    let flags = cpu_field("flags").unwrap_or_default();
    let has = |feature: &&str| flags.split(' ').any(|flag| flag == *feature);
    ["avx2", "avx512f", "avx512_bf16", "amx_bf16"].into_iter().filter(has).collect()
}

/// Available and total memory in GiB.
fn memory() -> (Option<u64>, Option<u64>) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib >> 20)
    };
    (field("MemAvailable"), field("MemTotal"))
}

/// Free GiB in the current directory's file system.
fn disk_free() -> Option<u64> {
    let stat = rustix::fs::statvfs(".").ok()?;
    Some((stat.f_bavail * stat.f_frsize) >> 30)
}

/// What is wrong, each with its fix.
fn problems(facts: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let text = |key: &str| facts[key].as_str().unwrap_or("");
    let cards = facts["cards"].as_array().map_or(&[][..], Vec::as_slice);
    if !text("libtorch").starts_with("2.11.0") {
        out.push(format!("libtorch is {}, not 2.11.0: run ./scripts/setup.sh", text("libtorch")));
    }
    let driver: u32 = text("driver").split('.').next().unwrap_or("").parse().unwrap_or(0);
    if driver > 0 && driver < OLDEST_DRIVER {
        out.push(format!(
            "driver {} is too old for CUDA 13.0: install {OLDEST_DRIVER} or newer",
            text("driver")
        ));
    } else if driver > 0 && cards.is_empty() {
        out.push("a driver is loaded but libtorch sees no card: check CUDA_VISIBLE_DEVICES".into());
    }
    for card in cards.iter().filter(|card| card["has_kernels"] == false) {
        out.push(format!(
            "no kernels for {} (compute capability {}): add it to CUDA_ARCHS in build.rs, after \
             ./scripts/setup.sh has installed nvcc, and build again",
            card["name"].as_str().unwrap_or("the card"),
            card["capability"].as_str().unwrap_or("?")
        ));
    }
    out
}

fn print_facts(facts: &Value) {
    for (key, value) in facts.as_object().into_iter().flatten() {
        let shown = match value {
            Value::Null => "-".into(),
            Value::String(text) => text.clone(),
            Value::Array(items) if key == "cards" && items.is_empty() => "none".into(),
            Value::Array(items) if key == "cards" => {
                items.iter().map(card_line).collect::<Vec<_>>().join("\n                ")
            }
            Value::Array(items) => {
                items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
            }
            Value::Object(map) => {
                map.iter().map(|(k, v)| format!("{v} {k}")).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        println!("{key:15} {shown}");
    }
}

fn card_line(card: &Value) -> String {
    let text = |key: &str| card[key].as_str().unwrap_or("?").to_owned();
    format!(
        "{}: {}, {} GiB, capability {}",
        card["index"],
        text("name"),
        card["memory_gib"],
        text("capability")
    )
}

fn print_problems(problems: &[String]) {
    if problems.is_empty() {
        println!("\nno problems found");
        return;
    }
    println!("\nproblems:");
    for problem in problems {
        println!("  - {problem}");
    }
}
