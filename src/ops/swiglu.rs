//! SwiGLU.

use tch::Tensor;

/// `silu(gate) * up`.
///
/// # Shapes
/// gate, up (.., F) -> (.., F), dtype of the inputs.
///
/// # Source
/// arXiv 2002.05202.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    gate.silu() * up
}
