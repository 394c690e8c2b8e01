//! Sharded data-parallel training: FSDP, ZeRO-2 and DDP as one state machine over the model's units.
//!
//! | strategy         | weights           | gradients             | optimizer state | reduced                      |
//! |------------------|-------------------|-----------------------|-----------------|------------------------------|
//! | `full_shard`     | 1/W, two slots    | 1/W, two slots (fp32) | 1/W             | each micro-batch             |
//! | `hybrid_shard`   | 1/S, two slots    | 1/S, two slots        | 1/S             | so in a node; last between   |
//! | `shard_grad_op`  | whole             | whole (fp32)          | 1/W             | last micro-batch             |
//! | `ddp`            | whole             | whole (fp32)          | whole           | last micro-batch             |
//!
//! Two groups of ranks make all four: shards are kept by the S ranks of the *shard group*, and W/S *replicas* of them
//! exist. With slots, units share two buffers in turn, and only the shards persist; a unit's weights are gathered when a
//! pass is one unit ahead of it, its gradients are reduced when the backward pass is one unit past it:
//!
//! ```text
//! forward    | unit u        | unit u+1      |        backward | unit u          | unit u-1        |
//! meanwhile  | gather u+1    | gather u+2    |                 | gather u-1      | gather u-2      |
//!                                                              | reduce u+1      | reduce u        |
//! ```
//!
//! Where the backward pass enters a unit that holds another's gradients or those of the step before, it clears them, but
//! for those that the unit's first matrix products overwrite (`csrc/torch_cuda/gradients.h`): on a GPU nearly all.
//!
//! NCCL runs on a stream of its own, which begins after what the computing stream was given before; the computing stream
//! waits where a unit is entered. The CPU waits for nothing but Gloo. All buffers are allocated once; parameters and
//! their `.grad` are views of them for the whole run, so addresses stay.
//!
//! # Source
//! ZeRO (arXiv 1910.02054), PyTorch FSDP (arXiv 2304.11277), `fully_shard` of torchtitan.

use super::job::Job;
use super::layout::Layout;
use crate::bail_hint;
use crate::config::Strategy;
use crate::ffi::{FirstProducts, ProcessGroup, ReduceOp, Work};
use crate::model::Pass;
use anyhow::{Context, Result, ensure};
use std::sync::{Arc, Mutex, MutexGuard};
use tch::{Kind, Tensor};

/// Ranks that exchange weights and gradients.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The ranks that together keep one copy of everything; `None`: each keeps all.
    pub shard: Option<Arc<ProcessGroup>>,
    /// The ranks that keep the same shard; `None`: no other does.
    pub replica: Option<Arc<ProcessGroup>>,
}

impl Groups {
    /// The groups of a strategy in a job. All ranks call this.
    ///
    /// # Sync
    /// With `hybrid_shard` the CPU waits for the other ranks.
    ///
    /// # Errors
    /// `hybrid_shard` with nodes of unlike numbers of ranks, or a group that does not come together.
    pub fn of(job: &Job, strategy: Strategy) -> Result<Self> {
        // A group of one has nothing to exchange.
        let all = || (job.size() > 1).then(|| Arc::clone(job.group()));
        Ok(match strategy {
            Strategy::FullShard | Strategy::ShardGradOp => Self { shard: all(), replica: None },
            Strategy::Ddp => Self { shard: None, replica: all() },
            Strategy::HybridShard => {
                let nodes = job.nodes()?;
                if nodes.iter().any(|node| node.len() != nodes[0].len()) {
                    let counts: Vec<usize> = nodes.iter().map(Vec::len).collect();
                    bail_hint!(
                        "start as many ranks on each node, or use `distributed.strategy: full_shard`";
                        "`hybrid_shard` keeps a copy of everything on each node, but the nodes have {counts:?} ranks"
                    );
                }
                let place = (0..nodes.len()).find(|&i| nodes[i].contains(&job.rank()));
                let node = &nodes[place.context("this rank is on no node")?];
                let twins: Vec<usize> = nodes.iter().map(|node| node[job.local_rank()]).collect();
                let group = |name: String, members: &[usize]| -> Result<_> {
                    let alone = members.len() == 1;
                    let new = || job.new_group(&name, members, job.device(), None).map(Arc::new);
                    (!alone).then(new).transpose()
                };
                let shard = group(format!("shard-{}", node[0]), node)?;
                let replica = group(format!("replica-{}", job.local_rank()), &twins)?;
                Self { shard, replica }
            }
        })
    }

    /// This rank's shard and their number S.
    pub fn shards(&self) -> (i64, i64) {
        self.shard.as_ref().map_or((0, 1), |group| (group.rank() as i64, group.size() as i64))
    }

    /// This rank's replica and their number.
    pub fn replicas(&self) -> (i64, i64) {
        self.replica.as_ref().map_or((0, 1), |group| (group.rank() as i64, group.size() as i64))
    }
}

/// One unit's memory. A buffer is flat, laid out as `layout` says.
#[derive(Debug)]
pub(super) struct Unit {
    pub layout: Layout,
    /// (len,) in the dtype of computation: own, or in a slot.
    pub weights: Tensor,
    /// (len,) sums of gradients, fp32 in the mixed precisions: own, or in a slot.
    pub grads: Tensor,
    /// Those of each parameter, views of `grads`, (numel,).
    pub gradients: Vec<Tensor>,
    /// (len/S,) this rank's part of the weights, which the optimizer writes: in `weights` where that is its own.
    pub weight_shard: Tensor,
    /// (len/S,) this rank's part of the summed gradients: in `grads` where that is its own.
    pub grad_shard: Tensor,
    /// Which of the shared buffers it uses, if it does.
    pub slot: Option<usize>,
}

/// What is under way for a unit.
#[derive(Debug, Default)]
struct UnderWay {
    /// Weights have been gathered, or are being so.
    current: bool,
    gather: Option<Work>,
    /// The reduction in the shard group, and what it writes where that is not `grad_shard`.
    reduce: Option<(Work, Option<Tensor>)>,
    /// The same over replicas.
    replicate: Option<(Work, Option<Tensor>)>,
}

/// The state machine. Shared by the training loop and the hooks of the model's passes.
#[derive(Clone, Debug)]
pub struct Fsdp(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    groups: Groups,
    units: Vec<Unit>,
    under_way: Vec<UnderWay>,
    how: How,
    /// Gradients of each micro-batch are reduced, not only the last one's.
    each: bool,
    /// This micro-batch is the first of its step.
    first: bool,
    /// It is the last.
    last: bool,
    /// Of each unit's gradients, those that matrix products overwrite; `None` where products do not know of that.
    products: Option<Vec<FirstProducts>>,
    /// The units whose products are watched now.
    watched: Vec<usize>,
    /// How many units the backward pass has entered.
    entered: usize,
    failed: Option<anyhow::Error>,
}

/// What an [`Fsdp`] is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    /// Gradients travel in this dtype.
    pub reduce_kind: Kind,
    /// The embedding is the head's weight too: its gradient begins in the last unit.
    pub tied: bool,
    /// Passes say where they are ([`Fsdp::enter`]).
    pub hooked: bool,
    /// The program's own matrix products write gradients ([`FirstProducts`]).
    pub products: bool,
}

/// Bytes that a rank keeps for the whole run, the optimizer's state aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Weights in the dtype of computation, shards and slots.
    pub weights: u64,
    /// Gradient sums, shards and slots.
    pub gradients: u64,
}

impl Fsdp {
    pub(super) fn new(groups: Groups, units: Vec<Unit>, how: How) -> Self {
        let under_way = units.iter().map(|_| UnderWay::default()).collect();
        let each = units.iter().any(|unit| unit.slot.is_some());
        let products = || units.iter().map(|_| FirstProducts::default()).collect();
        let products = how.products.then(products);
        Self(Arc::new(Mutex::new(State {
            groups,
            units,
            under_way,
            how,
            each,
            first: false,
            last: true,
            products,
            watched: Vec::new(),
            entered: 0,
            failed: None,
        })))
    }

    /// A poisoned lock means a panic in a hook, which has its own message.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Before a pass enters a unit. A failure is kept for [`Fsdp::end_micro_batch`] or [`Fsdp::check`]: a pass has no way
    /// to return it.
    pub(super) fn enter(&self, pass: Pass, unit: usize) {
        let mut state = self.state();
        if state.failed.is_some() {
            return;
        }
        let entered = match pass {
            Pass::Forward => state.forward(unit),
            Pass::Backward => state.backward(unit),
        };
        if let Err(error) = entered {
            state.failed = Some(error);
        }
    }

    /// Before a step's micro-batches. What gradients hold is old: each unit's are cleared where the backward pass enters
    /// it, here where passes do not say so.
    pub fn begin_step(&self) {
        let mut state = self.state();
        state.first = true;
        if !state.how.hooked {
            state.units.iter_mut().for_each(|unit| drop(unit.grads.zero_()));
        }
    }

    /// `last` of its step: then gradients are reduced over all ranks.
    pub fn begin_micro_batch(&self, last: bool) {
        let mut state = self.state();
        (state.last, state.entered) = (last, 0);
    }

    /// After the backward pass: reduces what is left of it.
    ///
    /// # Sync
    /// With Gloo the CPU waits for the other ranks, here and wherever a pass enters a unit.
    ///
    /// # Errors
    /// A collective operation failed in this micro-batch, or in a forward pass since the last one; or the backward pass has
    /// not entered every unit.
    pub fn end_micro_batch(&self) -> Result<()> {
        let mut state = self.state();
        state.check()?;
        state.finish_backward()?;
        state.first = false;
        Ok(())
    }

    /// Whether a collective operation has failed since the last question.
    pub fn check(&self) -> Result<()> {
        self.state().check()
    }

    /// The optimizer has written the weight shards: whole weights are gathered anew, the first units' at once.
    pub fn weights_changed(&self) -> Result<()> {
        self.state().weights_changed()
    }

    /// Bytes kept for the whole run.
    pub fn held(&self) -> Held {
        let state = self.state();
        let bytes = |t: &Tensor| t.numel() as u64 * t.kind().elt_size_in_bytes() as u64;
        let (mut held, mut slots) = (Held::default(), [[0u64; 2]; SLOTS]);
        for unit in &state.units {
            let (weights, grads) = (bytes(&unit.weights), bytes(&unit.grads));
            match unit.slot {
                None => {
                    held.weights += weights;
                    held.gradients += grads;
                }
                Some(i) => {
                    held.weights += bytes(&unit.weight_shard);
                    held.gradients += bytes(&unit.grad_shard);
                    slots[i] = [slots[i][0].max(weights), slots[i][1].max(grads)];
                }
            }
        }
        for [weights, grads] in slots {
            held.weights += weights;
            held.gradients += grads;
        }
        held
    }
}

/// Shared buffers: two in turn, and one of its own for an embedding that is the head too.
pub(super) const SLOTS: usize = 3;

/// The buffer of unit u where units share them.
pub(super) fn slot_of(unit: usize, tied: bool) -> usize {
    if tied && unit == 0 { 2 } else { unit % 2 }
}

impl State {
    fn check(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn last_unit(&self) -> usize {
        self.units.len() - 1
    }

    /// Starts to gather a unit's weights, unless they are there. Where units share buffers, what lay in this one is gone.
    fn gather(&mut self, u: usize) -> Result<()> {
        if self.under_way[u].current {
            return Ok(());
        }
        if let Some(slot) = self.units[u].slot {
            for (other, way) in self.units.iter().zip(&mut self.under_way) {
                way.current &= other.slot != Some(slot);
            }
        }
        if let Some(group) = &self.groups.shard {
            let unit = &self.units[u];
            self.under_way[u].gather =
                Some(group.all_gather_into(&unit.weights, &unit.weight_shard)?);
        }
        self.under_way[u].current = true;
        Ok(())
    }

    /// The computing stream (with Gloo the CPU) waits for a unit's weights.
    fn await_weights(&mut self, u: usize) -> Result<()> {
        self.gather(u)?;
        self.under_way[u].gather.take().map_or(Ok(()), Work::wait)
    }

    fn forward(&mut self, u: usize) -> Result<()> {
        self.await_weights(u)?;
        if u < self.last_unit() { self.gather(u + 1) } else { Ok(()) }
    }

    fn backward(&mut self, u: usize) -> Result<()> {
        self.entered += 1;
        if u > 0 {
            self.await_weights(u)?;
            if u > 1 || !self.last {
                self.gather(u - 1)?; // the embedding's for the next forward pass alone
            }
        }
        if self.each || self.last {
            if u < self.last_unit() {
                self.reduce(u + 1)?;
            }
            if u + 2 <= self.last_unit() {
                self.finish_reduce(u + 2)?; // its buffer is this unit's
            }
        }
        // A tied head's gradient begins in the last unit and ends in the embedding.
        match self.how.tied {
            true if u == self.last_unit() => self.begin_gradients(&[u, 0]),
            true if u == 0 => Ok(()),
            _ => self.begin_gradients(&[u]),
        }
    }

    /// The gradients of these units are to be computed. What they hold goes, if it is another unit's or the last step's.
    fn begin_gradients(&mut self, units: &[usize]) -> Result<()> {
        self.end_gradients()?;
        for &u in units {
            let unit = &mut self.units[u];
            if !self.first && unit.slot.is_none() {
                continue;
            }
            let products = self.products.as_ref().map(|products| &products[u]);
            for (i, gradient) in unit.gradients.iter_mut().enumerate() {
                if !products.is_some_and(|products| products.overwrites(i)) {
                    let _ = gradient.zero_();
                }
            }
            if let Some(products) = products {
                products.begin(&unit.gradients)?;
                self.watched.push(u);
            }
        }
        Ok(())
    }

    /// The gradients that were to be computed are.
    fn end_gradients(&mut self) -> Result<()> {
        let Some(products) = &mut self.products else { return Ok(()) };
        let mut watched = self.watched.drain(..);
        watched.try_for_each(|u| products[u].end(&self.units[u].gradients))
    }

    fn finish_backward(&mut self) -> Result<()> {
        let (entered, units) = (self.entered, self.units.len());
        ensure!(
            entered == units || !self.how.hooked,
            "the backward pass entered {entered} of {units} units: the others' gradients are not known to be new"
        );
        self.end_gradients()?;
        if !(self.each || self.last) {
            return Ok(());
        }
        self.reduce(0)?;
        for u in 0..self.units.len() {
            self.finish_reduce(u)?;
        }
        for u in 0..self.units.len() {
            if let Some((work, sum)) = self.under_way[u].replicate.take() {
                work.wait()?;
                if let Some(sum) = sum {
                    self.units[u].grad_shard.copy_(&sum);
                }
            }
        }
        Ok(())
    }

    /// Starts to sum a unit's gradients over the shard group.
    fn reduce(&mut self, u: usize) -> Result<()> {
        let unit = &self.units[u];
        let Some(group) = &self.groups.shard else { return self.replicate(u) };
        let whole = unit.grads.to_kind(self.how.reduce_kind); // the same tensor where the dtype is
        let own_place = (self.first || unit.slot.is_none()) && whole.kind() == unit.grads.kind();
        let apart = (!own_place)
            .then(|| Tensor::empty([unit.layout.shard], (self.how.reduce_kind, whole.device())));
        let shard = apart.as_ref().unwrap_or(&unit.grad_shard);
        let work = group.reduce_scatter_into(shard, &whole, ReduceOp::Sum)?;
        self.under_way[u].reduce = Some((work, apart));
        Ok(())
    }

    /// Takes over what the reduction gave, if one is under way.
    fn finish_reduce(&mut self, u: usize) -> Result<()> {
        let Some((work, apart)) = self.under_way[u].reduce.take() else { return Ok(()) };
        work.wait()?;
        if let Some(sum) = apart {
            let unit = &mut self.units[u];
            match unit.slot {
                Some(_) if !self.first => {
                    let _ = unit.grad_shard.g_add_(&sum);
                }
                _ => unit.grad_shard.copy_(&sum),
            }
        }
        self.replicate(u)
    }

    /// Starts to sum a shard over its replicas, at the end of a step.
    fn replicate(&mut self, u: usize) -> Result<()> {
        let (Some(group), true) = (&self.groups.replica, self.last) else { return Ok(()) };
        let shard = &self.units[u].grad_shard;
        let sum = shard.to_kind(self.how.reduce_kind);
        let work = group.all_reduce(&sum, ReduceOp::Sum)?;
        let apart = (sum.kind() != shard.kind()).then_some(sum);
        self.under_way[u].replicate = Some((work, apart));
        Ok(())
    }

    fn weights_changed(&mut self) -> Result<()> {
        for way in &mut self.under_way {
            if let Some(work) = way.gather.take() {
                work.wait()?; // one that no pass needed
            }
            way.current = false;
        }
        let ahead = if self.each { 2 } else { self.units.len() };
        for u in 0..ahead.min(self.units.len()) {
            self.gather(u)?;
        }
        Ok(())
    }
}
