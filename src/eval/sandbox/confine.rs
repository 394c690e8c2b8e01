//! Gives up rights of this process, for good: Landlock (files), seccomp (calls of the system), capabilities. What is
//! not on a list here is denied. Nothing of it needs root.

use super::enter::{Order, limit};
use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, path_beneath_rules,
};
use libc::*;
use rustix::process::{Signal, getpid, set_parent_process_death_signal};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use std::collections::BTreeMap;

/// The first Landlock that knows all ways to change a file's content (Linux 6.2).
const LANDLOCK: ABI = ABI::V3;

/// Readable for every program, where they exist: the system's libraries, and what Python's modules look up.
const SYSTEM: [&str; 14] = [
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/pki",
    "/etc/crypto-policies",
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
];

/// Calls without a condition. They read, compute, wait, or act on the process itself.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Open files.
    SYS_read, SYS_readv, SYS_pread64, SYS_preadv, SYS_write, SYS_writev, SYS_pwrite64, SYS_pwritev, SYS_lseek,
    SYS_close, SYS_close_range, SYS_dup, SYS_dup3, SYS_pipe2, SYS_eventfd2, SYS_sendfile, SYS_flock, SYS_fsync,
    SYS_fdatasync, SYS_ftruncate, SYS_fadvise64, SYS_ppoll, SYS_pselect6, SYS_epoll_create1, SYS_epoll_ctl,
    SYS_epoll_pwait,
    // What files there are.
    SYS_fstat, SYS_newfstatat, SYS_statx, SYS_statfs, SYS_fstatfs, SYS_faccessat, SYS_faccessat2, SYS_readlinkat,
    SYS_getdents64, SYS_getcwd, SYS_chdir, SYS_fchdir, SYS_umask,
    // Memory, threads, Python itself. `clone3` is here for the other filter, which answers it.
    SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_msync, SYS_mincore, SYS_brk, SYS_membarrier,
    SYS_clone3, SYS_futex, SYS_rseq, SYS_set_robust_list, SYS_get_robust_list, SYS_set_tid_address, SYS_sched_yield,
    SYS_sched_getaffinity, SYS_sched_getparam, SYS_sched_getscheduler, SYS_sched_get_priority_max,
    SYS_sched_get_priority_min, SYS_getcpu, SYS_execve, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid,
    SYS_getrandom, SYS_restart_syscall,
    // Who and when.
    SYS_getpid, SYS_getppid, SYS_gettid, SYS_getpgid, SYS_getsid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
    SYS_getresuid, SYS_getresgid, SYS_getgroups, SYS_getpriority, SYS_uname, SYS_sysinfo, SYS_getrusage, SYS_times,
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_getitimer,
    SYS_setitimer,
    // Its own signals.
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigpending, SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait, SYS_sigaltstack,
];

/// The same, by the older names that x86-64 alone has.
#[rustfmt::skip]
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] = &[
    SYS_stat, SYS_lstat, SYS_access, SYS_readlink, SYS_getdents, SYS_dup2, SYS_pipe, SYS_poll, SYS_select,
    SYS_epoll_create, SYS_epoll_wait, SYS_getrlimit, SYS_getpgrp, SYS_time, SYS_pause, SYS_alarm, SYS_arch_prctl,
];
#[cfg(target_arch = "aarch64")]
const ALLOWED_OLD: &[c_long] = &[];

/// Calls that change files; only where Landlock keeps them in the program's folder.
#[rustfmt::skip]
#[cfg(target_arch = "x86_64")]
const CHANGES: &[c_long] = &[
    SYS_openat, SYS_unlinkat, SYS_renameat, SYS_renameat2, SYS_open, SYS_unlink, SYS_rename,
];
#[cfg(target_arch = "aarch64")]
const CHANGES: &[c_long] = &[SYS_openat, SYS_unlinkat, 38, SYS_renameat2]; // 38: renameat, nameless in `libc`

/// Calls that open a file, and which argument is the flags; without Landlock they may only read.
#[cfg(target_arch = "x86_64")]
const OPENS: &[(c_long, u8)] = &[(SYS_openat, 2), (SYS_open, 1)];
#[cfg(target_arch = "aarch64")]
const OPENS: &[(c_long, u8)] = &[(SYS_openat, 2)];

/// Whether this kernel's Landlock can keep a program in its folder.
pub fn has_landlock() -> bool {
    let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    strict.handle_access(AccessFs::from_all(LANDLOCK)).and_then(|rules| rules.create()).is_ok()
}

/// Everything that this process gives up, and its limits. `execve` and threads stay possible.
pub fn confine(order: &Order) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot tie it to its parent")?;
    if order.landlock {
        restrict_files(order).context("Landlock refuses")?;
    }
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, none).context("cannot give up capabilities")?;
    // The filter that is installed last decides between two errors, so the general one allows `clone3`. glibc takes
    // ENOSYS as "use `clone`", whose arguments a filter can see.
    let clone3 = BTreeMap::from([(SYS_clone3, vec![])]);
    let clone3 = filter(clone3, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32))?;
    let denied = SeccompAction::Errno(EPERM as u32);
    let general = filter(allowed(order.landlock)?, denied, SeccompAction::Allow)?;
    limit(&order.limits)?;
    apply_filter(&clone3).and_then(|()| apply_filter(&general)).context("seccomp refuses")
}

fn restrict_files(order: &Order) -> Result<()> {
    let inside: BitFlags<AccessFs> = AccessFs::ReadDir
        | AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile;
    let null = AccessFs::ReadFile | AccessFs::WriteFile;
    let readable = SYSTEM.iter().map(AsRef::as_ref).chain(order.roots.iter().map(|p| p.as_path()));
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(readable, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules([&order.folder], inside))?
        .add_rules(path_beneath_rules(["/dev/null"], null))?
        .restrict_self()?;
    Ok(())
}

/// The calls that the program may make, with the conditions on their arguments.
fn allowed(landlock: bool) -> Result<BTreeMap<c_long, Vec<SeccompRule>>> {
    let plain = ALLOWED.iter().chain(ALLOWED_OLD).chain(if landlock { CHANGES } else { &[] });
    let mut calls: BTreeMap<c_long, Vec<SeccompRule>> = plain.map(|&call| (call, vec![])).collect();
    let mut allow =
        |call: c_long, argument: u8, length: SeccompCmpArgLen, op: SeccompCmpOp, value| {
            let condition = SeccompCondition::new(argument, length, op, value)?;
            calls.entry(call).or_default().push(SeccompRule::new(vec![condition])?);
            anyhow::Ok(())
        };
    let threads = CLONE_THREAD as u64; // and no other process
    allow(SYS_clone, 0, Qword, MaskedEq(threads), threads)?;
    let own = getpid().as_raw_nonzero().get() as u64; // `exec` keeps it
    allow(SYS_kill, 0, Dword, Eq, own)?;
    allow(SYS_tgkill, 0, Dword, Eq, own)?;
    allow(SYS_prlimit64, 2, Qword, Eq, 0)?; // reads limits, sets none
    for command in
        [F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW]
    {
        allow(SYS_fcntl, 1, Dword, Eq, command as u64)?; // not F_SETOWN, which sends signals
    }
    for command in [TCGETS, FIOCLEX, FIONCLEX, FIONBIO, FIONREAD] {
        allow(SYS_ioctl, 1, Dword, Eq, command)?;
    }
    if !landlock {
        let writing = (O_ACCMODE | O_CREAT | O_TRUNC) as u64;
        for &(call, flags) in OPENS {
            allow(call, flags, Dword, MaskedEq(writing), 0)?;
        }
    }
    Ok(calls)
}

fn filter(
    calls: BTreeMap<c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(calls, others, these, arch)?.try_into()?)
}
