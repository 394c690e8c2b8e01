//! How ranks find each other, and what is checked before they compute together.
//!
//! Each rank claims its number in the store and says who it is ([`Hello`]). Rank 0 waits for all, compares them, and
//! answers; where something is wrong, all ranks end and one tells why.

use super::failure::{Failure, Fault};
use super::job::Job;
use super::observer::key;
use super::store::Store;
use super::world::{Starter, World};
use super::{address, logs};
use crate::config::{self, CommBackend, RunConfig};
use crate::device;
use crate::error::{self, Told, WithHint, exit};
use crate::ffi::{self, driver};
use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tch::Device;

/// Between two looks into the store.
const GLANCE: Duration = Duration::from_millis(50);

/// What a rank says of itself.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Hello {
    host: String,
    process: u32,
    /// Version of the program and hash of its sources.
    code: String,
    /// The whole configuration.
    config: serde_json::Value,
    /// Where it computes: `cpu`, or a card's own number.
    device: String,
    /// By which this node reaches the master.
    address: Option<IpAddr>,
    /// Why it cannot take part.
    fault: Option<Fault>,
}

/// Rank 0's answer: an address of another node than its own, if there is one.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Met {
    other_node: Option<IpAddr>,
}

/// Meets the other ranks and connects to them. From here on this process is watched; see [`Job`].
///
/// # Errors
/// A rank that does not come in time, two with the same number, another version or configuration, a card too few; on
/// one rank with the whole message, on the others with a line.
pub fn meet(world: World, config: &RunConfig) -> Result<Job> {
    world.end_with_launcher()?;
    super::allow_many_files();
    logs::redirect(&world, &config.out_dir)?;
    let timeout = Duration::from_secs_f64(config.distributed.rendezvous_timeout);
    let store = open(&world, timeout)?;
    claim(&world, &store)?;
    let shares = config.distributed.backend == CommBackend::Gloo;
    let device = device_of(&world, &config.device.0, shares);
    let hello = hello(&world, config, &device);
    store.set_json(&hello_key(world.rank), &hello)?;

    let met = match world.rank {
        0 => gather(&world, &store, timeout)?,
        _ => await_answer(&world, &store, timeout)?,
    };
    let address = address::of_this_node(&world.master, met.other_node);
    let address = address.inspect_err(|error| tell_of(error, &world, &store))?; // nobody watches this rank yet
    Job::connect(world, config, Arc::new(store), device?, &address.to_string())
}

/// Tells the other ranks that this one cannot even begin, as far as they can be reached; the error that is left for
/// this process.
pub fn refuse(world: &World, error: anyhow::Error) -> anyhow::Error {
    if world.rank == 0 {
        return error; // it explains itself, and where it serves the store nobody waits
    }
    let line = format!("rank {} on {}: error: {}", world.rank, world.host, error);
    if let Ok(store) = Store::open(world, Duration::from_secs(3)) {
        tell_of(&error, world, &store);
    }
    Told { line, code: error::exit_code(&error) }.into()
}

/// Ends the job for an error of this rank, as far as others can be reached.
fn tell_of(error: &anyhow::Error, world: &World, store: &Store) {
    let failure = Failure::of_fault(world.rank, &world.host, &Fault::of(error), None);
    let _ = store.set_first(key::FAILED, &failure);
}

/// The store. On each node one rank tells why there is none.
fn open(world: &World, timeout: Duration) -> Result<Store> {
    let error = match Store::open(world, timeout) {
        Ok(store) => return Ok(store),
        Err(error) => error,
    };
    // The port may be taken by another rank 0 of this run, which claims its number now or did before.
    if world.serves()
        && let Ok(store) = Store::connect(&world.master, &world.prefix, Duration::from_secs(2))
        && is_set_soon(&store, &claim_key(0))
    {
        return Ok(store);
    }
    let code = error::exit_code(&error);
    if world.rank == 0 {
        return Err(error);
    }
    let text = error::house_form(&error::causes(&error), error::hint(&error));
    if world.local_rank == 0 && world.starter != Starter::Launcher {
        logs::to_terminal(&text);
    }
    Err(Told { line: text.trim_end().to_owned(), code }.into())
}

fn is_set_soon(store: &Store, key: &str) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        match store.check(key) {
            Ok(true) => return true,
            Ok(false) => thread::sleep(GLANCE),
            Err(_) => return false,
        }
    }
    false
}

fn claim_key(rank: usize) -> String {
    format!("claim/{rank}")
}

fn hello_key(rank: usize) -> String {
    format!("hello/{rank}")
}

const MET: &str = "met";

/// Takes this rank's number, which only one process may have.
fn claim(world: &World, store: &Store) -> Result<()> {
    let rank = world.rank;
    if store.add(&claim_key(rank), 1)? == 1 {
        return Ok(());
    }
    is_set_soon(store, &hello_key(rank));
    let first: Option<Hello> = store.json(&hello_key(rank))?;
    let who = |host: &str, process: u32| format!("process {process} on {host}");
    let this = who(&world.host, std::process::id());
    let first = first.map_or("another process".into(), |h| who(&h.host, h.process));
    let mut failure = Failure::of_end(rank, &world.host, "", None);
    failure.causes = vec![format!("two processes have RANK={rank}: {first}, and {this}")];
    failure.hint = Some(format!(
        "give each process its own RANK, 0 to {}; a second run on the same nodes needs another MASTER_PORT than {}",
        world.size - 1,
        world.master.port
    ));
    failure.code = exit::USAGE;
    failure.told_by = 0;
    if store.check(MET)? {
        // A run that is under way is not to end for this. Nobody else tells.
        let text = failure.message(None);
        return Err(Told { line: text.trim_end().to_owned(), code: failure.code }.into());
    }
    let failure = store.set_first(key::FAILED, &failure)?;
    Err(Told { line: failure.line(rank), code: failure.code }.into())
}

fn hello(world: &World, config: &RunConfig, device: &Result<Device>) -> Hello {
    let name = match device {
        Ok(Device::Cuda(index)) => {
            driver::card_id(*index).unwrap_or_else(|| format!("{} cuda:{index}", world.host))
        }
        _ => "cpu".into(),
    };
    Hello {
        host: world.host.clone(),
        process: std::process::id(),
        code: format!("{} ({})", env!("CARGO_PKG_VERSION"), env!("TL_SOURCES")),
        config: serde_json::to_value(config).unwrap_or_default(),
        device: name,
        address: address::towards(&world.master),
        fault: device.as_ref().err().map(Fault::of),
    }
}

/// The card of a rank: that of its number on the node. `shares`: where there are fewer, ranks share them in turn.
fn device_of(world: &World, choice: &str, shares: bool) -> Result<Device> {
    let count = ffi::cuda::device_count()?;
    let index = if shares { world.local_rank % count.max(1) } else { world.local_rank };
    match choice {
        "cpu" => Ok(Device::Cpu),
        "auto" if count == 0 => Ok(Device::Cpu),
        "auto" | "cuda" if count > 0 && index >= count => {
            // Slurm may show each task a card of its own, which all call 0.
            if count == 1 && world.starter == Starter::Slurm {
                return device::resolve("cuda:0");
            }
            Err(too_few_cards(&format!("LOCAL_RANK {index} needs a card"), count))
        }
        "auto" | "cuda" => device::resolve(&format!("cuda:{index}")),
        other if other.starts_with("cuda:") && world.size > 1 => {
            Err(anyhow!("`device: {other}` is one card for {} ranks", world.size)).usage(
                "use `device: cuda`, and CUDA_VISIBLE_DEVICES to choose among a node's cards",
            )
        }
        other => device::resolve(other),
    }
}

/// More workers than cards.
pub(super) fn too_few_cards(what: &str, count: usize) -> anyhow::Error {
    let cards = if count == 1 { "1 GPU".into() } else { format!("{count} GPUs") };
    let error = Err::<(), _>(anyhow!("{what}, but this node shows {cards}"));
    let hint = format!(
        "start at most {count} workers on it, or use `device: cpu`; CUDA_VISIBLE_DEVICES may hide cards, and \
         `tinyllama doctor` lists them"
    );
    error.usage(hint).unwrap_err()
}

/// Rank 0: waits for all ranks, compares them and answers.
fn gather(world: &World, store: &Store, timeout: Duration) -> Result<Met> {
    let start = Instant::now();
    let mut told = Duration::from_secs(10);
    let mut hellos: Vec<Option<Hello>> = vec![None; world.size];
    loop {
        if let Some(failure) = store.json(key::FAILED)? {
            return give_up(world, store, failure);
        }
        for (rank, hello) in hellos.iter_mut().enumerate().filter(|(_, hello)| hello.is_none()) {
            *hello = store.json(&hello_key(rank))?;
        }
        let missing: Vec<usize> = (0..world.size).filter(|rank| hellos[*rank].is_none()).collect();
        if missing.is_empty() {
            break;
        }
        if start.elapsed() >= timeout {
            return give_up(world, store, not_there(world, &missing, start.elapsed()));
        }
        if start.elapsed() >= told {
            eprintln!("waiting     for {}", ranks(&missing, world.size));
            told *= 3;
        }
        thread::sleep(GLANCE);
    }
    let hellos: Vec<Hello> = hellos.into_iter().flatten().collect();
    if let Some(failure) = compare(&hellos) {
        return give_up(world, store, failure);
    }
    let elsewhere = |hello: &Hello| hello.address.filter(|address| !address.is_loopback());
    let met = Met { other_node: hellos.iter().find_map(elsewhere) };
    store.set_json(MET, &met)?;
    Ok(met)
}

/// The other ranks: wait for rank 0's answer.
fn await_answer(world: &World, store: &Store, timeout: Duration) -> Result<Met> {
    let start = Instant::now();
    loop {
        if let Some(failure) = store.json(key::FAILED)? {
            return give_up(world, store, failure);
        }
        if let Some(met) = store.json(MET)? {
            return Ok(met);
        }
        // Rank 0 tells at its own timeout; this is for where it never came.
        if start.elapsed() >= timeout + Duration::from_secs(5) {
            let mut failure = not_there(world, &[0], start.elapsed());
            failure.told_by = 1;
            return give_up(world, store, failure);
        }
        thread::sleep(GLANCE);
    }
}

fn not_there(world: &World, missing: &[usize], waited: Duration) -> Failure {
    let mut failure = Failure::of_end(missing[0], "an unknown node", "", None);
    failure.causes = vec![format!(
        "{} did not come to {} within {:.0} s",
        ranks(missing, world.size),
        world.master,
        waited.as_secs_f64()
    )];
    let start = match world.starter {
        Starter::Slurm => "start the program by `srun`, on all nodes",
        _ => "start all ranks, each with its RANK and the same MASTER_ADDR and MASTER_PORT",
    };
    failure.hint = Some(format!("{start}; `distributed.rendezvous_timeout` is how long they wait"));
    failure.told_by = 0;
    failure
}

/// `rank 3 of 4`, `3 of 8 ranks: 1, 2, 5`.
fn ranks(some: &[usize], size: usize) -> String {
    if let [one] = some {
        return format!("rank {one} of {size}");
    }
    let shown: Vec<String> = some.iter().take(16).map(usize::to_string).collect();
    let more = if some.len() > shown.len() { ", .." } else { "" };
    format!("{} of {size} ranks ({}{more})", some.len(), shown.join(", "))
}

/// Ends this process's part of a meeting that failed; the rank that is to tell gets the whole message.
fn give_up<T>(world: &World, store: &Store, failure: Failure) -> Result<T> {
    let failure: Failure = store.set_first(key::FAILED, &failure)?;
    let _ = store.add(key::ENDED, 1);
    let start = Instant::now();
    while world.serves() && start.elapsed() < Duration::from_secs(2) {
        // Ranks that are here read from this process why it ends. Some may never have come.
        if store.add(key::ENDED, 0)? >= world.size as i64 {
            break;
        }
        thread::sleep(GLANCE);
    }
    let line = match world.starter == Starter::Launcher {
        true if world.rank == 0 => String::new(), // the launcher tells
        false if world.rank == failure.told_by => {
            let text = failure.message(None);
            if world.rank != 0 {
                logs::to_terminal(&text);
            }
            text.trim_end().to_owned()
        }
        _ => failure.line(world.rank),
    };
    Err(Told { line, code: failure.code }.into())
}

/// What is wrong with ranks that are all there.
fn compare(hellos: &[Hello]) -> Option<Failure> {
    let first = hellos.first()?;
    let name = |rank: usize| format!("rank {rank} on {}", hellos[rank].host);
    for (rank, hello) in hellos.iter().enumerate() {
        if let Some(fault) = &hello.fault {
            return Some(Failure::of_fault(rank, &hello.host, fault, None));
        }
    }
    let refuse = |rank: usize, causes: Vec<String>, hint: &str| {
        let mut failure = Failure::of_end(rank, &hellos[rank].host, "", None);
        (failure.causes, failure.hint) = (causes, Some(hint.to_owned()));
        (failure.code, failure.told_by, failure.is_alive) = (exit::USAGE, 0, true);
        failure
    };
    if let Some((rank, hello)) = hellos.iter().enumerate().find(|(_, h)| h.code != first.code) {
        let what =
            format!("{} runs version {}, {} {}", name(rank), hello.code, name(0), first.code);
        return Some(refuse(rank, vec![what], "install the same build on all nodes"));
    }
    if let Some((rank, hello)) = hellos.iter().enumerate().find(|(_, h)| h.config != first.config) {
        let what = format!("{} has another configuration than {}", name(rank), name(0));
        let mut causes = vec![what];
        causes.extend(differences(&first.config, &hello.config));
        return Some(refuse(rank, causes, "start all ranks with the same file and overrides"));
    }
    let mut owners: HashMap<&str, usize> = HashMap::new();
    let may_share = first.config["distributed"]["backend"] == "gloo";
    for (rank, hello) in hellos.iter().enumerate() {
        let is_cpu = |hello: &Hello| hello.device == "cpu";
        if is_cpu(hello) != is_cpu(first) {
            let (on_cpu, on_card) = if is_cpu(hello) { (rank, 0) } else { (0, rank) };
            let what = format!("{} sees no GPU, {} does", name(on_cpu), name(on_card));
            return Some(refuse(on_cpu, vec![what], "`tinyllama doctor` on that node says why"));
        }
        let before = owners.insert(&hello.device, rank).filter(|_| !is_cpu(hello) && !may_share);
        if let Some(before) = before {
            let what = format!("{} and {} have the same card", name(before), name(rank));
            let hint = "each needs its own: LOCAL_RANK is a worker's number on its node, and CUDA_VISIBLE_DEVICES may \
                        hide cards; with `distributed.backend: gloo` they may share one";
            return Some(refuse(rank, vec![what], hint));
        }
    }
    None
}

/// Keys that differ, as `key: of rank 0 -> of the other`.
fn differences(of_rank_0: &serde_json::Value, other: &serde_json::Value) -> Vec<String> {
    let read = |value: &serde_json::Value| serde_json::from_value::<RunConfig>(value.clone()).ok();
    let (Some(a), Some(b)) = (read(of_rank_0), read(other)) else { return Vec::new() };
    let mut lines = config::diff(&a, &b);
    if lines.len() > 8 {
        let more = lines.len() - 8;
        lines.truncate(8);
        lines.push(format!("and {more} more keys"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(host: &str, device: &str) -> Hello {
        Hello {
            host: host.into(),
            process: 1,
            code: "0.1.0 (a)".into(),
            config: serde_json::to_value(RunConfig::default()).unwrap(),
            device: device.into(),
            address: None,
            fault: None,
        }
    }

    fn text(hellos: &[Hello]) -> String {
        compare(hellos).map(|failure| failure.message(None)).unwrap_or_default()
    }

    #[test]
    fn ranks_that_fit_together_are_let_through() {
        assert_eq!(text(&[hello("a", "cpu"), hello("a", "cpu")]), "");
        assert_eq!(text(&[hello("a", "GPU-1"), hello("b", "GPU-2")]), "");
    }

    #[test]
    fn what_differs_is_told_with_rank_host_and_both_values() {
        let mut other = hello("b", "cpu");
        other.code = "0.1.0 (b)".into();
        let said = text(&[hello("a", "cpu"), other]);
        assert!(
            said.contains("rank 1 on b runs version 0.1.0 (b), rank 0 on a 0.1.0 (a)"),
            "{said}"
        );

        let mut other = hello("b", "cpu");
        let config = RunConfig { seed: 7, devices: 3, ..RunConfig::default() };
        other.config = serde_json::to_value(config).unwrap();
        let said = text(&[hello("a", "cpu"), hello("a", "cpu"), other]);
        for part in ["rank 2 on b has another configuration", "seed: 42 -> 7", "devices: 1 -> 3"] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn cards_are_not_shared_and_not_missing() {
        let said = text(&[hello("a", "GPU-1"), hello("a", "GPU-1")]);
        assert!(said.contains("rank 0 on a and rank 1 on a have the same card"), "{said}");
        let said = text(&[hello("a", "GPU-1"), hello("b", "cpu")]);
        assert!(said.contains("rank 1 on b sees no GPU, rank 0 on a does"), "{said}");
        let mut third = hello("b", "cpu");
        third.fault = Some(Fault::of(&too_few_cards("LOCAL_RANK 2 needs a card", 2)));
        let failure = compare(&[hello("a", "cpu"), third]).unwrap();
        assert_eq!(failure.code, exit::USAGE);
        let said = failure.message(None);
        assert!(said.contains("LOCAL_RANK 2 needs a card, but this node shows 2 GPUs"), "{said}");
        assert!(said.contains("rank 1 on b failed") && said.contains("hint: start at most 2"));
    }

    #[test]
    fn missing_ranks_are_counted() {
        assert_eq!(ranks(&[3], 4), "rank 3 of 4");
        assert_eq!(ranks(&[1, 2, 5], 8), "3 of 8 ranks (1, 2, 5)");
        let many: Vec<usize> = (1..40).collect();
        assert!(ranks(&many, 40).ends_with("15, 16, ..)"));
    }
}
