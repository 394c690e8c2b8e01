//! Runs a Python program that a model wrote, as HumanEval wants it, so that it can do no harm.
//!
//! The program `tinyllama` starts itself anew with a hidden verb. That process gives up its rights ([`enter`]) and
//! becomes Python, which runs `sandbox/driver.py`. The program inside
//! - starts no process, opens no socket, signals nobody, changes no owner or mode (seccomp);
//! - reads the system's and Python's folders only, and writes only in an empty folder that is deleted afterwards
//!   (Landlock; where the kernel has none, it reads what its user may read, and writes nowhere);
//! - has limited time, memory, size and number of files ([`Limits`]); what it prints is dropped.
//!
//! What stays possible: to find the driver's secret in its own process and so claim a success; no honest solution does.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod confine;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod confine {
    //! Another system: nothing can be confined, so nothing runs.
    pub fn has_landlock() -> bool {
        false
    }

    pub fn confine(_: &super::enter::Order) -> anyhow::Result<()> {
        crate::bail_hint!("evaluate on Linux, x86-64 or aarch64"; "models' code runs on Linux only")
    }
}

mod enter;

pub use enter::{Limits, enter};

use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow, bail};
use enter::Order;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde::Serialize;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The hidden verb of the program; its one argument is for [`enter`].
pub const VERB: &str = "run-sandboxed";

/// How long Python may take to start, on a machine with too much to do.
const START: Duration = Duration::from_secs(20);

/// How much longer than its time a program may live that ignores the alarm; `code_eval` has the same second.
const GRACE: Duration = Duration::from_secs(1);

/// How often the parent looks.
const TICK: Duration = Duration::from_millis(2);

/// How many files of the largest size all files together may be.
const FILES: u64 = 4;

/// What is shown of an exception, in characters.
const SHOWN: usize = 200;

/// How a program ended. Its text is short and has one line: `passed`, `failed: ...`, `timed out`, `stopped: ...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ended without an exception.
    Passed,
    /// It raised an exception: its type, and the first line of its message.
    Failed(String),
    /// It ran too long.
    TimedOut,
    /// It ended without an answer: a crash, a limit, or an early exit.
    Stopped(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Passed => f.write_str("passed"),
            Verdict::Failed(reason) => write!(f, "failed: {reason}"),
            Verdict::TimedOut => f.write_str("timed out"),
            Verdict::Stopped(reason) => write!(f, "stopped: {reason}"),
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where and how programs run. Threads can share one.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The program with the hidden verb: in `tinyllama`, `current_exe()`.
    pub program: PathBuf,
    /// The interpreter itself, not a script that looks for one.
    pub python: PathBuf,
    /// The folders of the interpreter, which programs may read.
    pub roots: Vec<PathBuf>,
    /// What each program may use.
    pub limits: Limits,
    /// Whether the kernel keeps programs from the user's files; if not, tell the user once.
    pub landlock: bool,
}

/// Why a process is no more.
#[derive(PartialEq, Eq)]
enum End {
    /// It ended by itself, or by a limit that the kernel watches.
    Itself,
    /// It had to be killed: too long.
    Late,
    /// It had to be killed: its folder is full.
    Full,
}

impl Sandbox {
    /// Asks `python` (as in a shell: `python3`, or a path) where it lives, and tries the sandbox with a program.
    ///
    /// # Errors
    /// No Python 3; a system that cannot confine a program.
    pub fn new(program: PathBuf, python: impl AsRef<OsStr>, limits: Limits) -> Result<Self> {
        if !cfg!(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))) {
            bail_hint!("evaluate on Linux, x86-64 or aarch64"; "models' code runs on Linux only");
        }
        let (python, roots) = locate(python.as_ref()).hint("install Python 3.8 or newer")?;
        let program = std::path::absolute(program)?; // it starts in another folder
        let landlock = confine::has_landlock();
        let sandbox = Sandbox { program, python, roots, limits, landlock };
        let check = "import os\ntry: os.fork()\nexcept PermissionError: pass\nelse: raise SystemError('it can fork')";
        match sandbox.run(check)? {
            Verdict::Passed => Ok(sandbox),
            other => bail_hint!(
                "raise the limits, or choose another Python";
                "`{}` does not work in the sandbox: {other}", sandbox.python.display()
            ),
        }
    }

    /// Runs `program` in a new process, and waits. At the end nothing of it is left: no process, no file.
    ///
    /// # Errors
    /// Only what is not the program's fault: Python does not start, the disk is full.
    pub fn run(&self, program: &str) -> Result<Verdict> {
        let folder = tempfile::Builder::new().prefix("tinyllama-code-").tempdir();
        let folder = folder.context("cannot make a temporary folder")?;
        let mut exchange = tempfile::tempfile().context("cannot make a temporary file")?;
        let secret = secret().context("cannot read `/dev/urandom`")?;
        exchange.write_all(format!("{secret}\n{program}").as_bytes())?;
        exchange.rewind()?;
        let order = serde_json::to_string(&Order {
            folder: folder.path().into(),
            python: self.python.clone(),
            roots: self.roots.clone(),
            limits: self.limits.clone(),
            landlock: self.landlock,
        })?;
        let mut child = Command::new(&self.program)
            .args([VERB, &order])
            .current_dir(&folder)
            .stdin(exchange.try_clone()?)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start `{}`", self.program.display()))?;
        let end = self.watch(&child, &exchange, &secret, folder.path());
        // Its leader is not yet waited for, so the group's number is nobody else's. ESRCH: all of it ended.
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        let status = child.wait()?;
        let (end, told) = (end?, told(&exchange)?);
        if told.starts_with(&secret) {
            return not_started(&mut child, end, status);
        }
        Ok(self.judge(&told, &secret, end, status))
    }

    /// Waits until the process ends, or has to be ended.
    fn watch(&self, child: &Child, exchange: &File, secret: &str, folder: &Path) -> Result<End> {
        let pid = WaitId::Pid(Pid::from_child(child));
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let (mut since, mut limit, mut started) = (Instant::now(), START, false);
        let mut ticks = 0;
        loop {
            if waitid(pid.clone(), look)?.is_some() {
                return Ok(End::Itself);
            }
            if !started && !told(exchange)?.starts_with(secret) {
                (since, limit, started) =
                    (Instant::now(), self.limits.time.saturating_add(GRACE), true);
            }
            if since.elapsed() > limit {
                return Ok(End::Late);
            }
            ticks += 1;
            let most = self.limits.file_size.saturating_mul(FILES);
            if ticks % 16 == 0 && holds_more_than(most, folder) {
                return Ok(End::Full);
            }
            sleep(TICK);
        }
    }

    /// What the driver told, or how the process ended.
    fn judge(&self, told: &str, secret: &str, end: End, status: ExitStatus) -> Verdict {
        if told.strip_prefix("passed ") == Some(secret) {
            return Verdict::Passed;
        }
        if let Some(reason) = told.strip_prefix("failed: ") {
            let line = reason.lines().next().unwrap_or_default();
            return Verdict::Failed(line.chars().filter(|c| !c.is_control()).take(SHOWN).collect());
        }
        match end {
            End::Itself => {}
            End::Late => return Verdict::TimedOut,
            End::Full => return Verdict::Stopped("it wrote too many files".into()),
        }
        match status.signal().and_then(Signal::from_named_raw) {
            Some(Signal::ALARM) => Verdict::TimedOut,
            Some(Signal::XCPU) => {
                Verdict::Stopped(format!("more than {} s of CPU time", self.limits.cpu_seconds))
            }
            Some(_) => Verdict::Stopped(format!("it crashed, {status}")),
            None => Verdict::Stopped(format!("it left early, {status}")),
        }
    }
}

/// The interpreter behind `python`, and its folders.
fn locate(python: &OsStr) -> Result<(PathBuf, Vec<PathBuf>)> {
    let ask = "import json, os, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix, \
               sys.exec_prefix, sys.base_exec_prefix, os.path.realpath(sys.executable)]))";
    let shown = Path::new(python).display();
    let output = Command::new(python)
        .args(["-I", "-c", ask])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let mut paths: Vec<PathBuf> = serde_json::from_slice(&output.stdout).map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr);
        anyhow!("`{shown}` is no Python 3: {}", text.lines().last().unwrap_or_default())
    })?;
    if paths.is_empty() {
        bail!("`{shown}` does not say where it lives");
    }
    let executable = paths.remove(0);
    paths.sort();
    paths.dedup();
    Ok((executable, paths))
}

/// Whether the files of a folder take more than `most` bytes; even an empty one takes a page.
fn holds_more_than(most: u64, folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let sizes = entries.flatten().map(|entry| entry.metadata().map_or(0, |m| m.len()).max(4096));
    let mut total = 0u64;
    sizes.into_iter().any(|size| {
        total = total.saturating_add(size);
        total > most
    })
}

/// What a program cannot guess.
fn secret() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// The beginning of what the exchange holds: the secret until the driver starts the program, then its verdict.
fn told(exchange: &File) -> Result<String> {
    let mut start = [0; 4 * SHOWN + 64];
    let length = exchange.read_at(&mut start, 0)?;
    Ok(String::from_utf8_lossy(&start[..length]).into_owned())
}

/// The error of a process that never came to the program.
fn not_started(child: &mut Child, end: End, status: ExitStatus) -> Result<Verdict> {
    let mut text = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(4096).read_to_string(&mut text)?;
    }
    if end == End::Late {
        bail_hint!("run fewer programs at a time"; "the sandbox did not start within {START:?}");
    }
    bail_hint!(
        "raise the limits, or choose another Python";
        "the sandbox did not start, {status}: {}", text.trim()
    )
}
