//! `tinyllama pretrain CONFIG` and `tinyllama finetune CONFIG`.

use crate::config::{BatchPlan, Method, RunConfig, counted};
use crate::device;
use crate::distributed::{self, World, rendezvous};
use crate::error::exit;
use crate::ffi;
use crate::train;
use crate::train::memory::{self, MemoryPlan, Share};
use anyhow::Result;
use std::path::{Path, PathBuf};
use tch::Device;

/// Arguments of `pretrain` and `finetune`.
#[derive(clap::Args)]
pub struct Args {
    /// The run's YAML, e.g. configs/quickstart.yaml or configs/finetune/quickstart.yaml
    config: PathBuf,
    /// Worker processes on this node, one a card; on the CPU as many as asked (the key `devices`)
    #[arg(long, value_name = "N")]
    devices: Option<u64>,
    /// Override a key, e.g. --set train.micro_batch_size=4 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// `auto` (newest checkpoint in out_dir, or start), `false`, or a checkpoint folder
    #[arg(long, value_name = "auto|false|PATH")]
    resume: Option<String>,
    /// Check the configuration, print batch arithmetic and the GPU memory that it will need, and stop
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// Reads a run's YAML and overrides.
pub(super) type Load = fn(&Path, &[String]) -> Result<RunConfig>;

/// Runs a verb, whose configuration `load` reads: alone, as one of many workers, or as the launcher of them.
pub fn run(args: Args, load_config: Load) -> Result<u8> {
    let world = if args.dry_run { None } else { World::from_env()? };
    let config = match (args.load(load_config), &world) {
        (Err(error), Some(world)) => return Err(rendezvous::refuse(world, error)),
        (config, _) => config?,
    };
    if args.dry_run {
        return dry_run(&config);
    }
    match world {
        Some(world) => work(world, &config),
        None if config.ranks() > 1 => distributed::launch(&config),
        _ => train::pretrain(&config, None),
    }
}

impl Args {
    /// The configuration with the overrides.
    pub(super) fn load(&self, load_config: Load) -> Result<RunConfig> {
        let mut sets = self.sets.clone();
        if let Some(devices) = self.devices {
            sets.push(format!("devices={devices}"));
        }
        match self.resume.as_deref() {
            None => {}
            Some("false") => sets.push("resume=false".into()),
            // Quoted as JSON, which is YAML: a path may look like a number.
            Some(text) => sets.push(format!("resume={}", serde_json::to_string(text)?)),
        }
        load_config(&self.config, &sets)
    }
}

/// One rank of many.
fn work(world: World, config: &RunConfig) -> Result<u8> {
    let (rank, size) = (world.rank, world.size as u64);
    if rank == 0 && config.ranks() > 1 && config.ranks() != size {
        let (devices, nodes) = (config.devices, config.num_nodes);
        eprintln!(
            "world       {size} ranks were started; `devices` {devices} x `num_nodes` {nodes} is not obeyed"
        );
    }
    distributed::meet(world, config)?.run(|job| train::pretrain(config, Some(job)))
}

/// Prints what would run. Nothing is read but the configuration, nothing allocated or written.
fn dry_run(config: &RunConfig) -> Result<u8> {
    let model = config.model()?;
    let sequence = config.sequence_length(&model);
    let plan = BatchPlan::new(config, sequence, config.ranks())?;
    println!(
        "model     {} with {:.1}M parameters",
        config.model_told(&model),
        model.n_params() as f64 / 1e6
    );
    println!("batch     {plan}");
    if let Some(steps) = plan.total_steps {
        println!("length    {}", counted(steps, "step"));
    }
    if let Some(n) = config.data.epochs {
        println!(
            "length    until a source is through {n} epoch(s), which shows when its files are read"
        );
    }
    let micro = config.train.micro_batch_size;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let again = memory::Recompute::of(config, model.n_layer);
    let (precision, optimizer) = (config.precision, &config.optimizer);
    let (strategy, devices) = (config.distributed.strategy, config.devices);
    let share = Share::of(strategy, config.ranks(), devices, &model);
    let memory_plan =
        MemoryPlan::new(&model, precision, optimizer, again, share, micro, sequence as u64);
    let Some(memory_plan) = memory_plan.filter(|_| {
        config.fused && config.finetune.as_ref().is_none_or(|f| f.method == Method::Full)
    }) else {
        println!(
            "memory    no plan: it knows all weights trained, in bf16-mixed and bf16-true, with fused kernels and head sizes 64 and 128"
        );
        return Ok(exit::OK);
    };
    println!("\nGPU memory at micro_batch_size {micro}, {}, in GiB", config.precision);
    for (name, bytes) in &memory_plan.parts {
        println!("  {name:<44} {:>6.2}", gib(*bytes));
    }
    println!("  {:<44} {:>6.2}", "total", gib(memory_plan.total()));
    if !memory_plan.host.is_empty() {
        println!("\nhost memory, page-locked, in GiB");
    }
    for (name, bytes) in &memory_plan.host {
        println!("  {name:<44} {:>6.2}", gib(*bytes));
    }
    println!("\nlargest micro_batch_size ({:.1} GiB left for CUDA itself)", gib(memory::RESERVE));
    let fits = |name: &str, bytes: u64| {
        let largest = memory::largest_micro_batch(
            &model,
            precision,
            optimizer,
            again,
            share,
            sequence as u64,
            bytes,
        );
        let of_a_rank = config.train.global_batch_size / config.ranks();
        match largest.unwrap_or(0) {
            0 => println!("  {name:<44} {:>6}", "none"),
            n => match (1..=n).rev().find(|n| of_a_rank.is_multiple_of(*n)) {
                Some(divides) if divides < n => {
                    println!("  {name:<44} {n:>6}, or {divides}, which divides the batch");
                }
                _ => println!("  {name:<44} {n:>6}"),
            },
        }
    };
    match device::resolve(&config.device.0) {
        Ok(Device::Cuda(i)) => {
            let card = ffi::cuda_device(i)?;
            fits(&format!("this {}", card.name), card.total_memory as u64);
        }
        _ => {
            // What libtorch sees of such cards.
            for (name, gib) in [("a card of 24 GB", 23.6), ("40 GB", 39.4), ("80 GB", 79.1)] {
                fits(name, (gib * (1u64 << 30) as f64) as u64);
            }
        }
    }
    Ok(exit::OK)
}
