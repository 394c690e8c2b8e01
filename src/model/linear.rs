//! `nn.Linear` and `nn.Embedding`.

use super::attention::Kernels;
use super::lora::Lora;
use super::norm::Norm;
use crate::ffi::{Fp8Linear, PackedWeight};
use crate::ops::{self, or_panic};
use crate::quant::nf4::Nf4Weight;
use tch::{Device, Kind, Tensor};

/// `y = x W^T + b`.
///
/// # Shapes
/// weight (out, in), bias (out,), x (.., in) -> (.., out).
#[derive(Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: Tensor,
    /// (out,)
    pub bias: Option<Tensor>,
    /// e4m3 copies of the weight and scales, in `fp8-mixed`.
    pub fp8: Option<Fp8Linear>,
    /// The weight in 4 or 8 bits, for inference; `weight` is empty then.
    pub packed: Option<PackedWeight>,
    /// The weight in NF4, for training adapters beside it; `weight` has no rows then.
    pub nf4: Option<Box<Nf4Weight>>,
    /// Adapters, trained instead of the weight.
    pub lora: Option<Box<Lora>>,
}

impl Linear {
    /// Uninitialised weight and zero bias; [`super::init`] fills them.
    pub fn new(inputs: i64, outputs: i64, bias: bool, device: Device) -> Self {
        let options = (Kind::Float, device);
        Self {
            weight: Tensor::empty([outputs, inputs], options),
            bias: bias.then(|| Tensor::zeros([outputs], options)),
            fp8: None,
            packed: None,
            nf4: None,
            lora: None,
        }
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        let fp8 = self.fp8.as_ref().map(Fp8Linear::shallow_clone);
        let packed = self.packed.as_ref().map(PackedWeight::shallow_clone);
        let nf4 = self.nf4.as_ref().map(|nf4| Box::new(nf4.shallow_clone()));
        let lora = self.lora.as_ref().map(|lora| Box::new(lora.shallow_clone()));
        Self { weight: self.weight.shallow_clone(), bias, fp8, packed, nf4, lora }
    }

    /// Whether the weight is all that there is: without adapters, and not in NF4.
    pub fn is_plain(&self) -> bool {
        self.lora.is_none() && self.nf4.is_none()
    }

    /// See [`ops::linear`]; with what [`Lora`] adds.
    pub fn forward(&self, x: &Tensor, with: &Kernels) -> Tensor {
        let y = self.without_lora(x, with); // (.., out)
        if let Some(lora) = self.lora.as_ref().filter(|_| with.lora) {
            lora.add_to(&y, x, with.train);
        }
        y
    }

    /// x W^T + b alone.
    pub(super) fn without_lora(&self, x: &Tensor, with: &Kernels) -> Tensor {
        if let Some(nf4) = &self.nf4 {
            let y = ops::nf4_linear(x, nf4); // (.., out)
            return self.bias.as_ref().map_or_else(|| y.shallow_clone(), |bias| &y + bias);
        }
        if self.packed.is_some() {
            return ops::linear(x, &self.dense(), self.bias.as_ref(), None, with.fused);
        }
        let fp8 = self.fp8.as_ref().filter(|_| with.fp8);
        ops::linear(x, &self.weight, self.bias.as_ref(), fp8, with.fused)
    }

    /// Width of what comes out; the weight itself has no rows where it is kept in few bits.
    pub fn rows(&self) -> i64 {
        self.nf4.as_ref().map_or_else(|| self.weight.size()[0], |nf4| nf4.shape().0)
    }

    /// W (out, in) in full: the weight, or what the packed one stands for.
    pub fn dense(&self) -> Tensor {
        match &self.packed {
            Some(packed) => or_panic(packed.dequantize()),
            None => self.weight.shallow_clone(),
        }
    }

    /// `(self(norm(sum)), sum)` with `sum = x + residual`: the layer behind a norm.
    ///
    /// # Shapes
    /// x, residual (.., C) -> (.., out), (.., C).
    pub fn after(
        &self,
        norm: &Norm,
        x: &Tensor,
        residual: Option<&Tensor>,
        with: &Kernels,
    ) -> (Tensor, Tensor) {
        let fp8 = self.fp8.as_ref().filter(|_| with.fp8);
        let fuses = norm.bias.is_none() && self.bias.is_none() && self.is_plain();
        if with.recomputes_norms() && fuses {
            return ops::norm_linear(x, residual, &norm.weight, norm.eps, &self.weight, fp8);
        }
        let (normed, sum) = norm.forward(x, residual, with.fused); // (.., C) x2
        (self.forward(&normed, with), sum)
    }
}

/// A table of vectors, one a token id.
#[derive(Debug)]
pub struct Embedding {
    /// (V, C)
    pub weight: Tensor,
}

impl Embedding {
    /// Uninitialised; [`super::init`] fills it.
    pub fn new(rows: i64, width: i64, device: Device) -> Self {
        Self { weight: Tensor::empty([rows, width], (Kind::Float, device)) }
    }

    /// Rows of the table.
    ///
    /// # Shapes
    /// idx (B, T) of i64 -> (B, T, C).
    pub fn forward(&self, idx: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, idx, -1, false, false)
    }
}
