//! How a job ends that cannot go on: what every rank learns, and who tells the user.

use crate::error::{self, exit};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Why the job ends on all ranks. The first one that is written into the store counts.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Failure {
    /// The rank that failed.
    pub rank: usize,
    /// The node that it ran on.
    pub host: String,
    /// What happened, naming rank and host, then each cause.
    pub causes: Vec<String>,
    /// The next action.
    pub hint: Option<String>,
    /// The last line that it wrote.
    pub last_line: Option<String>,
    /// Exit code of the job.
    pub code: u8,
    /// The rank can still hear of it.
    pub is_alive: bool,
    /// The rank that tells the user, where no launcher does.
    pub told_by: usize,
}

/// What went wrong on one rank, as it or its launcher sees it.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Fault {
    /// The error and its causes.
    pub causes: Vec<String>,
    /// The next action.
    pub hint: Option<String>,
    /// Exit code.
    pub code: u8,
    /// Not merely what a rank sees of another one's end, such as a closed connection.
    pub is_root: bool,
}

impl Fault {
    /// Of an error that training returned.
    pub fn of(error: &anyhow::Error) -> Self {
        let causes = error::causes(error);
        let is_root = !causes.iter().any(|cause| may_come_from_a_peer(cause));
        let hint = error::hint(error).map(str::to_owned);
        Self { causes, hint, code: error::exit_code(error), is_root }
    }
}

/// Whether a message is one that a collective operation ends with when another rank is gone.
fn may_come_from_a_peer(message: &str) -> bool {
    let message = message.to_lowercase();
    let signs = ["gloo", "nccl", "closed by peer", "reset by peer", "process group", "tcpstore"];
    signs.iter().any(|sign| message.contains(sign))
}

impl Failure {
    /// A rank failed by itself.
    pub fn of_fault(rank: usize, host: &str, fault: &Fault, last_line: Option<String>) -> Self {
        let mut causes = vec![format!("rank {rank} on {host} failed")];
        causes.extend(fault.causes.iter().cloned());
        let hint = fault.hint.clone();
        let host = host.to_owned();
        Self { rank, host, causes, hint, last_line, code: fault.code, is_alive: true, told_by: 0 }
    }

    /// A rank is no more: `what` follows its name and host, as in `was killed by SIGKILL`.
    pub fn of_end(rank: usize, host: &str, what: &str, last_line: Option<String>) -> Self {
        Self {
            rank,
            host: host.to_owned(),
            causes: vec![format!("rank {rank} on {host} {what}")],
            hint: Some("continue from the newest checkpoint with `--resume auto`".into()),
            last_line,
            code: exit::FAILED,
            is_alive: false,
            told_by: usize::from(rank == 0), // a dead rank 0 tells nothing
        }
    }

    /// The whole message; `log` is the file of the failed rank.
    pub fn message(&self, log: Option<&Path>) -> String {
        let mut text = error::house_form(&self.causes, None);
        if let Some(line) = self.last_line.as_deref().filter(|line| !line.is_empty()) {
            text += &format!("  last line: {line}\n");
        }
        if let Some(log) = log {
            text += &format!("  its log: {}\n", log.display());
        }
        if let Some(hint) = &self.hint {
            text += &format!("\nhint: {hint}\n");
        }
        text
    }

    /// One line for the ranks that do not explain.
    pub fn line(&self, rank: usize) -> String {
        match self.rank == rank {
            true => format!("rank {rank} ends: {}", self.causes.join(": ")),
            false => format!("rank {rank} ends, because {}", self.causes.join(": ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::WithHint;

    #[test]
    fn a_failure_names_rank_host_cause_last_line_log_and_the_next_action() {
        let error = anyhow::anyhow!("no space left").context("cannot save");
        let error = Err::<(), _>(error).hint("make room").unwrap_err();
        let fault = Fault::of(&error);
        assert!(fault.is_root);
        let failure = Failure::of_fault(3, "node-b", &fault, Some("step 7".into()));
        assert_eq!(
            failure.message(Some(Path::new("out/logs/rank-00003.log"))),
            "error: rank 3 on node-b failed\n  caused by: cannot save\n  caused by: no space left\n  \
             last line: step 7\n  its log: out/logs/rank-00003.log\n\nhint: make room\n"
        );
        assert!(failure.line(1).starts_with("rank 1 ends, because rank 3 on node-b failed"));
        let dead = Failure::of_end(0, "node-a", "was killed by SIGKILL", None);
        assert_eq!((dead.told_by, dead.code), (1, 1));
    }

    #[test]
    fn what_a_rank_sees_of_anothers_end_is_no_root() {
        for text in [
            "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
            "NCCL: an operation failed",
            "the process group was aborted, or an operation of it failed before",
        ] {
            assert!(!Fault::of(&anyhow::anyhow!("{text}").context("the step failed")).is_root);
        }
    }
}
