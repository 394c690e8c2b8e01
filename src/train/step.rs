//! One optimizer step: forward, loss, backward for each micro-batch, then clip and update.

use super::optimizer::AdamW;
use crate::config::TrainConfig;
use crate::data::Batch;
use crate::ffi;
use crate::model::GPT;
use crate::ops::LossScalars;
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// What a step leaves on the device; reading either makes the CPU wait.
pub struct StepOutput {
    /// Mean loss over the step's targets, `() fp32`.
    pub loss: Tensor,
    /// Gradient norm before clipping, `() fp32`.
    pub grad_norm: Tensor,
}

/// Accumulates the gradients of all micro-batches of a step and updates the weights once.
///
/// The loss is the mean over the targets (!= -100) of all micro-batches, so it does not depend on how the
/// step is cut into micro-batches; it includes `label_smoothing` and `z_loss`. `train` says those and how to clip.
///
/// # Errors
/// A failure of libtorch, such as CUDA out of memory, comes as a panic of tch;
/// [`crate::guard::catch`] around the call makes an error of it.
///
/// # Sync
/// None on a GPU with fused kernels: the caller reads the output when it wants to.
pub fn train_step(
    model: &GPT,
    optimizer: &mut AdamW,
    batches: &[Batch],
    lr: f64,
    train: &TrainConfig,
) -> Result<StepOutput> {
    let n_targets: i64 = batches.iter().map(|batch| batch.n_targets).sum();
    let scalars = LossScalars {
        scale: 1.0 / n_targets.max(1) as f64,
        label_smoothing: train.label_smoothing,
        z_loss: train.z_loss,
    };
    let mut step_loss = Tensor::zeros([], (Kind::Float, model.device()));

    for batch in batches {
        let input = to_device(&batch.input, model.device())?; // (B, T)
        let target = to_device(&batch.target, model.device())?; // (B, T)
        let loss = model.loss(&input, &target, scalars); // ()
        loss.backward();
        optimizer.accumulate();
        let _ = step_loss.g_add_(&loss.detach());
    }

    let grad_norm = optimizer.step(lr, train.max_norm)?;
    Ok(StepOutput { loss: step_loss, grad_norm })
}

/// Copies a batch to the GPU from pinned memory, without a CPU wait; on the CPU, the tensor itself.
pub fn to_device(tokens: &Tensor, device: Device) -> Result<Tensor> {
    match device {
        Device::Cuda(_) => {
            Ok(ffi::pin_memory(tokens)?.to_device_(device, Kind::Int64, true, false))
        }
        _ => Ok(tokens.shallow_clone()),
    }
}
