//! Which rank this process is, by the variables that its starter has set.

use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::fmt;

/// Set by [`super::launch`] in its workers: its process number.
pub(super) const LAUNCHER: &str = "TL_LAUNCHER";

/// Who started this process and set its variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// `pretrain --devices N` itself.
    Launcher,
    /// `torchrun --no-python`.
    Torchrun,
    /// `srun`.
    Slurm,
    /// A shell loop or another program.
    Other,
}

/// The place of this process among those of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// 0 to `size - 1` over all nodes.
    pub rank: usize,
    /// 0 to the number of ranks on this node - 1: which card.
    pub local_rank: usize,
    /// Ranks on all nodes.
    pub size: usize,
    /// Name of this node.
    pub host: String,
    /// Where the store is served by which the ranks meet.
    pub master: Address,
    /// Who started this process.
    pub starter: Starter,
    /// Process number of the launcher that started this process, if one did.
    pub launcher: Option<u32>,
    /// Somebody else serves the store, not rank 0.
    pub has_store: bool,
    /// Begins every key in the store: under `torchrun` it outlives a run that is started again.
    pub prefix: String,
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// A name or an IP address.
    pub host: String,
    /// A TCP port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl World {
    /// Reads `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, or what `srun` sets. `None`: this
    /// process was started by itself.
    ///
    /// # Errors
    /// Variables that are missing, no numbers, or contradict each other; all are told at once.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_vars(&|name| std::env::var(name).ok().filter(|text| !text.trim().is_empty()))
    }

    /// [`World::from_env`] with another source of variables.
    pub fn from_vars(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let mut vars = Vars { get, problems: Vec::new() };
        let is_set = |name: &str| get(name).is_some();
        let tasks = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
        let tasks = tasks.into_iter().find(|name| is_set(name));
        // With NODE_RANK, each task of Slurm is a launcher.
        let by_slurm = is_set("SLURM_PROCID") && tasks.is_some() && !is_set("NODE_RANK");
        let world = if is_set("RANK") {
            vars.standard()
        } else if let (true, Some(tasks)) = (by_slurm, tasks) {
            vars.slurm(tasks)
        } else {
            let size = get("WORLD_SIZE").filter(|size| size.trim() != "1");
            let stray = [size.and(Some("WORLD_SIZE")), get("LOCAL_RANK").and(Some("LOCAL_RANK"))];
            for name in stray.into_iter().flatten() {
                let value = get(name).unwrap_or_default();
                vars.problems.push(format!("{name}={value} is set, but RANK is not"));
            }
            None
        };
        let problems = vars.problems;
        if problems.is_empty() {
            return Ok(world);
        }
        Err(anyhow!(
            "the variables that say which rank this process is cannot be right:\n{}",
            problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n")
        ))
        .usage(
            "`torchrun --no-python`, `srun` and `pretrain --devices N` set them; a shell loop sets RANK, LOCAL_RANK, \
             WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset them all to run one process",
        )
    }

    /// Lets the system kill this process when the launcher that started it dies. (Elsewhere than on Linux it ends by
    /// itself, when the launcher's store does not answer.)
    ///
    /// # Errors
    /// It is dead already.
    pub(super) fn end_with_launcher(&self) -> Result<()> {
        let Some(launcher) = self.launcher else { return Ok(()) };
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get());
        if parent.and_then(|parent| u32::try_from(parent).ok()) != Some(launcher) {
            return Err(anyhow!("the launcher, process {launcher}, is gone"))
                .hint(format!("{LAUNCHER} is for workers of `pretrain --devices N`; unset it"));
        }
        Ok(())
    }

    /// Whether rank 0 of this world serves the store.
    pub fn serves(&self) -> bool {
        self.rank == 0 && !self.has_store
    }
}

/// Variables, and what is wrong with them.
struct Vars<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    problems: Vec<String>,
}

impl Vars<'_> {
    /// What `torchrun`, our launcher and shell loops set.
    fn standard(&mut self) -> Option<World> {
        let rank = self.number("RANK");
        let local_rank = self.number("LOCAL_RANK");
        let size = self.number("WORLD_SIZE");
        let host = self.text("MASTER_ADDR");
        let port = self.number("MASTER_PORT");
        let launcher = (self.get)(LAUNCHER).and_then(|text| text.parse().ok());
        let starter = match ((self.get)("TORCHELASTIC_RUN_ID"), launcher) {
            (_, Some(_)) => Starter::Launcher,
            (Some(_), None) => Starter::Torchrun,
            (None, None) => Starter::Other,
        };
        let agent = (self.get)("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        let restarts = (self.get)("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".into());
        let (rank, size) = self.in_range(rank, size, "RANK", "WORLD_SIZE")?;
        let local_size = match (self.get)("LOCAL_WORLD_SIZE") {
            Some(_) => ("LOCAL_WORLD_SIZE", self.number("LOCAL_WORLD_SIZE")?),
            None => ("WORLD_SIZE", size as u64),
        };
        let (local_rank, _) =
            self.in_range(local_rank, Some(local_size.1), "LOCAL_RANK", local_size.0)?;
        Some(World {
            rank,
            local_rank,
            size,
            host: host_name(),
            master: Address { host: host?, port: self.port(port?, "MASTER_PORT")? },
            starter,
            launcher,
            has_store: agent || launcher.is_some(),
            // A membership change of elastic torchrun counts as no restart, but changes the size.
            prefix: format!("tinyllama/{restarts}/{size}/"),
        })
    }

    /// What `srun` sets. The store is at the first node of the step, at a port that follows from the job's number.
    fn slurm(&mut self, tasks: &'static str) -> Option<World> {
        let size = self.number(tasks);
        if size == Some(1) {
            return None;
        }
        let (rank, local_rank) = (self.number("SLURM_PROCID"), self.number("SLURM_LOCALID"));
        let lists = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
        let nodes = lists.iter().find_map(|name| (self.get)(name));
        let host = (self.get)("MASTER_ADDR").or_else(|| nodes.as_deref().map(first_host));
        if host.is_none() {
            self.problems.push("neither MASTER_ADDR nor SLURM_JOB_NODELIST is set".into());
        }
        let port = match (self.get)("MASTER_PORT") {
            Some(_) => self.number("MASTER_PORT").and_then(|port| self.port(port, "MASTER_PORT")),
            None => self.number("SLURM_JOB_ID").map(|job| 12_000 + (job % 20_000) as u16),
        };
        let (rank, size) = self.in_range(rank, size, "SLURM_PROCID", tasks)?;
        let (local_rank, _) =
            self.in_range(local_rank, Some(size as u64), "SLURM_LOCALID", tasks)?;
        Some(World {
            rank,
            local_rank,
            size,
            host: host_name(),
            master: Address { host: host?, port: port? },
            starter: Starter::Slurm,
            launcher: None,
            has_store: false,
            prefix: format!("tinyllama/0/{size}/"),
        })
    }

    fn text(&mut self, name: &str) -> Option<String> {
        let value = (self.get)(name);
        if value.is_none() {
            self.problems.push(format!("{name} is not set"));
        }
        value
    }

    fn number(&mut self, name: &str) -> Option<u64> {
        let text = self.text(name)?;
        let number = text.trim().parse().ok();
        if number.is_none() {
            self.problems.push(format!("{name}: expected a number from 0, got `{text}`"));
        }
        number
    }

    fn port(&mut self, port: u64, name: &str) -> Option<u16> {
        let found = u16::try_from(port).ok().filter(|port| *port > 0);
        if found.is_none() {
            self.problems.push(format!("{name}: expected 1 to 65535, got {port}"));
        }
        found
    }

    /// `rank` below `size`, both at most 2^20.
    fn in_range(
        &mut self,
        rank: Option<u64>,
        size: Option<u64>,
        rank_name: &str,
        size_name: &str,
    ) -> Option<(usize, usize)> {
        let (rank, size) = (rank?, size?);
        if size == 0 || size > 1 << 20 {
            self.problems.push(format!("{size_name}: expected 1 to 2^20, got {size}"));
            return None;
        }
        if rank >= size {
            self.problems.push(format!(
                "{rank_name}={rank}, but {size_name}={size}: expected 0 to {}",
                size - 1
            ));
            return None;
        }
        Some((rank as usize, size as usize))
    }
}

/// Name of this node.
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The first host of Slurm's list: `gpu[003-010,12]-ib,login1` -> `gpu003-ib`.
fn first_host(list: &str) -> String {
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        let Some((inside, after)) =
            rest[at..].strip_prefix('[').and_then(|rest| rest.split_once(']'))
        else {
            return host; // a comma outside brackets
        };
        host.push_str(inside.split([',', '-']).next().unwrap_or_default());
        rest = after;
    }
    host + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(vars: &[(&str, &str)]) -> Result<Option<World>> {
        let get = |name: &str| {
            vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        World::from_vars(&get)
    }

    const LOOP: [(&str, &str); 5] = [
        ("RANK", "5"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "8"),
        ("MASTER_ADDR", "node-a"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn the_standard_variables_say_which_rank_this_is_and_who_serves_the_store() {
        assert_eq!(world(&[]).unwrap(), None);
        assert_eq!(world(&[("MASTER_ADDR", "node-a"), ("WORLD_SIZE", "1")]).unwrap(), None);
        let w = world(&LOOP).unwrap().unwrap();
        assert_eq!((w.rank, w.local_rank, w.size), (5, 1, 8));
        assert_eq!(w.master.to_string(), "node-a:29500");
        assert_eq!((w.starter, w.has_store, w.launcher), (Starter::Other, false, None));
        assert_eq!(w.prefix, "tinyllama/0/8/");

        let torchrun = [
            ("TORCHELASTIC_RUN_ID", "none"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ];
        let w = world(&[&LOOP[..], &torchrun].concat()).unwrap().unwrap();
        assert_eq!((w.starter, w.has_store), (Starter::Torchrun, true));
        assert_eq!(w.prefix, "tinyllama/2/8/");
        let w = world(&[&LOOP[..], &[(LAUNCHER, "77")]].concat()).unwrap().unwrap();
        assert_eq!((w.starter, w.has_store, w.launcher), (Starter::Launcher, true, Some(77)));
    }

    #[test]
    fn under_slurm_the_first_node_of_the_list_serves_and_the_port_follows_from_the_job() {
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_JOB_ID", "1234567"),
            ("SLURM_JOB_NODELIST", "gpu[003-010,12]-ib,login1"),
        ];
        let w = world(&slurm).unwrap().unwrap();
        assert_eq!((w.rank, w.local_rank, w.size, w.serves()), (3, 1, 4, false));
        assert_eq!(w.master, Address { host: "gpu003-ib".into(), port: 12_000 + 14_567 });
        let given = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "4000")];
        let w = world(&[&slurm[..], &given].concat()).unwrap().unwrap();
        assert_eq!(w.master.to_string(), "10.0.0.1:4000");
        // One task is no world; a task that is a launcher is none; torchrun's own variables come first.
        assert_eq!(world(&[&[("SLURM_STEP_NUM_TASKS", "1")], &slurm[..]].concat()).unwrap(), None);
        assert_eq!(world(&[&slurm[..], &[("NODE_RANK", "0")]].concat()).unwrap(), None);
        assert_eq!(world(&[&slurm[..], &LOOP].concat()).unwrap().unwrap().rank, 5);
        for (list, first) in
            [("n1", "n1"), ("a,b", "a"), ("r[1-2]n[03-05]", "r1n03"), ("n[7,9]", "n7")]
        {
            assert_eq!(first_host(list), first);
        }
    }

    #[test]
    fn variables_that_cannot_be_right_are_told_all_at_once_with_the_next_action() {
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
        let cases: [Case; 5] = [
            (&[("RANK", "0")], &["LOCAL_RANK is not set", "WORLD_SIZE is not", "MASTER_PORT is"]),
            (&[("WORLD_SIZE", "4")], &["WORLD_SIZE=4 is set, but RANK is not"]),
            (&[("RANK", "8")], &["RANK=8, but WORLD_SIZE=8: expected 0 to 7"]),
            (&[("RANK", "-1"), ("MASTER_PORT", "x")], &["RANK: expected a number", "got `x`"]),
            (
                &[("LOCAL_WORLD_SIZE", "1"), ("MASTER_PORT", "70000")],
                &["LOCAL_RANK=1, but LOCAL_WORLD_SIZE=1"],
            ),
        ];
        for (i, (vars, words)) in cases.into_iter().enumerate() {
            let vars = if i < 2 { vars.to_vec() } else { [vars, &LOOP].concat() };
            let error = world(&vars).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2);
            for word in words {
                assert!(error.to_string().contains(word), "{word}: {error}");
            }
        }
    }
}
