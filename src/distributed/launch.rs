//! `pretrain CONFIG --devices N`: starts N workers on this node and stays until the last has ended.
//!
//! A worker is this program with the same arguments and the variables of [`super::World`] set. The launcher serves the
//! store by which they meet, observes them, hands signals on, tells why a job failed, and leaves no process behind.

use super::failure::Failure;
use super::logs;
use super::observer::{Death, Observer};
use super::rendezvous::too_few_cards;
use super::store::Store;
use super::world::{Address, LAUNCHER, host_name};
use crate::config::{CommBackend, DistributedConfig, RunConfig, counted};
use crate::device;
use crate::error::{Told, WithHint, exit};
use crate::ffi;
use crate::train::signals::{self, StopSignal};
use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at the workers.
const GLANCE: Duration = Duration::from_millis(50);

/// Starts this node's workers and waits for them. Returns the exit code: theirs.
///
/// # Errors
/// Fewer cards than workers; a run on several nodes without `NODE_RANK`, `MASTER_ADDR` and `MASTER_PORT`; a worker that
/// failed, after all others were ended.
pub fn launch(config: &RunConfig) -> Result<u8> {
    check_cards(config)?;
    super::allow_many_files();
    let node = Node::from_env(config)?;
    let timeouts = &config.distributed;
    let mut master = node.master.clone();
    let prefix = format!("tinyllama/0/{}/", config.ranks());
    let timeout = Duration::from_secs_f64(timeouts.rendezvous_timeout);
    let store = match node.rank {
        0 => {
            let store = Store::serve(master.port, &prefix, timeout)?;
            master.port = store.port();
            Some(store)
        }
        _ => None,
    };
    let signal = StopSignal::install(true)?;
    let mut workers = Workers::start(config, &node, &master)?;
    let board = Arc::new(Board::default());
    let monitor = Monitor {
        board: Arc::clone(&board),
        ranks: config.ranks() as usize,
        timeouts: timeouts.clone(),
    };
    let connect = move || match store {
        Some(store) => Ok(store),
        None => Store::connect(&master, &prefix, timeout),
    };
    let monitor = thread::Builder::new().name("monitor".into()).spawn(move || monitor.run(connect));
    monitor.context("cannot start a thread")?;
    // Workers of a failed job end by themselves within a period or two.
    let patience = Duration::from_secs_f64(timeouts.heartbeat_timeout / 3.0);
    workers.wait(&signal, &board, patience);
    conclude(&workers, &board, timeouts)
}

/// Refuses more workers than cards, before any is started.
fn check_cards(config: &RunConfig) -> Result<()> {
    let (choice, devices) = (&config.device.0, config.devices as usize);
    let count = ffi::cuda::device_count()?;
    match choice.as_str() {
        "cpu" => Ok(()),
        "auto" if count == 0 => Ok(()),
        _ if count == 0 => device::resolve(choice).map(drop),
        _ if config.distributed.backend == CommBackend::Gloo => Ok(()), // they share cards
        _ if count < devices => Err(too_few_cards(&format!("`devices` is {devices}"), count)),
        _ => Ok(()),
    }
}

/// This node among those of the run.
struct Node {
    rank: u64,
    master: Address,
}

impl Node {
    fn from_env(config: &RunConfig) -> Result<Self> {
        if config.num_nodes == 1 {
            return Ok(Self { rank: 0, master: Address { host: "127.0.0.1".into(), port: 0 } });
        }
        let var = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let rank = var("NODE_RANK").and_then(|text| text.trim().parse().ok());
        let rank = rank.filter(|rank| *rank < config.num_nodes);
        let port = var("MASTER_PORT").and_then(|text| text.trim().parse().ok());
        match (rank, var("MASTER_ADDR"), port.filter(|port| *port > 0)) {
            (Some(rank), Some(host), Some(port)) => {
                Ok(Self { rank, master: Address { host, port } })
            }
            _ => Err(anyhow!(
                "`num_nodes` is {}, but NODE_RANK, MASTER_ADDR and MASTER_PORT do not say which of them this is",
                config.num_nodes
            ))
            .usage(format!(
                "start this command on each node with NODE_RANK=0 to {}, MASTER_ADDR=the first node and MASTER_PORT=a \
                 free port of it, or start all ranks by `torchrun --no-python` or `srun`",
                config.num_nodes - 1
            )),
        }
    }
}

/// The workers of this node.
struct Workers {
    list: Vec<Worker>,
    host: String,
    /// The signal that was handed on.
    signal: Option<i32>,
}

struct Worker {
    rank: usize,
    child: Child,
    status: Option<ExitStatus>,
    log: Option<PathBuf>,
}

impl Workers {
    fn start(config: &RunConfig, node: &Node, master: &Address) -> Result<Self> {
        let devices = config.devices as usize;
        let host = host_name();
        let dir = config.out_dir.join("logs");
        let workers = counted(devices as u64, "worker");
        eprintln!("launch      {workers} on {host}; logs in {}", dir.display());
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut workers = Self { list: Vec::new(), host, signal: None };
        for local_rank in 0..devices {
            let rank = node.rank as usize * devices + local_rank;
            match Worker::start(config, &program, rank, local_rank, master) {
                Ok(worker) => workers.list.push(worker),
                Err(error) => {
                    workers.kill();
                    return Err(error);
                }
            }
        }
        Ok(workers)
    }

    /// Waits until all have ended; `patience` after the job has failed, kills what is left.
    fn wait(&mut self, signal: &StopSignal, board: &Board, patience: Duration) {
        let mut ending_since: Option<Instant> = None;
        while self.list.iter().any(|worker| worker.status.is_none()) {
            thread::sleep(GLANCE);
            self.reap(board);
            if let (Some(number), None) = (signal.requested(), self.signal) {
                self.signal = Some(number);
                self.hand_on(number);
            }
            let unsaved = self.list.iter().any(|worker| worker.obeyed(self.signal));
            if board.failure().is_some() || unsaved {
                ending_since = ending_since.or_else(|| Some(Instant::now()));
            }
            if ending_since.is_some_and(|since| since.elapsed() > patience) {
                self.kill();
            }
        }
    }

    /// Notes who has ended, and tells the monitor of those that should not have.
    fn reap(&mut self, board: &Board) {
        for worker in self.list.iter_mut().filter(|worker| worker.status.is_none()) {
            let Ok(Some(status)) = worker.child.try_wait() else { continue };
            worker.status = Some(status);
            if worker.has_failed(self.signal) {
                board.lock().deaths.push(worker.death(status, &self.host));
            }
        }
    }

    fn hand_on(&self, signal: i32) {
        let signal = if signal == 2 { Signal::INT } else { Signal::TERM };
        for worker in self.list.iter().filter(|worker| worker.status.is_none()) {
            if let Some(process) = i32::try_from(worker.child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(process, signal); // it may have ended just now
            }
        }
    }

    /// SIGKILL ends a stopped process too.
    fn kill(&mut self) {
        for worker in self.list.iter_mut().filter(|worker| worker.status.is_none()) {
            let _ = worker.child.kill();
        }
    }
}

impl Worker {
    fn start(
        config: &RunConfig,
        program: &Path,
        rank: usize,
        local_rank: usize,
        master: &Address,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command
            .args(std::env::args_os().skip(1))
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", local_rank.to_string())
            .env("WORLD_SIZE", config.ranks().to_string())
            .env("LOCAL_WORLD_SIZE", config.devices.to_string())
            .env("MASTER_ADDR", &master.host)
            .env("MASTER_PORT", master.port.to_string())
            .env(LAUNCHER, std::process::id().to_string())
            .stdin(Stdio::null())
            .process_group(0); // Ctrl-C reaches the launcher alone, which hands it on once
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let cores = thread::available_parallelism().map_or(1, |n| n.get());
            let threads = (cores / config.devices as usize).max(1);
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        let mut log = None;
        if rank != 0 {
            let file = logs::open(&config.out_dir, rank)?;
            command.stdout(file.try_clone()?).stderr(file);
            log = Some(logs::path(&config.out_dir, rank));
        }
        let child = command.spawn().with_context(|| format!("cannot start rank {rank}"))?;
        Ok(Self { rank, child, status: None, log })
    }

    /// Ended, neither well nor after saving nor by the signal that was handed on.
    fn has_failed(&self, handed_on: Option<i32>) -> bool {
        let saved = [exit::OK, exit::INTERRUPTED, exit::TERMINATED].map(i32::from);
        self.status.is_some_and(|status| !status.code().is_some_and(|code| saved.contains(&code)))
            && !self.obeyed(handed_on)
    }

    /// Killed by the signal that was handed on, before it could catch and obey it in order.
    fn obeyed(&self, handed_on: Option<i32>) -> bool {
        handed_on.is_some() && self.status.is_some_and(|status| status.signal() == handed_on)
    }

    fn death(&self, status: ExitStatus, host: &str) -> Death {
        let (what, is_root) = match (status.signal(), status.code()) {
            // A peer's end may make libtorch abort; nothing else raises the other signals.
            (Some(number), _) => {
                let name = signals::name(number);
                (format!("was killed by signal {number} ({name})"), name != "SIGABRT")
            }
            (None, code) => (format!("ended with exit code {}", code.unwrap_or(-1)), false),
        };
        let last_line = self.log.as_deref().and_then(logs::last_line);
        Death { rank: self.rank, host: host.to_owned(), what, is_root, last_line }
    }
}

/// What the launcher's two threads tell each other.
#[derive(Default)]
struct Board(Mutex<Notes>);

#[derive(Default)]
struct Notes {
    /// Of this node's workers.
    deaths: Vec<Death>,
    /// Why the job ends.
    failure: Option<Failure>,
    /// Kept to the end: workers read from it why the job ends.
    store: Option<Arc<Store>>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> Option<Failure> {
        self.lock().failure.clone()
    }
}

/// The thread that speaks with the store, which may hang where another node serves it.
struct Monitor {
    board: Arc<Board>,
    ranks: usize,
    timeouts: DistributedConfig,
}

impl Monitor {
    fn run(&self, connect: impl FnOnce() -> Result<Store>) {
        let failure = connect().map(Arc::new).and_then(|store| {
            self.board.lock().store = Some(Arc::clone(&store));
            self.observe(store)
        });
        let failure = failure.unwrap_or_else(|error| {
            let mut failure = Failure::of_end(0, "the first node", "", None);
            failure.causes = crate::error::causes(&error);
            failure.hint = crate::error::hint(&error).map(str::to_owned).or(failure.hint);
            failure
        });
        self.board.lock().failure = Some(failure);
    }

    /// Observes all ranks until the job has failed.
    fn observe(&self, store: Arc<Store>) -> Result<Failure> {
        let mut observer = Observer::new(store, 0..self.ranks, self.ranks, &self.timeouts);
        let period = self.timeouts.period();
        let pause = period.min(Duration::from_millis(100));
        let mut last = Instant::now();
        loop {
            // Every node's launcher asks one store. Ranks beat once a period; only what is urgent is looked for faster.
            let deaths = self.board.lock().deaths.clone();
            let looks = !deaths.is_empty() || observer.is_urgent() || last.elapsed() >= period / 2;
            let found = match looks {
                true => {
                    let elapsed = std::mem::replace(&mut last, Instant::now()).elapsed();
                    observer.look(elapsed, &deaths)?
                }
                false => observer.failed()?,
            };
            if let Some(failure) = found {
                return Ok(failure);
            }
            thread::sleep(pause);
        }
    }
}

/// The exit code of a run whose workers on this node have ended, or why it failed.
fn conclude(workers: &Workers, board: &Board, timeouts: &DistributedConfig) -> Result<u8> {
    if workers.list.iter().any(|worker| worker.obeyed(workers.signal)) {
        let signal = workers.signal.unwrap_or_default();
        let line = format!("stopped by {} before training began", signals::name(signal));
        return Err(Told { line, code: signals::exit_code(signal) }.into());
    }
    // Ranks leave when all are through, so that those of other nodes need this process no more.
    if !workers.list.iter().any(|worker| worker.has_failed(workers.signal)) {
        let codes = workers.list.iter().filter_map(|worker| worker.status?.code());
        return Ok(codes.max().unwrap_or(0) as u8);
    }
    let judgement = Duration::from_secs_f64(timeouts.heartbeat_timeout) + Duration::from_secs(5);
    let start = Instant::now();
    while board.failure().is_none() && start.elapsed() < judgement {
        thread::sleep(GLANCE);
    }
    let failure = board.failure().unwrap_or_else(|| {
        let failed = workers.list.iter().find(|worker| worker.has_failed(workers.signal));
        let rank = failed.map_or(0, |worker| worker.rank);
        Failure::of_end(rank, &workers.host, "failed", None)
    });
    let worker = workers.list.iter().find(|worker| worker.rank == failure.rank);
    let log = worker.and_then(|worker| worker.log.as_deref());
    let text = failure.message(log).trim_end().to_owned();
    Err(Told { line: text, code: failure.code }.into())
}
