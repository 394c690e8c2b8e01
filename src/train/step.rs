//! One optimizer step: forward, loss, backward for each micro-batch, then clip and update.

use super::objective::Objective;
use super::optimizer::AdamW;
use crate::config::TrainConfig;
use crate::data::Batch;
use crate::distributed::Ranks;
use crate::ffi::{Graph, Staged};
use crate::model::GPT;
use crate::ops::{Documents, LossScalars};
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// What a step leaves on the device; reading it makes the CPU wait.
pub struct StepOutput {
    /// Mean loss over the step's targets, `() fp32`.
    pub loss: Tensor,
    /// Gradient norm before clipping, `() fp32`.
    pub grad_norm: Tensor,
    /// Of preferences, what [`Objective::take`] says.
    pub rewards: Option<Tensor>,
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
    // Other ranks' targets are not known yet, nor how long their rows are: as if each were full of them, and put right at
    // the end.
    let full = batches.len() as i64 * train.micro_batch_size as i64 * model.config.block_size;
    let expected = ranks.map_or(n_targets, |ranks| full * ranks.size() as i64).max(1) as f64;
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
    let coming: Vec<Coming> =
        batches.iter().map(|batch| Coming::new(batch, device)).collect::<Result<_>>()?;
    if let Some(ranks) = ranks {
        ranks.fsdp.begin_step();
    }
    for (i, batch) in coming.into_iter().enumerate() {
        let batch = batch.take()?;
        let first = (i == 0).then_some(&mut *optimizer);
        if let Some(ranks) = ranks {
            ranks.fsdp.begin_micro_batch(i + 1 == batches.len());
        }
        let _ = loss.g_add_(&micro.run(model, first, &batch, scalars)?);
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
    let rewards = micro.objective.take();
    if let (Some(ranks), Some(rewards)) = (ranks, &rewards) {
        ranks.mean(rewards)?;
    }
    Ok(StepOutput { loss, grad_norm, rewards })
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
    /// What is made smaller.
    pub objective: Objective,
    runs: [usize; 2],
    captured: [Option<Captured>; 2],
}

/// A captured micro-step with the memory that it reads and writes.
#[derive(Debug)]
struct Captured {
    graph: Graph,
    batch: Batch,
    loss: Tensor, // ()
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
    /// products overwrite. The batch is on the model's device.
    pub fn run(
        &mut self,
        model: &GPT,
        optimizer: Option<&mut AdamW>,
        batch: &Batch,
        scalars: LossScalars,
    ) -> Result<Tensor> {
        let first = optimizer.is_some();
        let which = usize::from(!first);
        self.runs[which] += 1;
        let warm = match first {
            true => self.runs[0] > Self::WARM_UP,
            false => self.runs[0] >= Self::WARM_UP && self.runs[1] > 1,
        };
        let objective = &self.objective;
        if !self.graph || !warm {
            return forward_backward(model, objective, optimizer, batch, scalars);
        }
        let [of_first, of_others] = &mut self.captured;
        let (captured, other) = if first { (of_first, of_others) } else { (of_others, of_first) };
        if captured.is_none() {
            let other = other.as_ref().map(|c| &c.graph);
            let work =
                |batch: &Batch| forward_backward(model, objective, optimizer, batch, scalars);
            let new = Captured::new(batch, scalars, other, work)?;
            return captured.insert(new).run(batch);
        }
        match captured {
            Some(c) if c.scalars == scalars && c.batch.input.size() == batch.input.size() => {
                c.run(batch)
            }
            _ => forward_backward(model, objective, optimizer, batch, scalars),
        }
    }
}

impl Captured {
    /// The graph uses the memory of `other` again, which never runs at the same time.
    fn new(
        batch: &Batch,
        scalars: LossScalars,
        other: Option<&Graph>,
        work: impl FnOnce(&Batch) -> Result<Tensor>,
    ) -> Result<Self> {
        let batch = Batch {
            input: batch.input.copy(),
            target: batch.target.copy(),
            documents: batch.documents.as_ref().map(Documents::copy),
            ..*batch
        };
        let mut loss = Tensor::zeros([], (Kind::Float, batch.input.device()));
        let graph = Graph::capture(other, || {
            loss.copy_(&work(&batch)?);
            Ok(())
        })?;
        Ok(Self { graph, batch, loss, scalars })
    }

    fn run(&mut self, batch: &Batch) -> Result<Tensor> {
        self.batch.input.copy_(&batch.input);
        self.batch.target.copy_(&batch.target);
        if let (Some(mine), Some(documents)) = (&mut self.batch.documents, &batch.documents) {
            mine.copy_(documents);
        }
        self.graph.replay()?;
        Ok(self.loss.shallow_clone())
    }
}

fn forward_backward(
    model: &GPT,
    objective: &Objective,
    optimizer: Option<&mut AdamW>,
    batch: &Batch,
    scalars: LossScalars,
) -> Result<Tensor> {
    model.update_fp8_scales()?; // from the micro-batch before
    let loss = objective.loss(model, batch, scalars); // ()
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
    let batch = Coming::new(batch, model.device())?.take()?;
    for _ in 0..6 {
        let _ = forward_backward(model, &Objective::NextToken, None, &batch, scalars)?;
    }
    Ok(())
}

/// A batch on its way to the model's device.
pub struct Coming {
    input: OnTheWay,
    target: OnTheWay,
    documents: Option<[OnTheWay; 2]>,
    n_targets: i64,
}

impl Coming {
    /// Starts the copies.
    pub fn new(batch: &Batch, device: Device) -> Result<Self> {
        let start = |tensor: &Tensor| OnTheWay::new(tensor, device);
        let documents = match &batch.documents {
            Some(documents) => Some([start(&documents.start)?, start(&documents.end)?]),
            None => None,
        };
        let (input, target) = (start(&batch.input)?, start(&batch.target)?);
        Ok(Self { input, target, documents, n_targets: batch.n_targets })
    }

    /// The batch on the device. The stream waits for the copies, the CPU does not.
    pub fn take(self) -> Result<Batch> {
        let documents = match self.documents {
            Some([start, end]) => Some(Documents::new(start.take()?, end.take()?)),
            None => None,
        };
        let (input, target) = (self.input.take()?, self.target.take()?);
        Ok(Batch { input, target, documents, n_targets: self.n_targets })
    }
}

enum OnTheWay {
    /// Copied from page-locked memory beside the work before.
    Staged(Staged),
    /// On the CPU, where the model is.
    Here(Tensor),
}

impl OnTheWay {
    fn new(tensor: &Tensor, device: Device) -> Result<Self> {
        Ok(match device {
            Device::Cuda(_) => Self::Staged(Staged::new(tensor, device)?),
            _ => Self::Here(tensor.shallow_clone()),
        })
    }

    fn take(self) -> Result<Tensor> {
        match self {
            Self::Staged(tensor) => tensor.take(),
            Self::Here(tensor) => Ok(tensor),
        }
    }
}
