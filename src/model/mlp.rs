//! The two feed-forward layers.

use super::attention::Kernels;
use super::config::{MlpClass, ModelConfig};
use super::linear::Linear;
use super::norm::Norm;
use crate::ffi::{Fp8Linear, PackedWeight};
use crate::ops::{self, or_panic};
use tch::{Device, Tensor};

/// `proj(silu(fc_1(x)) * fc_2(x))`.
#[derive(Debug)]
#[allow(clippy::upper_case_acronyms)]
pub struct LLaMAMLP {
    /// gate: (F, C)
    pub fc_1: Linear,
    /// up: (F, C)
    pub fc_2: Linear,
    /// down: (C, F)
    pub proj: Linear,
    /// e4m3 copies of `[fc_1; fc_2]` and their scales, in `fp8-mixed`.
    pub gate_up_fp8: Option<Fp8Linear>,
    /// `[fc_1; fc_2]` in 4 or 8 bits, for inference; their own weights are empty then.
    pub gate_up_packed: Option<PackedWeight>,
}

/// `proj(gelu(fc(x)))`.
#[derive(Debug)]
pub struct GptNeoxMLP {
    /// (F, C)
    pub fc: Linear,
    /// (C, F)
    pub proj: Linear,
}

/// Feed-forward layer of a block.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there is one a block
pub enum Mlp {
    /// Llama family.
    LLaMA(LLaMAMLP),
    /// GPT-NeoX family.
    GptNeox(GptNeoxMLP),
}

impl Mlp {
    /// An uninitialised layer of the class that the configuration names.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let (c, f, bias) = (config.n_embd, config.intermediate_size, config.bias);
        let mut mlp = match config.mlp_class {
            MlpClass::LLaMAMLP => Self::LLaMA(LLaMAMLP {
                fc_1: Linear::new(c, f, bias, device),
                fc_2: Linear::new(c, f, bias, device),
                proj: Linear::new(f, c, bias, device),
                gate_up_fp8: None,
                gate_up_packed: None,
            }),
            MlpClass::GptNeoxMLP => Self::GptNeox(GptNeoxMLP {
                fc: Linear::new(c, f, bias, device),
                proj: Linear::new(f, c, bias, device),
            }),
        };
        mlp.join(false);
        mlp
    }

    /// Moves `fc_1` and `fc_2` of a Llama into one block of memory, `[W1; W2]`, which
    /// [`ops::swiglu_mlp`] multiplies as one matrix: a tenth faster than two. They stay two parameters.
    /// `keep` copies their values. Sizes that would start W2 between multiples of 16 bytes, which kernels
    /// need, stay apart.
    pub fn join(&mut self, keep: bool) {
        let Self::LLaMA(mlp) = self else { return };
        let weights = [&mut mlp.fc_1.weight, &mut mlp.fc_2.weight];
        let (f, c) = weights[0].size2().expect("a matrix is (F, C)");
        if f * c % 8 != 0 {
            return;
        }
        let block = Tensor::empty([2 * f, c], (weights[0].kind(), weights[0].device())); // (2F, C)
        tch::no_grad(|| {
            for (i, weight) in weights.into_iter().enumerate() {
                let mut half = block.narrow(0, i as i64 * f, f); // (F, C)
                if keep {
                    half.copy_(weight);
                }
                weight.set_data(&half);
            }
        });
    }

    /// `[W1; W2]` (2F, C) as one view, where they lie behind each other.
    pub fn gate_up(&self) -> Option<Tensor> {
        let Self::LLaMA(mlp) = self else { return None };
        if !mlp.is_joined() {
            return None;
        }
        let (f, c) = mlp.fc_1.weight.size2().expect("a matrix is (F, C)");
        Some(mlp.fc_1.weight.as_strided([2 * f, c], [c, 1], None))
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::LLaMA(mlp) => Self::LLaMA(LLaMAMLP {
                fc_1: mlp.fc_1.shallow_clone(),
                fc_2: mlp.fc_2.shallow_clone(),
                proj: mlp.proj.shallow_clone(),
                gate_up_fp8: mlp.gate_up_fp8.as_ref().map(Fp8Linear::shallow_clone),
                gate_up_packed: mlp.gate_up_packed.as_ref().map(PackedWeight::shallow_clone),
            }),
            Self::GptNeox(mlp) => Self::GptNeox(GptNeoxMLP {
                fc: mlp.fc.shallow_clone(),
                proj: mlp.proj.shallow_clone(),
            }),
        }
    }

    /// # Shapes
    /// x (B, T, C) -> (B, T, C).
    pub fn forward(&self, x: &Tensor, with: &Kernels) -> Tensor {
        match self {
            Self::LLaMA(LLaMAMLP { gate_up_packed: Some(packed), proj, .. }) => {
                let gate_up = x.linear(&or_panic(packed.dequantize()), None::<Tensor>); // (B, T, 2F)
                proj.forward(&ops::swiglu(&gate_up, with.fused), with) // (B, T, C)
            }
            Self::LLaMA(mlp) if !mlp.is_plain() => {
                let gate_up = match self.gate_up().filter(|_| mlp.fc_1.nf4.is_none()) {
                    Some(weight) => ops::linear(x, &weight, None, None, with.fused), // (B, T, 2F)
                    None => {
                        let halves = [&mlp.fc_1, &mlp.fc_2].map(|half| half.without_lora(x, with));
                        Tensor::cat(&halves, -1) // (B, T, 2F)
                    }
                };
                let f = gate_up.size()[2] / 2;
                for (half, start) in [(&mlp.fc_1, 0), (&mlp.fc_2, f)] {
                    if let Some(lora) = half.lora.as_ref().filter(|_| with.lora) {
                        lora.add_to(&gate_up.narrow(-1, start, f), x, with.train);
                    }
                }
                mlp.proj.forward(&ops::swiglu(&gate_up, with.fused), with) // (B, T, C)
            }
            Self::LLaMA(mlp) if mlp.proj.bias.is_none() => {
                let [fc_1, fc_2, proj] = mlp.weights();
                ops::swiglu_mlp(x, fc_1, fc_2, proj, with.fused) // (B, T, C)
            }
            Self::LLaMA(mlp) => {
                let (gate, up) = (mlp.fc_1.forward(x, with), mlp.fc_2.forward(x, with)); // (B, T, F) x2
                mlp.proj.forward(&ops::swiglu_reference(&gate, &up), with) // (B, T, C)
            }
            Self::GptNeox(mlp) => {
                let x = mlp.fc.forward(x, with).gelu("none"); // (B, T, F)
                mlp.proj.forward(&x, with) // (B, T, C)
            }
        }
    }

    /// `(self(norm(sum)), sum)` with `sum = x + residual`: the MLP behind a norm.
    ///
    /// # Shapes
    /// x, residual (B, T, C) -> (B, T, C) x2.
    pub fn after(
        &self,
        norm: &Norm,
        x: &Tensor,
        residual: Option<&Tensor>,
        with: &Kernels,
    ) -> (Tensor, Tensor) {
        if let Self::LLaMA(mlp) = self
            && with.recomputes_norms()
            && norm.bias.is_none()
            && mlp.proj.bias.is_none()
            && mlp.is_plain()
        {
            let fp8 = mlp.gate_up_fp8.as_ref().zip(mlp.proj.fp8.as_ref()).filter(|_| with.fp8);
            return ops::norm_mlp(x, residual, &norm.weight, norm.eps, mlp.weights(), fp8);
        }
        let (normed, sum) = norm.forward(x, residual, with.fused); // (B, T, C) x2
        (self.forward(&normed, with), sum)
    }
}

impl LLaMAMLP {
    /// Whether no matrix has adapters, or is in NF4.
    pub fn is_plain(&self) -> bool {
        [&self.fc_1, &self.fc_2, &self.proj].iter().all(|linear| linear.is_plain())
    }

    /// Whether W2 lies behind W1 ([`Mlp::join`]).
    pub fn is_joined(&self) -> bool {
        let Ok((f, c)) = self.fc_1.weight.size2() else { return false };
        let bytes = (f * c) as usize * self.fc_1.weight.kind().elt_size_in_bytes();
        self.fc_1.weight.data_ptr() as usize + bytes == self.fc_2.weight.data_ptr() as usize
    }

    /// W1 (F, C), W2 (F, C), W3 (C, F).
    fn weights(&self) -> [&Tensor; 3] {
        [&self.fc_1.weight, &self.fc_2.weight, &self.proj.weight]
    }
}
