//! The process inside: from the hidden verb to Python. Apart from [`super::confine`], it needs nothing of this crate,
//! so that a small program can be made of both.

use super::confine;
use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// What Python runs.
const DRIVER: &str = include_str!("driver.py");

/// What a program may use. The defaults: `code_eval`'s three seconds, and more of the rest than HumanEval needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Wall-clock time of the program; Python's start is not counted.
    pub time: Duration,
    /// CPU time of the process, in seconds, Python's start included.
    pub cpu_seconds: u64,
    /// Address space, in bytes.
    pub memory: u64,
    /// Size of each file that it writes, in bytes.
    pub file_size: u64,
    /// Files that it holds open.
    pub open_files: u64,
    /// Threads of its user, all programs together; the kernel does not count root's.
    pub threads: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            time: Duration::from_secs(3),
            cpu_seconds: 5,
            memory: 4 << 30,
            file_size: 16 << 20,
            open_files: 64,
            threads: 16_384,
        }
    }
}

/// What the parent tells [`enter`].
#[derive(Serialize, Deserialize)]
pub struct Order {
    /// The program's own folder.
    pub folder: PathBuf,
    /// The interpreter.
    pub python: PathBuf,
    /// What the interpreter needs to read.
    pub roots: Vec<PathBuf>,
    /// What the program may use.
    pub limits: Limits,
    /// Whether Landlock confines it; without, it may open files only to read.
    pub landlock: bool,
}

/// The hidden verb: takes the order of `Sandbox::run`, gives up this process's rights, and becomes Python.
///
/// # Errors
/// A right that cannot be given up; a Python that cannot be executed. What is given up stays so.
pub fn enter(order: &str) -> Result<Infallible> {
    let order: Order =
        serde_json::from_str(order).context("this verb is for the program itself")?;
    let seconds = order.limits.time.as_secs_f64().to_string();
    let mut python = Command::new(&order.python);
    python.args(["-I", "-B", "-c", DRIVER, &seconds]).env_clear();
    python.envs([("LANG", "C.UTF-8"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")]);
    confine::confine(&order).context("cannot confine this process")?;
    let error = python.exec(); // returns only if it fails
    Err(error).with_context(|| format!("cannot execute `{}`", order.python.display()))
}

/// Limits this process, for good. Its memory comes last: one with libtorch has more than the limit and gets none from here on.
pub fn limit(limits: &Limits) -> Result<()> {
    let set = |resource: Resource, most: u64, grace: u64| {
        let cap = getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let new = Rlimit {
            current: Some(most.min(cap)),
            maximum: Some(most.saturating_add(grace).min(cap)),
        };
        setrlimit(resource, new).with_context(|| format!("cannot limit {resource:?} to {most}"))
    };
    set(Resource::Cpu, limits.cpu_seconds, 1)?; // SIGXCPU, a second later SIGKILL
    set(Resource::Fsize, limits.file_size, 0)?;
    set(Resource::Nofile, limits.open_files, 0)?;
    set(Resource::Nproc, limits.threads, 0)?;
    set(Resource::Core, 0, 0)?;
    drop(std::hint::black_box(vec![1u8; 64 << 10])); // stays in the heap, for the little that `exec` needs
    set(Resource::As, limits.memory, 0)
}
