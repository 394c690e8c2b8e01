//! What is done to a model to make it one of many, in one function and in this order.

use super::fsdp::{Fsdp, Groups, How, SLOTS, Unit, slot_of};
use super::layout::Layout;
use crate::bail_hint;
use crate::config::{OptimizerConfig, Precision, ReduceDtype, Strategy};
use crate::ffi::{self, ProcessGroup, ReduceOp};
use crate::model::{AtUnit, GPT};
use crate::train::optimizer::{AdamW, Part, gradient_kind, weight_kind};
use anyhow::Result;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// A model whose ranks share the work, and what they do about it.
#[derive(Clone, Debug)]
pub struct Ranks {
    /// Who keeps what, and when it travels.
    pub fsdp: Fsdp,
    /// How each unit is laid out, in the model's order.
    pub layouts: Vec<Layout>,
    groups: Groups,
    world: Arc<ProcessGroup>,
}

/// What is asked of [`parallelize`].
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Who keeps what.
    pub strategy: Strategy,
    /// Dtype in which gradients travel.
    pub reduce_dtype: ReduceDtype,
    /// Precision of the run.
    pub precision: Precision,
    /// The optimizer.
    pub optimizer: &'a OptimizerConfig,
    /// Ranks that share the memory of this rank's host.
    pub sharers: usize,
}

/// Writes the fp32 values of a parameter, told by its lit-gpt name, into a tensor of its shape.
pub type Fill<'a> = dyn Fn(&str, &Tensor) -> Result<()> + 'a;

/// Makes an fp32 model one of many, and gives it its optimizer:
///
/// 1. the parameters of each unit get places in one flat buffer, cut into equal shards ([`Layout`]);
/// 2. there are buffers in the dtypes of `precision`: two that the units share in turn (`full_shard`, `hybrid_shard`) or
///    one for each, of weights and of gradients; and memory of the host for the optimizer, where it is to be there;
/// 3. unit by unit all ranks take rank 0's weights, for unlike cards draw unlike random numbers. This rank's part of them
///    is kept, in fp32 as masters; parameters and their gradients become views of the buffers, and what the unit was in
///    before is given back;
/// 4. AdamW gets this rank's parts of weights and gradients;
/// 5. hooks on the passes bring weights and send off gradients ([`Fsdp`]).
///
/// With `fill` the model is a [`GPT::outline`], and `fill` is asked for each parameter in the model's order; what it writes
/// counts on rank 0. So no card holds more than one unit in whole fp32 beside what it keeps. Without, the model has weights.
///
/// Of adapters each rank has all, beside all weights: their gradients, one buffer, travel once a step.
///
/// Activation checkpointing, attention and fused kernels are the model's own and know nothing of this.
///
/// # Sync
/// With Gloo the CPU waits for the other ranks; with `cpu_offload` for the copies to the host.
///
/// # Errors
/// `fp8-mixed` or adapters with a strategy other than `ddp`; the optimizer's own; those of `fill`, on rank 0 alone: the
/// others wait in a collective operation until the watch ends the job.
pub fn parallelize(
    model: &mut GPT,
    groups: Groups,
    world: Arc<ProcessGroup>,
    plan: Plan,
    fill: Option<&Fill>,
) -> Result<(Ranks, AdamW)> {
    if plan.precision == Precision::Fp8Mixed && plan.strategy != Strategy::Ddp {
        bail_hint!(
            "set `distributed.strategy: ddp`, or `precision: bf16-mixed`";
            "`fp8-mixed` needs whole weights on each rank for its casts; `distributed.strategy` is `{}`",
            serde_json::to_value(plan.strategy)?.as_str().unwrap_or_default()
        );
    }
    let adapted = !model.adapters().is_empty();
    if adapted && plan.strategy != Strategy::Ddp {
        bail_hint!(
            "set `distributed.strategy: ddp`";
            "adapters are trained beside whole weights on each rank"
        );
    }
    let _guard = tch::no_grad_guard();
    let (rank, ranks) = groups.shards();
    let device = model.device();

    // 1. Places.
    let parameters = model.units();
    let layout = |unit: &Vec<(String, Tensor)>| {
        Layout::new(unit.iter().map(|(name, p)| (name.clone(), p.size())), ranks)
    };
    let layouts: Vec<Layout> = parameters.iter().map(layout).collect();

    // 2. Buffers, and the host's memory.
    let kinds = [weight_kind(plan.precision), gradient_kind(plan.precision)];
    let tied = model.lm_head.is_none();
    let cuts = matches!(plan.strategy, Strategy::FullShard | Strategy::HybridShard);
    let shares = cuts && groups.shard.is_some();
    let units = buffers(&layouts, kinds, device, rank, shares.then_some(tied));
    let (precision, fused) = (plan.precision, model.fused);
    let sizes: Vec<i64> =
        layouts.iter().flat_map(|layout| layout.slices(rank)).map(|slice| slice.len).collect();
    let offload = AdamW::offload(&sizes, device, fused, precision, plan.optimizer, plan.sharers)?;

    // 3. Weights.
    let values = |unit: &Vec<(String, Tensor)>| -> Vec<Tensor> {
        unit.iter().map(|(_, p)| p.detach()).collect()
    };
    let held: Vec<Vec<Tensor>> = match fill {
        Some(_) => parameters.iter().map(|_| Vec::new()).collect(),
        None => parameters.iter().map(values).collect(),
    };
    if adapted {
        model.to_kind(kinds[0]); // the weights beside them, which have no place in a buffer
    }
    let (mut parts, mut before) = (Vec::new(), 0); // parameters of the units before
    for (((unit, layout), parameters), held) in
        units.iter().zip(&layouts).zip(&parameters).zip(held)
    {
        let whole = match fill {
            Some(fill) => filled(parameters, device, fill)?,
            None => held,
        };
        for value in &whole {
            world.broadcast(value, 0)?.wait()?;
        }
        for slice in layout.slices(rank) {
            let part = whole[slice.place].view([-1]).narrow(0, slice.in_parameter, slice.len); // (n,)
            let cut = |shard: &Tensor| shard.narrow(0, slice.in_shard, slice.len); // (n,)
            let mut weight = cut(&unit.weight_shard);
            let exact = match &offload {
                Some(offload) => Some(offload.take_over(parts.len(), &part)),
                None => precision.is_mixed().then(|| part.copy()),
            };
            if exact.is_none() {
                weight.copy_(&part);
            }
            parts.push(Part {
                name: layout.places[slice.place].name.clone(),
                index: before + slice.place,
                start: Some(slice.in_parameter),
                weight,
                grad: cut(&unit.grad_shard),
                exact,
            });
        }
        for (place, (_, parameter)) in layout.places.iter().zip(parameters) {
            let at =
                |flat: &Tensor| flat.narrow(0, place.start, place.numel()).view(&place.shape[..]);
            let mut parameter = parameter.shallow_clone();
            parameter.set_data(&at(&unit.weights));
            let parameter = parameter.set_requires_grad(true);
            ffi::set_grad(&parameter, &at(&unit.grads))?;
        }
        before += layout.places.len();
    }

    // 4. The optimizer of this rank's parts.
    let optimizer = AdamW::of_parts(parts, device, offload, fused, precision, plan.optimizer);

    // 5. Hooks.
    let reduce_kind = match plan.reduce_dtype {
        ReduceDtype::Bf16 => Kind::BFloat16,
        ReduceDtype::Fp32 => Kind::Float,
    };
    let how = How { reduce_kind, tied, hooked: !adapted, products: optimizer.is_fused() };
    let fsdp = Fsdp::new(groups.clone(), units, how);
    if !adapted {
        let hooks = fsdp.clone();
        model.at_unit = Some(AtUnit(Arc::new(move |pass, unit| hooks.enter(pass, unit))));
    }
    fsdp.weights_changed()?;
    Ok((Ranks { fsdp, layouts, groups, world }, optimizer))
}

/// A unit's fp32 weights in memory of their own.
fn filled(unit: &[(String, Tensor)], device: Device, fill: &Fill) -> Result<Vec<Tensor>> {
    let value = |(name, parameter): &(String, Tensor)| {
        let value = Tensor::empty(parameter.size(), (Kind::Float, device));
        fill(name, &value).map(|()| value)
    };
    unit.iter().map(value).collect()
}

/// Zeroed buffers of all units, weights and gradients in `kinds`; units share slots where `shared` says whether the head
/// is tied.
fn buffers(
    layouts: &[Layout],
    kinds: [Kind; 2],
    device: Device,
    rank: i64,
    shared: Option<bool>,
) -> Vec<Unit> {
    let zeros = |n: i64, kind: Kind| Tensor::zeros([n], (kind, device));
    let slot = |u: usize| shared.map(|tied| slot_of(u, tied));
    let mut lengths = [0; SLOTS];
    for (u, layout) in layouts.iter().enumerate() {
        if let Some(i) = slot(u) {
            lengths[i] = layout.len.max(lengths[i]);
        }
    }
    let slots = lengths.map(|n| kinds.map(|kind| zeros(n, kind)));
    let unit = |(u, layout): (usize, &Layout)| {
        let whole = match slot(u) {
            Some(i) => slots[i].each_ref().map(|t| t.narrow(0, 0, layout.len)),
            None => kinds.map(|kind| zeros(layout.len, kind)),
        };
        let shards = match slot(u) {
            Some(_) => kinds.map(|kind| zeros(layout.shard, kind)),
            None => whole.each_ref().map(|t| t.narrow(0, rank * layout.shard, layout.shard)),
        };
        let ([weights, grads], [weight_shard, grad_shard]) = (whole, shards);
        let gradients = layout.places.iter().map(|p| grads.narrow(0, p.start, p.numel())).collect();
        let (layout, slot) = (layout.clone(), slot(u));
        Unit { layout, weights, grads, gradients, weight_shard, grad_shard, slot }
    };
    layouts.iter().enumerate().map(unit).collect()
}

impl Ranks {
    /// W.
    pub fn size(&self) -> usize {
        self.world.size()
    }

    /// This rank, 0 to W - 1.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// Who exchanges what.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Of a step: the gradient norm over all of the model, the loss, and the factor by which gradients that were scaled
    /// for `expected` targets are still to be multiplied, each `() fp32`; from this rank's norm, loss and targets.
    ///
    /// # Sync
    /// With Gloo the CPU waits for the other ranks.
    pub fn totals(
        &self,
        norm: &Tensor,
        loss: &Tensor,
        n_targets: i64,
        expected: f64,
    ) -> Result<[Tensor; 3]> {
        let fp64 = |x: &Tensor| x.to_kind(Kind::Double).view([1]);
        let targets = Tensor::full([1], n_targets as f64, (Kind::Double, norm.device()));
        let squared = fp64(norm).square() / self.groups.replicas().1 as f64; // each replica has all shards
        let sums = Tensor::cat(&[squared, fp64(loss), targets], 0); // (3,)
        self.sum(&sums)?;
        let fp32 = |x: Tensor| x.to_kind(Kind::Float);
        let factor = sums.get(2).clamp_min(1.0).reciprocal() * expected; // ()
        let (norm, loss) = (sums.get(0).sqrt() * &factor, sums.get(1) * &factor);
        Ok([fp32(norm), fp32(loss), fp32(factor)])
    }

    /// Fails where a collective operation of any of the groups failed. Does not wait: ask where the CPU has waited for
    /// the card, before using what was computed.
    pub fn check(&self) -> Result<()> {
        self.fsdp.check()?;
        let groups = [Some(&self.world), self.groups.shard.as_ref(), self.groups.replica.as_ref()];
        groups.into_iter().flatten().try_for_each(|group| group.check())
    }

    /// Replaces a tensor by its mean over all ranks.
    ///
    /// # Sync
    /// As [`Ranks::sum`].
    pub fn mean(&self, x: &Tensor) -> Result<()> {
        self.sum(x)?;
        let _ = tch::no_grad(|| x.shallow_clone().g_div_scalar_(self.size() as f64));
        Ok(())
    }

    /// Replaces a tensor by its sum over all ranks.
    ///
    /// # Sync
    /// With Gloo the CPU waits for the other ranks.
    pub fn sum(&self, x: &Tensor) -> Result<()> {
        self.world.all_reduce(x, ReduceOp::Sum)?.wait()
    }
}
