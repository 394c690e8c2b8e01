//! AdamW over fp32 master weights, with gradient accumulation and clipping.
//!
//! | precision    | master, exp_avg, exp_avg_sq | weight the model computes with | gradient sum |
//! |--------------|-----------------------------|--------------------------------|--------------|
//! | `32-true`    | fp32                        | the master itself              | fp32         |
//! | `bf16-mixed` | fp32                        | bf16 copy, refreshed each step | fp32         |
//! | `bf16-true`  | bf16                        | the master itself              | bf16         |
//!
//! The gradient sums lie in one buffer. Each parameter's part of it is that weight's `.grad` for the whole run, in
//! `bf16-mixed` an fp32 `.grad` of a bf16 weight: autograd adds to it in place, and on a GPU the matrix products of
//! the backward pass do so themselves (`csrc/torch/matmul.h`), with no bf16 gradient in between.

use crate::config::{OptimizerConfig, Precision};
use crate::ffi;
use crate::model::GPT;
use anyhow::{Result, bail};
use tch::{Kind, Tensor};

/// One parameter with its optimizer state; all tensors have the parameter's shape.
#[derive(Debug)]
pub struct ParamState {
    /// lit-gpt name.
    pub name: String,
    /// What the model computes with; shares storage with the model.
    pub weight: Tensor,
    /// Exact weights; in `32-true` and `bf16-true` the same storage as `weight`.
    pub master: Tensor,
    /// Sum of the gradients since the last step; the `.grad` of `weight`.
    pub grad: Tensor,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

/// AdamW with decoupled weight decay on every parameter, as in the original.
///
/// # Source
/// arXiv 1711.05101; `torch.optim.AdamW`. Fused form: `csrc/adamw.cu`.
#[derive(Debug)]
pub struct AdamW {
    /// One a parameter, in the model's order.
    pub params: Vec<ParamState>,
    /// Steps done.
    pub step_count: i64,
    betas: [f64; 2],
    weight_decay: f64,
    eps: f64,
    mixed: bool,
    fused: bool,
    grads: Tensor,
}

impl AdamW {
    /// Takes over an fp32 model: keeps its weights as masters and, as `precision` says, gives the model
    /// its bf16 weights. Turns on gradients.
    pub fn new(model: &mut GPT, precision: Precision, config: &OptimizerConfig) -> Self {
        let fp32 = model.named_parameters();
        let masters: Vec<Tensor> = match precision {
            Precision::Bf16Mixed => fp32.iter().map(|(_, p)| p.detach().copy()).collect(),
            _ => Vec::new(),
        };
        if precision != Precision::Fp32True {
            model.to_kind(Kind::BFloat16);
        }
        model.requires_grad(true);

        let weights = model.named_parameters();
        let mixed = precision == Precision::Bf16Mixed;
        let grad_kind = if mixed { Kind::Float } else { weights[0].1.kind() };
        let (grads, parts) = gradient_buffer(&weights, grad_kind);
        let mut masters = masters.into_iter();
        let mut params = vec![];
        for ((name, weight), grad) in weights.into_iter().zip(parts) {
            ffi::set_grad(&weight, &grad).expect("a part of the buffer has its weight's shape");
            let master = masters.next().unwrap_or_else(|| weight.detach());
            let (exp_avg, exp_avg_sq) = (master.zeros_like(), master.zeros_like());
            params.push(ParamState { name, weight, master, grad, exp_avg, exp_avg_sq });
        }
        Self {
            params,
            step_count: 0,
            betas: config.betas,
            weight_decay: config.weight_decay,
            eps: config.eps,
            mixed,
            fused: model.fused && model.device().is_cuda() && precision != Precision::Bf16True,
            grads,
        }
    }

    /// Whether steps run as one kernel over all parameters, with no CPU wait.
    pub fn is_fused(&self) -> bool {
        self.fused
    }

    /// L2 norm over all gradient sums, `() fp32` on their device. The CPU does not wait.
    pub fn grad_norm(&self) -> Tensor {
        let norm = |p: &ParamState| p.grad.norm_scalaropt_dtype(2, Kind::Float);
        let norms: Vec<Tensor> = self.params.iter().map(norm).collect();
        Tensor::stack(&norms, 0).norm()
    }

    /// Clips the global norm to `max_norm`, updates masters and moments, refreshes the working copies.
    /// Returns the norm before clipping, `() fp32`.
    ///
    /// Where the norm is not finite nothing is updated; the caller stops the run.
    ///
    /// # Sync
    /// Fused: none. Reference on a GPU: the CPU waits for the norm.
    pub fn step(&mut self, lr: f64, max_norm: Option<f64>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        if self.fused {
            return self.step_fused(lr, max_norm);
        }
        let norm = self.grad_norm();
        // As clip_grad_norm_: max_norm / (norm + 1e-6), at most 1. `norm * 0` carries inf and nan over.
        let clip = match max_norm {
            Some(max) => ((&norm + 1e-6).reciprocal() * max).clamp_max(1.0) + &norm * 0.0,
            None => &norm * 0.0 + 1.0,
        };
        if norm.double_value(&[]).is_finite() {
            self.step_reference(lr, &clip);
            self.step_count += 1;
        }
        Ok(norm)
    }

    fn step_fused(&mut self, lr: f64, max_norm: Option<f64>) -> Result<Tensor> {
        let [beta1, beta2] = self.betas;
        let grads: Vec<&Tensor> = self.params.iter().map(|p| &p.grad).collect();
        let (norm, clip) = ffi::grad_norm(&grads, max_norm)?;
        let tensors: Vec<ffi::AdamWTensors> = self
            .params
            .iter()
            .map(|p| ffi::AdamWTensors {
                param: &p.master,
                grad: &p.grad,
                exp_avg: &p.exp_avg,
                exp_avg_sq: &p.exp_avg_sq,
                weight: self.mixed.then_some(&p.weight),
            })
            .collect();
        let (eps, weight_decay, step) = (self.eps, self.weight_decay, self.step_count + 1);
        let scalars =
            ffi::AdamWScalars { lr, beta1, beta2, eps, weight_decay, step, clear_grad: true };
        ffi::adamw(&tensors, &clip, scalars)?;
        self.step_count += 1;
        Ok(norm)
    }

    /// The plain formula, a few ATen operations a parameter.
    fn step_reference(&mut self, lr: f64, clip: &Tensor) {
        let [beta1, beta2] = self.betas;
        let s = (self.step_count + 1) as i32;
        let (bias1, bias2) = (1.0 - beta1.powi(s), 1.0 - beta2.powi(s));
        for p in &mut self.params {
            let grad = &p.grad * clip.to_kind(p.grad.kind());
            let _ = p.master.g_mul_scalar_(1.0 - lr * self.weight_decay);
            let _ = p.exp_avg.lerp_(&grad, 1.0 - beta1);
            let _ = p.exp_avg_sq.g_mul_scalar_(beta2).g_add_(&(grad.square() * (1.0 - beta2)));
            let denominator = p.exp_avg_sq.sqrt() / bias2.sqrt() + self.eps;
            let _ = p.master.g_sub_(&(&p.exp_avg / denominator * (lr / bias1)));
            if self.mixed {
                p.weight.copy_(&p.master);
            }
        }
    }

    /// Zeroes the gradient sums in place, before a step's micro-batches; the fused update has done so.
    pub fn zero_grad(&mut self) {
        if self.fused {
            return;
        }
        let _ = self.grads.zero_();
    }

    /// Names of the parameters whose gradient sum holds a value that is not finite.
    ///
    /// # Sync
    /// The CPU waits once a parameter; for the message of a run that stops.
    pub fn non_finite(&self) -> Vec<&str> {
        let bad = |p: &&ParamState| !p.grad.norm().double_value(&[]).is_finite();
        self.params.iter().filter(bad).map(|p| p.name.as_str()).collect()
    }

    /// The exact weights under their lit-gpt names, sharing storage.
    pub fn masters(&self) -> Vec<(String, Tensor)> {
        self.params.iter().map(|p| (p.name.clone(), p.master.shallow_clone())).collect()
    }

    /// Moments under the names `exp_avg.NAME` and `exp_avg_sq.NAME`, sharing storage.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let both = |p: &ParamState| {
            [("exp_avg", &p.exp_avg), ("exp_avg_sq", &p.exp_avg_sq)]
                .map(|(kind, t)| (format!("{kind}.{}", p.name), t.shallow_clone()))
        };
        self.params.iter().flat_map(both).collect()
    }

    /// Restores what [`AdamW::state`] gave, bit for bit.
    ///
    /// # Errors
    /// A tensor is missing, or has another shape or dtype.
    pub fn load_state(&mut self, step_count: i64, saved: &[(String, Tensor)]) -> Result<()> {
        let find = |name: &str| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t);
        for (name, mut ours) in self.state() {
            let Some(theirs) = find(&name) else { bail!("optimizer state lacks `{name}`") };
            if (theirs.size(), theirs.kind()) != (ours.size(), ours.kind()) {
                bail!(
                    "optimizer state `{name}`: expected {:?} {:?}, got {:?} {:?}",
                    ours.kind(),
                    ours.size(),
                    theirs.kind(),
                    theirs.size()
                );
            }
            ours.copy_(theirs);
        }
        self.step_count = step_count;
        Ok(())
    }

    /// Loads exact weights (from a checkpoint that already sits in the masters) into the working copies.
    pub fn refresh_weights(&mut self) {
        let _guard = tch::no_grad_guard();
        if self.mixed {
            for p in &mut self.params {
                p.weight.copy_(&p.master);
            }
        }
    }
}

/// A zeroed buffer with a part in each parameter's shape, in the parameters' order. Weights that lie behind each other
/// in memory have gradients that do so too, where their size is a multiple of 64.
fn gradient_buffer(weights: &[(String, Tensor)], kind: Kind) -> (Tensor, Vec<Tensor>) {
    let room = |weight: &Tensor| (weight.numel() as i64 + 63) / 64 * 64; // kernels need 16 bytes
    let total = weights.iter().map(|(_, weight)| room(weight)).sum::<i64>();
    let buffer = Tensor::zeros([total], (kind, weights[0].1.device()));
    let mut start = 0;
    let mut part = |weight: &Tensor| {
        let part = buffer.narrow(0, start, weight.numel() as i64).view_(weight.size());
        start += room(weight);
        part
    };
    let parts = weights.iter().map(|(_, weight)| part(weight)).collect();
    (buffer, parts)
}
