//! Gradient norm and AdamW over 1.1e9 parameters, as 22 equal tensors, in each format of weights and moments.

use super::{Lab, Work, time};
use crate::config::{MasterFormat, StateFormat};
use crate::ffi;
use crate::train::optimizer::low_memory;
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// Of TinyLlama, and in how many tensors.
const PARAMETERS: i64 = 1_100_048_384;
const TENSORS: i64 = 22;

impl Lab {
    pub(super) fn optimizer(&mut self) -> Result<()> {
        use {MasterFormat as M, StateFormat as S};
        if self.wants("grad_norm") {
            let each = [PARAMETERS / TENSORS];
            let grads: Vec<Tensor> =
                (0..TENSORS).map(|_| Tensor::randn(each, (Kind::Float, self.device))).collect();
            let grads: Vec<&Tensor> = grads.iter().collect();
            let ms = time(|| ffi::grad_norm(&grads, Some(1.0), None).map(drop))?;
            let work = Work::Bytes(4.0 * (each[0] * TENSORS) as f64);
            self.add("grad_norm of 1.1e9 values", 0, "ours", ms, work, None);
        }
        if self.wants("adamw") {
            self.adamw("ours, 30 B each", (M::Fp32, S::Fp32), false, 30.0)?;
            self.adamw("ours, gradient cleared", (M::Fp32, S::Fp32), true, 34.0)?;
            self.adamw("ours, split master", (M::Split, S::Fp32), true, 32.0)?;
            self.adamw("ours, int8 moments", (M::Fp32, S::Int8), true, 22.0 + 16.0 / 256.0)?;
            self.adamw("ours, split, int8", (M::Split, S::Int8), true, 20.0 + 16.0 / 256.0)?;
            self.adamw("ours, bf16, bf16", (M::Bf16, S::Bf16), true, 20.0)?;
            self.adamw("ours, bf16, int8", (M::Bf16, S::Int8), true, 16.0 + 16.0 / 256.0)?;
        }
        Ok(())
    }

    /// One step in these formats, which moves `bytes` a parameter.
    fn adamw(
        &mut self,
        kernel: &str,
        (master, state): (MasterFormat, StateFormat),
        clear_grad: bool,
        bytes: f64,
    ) -> Result<()> {
        let each = PARAMETERS / TENSORS;
        let list: Vec<Kept> =
            (0..TENSORS).map(|_| kept(each, master, state, self.device)).collect();
        let tensors: Vec<ffi::AdamWTensors> =
            list.iter().map(|kept| kept.tensors(clear_grad)).collect();
        let clip = Tensor::ones([], (Kind::Float, self.device));
        let (lr, beta1, beta2, eps, weight_decay) = (1e-4, 0.9, 0.95, 1e-8, 0.1);
        let s = ffi::AdamWScalars { lr, beta1, beta2, eps, weight_decay, step: 10 };
        let ms = time(|| ffi::adamw(&tensors, &clip, s))?;
        let work = Work::Bytes(bytes * (each * TENSORS) as f64);
        self.add("adamw of 1.1e9 parameters", 0, kernel, ms, work, None);
        Ok(())
    }
}

/// A parameter as an optimizer keeps it.
struct Kept {
    param: Option<Tensor>,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Option<(Tensor, Tensor)>,
    weight: Tensor,
}

impl Kept {
    fn tensors(&self, clear_grad: bool) -> ffi::AdamWTensors<'_> {
        ffi::AdamWTensors {
            param: self.param.as_ref(),
            grad: &self.grad,
            exp_avg: &self.exp_avg,
            exp_avg_sq: &self.exp_avg_sq,
            scales: self.scales.as_ref().map(|(m, v)| (m, v)),
            weight: Some(&self.weight),
            key: 1,
            clear_grad,
        }
    }
}

/// n random elements in these formats.
fn kept(n: i64, master: MasterFormat, state: StateFormat, device: Device) -> Kept {
    let random = || Tensor::randn([n], (Kind::Float, device)) * 1e-2;
    let (exact, m, v) = (random(), random(), random().square());
    let (weight, low) = low_memory::split(&exact);
    let param = match master {
        MasterFormat::Fp32 => Some(exact),
        MasterFormat::Split => Some(low),
        MasterFormat::Bf16 => None,
    };
    let half = Tensor::full([n], 0x8000, (Kind::Int, device));
    let (exp_avg, exp_avg_sq, scales) = match state {
        StateFormat::Fp32 => (m, v, None),
        StateFormat::Bf16 => (m.to_kind(Kind::BFloat16), v.to_kind(Kind::BFloat16), None),
        StateFormat::Int8 => {
            let (m, scale) = low_memory::quantize_signed(&m, &half);
            let (v, scale_sq) = low_memory::quantize_unsigned(&v, &half);
            (m, v, Some((scale, scale_sq)))
        }
    };
    Kept { param, grad: random(), exp_avg, exp_avg_sq, scales, weight }
}
