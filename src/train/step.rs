//! One optimizer step: forward, loss, backward for each micro-batch, then clip and update.

use super::optimizer::AdamW;
use crate::config::TrainConfig;
use crate::data::Batch;
use crate::distributed::Ranks;
use crate::ffi::{Graph, Staged};
use crate::model::GPT;
use crate::ops::LossScalars;
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// What a step leaves on the device; reading it makes the CPU wait.
pub struct StepOutput {
    /// Mean loss over the step's targets, `() fp32`.
    pub loss: Tensor,
    /// Gradient norm before clipping, `() fp32`.
    pub grad_norm: Tensor,
}

/// Accumulates the gradients of all micro-batches of a step and updates the weights once.
///
/// The loss is the mean over the targets (!= -100) of all micro-batches, so it does not depend on how the
/// step is cut into micro-batches, nor on how many `ranks` share it; it includes `label_smoothing` and `z_loss`. `train`
/// says those and how to clip. Several ranks: `batches` are this one's.
///
/// # Errors
/// A failure of libtorch, such as CUDA out of memory, comes as a panic of tch;
/// [`crate::guard::catch`] around the call makes an error of it.
///
/// # Sync
/// None on a GPU with fused kernels, but while a graph is captured: the caller reads the output when it wants to. Over
/// Gloo the CPU waits for the other ranks.
pub fn train_step(
    model: &GPT,
    optimizer: &mut AdamW,
    micro: &mut MicroStep,
    batches: &[Batch],
    lr: f64,
    train: &TrainConfig,
    ranks: Option<&Ranks>,
) -> Result<StepOutput> {
    let n_targets: i64 = batches.iter().map(|batch| batch.n_targets).sum();
    // Other ranks' targets are not known yet: as if every token were one, and put right at the end.
    let n_tokens: i64 = batches.iter().map(|batch| batch.target.numel() as i64).sum();
    let expected = ranks.map_or(n_targets, |ranks| n_tokens * ranks.size() as i64).max(1) as f64;
    let scalars = LossScalars {
        scale: 1.0 / expected,
        label_smoothing: train.label_smoothing,
        z_loss: train.z_loss,
    };
    let device = model.device();
    let mut loss = Tensor::zeros([], (Kind::Float, device));
    if let Some(ranks) = ranks {
        ranks.fsdp.begin_micro_batch(false);
    }
    if let (true, Some(first)) = (std::mem::take(&mut micro.find_scales), batches.first()) {
        find_scales(model, first, scalars)?;
        optimizer.clear_gradients();
    }
    let coming: Vec<[Coming; 2]> =
        batches.iter().map(|batch| stage(batch, device)).collect::<Result<_>>()?;
    if let Some(ranks) = ranks {
        ranks.fsdp.begin_step();
    }
    for (i, [input, target]) in coming.into_iter().enumerate() {
        let (input, target) = (input.take()?, target.take()?); // (B, T) x2
        let first = (i == 0).then_some(&mut *optimizer);
        if let Some(ranks) = ranks {
            ranks.fsdp.begin_micro_batch(i + 1 == batches.len());
        }
        let _ = loss.g_add_(&micro.run(model, first, &input, &target, scalars)?);
        if let Some(ranks) = ranks {
            ranks.fsdp.end_micro_batch()?;
        }
    }
    let (loss, grad_norm) = match ranks {
        None => (loss, optimizer.step(lr, train.max_norm)?),
        Some(ranks) => {
            let norm = optimizer.grad_norm()?;
            let [norm, loss, factor] = ranks.totals(&norm, &loss, n_targets, expected)?;
            optimizer.step_by_norm(lr, train.max_norm, &norm, &factor)?;
            ranks.fsdp.weights_changed()?;
            (loss, norm)
        }
    };
    model.refresh_fp8_weights()?;
    Ok(StepOutput { loss, grad_norm })
}

/// Forward, loss and backward of one micro-batch; gradients are added to the weights' `.grad`, or overwrite it
/// ([`AdamW::overwriting`]) in the first of a step.
///
/// With `graph`, its GPU work is captured once as a CUDA graph and then launched by one call each time that shape and
/// scalars are the same; others run as if there were no graph. The first of a step is a graph of its own.
#[derive(Debug, Default)]
pub struct MicroStep {
    graph: bool,
    /// Find the scales of `fp8-mixed` by the first batch before the first step.
    pub find_scales: bool,
    runs: [usize; 2],
    captured: [Option<Captured>; 2],
}

/// A captured micro-step with the memory that it reads and writes.
#[derive(Debug)]
struct Captured {
    graph: Graph,
    input: Tensor,  // (B, T)
    target: Tensor, // (B, T)
    loss: Tensor,   // ()
    scalars: LossScalars,
}

impl MicroStep {
    /// First micro-batches before the capture of either: libraries make their workspaces, and products are chosen by
    /// measurement, in the second one those that overwrite. What captures made is out of reach for runs without graph,
    /// so that none may follow.
    const WARM_UP: usize = 2;

    /// `graph`: capture it; on a GPU only.
    pub fn new(graph: bool) -> Self {
        Self { graph, ..Self::default() }
    }

    /// The loss of the micro-batch, `() fp32`. With the optimizer it is the first of its step: gradients that are
    /// products overwrite.
    ///
    /// # Shapes
    /// input, target (B, T) of i64 on the model's device.
    pub fn run(
        &mut self,
        model: &GPT,
        optimizer: Option<&mut AdamW>,
        input: &Tensor,
        target: &Tensor,
        scalars: LossScalars,
    ) -> Result<Tensor> {
        let first = optimizer.is_some();
        let which = usize::from(!first);
        self.runs[which] += 1;
        let warm = match first {
            true => self.runs[0] > Self::WARM_UP,
            false => self.runs[0] >= Self::WARM_UP && self.runs[1] > 1,
        };
        if !self.graph || !warm {
            return forward_backward(model, optimizer, input, target, scalars);
        }
        let [of_first, of_others] = &mut self.captured;
        let (captured, other) = if first { (of_first, of_others) } else { (of_others, of_first) };
        if captured.is_none() {
            let other = other.as_ref().map(|c| &c.graph);
            let work = |input: &Tensor, target: &Tensor| {
                forward_backward(model, optimizer, input, target, scalars)
            };
            let new = Captured::new(input, target, scalars, other, work)?;
            return captured.insert(new).run(input, target);
        }
        match captured {
            Some(c) if c.scalars == scalars && c.input.size() == input.size() => {
                c.run(input, target)
            }
            _ => forward_backward(model, optimizer, input, target, scalars),
        }
    }
}

impl Captured {
    /// The graph uses the memory of `other` again, which never runs at the same time.
    fn new(
        input: &Tensor,
        target: &Tensor,
        scalars: LossScalars,
        other: Option<&Graph>,
        work: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let (input, target) = (input.copy(), target.copy());
        let mut loss = Tensor::zeros([], (Kind::Float, input.device()));
        let graph = Graph::capture(other, || {
            loss.copy_(&work(&input, &target)?);
            Ok(())
        })?;
        Ok(Self { graph, input, target, loss, scalars })
    }

    fn run(&mut self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.input.copy_(input);
        self.target.copy_(target);
        self.graph.replay()?;
        Ok(self.loss.shallow_clone())
    }
}

fn forward_backward(
    model: &GPT,
    optimizer: Option<&mut AdamW>,
    input: &Tensor,
    target: &Tensor,
    scalars: LossScalars,
) -> Result<Tensor> {
    model.update_fp8_scales()?; // from the micro-batch before
    let loss = model.loss(input, target, scalars); // ()
    match optimizer {
        Some(optimizer) => optimizer.overwriting(|| {
            loss.backward();
            Ok(())
        })?,
        None => loss.backward(),
    }
    Ok(loss.detach())
}

/// Runs a batch without learning from it until the scales of `fp8-mixed`, which come from the micro-batch before, fit:
/// a scale that was wrong makes those of the layers after it wrong, once.
fn find_scales(model: &GPT, batch: &Batch, scalars: LossScalars) -> Result<()> {
    let Some(fp8) = &model.fp8 else { return Ok(()) };
    fp8.guess_gradients(1.0 / scalars.scale);
    let [input, target] = stage(batch, model.device())?;
    let (input, target) = (input.take()?, target.take()?); // (B, T) x2
    for _ in 0..6 {
        let _ = forward_backward(model, None, &input, &target, scalars)?;
    }
    Ok(())
}

/// Token ids on their way to the model's device.
pub enum Coming {
    /// Copied from page-locked memory beside the work before.
    Staged(Staged),
    /// On the CPU, where the model is.
    Here(Tensor),
}

impl Coming {
    /// Starts the copy.
    pub fn new(tokens: &Tensor, device: Device) -> Result<Self> {
        Ok(match device {
            Device::Cuda(_) => Self::Staged(Staged::new(tokens, device)?),
            _ => Self::Here(tokens.shallow_clone()),
        })
    }

    /// The ids on the device. The stream waits for the copy, the CPU does not.
    pub fn take(self) -> Result<Tensor> {
        match self {
            Self::Staged(tokens) => tokens.take(),
            Self::Here(tokens) => Ok(tokens),
        }
    }
}

/// Input and target of a batch on their way.
pub fn stage(batch: &Batch, device: Device) -> Result<[Coming; 2]> {
    Ok([Coming::new(&batch.input, device)?, Coming::new(&batch.target, device)?])
}
