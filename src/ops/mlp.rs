//! SwiGLU and the MLP around it.

use super::{fused_here, or_panic, say_once};
use crate::ffi;
use tch::{Kind, Tensor};

/// `silu(gate) * up` of a packed projection `[gate | up]`.
///
/// `fused` uses `csrc/swiglu.cu` on a GPU; otherwise [`swiglu_reference`].
///
/// # Shapes
/// gate_up (.., 2F) -> (.., F), dtype of the input.
///
/// # Numerics
/// fp32 inside, rounded once; test `swiglu_agrees_with_its_reference`.
///
/// # Source
/// arXiv 2002.05202.
pub fn swiglu(gate_up: &Tensor, fused: bool) -> Tensor {
    let f = gate_up.size().last().map_or(0, |two_f| two_f / 2);
    if fused && kernel_takes(gate_up, f) {
        return or_panic(ffi::swiglu(&gate_up.contiguous()));
    }
    swiglu_reference(&gate_up.narrow(-1, 0, f), &gate_up.narrow(-1, f, f))
}

/// The plain formula, `silu(gate) * up`.
///
/// # Shapes
/// gate, up (.., F) -> (.., F), dtype of the inputs.
pub fn swiglu_reference(gate: &Tensor, up: &Tensor) -> Tensor {
    gate.silu() * up
}

/// The LLaMA MLP: `(silu(x W1^T) * (x W2^T)) W3^T`.
///
/// `fused` is one autograd function that keeps only x and `[x W1^T | x W2^T]`, and computes the product again
/// in the backward pass; otherwise plain operations, each of which keeps its input, or where `fused` finds nothing
/// to differentiate multiplies in place. W1 and W2 that lie behind each other in memory are multiplied as one matrix.
///
/// # Shapes
/// x (.., C); fc_1, fc_2 (F, C); proj (C, F) -> (.., C).
///
/// # Numerics
/// Products in the dtype of x with fp32 sums; test `the_mlp_agrees_with_its_reference`.
pub fn swiglu_mlp(x: &Tensor, fc_1: &Tensor, fc_2: &Tensor, proj: &Tensor, fused: bool) -> Tensor {
    if fused && kernel_takes(x, fc_1.size()[0]) {
        return or_panic(ffi::swiglu_mlp(&x.contiguous(), fc_1, fc_2, proj));
    }
    let linear = |x: &Tensor, w: &Tensor| x.linear(w, None::<Tensor>);
    let (gate, up) = (linear(x, fc_1), linear(x, fc_2)); // (.., F) x2
    let product = match fused && !gate.requires_grad() && !up.requires_grad() {
        true => gate.silu().g_mul_(&up), // one matrix less in memory
        false => swiglu_reference(&gate, &up),
    };
    linear(&product, proj) // (.., C)
}

/// Whether the kernel covers this F: it works in 16-byte pieces. Says so where it does not.
pub(super) fn kernel_takes(x: &Tensor, f: i64) -> bool {
    let vector = if x.kind() == Kind::Float { 4 } else { 8 };
    let here = fused_here(x);
    if here && f % vector != 0 {
        say_once(format!(
            "swiglu      plain operations: the kernel covers multiples of {vector}, not {f}"
        ));
    }
    here && f % vector == 0
}
