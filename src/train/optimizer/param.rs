//! What AdamW keeps for a parameter, or for a rank's part of one.

use super::low_memory::{self, Noise, noise_key};
use super::offload::Kept;
use crate::config::{MasterFormat, StateFormat};
use tch::{Kind, Tensor};

/// Values of a new parameter that are rounded at a time.
const ROUNDED: i64 = 1 << 22;

/// A parameter that an optimizer is to update, or the part of one that this rank keeps.
#[derive(Debug)]
pub struct Part {
    /// lit-gpt name.
    pub name: String,
    /// Its parameter's number in the model's order.
    pub index: usize,
    /// First value of a part, counted in the parameter, a multiple of 256; `None`: the whole parameter.
    pub start: Option<i64>,
    /// What the model computes with.
    pub weight: Tensor,
    /// Sum of the gradients.
    pub grad: Tensor,
    /// In the mixed precisions its fp32 values.
    pub exact: Option<Tensor>,
}

/// One parameter, or a rank's part of it, with its optimizer state; all tensors have its shape. With `cpu_offload`
/// master, moments and scales are on the host: call [`super::AdamW::settle`] before they are read or written.
#[derive(Debug)]
pub struct ParamState {
    /// lit-gpt name.
    pub name: String,
    /// Its parameter's number in the model's order.
    pub index: usize,
    /// First value of a part, counted in the parameter; `None`: the whole parameter.
    pub start: Option<i64>,
    /// What the model computes with; shares storage with the model.
    pub weight: Tensor,
    /// `master: fp32`: exact weights, fp32. `split`: the 16 bits that `weight` lacks, int16. The same storage as
    /// `weight` for `bf16`, and in `32-true` and `bf16-true`.
    pub master: Tensor,
    /// Sum of the gradients since the last step: the `.grad` of a whole parameter's `weight`, a view into it of a
    /// part's.
    pub grad: Tensor,
    /// First moment: the dtype of the master's values, or bf16, or int8 codes.
    pub exp_avg: Tensor,
    /// Second moment: the same, or uint8 codes.
    pub exp_avg_sq: Tensor,
    /// With `state: int8`, the scales of both moments, each `(ceil(n / 256),) fp32`.
    pub scales: Option<[Tensor; 2]>,
}

impl ParamState {
    /// The bits of stochastic rounding in a step; parts of a parameter have their own.
    pub(super) fn noise_key(&self, seed: u64, step: i64) -> u64 {
        noise_key(seed.wrapping_add(self.start.unwrap_or(0) as u64), step, self.index)
    }

    /// Name in a checkpoint: `exp_avg.NAME`, of a part `exp_avg.NAME@START`. Scales count blocks.
    pub(super) fn saved_name(&self, kind: &str) -> String {
        let unit = if kind.contains("scale") { low_memory::BLOCK } else { 1 };
        match self.start {
            None => format!("{kind}.{}", self.name),
            Some(start) => format!("{kind}.{}@{}", self.name, start / unit),
        }
    }

    /// The exact weight: fp32, or bf16 where there is no more of it. A new tensor with `master: split`, else
    /// sharing storage.
    pub fn exact(&self) -> Tensor {
        match self.master.kind() {
            Kind::Int16 => {
                low_memory::join(&self.weight, &self.master.to_device(self.weight.device()))
            }
            _ => self.master.shallow_clone(),
        }
    }

    /// The moments as a step computes with them: fp32 copies, or, kept in the master's dtype, themselves.
    pub(super) fn moments(&self, format: StateFormat) -> [Tensor; 2] {
        match (format, &self.scales) {
            (StateFormat::Int8, Some([scale, scale_sq])) => [
                low_memory::dequantize_signed(&self.exp_avg, scale),
                low_memory::dequantize_unsigned(&self.exp_avg_sq, scale_sq),
            ],
            (StateFormat::Bf16, _) => {
                [&self.exp_avg, &self.exp_avg_sq].map(|t| t.to_kind(Kind::Float))
            }
            _ => [&self.exp_avg, &self.exp_avg_sq].map(Tensor::shallow_clone),
        }
    }

    /// Keeps fp32 moments in the format; nothing to do where they are kept as they are.
    pub(super) fn keep_moments(
        &mut self,
        format: StateFormat,
        [m, v]: &[Tensor; 2],
        noise: &Noise,
    ) {
        match (format, &mut self.scales) {
            (StateFormat::Int8, Some([scale, scale_sq])) => {
                let (code, s) = low_memory::quantize_signed(m, &noise.exp_avg);
                let (code_sq, s_sq) = low_memory::quantize_unsigned(v, &noise.exp_avg_sq);
                self.exp_avg.copy_(&code);
                self.exp_avg_sq.copy_(&code_sq);
                scale.copy_(&s);
                scale_sq.copy_(&s_sq);
            }
            (StateFormat::Bf16, _) => {
                self.exp_avg.copy_(&low_memory::stochastic_bf16(m, &noise.exp_avg));
                self.exp_avg_sq.copy_(&low_memory::stochastic_bf16(v, &noise.exp_avg_sq));
            }
            _ => {}
        }
    }

    /// Keeps an updated fp32 weight in the format, and what the model computes with.
    pub(super) fn keep_weight(&mut self, format: MasterFormat, exact: &Tensor, noise: &Noise) {
        keep_weight([&self.weight, &self.master], format, exact, noise);
    }
}

fn keep_weight(
    [weight, master]: [&Tensor; 2],
    format: MasterFormat,
    exact: &Tensor,
    noise: &Noise,
) {
    let (mut weight, mut master) = (weight.shallow_clone(), master.shallow_clone());
    match format {
        MasterFormat::Fp32 => weight.copy_(&low_memory::nearest_bf16(exact)),
        MasterFormat::Split => {
            let (high, low) = low_memory::split(exact);
            weight.copy_(&high);
            master.copy_(&low);
        }
        MasterFormat::Bf16 => weight.copy_(&low_memory::stochastic_bf16(exact, &noise.weight)),
    }
}

/// A parameter with moments of zero. `zeros` gives the memory of a kind of state.
pub(super) fn new_param(
    part: Part,
    state: StateFormat,
    master: MasterFormat,
    zeros: impl Fn(Kept, &[i64], Kind) -> Tensor,
) -> ParamState {
    let Part { name, index, start, weight, grad, exact } = part;
    let (shape, device) = (weight.size(), weight.device());
    let [first, second] = match state {
        StateFormat::Fp32 => [exact.as_ref().map_or(weight.kind(), Tensor::kind); 2],
        StateFormat::Bf16 => [Kind::BFloat16; 2],
        StateFormat::Int8 => [Kind::Int8, Kind::Uint8],
    };
    let blocks = [low_memory::n_blocks(weight.numel() as i64)];
    let scale = |kept| zeros(kept, &blocks, Kind::Float);
    let p = ParamState {
        name,
        index,
        start,
        master: match (&exact, master) {
            (Some(exact), MasterFormat::Fp32) => exact.shallow_clone(),
            (Some(_), MasterFormat::Split) => zeros(Kept::Master, &shape, Kind::Int16),
            _ => weight.detach(),
        },
        grad,
        exp_avg: zeros(Kept::ExpAvg, &shape, first),
        exp_avg_sq: zeros(Kept::ExpAvgSq, &shape, second),
        scales: (state == StateFormat::Int8).then(|| [scale(Kept::Scale), scale(Kept::ScaleSq)]),
        weight,
    };
    if let Some(exact) = exact {
        // Some values at a time: rounding takes up to 35 bytes for each.
        let n = exact.numel() as i64;
        for start in (0..n).step_by(ROUNDED as usize) {
            let part = |t: &Tensor| t.view([-1]).narrow(0, start, ROUNDED.min(n - start));
            let (exact, to) = (part(&exact).to_device(device), [part(&p.weight), part(&p.master)]);
            keep_weight(to.each_ref(), master, &exact, &Noise::half(&exact.size(), device));
        }
    }
    p
}
