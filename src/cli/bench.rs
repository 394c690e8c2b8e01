//! `tinyllama bench`.

use crate::bench::comm;
use crate::bench::kernels::{self, Report, Unit};
use crate::bench::profile::{Family, Profile};
use crate::bench::{load, tokenizer, train};
use crate::distributed::{self, World, rendezvous};
use crate::error::{WithHint, exit};
use crate::tokenizer::Tokenizer;
use crate::{config, device, guard};
use anyhow::{Result, anyhow};
use std::path::PathBuf;
use tch::Device;

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
    /// Tokens a second, utilisation and memory of a run's configuration, on its own data, and where
    /// the time of a step goes
    Train(TrainArgs),
    /// Tokens a second and CPU time of reading alone, from memory maps and from files opened for each block
    Data(super::bench_data::Args),
    /// Tokens a second of the engine: reading prompts, making tokens, beside what memory bandwidth allows
    Decode(super::bench_decode::Args),
    /// A server under load: requests and tokens a second, time to the first token and between tokens, as clients see them
    Serve(Box<super::bench_serve::Args>),
    /// Bytes a second of loading a checkpoint into host memory, beside reading its files
    Load(LoadArgs),
    /// Bandwidth of all-gather and reduce-scatter between ranks, as nccl-tests define it: threads of
    /// this machine, over Gloo on the CPU or NCCL with a card each
    Comm(CommArgs),
    /// Encoding speed of a tokenizer on real files, beside the slow way that defines its ids, and
    /// whether the ids are the same
    Tokenizer(TokenizerArgs),
}

#[derive(clap::Args)]
struct LoadArgs {
    /// Checkpoint of any format
    path: PathBuf,
    /// Dtype in memory
    #[arg(long, value_enum, default_value_t = LoadDtype::Bf16)]
    dtype: LoadDtype,
    /// Measurements of each kind, of which the best counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..100))]
    passes: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LoadDtype {
    Fp32,
    Bf16,
    Fp16,
}

#[derive(clap::Args)]
struct TokenizerArgs {
    /// Folder with tokenizer.json or tokenizer.model, or one of these files
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Files of documents: .jsonl, .parquet, or text (a file is a document); .gz and .zst too
    #[arg(long = "input", value_name = "FILE", required = true, num_args = 1..)]
    inputs: Vec<PathBuf>,
    /// Key or column of the text
    #[arg(long, value_name = "NAME")]
    text_field: Option<String>,
    /// Encoders at work, each in a thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    threads: usize,
    /// Timed passes over each file, after one that fills the caches
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    passes: usize,
    /// Leave out the slow way, which takes most of the time
    #[arg(long)]
    no_reference: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct CommArgs {
    /// Threads, each a rank
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = at_least_one)]
    ranks: usize,
    /// Sizes of the whole tensor, MiB
    #[arg(long, value_name = "MIB,MIB", value_delimiter = ',', default_values_t = [1, 4, 16, 64, 256])]
    sizes: Vec<u64>,
    /// Of its elements
    #[arg(long, default_value = "bf16")]
    dtype: CommType,
    /// Timed calls of each size
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    repeats: usize,
    /// `cpu`, or `cuda`: cards 0 to N - 1
    #[arg(long, default_value = "cpu")]
    device: CommDevice,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum CommType {
    Bf16,
    Fp16,
    Fp32,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum CommDevice {
    Cpu,
    Cuda,
}

#[derive(clap::Args)]
struct TrainArgs {
    /// The run's YAML
    config: PathBuf,
    /// Worker processes on this node, one a card (the key `devices`); `torchrun` and `srun` start ranks as well
    #[arg(long, value_name = "N")]
    devices: Option<u64>,
    /// Override a key, e.g. --set train.micro_batch_size=4 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    steps: usize,
    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 10)]
    warmup: usize,
    /// Steps after them whose kernels are recorded, for the table of where the time goes; 0: no table
    #[arg(long, value_name = "N", default_value_t = 2)]
    profile_steps: usize,
    /// Also write the recorded kernels as a Chrome trace (chrome://tracing, ui.perfetto.dev)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print one JSON object; it also lists every kernel
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

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1; leave it out for the default".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("expected a whole number from 1".into()),
    }
}

/// Runs `bench`.
pub fn run(args: Args) -> Result<u8> {
    match args.kind {
        Kind::Kernels(args) => run_kernels(args)?,
        Kind::Data(args) => super::bench_data::run(args)?,
        Kind::Train(args) => return run_train(args),
        Kind::Serve(args) => super::bench_serve::run(&args)?,
        Kind::Decode(args) => super::bench_decode::run(&args)?,
        Kind::Load(args) => run_load(&args)?,
        Kind::Comm(args) => run_comm(args)?,
        Kind::Tokenizer(args) => return run_tokenizer(&args),
    }
    Ok(exit::OK)
}

fn run_load(args: &LoadArgs) -> Result<()> {
    let kind = match args.dtype {
        LoadDtype::Fp32 => tch::Kind::Float,
        LoadDtype::Bf16 => tch::Kind::BFloat16,
        LoadDtype::Fp16 => tch::Kind::Half,
    };
    let path = crate::checkpoint::resolve(&args.path)?;
    let r = load::run(&path, kind, args.passes as usize)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&r)?);
        return Ok(());
    }
    let row = |name: &str, speed: f64| println!("{name:<20}{:>8.2} GB/s", speed / 1e9);
    println!("{}, {}", path.display(), r.format);
    println!("tensors             {:>8.2} GB", r.bytes as f64 / 1e9);
    row("read", r.read);
    row("read, new memory", r.read_to_memory);
    row("load", r.load);
    println!("load / read         {:>8.0} %", 100.0 * r.load / r.read);
    Ok(())
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

fn run_train(args: TrainArgs) -> Result<u8> {
    if args.trace.is_some() && args.profile_steps == 0 {
        let error = Err(anyhow!("`--trace` writes what `--profile-steps` records, and that is 0"));
        return error.usage("leave out one of the two");
    }
    let options = train::Options {
        warmup: args.warmup,
        steps: args.steps,
        profile_steps: args.profile_steps,
        trace: args.trace.as_deref(),
    };
    let world = World::from_env()?;
    let folder = train::TemporaryFolder::new(world.as_ref())?;
    let mut sets = args.sets.clone();
    sets.extend(args.devices.map(|n| format!("devices={n}")));
    sets.push(format!("out_dir={}", serde_json::to_string(&folder.path)?));
    sets.push("resume=false".into());
    let config = match (config::load(&args.config, &sets), &world) {
        (Err(error), Some(world)) => return Err(rendezvous::refuse(world, error)),
        (config, _) => config?,
    };
    match world {
        Some(world) => distributed::meet(world, &config)?.run(|job| {
            let report = train::run(&config, Some(job), options)?;
            if job.prints() {
                print_train(&report, args.json)?;
            }
            job.host_group().barrier()?; // nobody leaves a group that another still uses
            Ok(exit::OK)
        }),
        None if config.ranks() > 1 => distributed::launch(&config),
        None => {
            print_train(&train::run(&config, None, options)?, args.json)?;
            Ok(exit::OK)
        }
    }
}

fn print_train(r: &train::Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(r)?);
        return Ok(());
    }
    let percent = |x: Option<f64>| x.map_or("n/a".into(), |x| format!("{:.1} %", 100.0 * x));
    let [low, high] = r.tokens_per_sec_quartiles;
    let ranks = if r.ranks == 1 { String::new() } else { format!("{} x ", r.ranks) };
    println!("{} in {} on {ranks}{}", r.model, r.precision, r.device);
    println!(
        "step      {ranks}{} x {} = {} tokens",
        r.micro_batch_size, r.accumulation, r.tokens_per_step
    );
    println!("time      {:.4} s, median of {}", r.step_seconds, r.steps);
    println!("speed     {:.0} tok/s (quartiles {low:.0} to {high:.0})", r.tokens_per_sec);
    if r.ranks > 1 {
        println!("          {:.0} tok/s a card", r.tokens_per_sec / r.ranks as f64);
    }
    println!("mfu       {} full attention, {} causal", percent(r.mfu), percent(r.mfu_causal));
    if let Some(gib) = r.peak_memory_gib {
        println!("memory    {gib:.1} GiB peak");
    }
    println!("loss      {:.4} -> {:.4}", r.loss[0], r.loss[1]);
    if let Some(profile) = &r.profile {
        print_profile(profile, r.step_seconds);
    }
    if let Some(reason) = &r.no_profile {
        println!("table     none: {reason}");
    }
    Ok(())
}

fn mib_as_bytes(mib: u64) -> Result<u64> {
    match mib {
        1..=0x10_0000 => Ok(mib << 20),
        _ => Err(anyhow!("`--sizes`: {mib} MiB")).usage("give from 1 to 1,048,576 MiB each"),
    }
}

fn run_comm(args: CommArgs) -> Result<()> {
    let device = |rank| match args.device {
        CommDevice::Cpu => Ok(Device::Cpu),
        CommDevice::Cuda => device::resolve(&format!("cuda:{rank}")),
    };
    let devices: Vec<Device> = (0..args.ranks).map(device).collect::<Result<_>>()?;
    let options = comm::Options {
        sizes: args.sizes.iter().map(|mib| mib_as_bytes(*mib)).collect::<Result<_>>()?,
        kind: match args.dtype {
            CommType::Bf16 => tch::Kind::BFloat16,
            CommType::Fp16 => tch::Kind::Half,
            CommType::Fp32 => tch::Kind::Float,
        },
        repeats: args.repeats,
    };
    let report = comm::run_threads(&devices, &options)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let nccl = report.nccl.as_ref().map_or_else(String::new, |version| format!(" {version}"));
    println!(
        "{} ranks, all threads of this process, over {}{nccl} on {}; {}, {} calls",
        report.ranks, report.backend, report.device, report.dtype, report.repeats
    );
    println!(
        "  {:<16} {:>11} {:>12} {:>10} {:>10} {:>6}",
        "", "MiB", "us", "algbw", "busbw", "wrong"
    );
    for row in &report.rows {
        println!(
            "  {:<16} {:>11.2} {:>12.1} {:>10.3} {:>10.3} {:>6}",
            row.op,
            row.bytes as f64 / f64::from(1 << 20),
            row.us,
            row.algorithm_gb_s,
            row.bus_gb_s,
            row.wrong
        );
    }
    println!("algbw = bytes / time, busbw = algbw (ranks - 1) / ranks, both GB/s");
    Ok(())
}

fn run_tokenizer(args: &TokenizerArgs) -> Result<u8> {
    let options = tokenizer::Options {
        inputs: &args.inputs,
        field: args.text_field.as_deref(),
        threads: args.threads,
        passes: args.passes,
        reference: !args.no_reference,
    };
    let report = tokenizer::run(&Tokenizer::load(&args.tokenizer)?, &options)?;
    let differ = |file: &tokenizer::FileReport| {
        file.reference.as_ref().map_or(0, |slow| slow.documents_that_differ)
    };
    let differ: usize = report.files.iter().map(differ).sum();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_tokenizer(&report);
    }
    if differ > 0 {
        return Err(anyhow!("the fast way gave other ids than the slow one in {differ} documents"))
            .hint("this is a bug: please report it with the tokenizer and the text");
    }
    Ok(exit::OK)
}

fn print_tokenizer(r: &tokenizer::Report) {
    println!(
        "{}, {} ids; {} threads, median of {} passes; speeds a thread",
        r.tokenizer, r.vocab_size, r.threads, r.passes
    );
    println!(
        "  {:<28} {:>9} {:>11} {:>8} {:>10} {:>10} {:>7} {:>9}",
        "", "documents", "tokens", "MB/s", "Mtok/s", "first pass", "slow", "ids"
    );
    for file in &r.files {
        let million = |seconds: f64| file.tokens as f64 / seconds / 1e6;
        let name = file.file.file_name().unwrap_or_default().to_string_lossy();
        let (slow, ids) = match &file.reference {
            None => ("-".into(), "-"),
            Some(slow) if slow.documents_that_differ == 0 => {
                (format!("{:.2}", slow.tokens_per_sec / 1e6), "the same")
            }
            Some(slow) => (format!("{:.2}", slow.tokens_per_sec / 1e6), "DIFFER"),
        };
        println!(
            "  {name:<28} {:>9} {:>11} {:>8.1} {:>10.2} {:>10.2} {slow:>7} {ids:>9}",
            file.documents,
            file.tokens,
            file.mb_per_sec_core,
            file.tokens_per_sec_core / 1e6,
            million(file.first_pass_seconds * r.threads as f64),
        );
    }
}

/// The table of where the time goes; `step_seconds` is a step's without the profiler.
fn print_profile(p: &Profile, step_seconds: f64) {
    println!(
        "table     {} more steps, recorded: {:.2} ms a step, {:.2} without the profiler",
        p.steps,
        p.step_ms,
        1e3 * step_seconds
    );
    let line = |title: &str, ms: f64, launches: String| {
        println!("  {title:<20} {ms:>9.2} ms {:>6.1} %{launches}", 100.0 * ms / p.step_ms);
    };
    for row in &p.families {
        line(row.family.title(), row.ms, format!(" {:>7.0} launches", row.launches));
    }
    if p.overlap_ms > 0.0 {
        line("at the same time", -p.overlap_ms, String::new());
    }
    line("gaps", p.gap_ms, String::new());
    if p.families.iter().any(|row| row.family == Family::Communication) {
        println!(
            "alone     {:.2} ms of communication beside no other kernel",
            p.communication_alone_ms
        );
    }
    println!("waits     {} in forward, backward and update of {} steps", p.waits_inside, p.steps);
    for wait in &p.waits {
        let place = if wait.inside { "inside" } else { "reading loss and norm" };
        println!("  {:<28} {:>5} times, {:>9.2} ms, {place}", wait.call, wait.count, wait.ms);
    }
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
