//! `tinyllama pretrain CONFIG` and `tinyllama finetune CONFIG`.

use crate::config::{BatchPlan, RunConfig, counted};
use crate::device;
use crate::distributed::{self, Starter, World, rendezvous};
use crate::error::{WithHint, exit};
use crate::ffi;
use crate::train;
use crate::train::memory::{self, Planner, Share};
use anyhow::{Result, anyhow};
use std::path::{Path, PathBuf};
use tch::Device;

/// Arguments of `pretrain` and `finetune`.
#[derive(clap::Args)]
pub struct Args {
    /// The run's YAML: for `pretrain` one of configs/, for `finetune` one of configs/finetune/
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
    let one_a_node = size == config.num_nodes && size > 1;
    if world.starter == Starter::Slurm && one_a_node && config.devices > 1 {
        return Err(anyhow!(
            "Slurm started one task on each of {size} nodes, of `devices`: {} each", config.devices
        ))
        .usage(
            "start one a card (`srun --ntasks-per-node`, as scripts/slurm.sh), or set NODE_RANK=$SLURM_NODEID, MASTER_ADDR \
             and MASTER_PORT for each task, which makes it a launcher",
        );
    }
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
        let n = counted(n, "epoch");
        println!("length    until a source is through {n}, which shows when its files are read");
    }
    let micro = config.train.micro_batch_size;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let share = Share::of(config.distributed.strategy, config.ranks(), config.devices, &model);
    let Some(planner) = Planner::of(config, &model, share)? else {
        println!(
            "memory    no plan: it knows weights or adapters trained, not preferences, in bf16-mixed, fp8-mixed and \
             bf16-true, with fused kernels and head sizes 64 and 128"
        );
        return Ok(exit::OK);
    };
    let memory_plan = planner.plan(micro, sequence as u64);
    println!("\nGPU memory at micro_batch_size {micro}, {}, in GiB", config.precision);
    for (name, bytes) in &memory_plan.parts {
        println!("  {name:<44} {:>6.2}", gib(*bytes));
    }
    let whole = match memory_plan.reading == memory_plan.total() {
        true => "total, while weights are read in fp32",
        false => "total",
    };
    println!("  {whole:<44} {:>6.2}", gib(memory_plan.total()));
    if !memory_plan.host.is_empty() {
        println!("\nhost memory, page-locked, in GiB");
    }
    for (name, bytes) in &memory_plan.host {
        println!("  {name:<44} {:>6.2}", gib(*bytes));
    }
    println!("\nlargest micro_batch_size ({:.1} GiB left for CUDA itself)", gib(memory::RESERVE));
    let fits = |name: &str, bytes: u64| {
        let of_a_rank = config.train.global_batch_size / config.ranks();
        match planner.largest_micro_batch(sequence as u64, bytes) {
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
