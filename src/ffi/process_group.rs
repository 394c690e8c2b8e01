//! Collective operations between ranks over NCCL (cards) or Gloo (CPUs), libtorch's own.

use super::store::{TcpStore, c_text, milliseconds};
use super::{Handle, cuda, cuda_functions, device_index, handle};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::ptr::null_mut;
use std::time::Duration;
use tch::{Device, Tensor};

unsafe extern "C" {
    fn tl_group_new(
        store: *mut c_void,
        prefix: *const c_char,
        nccl: *const c_void,
        rank: c_int,
        size: c_int,
        device: c_int,
        address: *const c_char,
        timeout_ms: i64,
        group: *mut *mut c_void,
    ) -> c_int;
    fn tl_group_finish(group: *mut c_void) -> c_int;
    fn tl_group_free(group: *mut c_void);
    fn tl_group_abort(group: *mut c_void) -> c_int;
    fn tl_group_check(group: *mut c_void) -> c_int;
    fn tl_group_barrier(group: *mut c_void) -> c_int;
    fn tl_all_reduce(
        group: *mut c_void,
        tensor: Handle,
        op: c_int,
        work: *mut *mut c_void,
    ) -> c_int;
    fn tl_all_gather(
        group: *mut c_void,
        whole: Handle,
        shard: Handle,
        work: *mut *mut c_void,
    ) -> c_int;
    fn tl_reduce_scatter(
        group: *mut c_void,
        shard: Handle,
        whole: Handle,
        op: c_int,
        work: *mut *mut c_void,
    ) -> c_int;
    fn tl_broadcast(
        group: *mut c_void,
        tensor: Handle,
        root: c_int,
        work: *mut *mut c_void,
    ) -> c_int;
    fn tl_work_wait(work: *mut c_void) -> c_int;
    fn tl_work_free(work: *mut c_void);
}

cuda_functions! {
    fn tl_nccl_versions(built: *mut c_int, running: *mut c_int) -> c_int;
}

/// Like `super::check`, with all lines of libtorch's text up to its backtrace: NCCL says more in the second.
fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: a NUL-terminated text of this thread, never null.
    let text = unsafe { std::ffi::CStr::from_ptr(super::tl_last_error()) }.to_string_lossy();
    let lines = text.lines().take_while(|line| !line.starts_with("Exception raised from"));
    let lines: Vec<&str> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    bail!("{}", lines.join("; "))
}

/// By which library ranks exchange tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Between CPUs, over TCP.
    Gloo,
    /// Between NVIDIA cards.
    Nccl,
}

impl Backend {
    /// That of tensors on `device`.
    pub fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Nccl } else { Self::Gloo }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gloo => "Gloo",
            Self::Nccl => "NCCL",
        })
    }
}

/// What becomes of the ranks' numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// Their mean; floating-point numbers only.
    Avg,
    /// The largest.
    Max,
}

impl ReduceOp {
    /// As in `csrc/api.h`.
    fn code(self) -> c_int {
        match self {
            Self::Sum => 0,
            Self::Avg => 1,
            Self::Max => 2,
        }
    }
}

/// One rank's membership in a group. All ranks call the same operations in the same order.
///
/// Tensors are contiguous and on the group's device. Nothing is recorded for a backward pass. An operation may run
/// while the thread goes on: until its [`Work::wait`], its tensors must be neither read nor written.
///
/// # Numerics
/// NCCL adds 16-bit numbers in their own dtype, rounding at every addition. Gloo adds them in fp32 and rounds once;
/// its [`Self::reduce_scatter_into`] adds in order of rank, so that the result does not depend on sizes. Every rank
/// gets the same bits of an `all_reduce`.
///
/// # Failure
/// With NCCL an operation fails beside the CPU: one that takes longer than the group's timeout, or whose connection
/// breaks, is ended by libtorch's watchdog, says so on stderr, and leaves garbage in its tensors. [`Self::check`] tells,
/// and so do all later operations; ask it where the CPU waits for the card anyway, before using what was computed.
/// With Gloo [`Work::wait`] returns the error.
#[derive(Debug)]
pub struct ProcessGroup {
    group: *mut c_void,
    backend: Backend,
    rank: usize,
    size: usize,
    device: Device,
}

// SAFETY: the C++ side starts operations under a lock, and libtorch's own abort may come from any thread.
unsafe impl Send for ProcessGroup {}
unsafe impl Sync for ProcessGroup {}

impl ProcessGroup {
    /// Waits for all `size` ranks of the group and connects them.
    ///
    /// `prefix` names the group: several share a store, and a name is used once. `device` is where this rank's tensors
    /// are: a card of its own for NCCL; for Gloo the CPU, or a card, from and to which they are copied. `address` is the
    /// host name or IP address of this machine at which Gloo listens and others reach it; `None`: that of the host name.
    /// `timeout` is for the ranks to come, and then for every single operation.
    ///
    /// # Errors
    /// A rank does not come in time (the message names it, the store and the wait), a name is used twice, the backend
    /// does not fit the device or is not in this build, or the ranks cannot reach each other.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        store: &TcpStore,
        prefix: &str,
        backend: Backend,
        rank: usize,
        size: usize,
        device: Device,
        address: Option<&str>,
        timeout: Duration,
    ) -> Result<Self> {
        ensure!(rank < size, "rank must be below the group's size {size}, got {rank}");
        ensure!(
            backend == Backend::Gloo || device.is_cuda(),
            "NCCL does not work on {device:?}, but between CUDA cards"
        );
        join(store, prefix, rank, size, timeout)?;
        let c_prefix = c_text(prefix)?;
        let c_address = address.map(c_text).transpose()?;
        let nccl = match backend {
            Backend::Nccl => cuda::address("tl_make_nccl"),
            Backend::Gloo => Some(std::ptr::null()),
        };
        let mut group = null_mut();
        // SAFETY: store and texts outlive the call (C++ keeps what it needs); on success `group` is ours.
        let connect = |nccl| unsafe {
            tl_group_new(
                store.as_ptr(),
                c_prefix.as_ptr(),
                nccl,
                rank as c_int,
                size as c_int,
                device_index(device),
                c_address.as_ref().map_or(std::ptr::null(), |text| text.as_ptr()),
                milliseconds(timeout),
                &mut group,
            )
        };
        check(nccl.map_or(1, connect)) // 1: the last error says why there is no NCCL
            .with_context(|| match address {
                Some(address) if backend == Backend::Gloo => {
                    format!("rank {rank} cannot connect group `{prefix}` over Gloo at `{address}`")
                }
                _ => format!("rank {rank} cannot connect group `{prefix}` over {backend}"),
            })?;
        Ok(Self { group, backend, rank, size, device })
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are, W.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The library beneath.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Where its tensors are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Replaces the tensor by the sum, mean or largest over all ranks, element by element.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        // SAFETY: C++ checks the tensor and keeps a handle of its own.
        Work::start(|work| unsafe { tl_all_reduce(self.group, handle(tensor), op.code(), work) })
    }

    /// `whole` = the `shard`s of all ranks, in order of rank: `(n,)` each -> `(W * n,)`, shapes aside. The shard may lie
    /// in `whole` where it belongs, at element `rank * n`; elsewhere in it is an error.
    pub fn all_gather_into(&self, whole: &Tensor, shard: &Tensor) -> Result<Work> {
        // SAFETY: as in `all_reduce`.
        Work::start(|work| unsafe { tl_all_gather(self.group, handle(whole), handle(shard), work) })
    }

    /// `shard` = this rank's part, `(n,)` from element `rank * n` on, of the sum, mean or largest of all ranks' `whole`
    /// `(W * n,)`. The shard may lie in `whole` where it belongs. `whole` keeps its values (NCCL does not touch it
    /// outside the shard either).
    pub fn reduce_scatter_into(
        &self,
        shard: &Tensor,
        whole: &Tensor,
        op: ReduceOp,
    ) -> Result<Work> {
        // SAFETY: as in `all_reduce`.
        Work::start(|work| unsafe {
            tl_reduce_scatter(self.group, handle(shard), handle(whole), op.code(), work)
        })
    }

    /// Gives all ranks the tensor of rank `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        // SAFETY: as in `all_reduce`.
        Work::start(|work| unsafe { tl_broadcast(self.group, handle(tensor), root as c_int, work) })
    }

    /// Waits until all ranks are here.
    ///
    /// # Sync
    /// Makes the CPU wait with both backends; with NCCL for the card's work so far as well.
    pub fn barrier(&self) -> Result<()> {
        // SAFETY: the group is live.
        check(unsafe { tl_group_barrier(self.group) }).context("barrier between ranks")
    }

    /// Fails where an operation failed, took longer than the timeout, or the group was aborted. Does not wait.
    pub fn check(&self) -> Result<()> {
        // SAFETY: the group is live.
        check(unsafe { tl_group_check(self.group) })
    }

    /// Ends what is in flight on this rank, so that a thread that waits for it goes on: with an error (Gloo), or with
    /// garbage in the tensors and an error from [`Self::check`] (NCCL). May be called from another thread. Other ranks
    /// notice after their timeout, or when this process ends.
    pub fn abort(&self) -> Result<()> {
        // SAFETY: the group is live, and this function of C++ is made for any thread.
        check(unsafe { tl_group_abort(self.group) })
    }

    /// Leaves the group in order: NCCL waits for its operations and the other ranks. A group that is dropped without
    /// this is aborted.
    ///
    /// # Errors
    /// An operation failed before.
    pub fn finish(&self) -> Result<()> {
        // SAFETY: the group is live; `Drop` frees it.
        check(unsafe { tl_group_finish(self.group) }).context("leaving the group of ranks")
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: made by `tl_group_new`, freed once; works in flight keep the C++ object.
        unsafe { tl_group_free(self.group) }
    }
}

/// Announces this rank in the store and waits for all others; the last to come tells. One that never comes is told by
/// its number.
fn join(store: &TcpStore, prefix: &str, rank: usize, size: usize, timeout: Duration) -> Result<()> {
    let key = |rank: usize| format!("{prefix}/joined/{rank}");
    let all = format!("{prefix}/joined/all");
    let times = store.add(&key(rank), 1)?;
    ensure!(
        times == 1,
        "rank {rank} joined group `{prefix}` {times} times at the store {}; a group has a name of \
         its own, and a rank is in it once",
        store.address()
    );
    if store.add(&format!("{prefix}/joined/count"), 1)? == size as i64 {
        store.set(&all, b"")?;
    }
    store.wait(&[&all], timeout).map_err(|error| {
        let came = |&rank: &usize| store.check(&key(rank)).unwrap_or(false);
        let missing: Vec<String> =
            (0..size).filter(|rank| !came(rank)).map(|rank| rank.to_string()).collect();
        let (shown, more) = missing.split_at(missing.len().min(8));
        error.context(format!(
            "{} of {size} ranks did not join group `{prefix}` at {} within {timeout:?}: rank {}{}",
            missing.len(),
            store.address(),
            shown.join(", "),
            if more.is_empty() { "" } else { ", .." }
        ))
    })
}

/// An operation that was started.
///
/// Dropping it does not stop it: its tensors live until it is done, but with Gloo the result of an `all_reduce` of
/// 16-bit numbers or of a `reduce_scatter_into` is then never written.
#[must_use = "the result is there after `wait`"]
#[derive(Debug)]
pub struct Work(*mut c_void);

// SAFETY: a work is used by one thread at a time; libtorch's are made to be waited for anywhere.
unsafe impl Send for Work {}

impl Work {
    fn start(operation: impl FnOnce(*mut *mut c_void) -> c_int) -> Result<Self> {
        let mut work = null_mut();
        check(operation(&mut work))?;
        Ok(Self(work))
    }

    /// Makes later work see the result.
    ///
    /// # Sync
    /// NCCL: the current stream of the card waits, the CPU does not. Gloo: the CPU waits.
    ///
    /// # Errors
    /// Gloo: another rank died, did not come within the group's timeout, or the group was aborted. NCCL: see
    /// [`ProcessGroup`].
    pub fn wait(self) -> Result<()> {
        // SAFETY: the work is live; `Drop` frees it.
        check(unsafe { tl_work_wait(self.0) }).context("a collective operation failed")
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: made by a call that started an operation, freed once.
        unsafe { tl_work_free(self.0) }
    }
}

/// Versions of NCCL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NcclVersions {
    /// Whose header this binary was compiled with.
    pub built: String,
    /// Of the library in this process.
    pub running: String,
}

/// NCCL's version found at run time, and that built for.
///
/// # Errors
/// This build has no NCCL.
pub fn nccl_versions() -> Result<NcclVersions> {
    let (mut built, mut running) = (0, 0);
    // SAFETY: both pointers are to live locals.
    check(unsafe { tl_nccl_versions(&mut built, &mut running) })?;
    let text = |v: c_int| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100);
    Ok(NcclVersions { built: text(built), running: text(running) })
}
