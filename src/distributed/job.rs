//! What training gets to know of the other ranks.

use super::store::Store;
use super::watch::Watch;
use super::world::World;
use crate::config::{CommBackend, RunConfig};
use crate::ffi::{self, Backend, ProcessGroup};
use crate::guard;
use anyhow::{Context, Result};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// One rank of a run, connected to all others and watched.
///
/// From [`super::meet`] on, a rank that dies, fails, or neither lives nor makes progress ends the process of every
/// rank, whatever its main thread is waiting for.
pub struct Job {
    world: World,
    device: Device,
    group: Arc<ProcessGroup>,
    host_group: ProcessGroup,
    backend: CommBackend,
    address: String,
    timeout: Duration,
    store: Arc<Store>,
    watch: Watch,
}

impl Job {
    /// Connects the groups of a rank that has met the others. A rank that cannot ends the job.
    pub(super) fn connect(
        world: World,
        config: &RunConfig,
        store: Arc<Store>,
        device: Device,
        address: &str,
    ) -> Result<Self> {
        if device.is_cuda() {
            ffi::configure_allocator()?; // sets a variable of the environment: before there are threads
        }
        let timeouts = &config.distributed;
        let watch = Watch::start(&world, timeouts, config.out_dir.clone(), Arc::clone(&store))?;
        // Longer than the watch needs to name the rank that everybody waits for.
        let timeout = Duration::from_secs_f64(timeouts.timeout + timeouts.heartbeat_timeout);
        let group = |name: &str, device: Device| {
            let (backend, key) = (backend_of(timeouts.backend, device), store.key(name));
            let (rank, size) = (world.rank, world.size);
            let tcp = store.tcp();
            ProcessGroup::new(tcp, &key, backend, rank, size, device, Some(address), timeout)
        };
        let connect = || {
            if let Device::Cuda(card) = device {
                ffi::cuda_set_device(card)?;
            }
            Ok((group("host", Device::Cpu)?, group("device", device)?))
        };
        match connect() {
            Ok((host_group, group)) => {
                let (group, address) = (Arc::new(group), address.to_owned());
                let backend = timeouts.backend;
                Ok(Self {
                    world,
                    device,
                    group,
                    host_group,
                    backend,
                    address,
                    timeout,
                    store,
                    watch,
                })
            }
            Err(error) => watch.fail(&error),
        }
    }

    /// This rank, 0 to [`Job::size`] - 1.
    pub fn rank(&self) -> usize {
        self.world.rank
    }

    /// Ranks on all nodes, W.
    pub fn size(&self) -> usize {
        self.world.size
    }

    /// This rank among those of its node.
    pub fn local_rank(&self) -> usize {
        self.world.local_rank
    }

    /// This rank's own card, or the CPU.
    pub fn device(&self) -> Device {
        self.device
    }

    /// All ranks, for tensors on [`Job::device`].
    pub fn group(&self) -> &Arc<ProcessGroup> {
        &self.group
    }

    /// A further group, of these ranks, this one among them, for tensors on `device`. All of them call this, with a
    /// name that is used once.
    ///
    /// `timeout` of an operation; `None`: as the others'.
    pub fn new_group(
        &self,
        name: &str,
        members: &[usize],
        device: Device,
        timeout: Option<Duration>,
    ) -> Result<ProcessGroup> {
        let place = members.iter().position(|&rank| rank == self.world.rank);
        let place = place.with_context(|| format!("rank {} is not in {name}", self.world.rank))?;
        ProcessGroup::new(
            self.store.tcp(),
            &self.store.key(name),
            backend_of(self.backend, device),
            place,
            members.len(),
            device,
            Some(&self.address),
            timeout.unwrap_or(self.timeout),
        )
    }

    /// All ranks, for tensors on the host: Gloo. Another group than [`Job::group`] on the CPU too.
    pub fn host_group(&self) -> &ProcessGroup {
        &self.host_group
    }

    /// Ranks of each node; a node's are numbered in a row. All ranks call this.
    ///
    /// # Sync
    /// The CPU waits for the other ranks.
    pub fn nodes(&self) -> Result<Vec<Vec<usize>>> {
        let local = Tensor::from_slice(&[self.local_rank() as i64]);
        let all = Tensor::zeros([self.size() as i64], (Kind::Int64, Device::Cpu)); // (W,)
        self.host_group.all_gather_into(&all, &local)?.wait()?;
        let mut nodes: Vec<Vec<usize>> = Vec::new();
        for (rank, local) in Vec::<i64>::try_from(&all)?.into_iter().enumerate() {
            match nodes.last_mut() {
                Some(node) if local > 0 => node.push(rank),
                _ => nodes.push(vec![rank]),
            }
        }
        Ok(nodes)
    }

    /// Keys and values that all ranks see.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Whether this rank's stdout and stderr are the user's terminal; those of the others are their logs.
    pub fn prints(&self) -> bool {
        self.world.rank == 0
    }

    /// Tells the watch that this rank makes progress: it begins `stage` ("reading data") of `step`.
    ///
    /// Call it at the same places on all ranks, some times a step: where the job hangs for `distributed.timeout`
    /// seconds, the rank with the fewest calls is the one that the others wait for. From the first call on, that time
    /// also bounds each span between two. Costs a lock that nobody holds for long.
    pub fn tick(&self, step: u64, stage: &'static str) {
        self.watch.tick(step, stage);
    }

    /// Notes that this rank waits, as for a disk, for what other ranks may not wait for, or less often: it is not stuck. Who
    /// is to blame for a job that is shows by [`Job::tick`] alone.
    pub fn wait_on(&self, step: u64, stage: &'static str) {
        self.watch.wait_on(step, stage);
    }

    /// Writes a line to this rank's stderr; if the rank fails, the message names the last one.
    pub fn say(&self, line: &str) {
        self.note(line);
        eprintln!("{line}");
    }

    /// Notes a line that was written by other means as this rank's last.
    pub fn note(&self, line: &str) {
        self.watch.note(line);
    }

    /// Asked at the end of `step` on every rank: the signal for which all ranks stop here, all at the same step.
    ///
    /// `local` is the signal that came to this rank, if one did. One rank's is enough; the ranks agree beside the main
    /// thread, and none goes on while others may stop before. Costs a lock that nobody holds for long.
    ///
    /// # Sync
    /// While a stop is being agreed on, at most once, the CPU waits some tenths of a second for the other ranks' votes.
    pub fn agree_to_stop(&self, local: Option<i32>, step: u64) -> Option<i32> {
        self.watch.agree_to_stop(local, step)
    }

    /// Runs training. Its error, or panic, ends the job on all ranks and with it this process, after a message that
    /// names this rank; its exit code is returned when all ranks are through.
    pub fn run(self, train: impl FnOnce(&Self) -> Result<u8>) -> Result<u8> {
        let lower = "lower `train.micro_batch_size`";
        match guard::catch("training", self.device, lower, || train(&self)) {
            Ok(code) => self.finish().map(|()| code),
            Err(error) => self.watch.fail(&error),
        }
    }

    /// Leaves in order, when all ranks are through.
    pub fn finish(self) -> Result<()> {
        let left = self.group.finish().and_then(|()| self.host_group.finish());
        match left {
            Ok(()) => self.watch.finish(),
            Err(error) => self.watch.fail(&error),
        }
        Ok(())
    }
}

/// What carries tensors that are on `device`.
fn backend_of(choice: CommBackend, device: Device) -> Backend {
    match choice {
        CommBackend::Auto => Backend::of(device),
        CommBackend::Gloo => Backend::Gloo,
    }
}
