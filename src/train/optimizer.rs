//! AdamW over fp32 master weights, with gradient accumulation and clipping.
//!
//! | precision    | master, exp_avg, exp_avg_sq | weight the model computes with | gradient sum |
//! |--------------|-----------------------------|--------------------------------|--------------|
//! | `32-true`    | fp32                        | the master itself              | fp32         |
//! | `bf16-mixed` | fp32                        | bf16 copy, refreshed each step | fp32         |
//! | `fp8-mixed`  | fp32                        | the same, and e4m3 copies      | fp32         |
//! | `bf16-true`  | bf16                        | the master itself              | bf16         |
//!
//! The gradient sums lie in one buffer. Each parameter's part of it is that weight's `.grad` for the whole run, in
//! the mixed precisions an fp32 `.grad` of a bf16 weight: autograd adds to it in place, and on a GPU the matrix products of
//! the backward pass do so themselves (`csrc/torch_cuda/matmul.h`), with no bf16 gradient in between. The first product of a
//! step overwrites, so that the update need not leave zeros (`csrc/torch_cuda/gradients.h`).
//!
//! The mixed precisions can keep master and moments in fewer bytes: `optimizer.master`, `optimizer.state`. Every step
//! widens them to fp32, updates, and narrows the result; the formats are in [`low_memory`]. `optimizer.cpu_offload` keeps
//! both in memory of the host: [`offload`].

pub mod low_memory;
pub mod offload;
mod param;

use crate::bail_hint;
use crate::checkpoint::Moments;
use crate::config::{MasterFormat, OptimizerConfig, Precision, StateFormat};
use crate::ffi::{self, FirstProducts};
use crate::model::GPT;
use anyhow::Result;
use low_memory::Noise;
use offload::{Kept, Offload};
use param::new_param;
pub use param::{ParamState, Part};
use tch::{Device, Kind, Tensor};

/// AdamW with decoupled weight decay on every parameter, as in the original.
///
/// # Source
/// arXiv 1711.05101; `torch.optim.AdamW`. Fused form: `csrc/adamw.cu`.
#[derive(Debug)]
pub struct AdamW {
    /// In the model's order: one a parameter, or of several ranks this one's parts, perhaps none.
    pub params: Vec<ParamState>,
    /// Steps done.
    pub step_count: i64,
    /// Seed of stochastic rounding; the bits of a step follow from it and the step's number alone.
    pub seed: u64,
    betas: [f64; 2],
    weight_decay: f64,
    eps: f64,
    mixed: bool,
    /// Dtype of what the model computes with.
    weight_kind: Kind,
    fused: bool,
    /// All gradients in one buffer; `None`: somebody else's, who clears them.
    grads: Option<Tensor>,
    /// Which gradients the first micro-batch of a step overwrites.
    products: FirstProducts,
    /// What the first gradient norm that is not finite was due to (`ffi::grad_norm`).
    watch: Tensor,
    /// 0, or nan once a norm over all ranks was not finite: `() fp32`.
    stopped: Tensor,
    state: StateFormat,
    master: MasterFormat,
    offload: Option<Offload>,
}

impl AdamW {
    /// Takes over an fp32 model: keeps its weights (or, where it has adapters, those) as masters and, as `precision` says,
    /// gives the model its bf16 weights. Turns on gradients. `config.state` and `config.master` count in `bf16-mixed` and `fp8-mixed`.
    ///
    /// # Errors
    /// `config.cpu_offload` without what it needs ([`offload::require`]), or without enough memory on the host.
    pub fn new(model: &mut GPT, precision: Precision, config: &OptimizerConfig) -> Result<Self> {
        let fp32 = model.trained_parameters();
        let sizes: Vec<i64> = fp32.iter().map(|(_, p)| p.numel() as i64).collect();
        let offload = Self::offload(&sizes, model.device(), model.fused, precision, config, 1)?;
        let masters: Vec<Tensor> = match (precision, &offload) {
            (_, Some(offload)) => {
                fp32.iter().enumerate().map(|(i, (_, p))| offload.take_over(i, p)).collect()
            }
            (Precision::Bf16Mixed | Precision::Fp8Mixed, None) => {
                fp32.iter().map(|(_, p)| p.detach().copy()).collect()
            }
            _ => Vec::new(),
        };
        if precision != Precision::Fp32True {
            model.to_kind(Kind::BFloat16);
        }
        model.requires_grad(true);

        let weights = model.trained_parameters();
        let (grads, sums) = gradient_buffer(&weights, gradient_kind(precision));
        let mut masters = masters.into_iter();
        let part = |(index, ((name, weight), grad)): (usize, ((String, Tensor), Tensor))| {
            ffi::set_grad(&weight, &grad).expect("a part of the buffer has its weight's shape");
            Part { name, index, start: None, weight, grad, exact: masters.next() }
        };
        let parts = weights.into_iter().zip(sums).enumerate().map(part).collect();
        let mut optimizer =
            Self::of_parts(parts, model.device(), offload, model.fused, precision, config);
        optimizer.grads = Some(grads);
        Ok(optimizer)
    }

    /// An optimizer of parameters, or of the parts of them that this rank keeps, whose gradients somebody else clears.
    ///
    /// # Shapes
    /// A whole parameter's own, a part (n,).
    pub fn of_parts(
        parts: Vec<Part>,
        device: Device,
        offload: Option<Offload>,
        fused: bool,
        precision: Precision,
        config: &OptimizerConfig,
    ) -> Self {
        let mixed = precision.is_mixed();
        let (state, master) = match mixed {
            true => (config.state, config.master),
            false => (StateFormat::Fp32, MasterFormat::Fp32),
        };
        let new = |(i, part): (usize, Part)| {
            let zeros = |kept: Kept, shape: &[i64], kind: Kind| {
                let host = offload.as_ref().and_then(|offload| offload.part(kept, i, shape));
                host.unwrap_or_else(|| Tensor::zeros(shape, (kind, device)))
            };
            new_param(part, state, master, zeros)
        };
        let params: Vec<ParamState> =
            tch::no_grad(|| parts.into_iter().enumerate().map(new).collect());
        Self {
            watch: Tensor::zeros([params.len() as i64 + 1], (Kind::Int, device)),
            stopped: Tensor::zeros([], (Kind::Float, device)),
            params,
            step_count: 0,
            seed: 0,
            betas: config.betas,
            weight_decay: config.weight_decay,
            eps: config.eps,
            mixed,
            weight_kind: weight_kind(precision),
            fused: fused && device.is_cuda() && precision != Precision::Bf16True,
            grads: None,
            products: FirstProducts::default(),
            state,
            master,
            offload,
        }
    }

    /// Memory on the host, which `sharers` ranks share, for the state of parts of these sizes, where
    /// `config.cpu_offload` asks for it.
    ///
    /// # Errors
    /// As [`AdamW::new`].
    pub fn offload(
        sizes: &[i64],
        device: Device,
        fused: bool,
        precision: Precision,
        config: &OptimizerConfig,
        sharers: usize,
    ) -> Result<Option<Offload>> {
        if !config.cpu_offload || sizes.is_empty() {
            return Ok(None);
        }
        offload::require(device, precision.is_mixed(), fused)?;
        Offload::new(sizes, config, device, sharers).map(Some)
    }

    /// Makes the CPU wait until masters and moments that lie on the host are those of the last step. What this type
    /// gives and takes is settled; for those who look at [`AdamW::params`] themselves.
    ///
    /// # Panics
    /// The card failed, as libtorch's operations do.
    pub fn settle(&self) {
        if let Some(Err(e)) = self.offload.as_ref().map(Offload::wait) {
            panic!("{e:#}")
        }
    }

    /// Runs the first micro-batch of a step, whose products overwrite the gradients of the step before.
    ///
    /// Only the fused update leaves such gradients as they are. Which they are is seen in the first call.
    pub fn overwriting<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if !self.fused || self.grads.is_none() {
            return work();
        }
        let grads: Vec<&Tensor> = self.params.iter().map(|p| &p.grad).collect();
        self.products.around(&grads, work)
    }

    /// Whether steps run as one kernel over all parameters, with no CPU wait.
    pub fn is_fused(&self) -> bool {
        self.fused
    }

    /// L2 norm over all gradient sums here, `() fp32` on their device. The CPU does not wait.
    pub fn grad_norm(&self) -> Result<Tensor> {
        if self.params.is_empty() {
            return Ok(self.stopped.copy()); // a rank with nothing but padding
        }
        if self.fused {
            let grads: Vec<&Tensor> = self.params.iter().map(|p| &p.grad).collect();
            return ffi::grad_norm(&grads, None, Some(&self.watch)).map(|(norm, _)| norm);
        }
        let norm = |p: &ParamState| p.grad.norm_scalaropt_dtype(2, Kind::Float);
        let norms: Vec<Tensor> = self.params.iter().map(norm).collect();
        Ok(Tensor::stack(&norms, 0).norm())
    }

    /// Clips the global norm to `max_norm`, updates masters and moments, refreshes the working copies.
    /// Returns the norm before clipping, `() fp32`.
    ///
    /// Where the norm is not finite nothing is updated, in the fused form neither by any later step; the caller stops
    /// the run.
    ///
    /// # Sync
    /// Fused: none. Reference on a GPU: the CPU waits for the norm.
    pub fn step(&mut self, lr: f64, max_norm: Option<f64>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        if self.fused {
            return self.step_fused(lr, max_norm);
        }
        let norm = self.grad_norm()?;
        self.step_reference(lr, &clip_factor(&norm, max_norm));
        Ok(norm)
    }

    /// [`AdamW::step`] with gradients that are still to be multiplied by `factor`, and their norm over all ranks, which
    /// all ranks know: both `() fp32`.
    pub fn step_by_norm(
        &mut self,
        lr: f64,
        max_norm: Option<f64>,
        norm: &Tensor,
        factor: &Tensor,
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let _ = self.stopped.g_add_(&(norm * 0.0)); // as the fused norm's `watch`, which knows this rank's part
        let clip = clip_factor(norm, max_norm) * factor + &self.stopped; // ()
        match self.fused {
            true => self.update_fused(lr, &clip)?,
            false => self.step_reference(lr, &clip),
        }
        Ok(())
    }

    fn step_fused(&mut self, lr: f64, max_norm: Option<f64>) -> Result<Tensor> {
        let grads: Vec<&Tensor> = self.params.iter().map(|p| &p.grad).collect();
        let (norm, clip) = ffi::grad_norm(&grads, max_norm, Some(&self.watch))?;
        self.update_fused(lr, &clip)?;
        Ok(norm)
    }

    fn update_fused(&mut self, lr: f64, clip: &Tensor) -> Result<()> {
        let [beta1, beta2] = self.betas;
        let step = self.step_count + 1;
        let tensors = self.params.iter().enumerate().map(|(i, p)| ffi::AdamWTensors {
            param: (self.master != MasterFormat::Bf16).then_some(&p.master),
            grad: &p.grad,
            exp_avg: &p.exp_avg,
            exp_avg_sq: &p.exp_avg_sq,
            scales: p.scales.as_ref().map(|[m, v]| (m, v)),
            weight: self.mixed.then_some(&p.weight),
            key: p.noise_key(self.seed, step),
            clear_grad: self.grads.is_some() && !self.products.overwrites(i),
        });
        let tensors: Vec<ffi::AdamWTensors> = tensors.collect();
        let (eps, weight_decay) = (self.eps, self.weight_decay);
        let scalars = ffi::AdamWScalars { lr, beta1, beta2, eps, weight_decay, step };
        match &self.offload {
            _ if tensors.is_empty() => {}
            Some(offload) => offload.adamw(&tensors, clip, scalars)?,
            None => ffi::adamw(&tensors, clip, scalars)?,
        }
        self.step_count += 1;
        Ok(())
    }

    /// The plain formula, a few ATen operations a parameter; nothing where `clip` is not finite.
    fn step_reference(&mut self, lr: f64, clip: &Tensor) {
        if !clip.double_value(&[]).is_finite() {
            return;
        }
        let [beta1, beta2] = self.betas;
        let s = (self.step_count + 1) as i32;
        let (bias1, bias2) = (1.0 - beta1.powi(s), 1.0 - beta2.powi(s));
        let random = self.state != StateFormat::Fp32 || self.master == MasterFormat::Bf16;
        for p in &mut self.params {
            let grad = &p.grad * clip.to_kind(p.grad.kind());
            let mut master = match self.mixed {
                true => p.exact().to_kind(Kind::Float),
                false => p.master.shallow_clone(),
            };
            let [mut m, mut v] = p.moments(self.state);
            let _ = master.g_mul_scalar_(1.0 - lr * self.weight_decay);
            let _ = m.lerp_(&grad, 1.0 - beta1);
            let _ = v.g_mul_scalar_(beta2).g_add_(&(grad.square() * (1.0 - beta2)));
            let denominator = v.sqrt() / bias2.sqrt() + self.eps;
            let _ = master.g_sub_(&(&m / denominator * (lr / bias1)));
            let (shape, device) = (p.weight.size(), p.weight.device());
            let noise = match random {
                true => Noise::new(p.noise_key(self.seed, i64::from(s)), &shape, device),
                false => Noise::half(&[0], device),
            };
            p.keep_moments(self.state, &[m, v], &noise);
            if self.mixed {
                p.keep_weight(self.master, &master, &noise);
            }
        }
        self.step_count += 1;
    }

    /// Zeroes the gradient sums in place, before a step's micro-batches. The fused update has done so, but for those
    /// that the first micro-batch overwrites.
    pub fn zero_grad(&mut self) {
        if !self.fused {
            self.clear_gradients();
        }
    }

    /// Zeroes the gradient sums in place.
    pub fn clear_gradients(&mut self) {
        if let Some(grads) = &mut self.grads {
            let _ = grads.zero_();
        }
    }

    /// Names of the parameters, of those here, whose gradient sum held a value that is not finite when a norm was not
    /// finite for the first time.
    ///
    /// # Sync
    /// The CPU waits; for the message of a run that stops.
    pub fn non_finite(&self) -> Vec<&str> {
        let names = self.params.iter().map(|p| p.name.as_str());
        if self.fused {
            let watched = Vec::<i64>::try_from(&self.watch.to_kind(Kind::Int64)); // (n + 1,)
            let bad = names.zip(watched.unwrap_or_default()).filter(|(_, seen)| *seen == 1);
            return bad.map(|(name, _)| name).collect();
        }
        let finite = |p: &ParamState| p.grad.norm().double_value(&[]).is_finite();
        names.zip(&self.params).filter(|(_, p)| !finite(p)).map(|(name, _)| name).collect()
    }

    /// Dtype of the exact weights.
    pub fn exact_kind(&self) -> Kind {
        match self.mixed && self.master != MasterFormat::Bf16 {
            true => Kind::Float,
            false => self.weight_kind,
        }
    }

    /// The exact weights under their lit-gpt names, one after the other: with `master: split` each is a new tensor, on the
    /// device of the weight.
    ///
    /// # Sync
    /// As [`AdamW::masters`].
    pub fn exact_weights(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.settle();
        self.params.iter().map(|p| (p.name.clone(), p.exact()))
    }

    /// Bytes of each tensor of [`AdamW::exact_weights`] and [`AdamW::state`].
    pub fn saved_sizes(&self) -> Vec<u64> {
        let kind = self.exact_kind();
        let bytes = |kind: Kind, n: usize| (n * kind.elt_size_in_bytes()) as u64;
        let exact = self.params.iter().map(|p| bytes(kind, p.weight.numel()));
        let state = self.state().into_iter().map(|(_, t)| bytes(t.kind(), t.numel()));
        exact.chain(state).collect()
    }

    /// The exact weights under their lit-gpt names. They share storage but for `master: split`, whose weights are
    /// put together on the CPU, so that a GPU needs room for one of them at a time.
    ///
    /// # Sync
    /// With `cpu_offload` the CPU waits for the last step. What it gives is good until the next one.
    pub fn masters(&self) -> Vec<(String, Tensor)> {
        self.settle();
        let exact = |p: &ParamState| match self.master {
            MasterFormat::Split => p.exact().to_device(Device::Cpu),
            _ => p.exact(),
        };
        self.params.iter().map(|p| (p.name.clone(), exact(p))).collect()
    }

    /// Moments under the names `exp_avg.NAME` and `exp_avg_sq.NAME`, and with `state: int8` their scales
    /// `exp_avg_scale.NAME` and `exp_avg_sq_scale.NAME`, of parts with `@START` behind; sharing storage.
    ///
    /// # Sync
    /// As [`AdamW::masters`].
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.settle();
        let all = |p: &ParamState| {
            let mut kept = vec![("exp_avg", &p.exp_avg), ("exp_avg_sq", &p.exp_avg_sq)];
            if let Some([scale, scale_sq]) = &p.scales {
                kept.extend([("exp_avg_scale", scale), ("exp_avg_sq_scale", scale_sq)]);
            }
            let named = |(kind, t): (&str, &Tensor)| (p.saved_name(kind), t.shallow_clone());
            kept.into_iter().map(named).collect::<Vec<_>>()
        };
        self.params.iter().flat_map(all).collect()
    }

    /// Restores what [`AdamW::state`] gave, bit for bit, also what optimizers of other parts gave. fp32 moments are taken
    /// into `state: bf16` and `int8` too, rounded to the nearest.
    ///
    /// # Errors
    /// The moments are of another format; a tensor is missing, or has another shape or dtype.
    pub fn load_state(&mut self, step_count: i64, saved: &Moments) -> Result<()> {
        let _guard = tch::no_grad_guard();
        self.settle();
        let theirs = saved.kind_of("exp_avg.");
        let ours = self.params.first().map(|p| p.exp_avg.kind());
        match (theirs.and_then(format_of), ours.and_then(format_of)) {
            (Some(StateFormat::Fp32), _) if self.state != StateFormat::Fp32 => {
                self.narrow_state(saved)?;
            }
            (Some(theirs), Some(ours)) if theirs != ours => bail_hint!(
                format!(
                    "continue with that run's `optimizer.state: {theirs}`, or start from the checkpoint's weights \
                     alone with `initial_checkpoint_dir`"
                );
                "the moments in the checkpoint are `{theirs}`, the configuration wants `{ours}`"
            ),
            _ => {
                for (name, mut ours) in self.state() {
                    ours.copy_(&saved.get(&name, ours.kind(), &ours.size())?);
                }
            }
        }
        self.step_count = step_count;
        Ok(())
    }

    /// Takes fp32 moments over into a smaller format.
    fn narrow_state(&mut self, saved: &Moments) -> Result<()> {
        for p in &mut self.params {
            let (shape, device) = (p.weight.size(), p.weight.device());
            let moment = |kind: &str| -> Result<Tensor> {
                Ok(saved.get(&p.saved_name(kind), Kind::Float, &shape)?.to_device(device))
            };
            let moments = [moment("exp_avg")?, moment("exp_avg_sq")?];
            p.keep_moments(self.state, &moments, &Noise::half(&shape, device));
        }
        Ok(())
    }
}

/// As clip_grad_norm_: `max_norm / (norm + 1e-6)`, at most 1, `() fp32`; not finite where the norm is not.
fn clip_factor(norm: &Tensor, max_norm: Option<f64>) -> Tensor {
    match max_norm {
        Some(max) => ((norm + 1e-6).reciprocal() * max).clamp_max(1.0) + norm * 0.0,
        None => norm * 0.0 + 1.0,
    }
}

/// Dtype of the weights that the model computes with.
pub fn weight_kind(precision: Precision) -> Kind {
    if precision == Precision::Fp32True { Kind::Float } else { Kind::BFloat16 }
}

/// Dtype of the gradient sums.
pub fn gradient_kind(precision: Precision) -> Kind {
    if precision.is_mixed() { Kind::Float } else { weight_kind(precision) }
}

/// The format whose first moments are of this dtype.
fn format_of(kind: Kind) -> Option<StateFormat> {
    match kind {
        Kind::Float => Some(StateFormat::Fp32),
        Kind::BFloat16 => Some(StateFormat::Bf16),
        Kind::Int8 => Some(StateFormat::Int8),
        _ => None,
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
