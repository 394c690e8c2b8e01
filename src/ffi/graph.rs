//! CUDA graphs, and copies between CPU and card that neither waits for.

use super::{Event, Handle, check, cuda_functions, handle};
use anyhow::{Context, Result};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use tch::{Device, Tensor};

cuda_functions! {
    fn tl_graph_begin(other: *mut c_void, graph: *mut *mut c_void) -> c_int;
    fn tl_graph_end(graph: *mut c_void) -> c_int;
    fn tl_graph_replay(graph: *mut c_void) -> c_int;
    fn tl_graph_free(graph: *mut c_void);
    fn tl_stage_new(tensor: Handle, device: c_int, staged: *mut *mut c_void) -> c_int;
    fn tl_stage_take(staged: *mut c_void, out: *mut Handle) -> c_int;
    fn tl_stage_free(staged: *mut c_void);
    fn tl_read_back(numbers: Handle, host: *mut Handle, event: *mut c_void) -> c_int;
}

/// GPU work that is launched again by one call, on the same memory.
#[derive(Debug)]
pub struct Graph(*mut c_void);

impl Graph {
    /// Captures what `work` launches, its backward passes included; nothing runs. All tensors that `work`
    /// makes live in the graph's own memory, or in that of `other`, if they never run at the same time and nothing that
    /// the other one's work made is looked at after this one ran.
    ///
    /// # Sync
    /// The CPU waits for the card before.
    pub fn capture(other: Option<&Self>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mut graph = null_mut();
        let other = other.map_or(null_mut(), |graph| graph.0);
        // SAFETY: the other graph is live; on success `graph` is ours; `Drop` frees it, and ends the capture where
        // `work` failed.
        check(unsafe { tl_graph_begin(other, &mut graph) })?;
        let graph = Self(graph);
        work()?;
        // SAFETY: the graph is live and capturing.
        check(unsafe { tl_graph_end(graph.0) })?;
        Ok(graph)
    }

    /// Launches the work. The CPU does not wait.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is live.
        check(unsafe { tl_graph_replay(self.0) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `tl_graph_begin`, freed once.
        unsafe { tl_graph_free(self.0) }
    }
}

/// A CPU tensor on its way to a card, through page-locked memory and on a stream of its own.
#[derive(Debug)]
pub struct Staged(*mut c_void);

impl Staged {
    /// Starts the copy.
    pub fn new(tensor: &Tensor, device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { anyhow::bail!("staged copies go to a CUDA card") };
        let mut staged = null_mut();
        // SAFETY: the tensor outlives the call; on success `staged` is ours.
        check(unsafe { tl_stage_new(handle(tensor), index as c_int, &mut staged) })?;
        Ok(Self(staged))
    }

    /// The tensor on the card. The current stream waits for the copy, the CPU does not.
    pub fn take(self) -> Result<Tensor> {
        let mut out: Handle = null_mut();
        // SAFETY: `self` is live; on success `out` is a new tensor of this side's.
        check(unsafe { tl_stage_take(self.0, &mut out) })?;
        Ok(unsafe { Tensor::from_ptr(out) })
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // SAFETY: made by `tl_stage_new`, freed once.
        unsafe { tl_stage_free(self.0) }
    }
}

/// Numbers on their way from a card to the CPU.
#[derive(Debug)]
pub struct ReadBack {
    host: Tensor,
    done: Event,
}

impl ReadBack {
    /// Starts the copy, after all work so far.
    pub fn start(numbers: &Tensor) -> Result<Self> {
        let done = Event::record()?;
        let mut host: Handle = null_mut();
        // SAFETY: the tensor outlives the call, the event this value; on success `host` is a new tensor.
        check(unsafe { tl_read_back(handle(numbers), &mut host, done.as_ptr()) })?;
        Ok(Self { host: unsafe { Tensor::from_ptr(host) }, done })
    }

    /// The numbers. The CPU waits for the copy.
    pub fn wait(self) -> Result<Vec<f64>> {
        self.done.wait()?;
        Vec::try_from(self.host.to_kind(tch::Kind::Double).view([-1])).context("numbers of a step")
    }
}
