//! `nn.Linear` and `nn.Embedding`.

use crate::ops;
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
}

impl Linear {
    /// Uninitialised weight and zero bias; [`super::init`] fills them.
    pub fn new(inputs: i64, outputs: i64, bias: bool, device: Device) -> Self {
        let options = (Kind::Float, device);
        Self {
            weight: Tensor::empty([outputs, inputs], options),
            bias: bias.then(|| Tensor::zeros([outputs], options)),
        }
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight: self.weight.shallow_clone(), bias }
    }

    /// See [`ops::linear`].
    pub fn forward(&self, x: &Tensor, fused: bool) -> Tensor {
        ops::linear(x, &self.weight, self.bias.as_ref(), fused)
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
