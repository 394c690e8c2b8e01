//! Differentiable operations of the model, each with its plain ATen reference.
//!
//! The fast ones are kernels of `csrc/`, for CUDA tensors; `fused: false` or `attention: math` in a
//! configuration, and every CPU tensor, take the reference. An argument that a kernel refuses panics with
//! its message, as tch's own operations do; [`crate::guard::catch`] makes an error of it.

mod attention;
mod linear;
mod loss;
mod mlp;
mod nf4;
mod norm;
mod recompute;
mod rope;

pub use crate::ffi::LossScalars;
pub use attention::{
    Branches, Documents, Mask, attention, attention_qkv, attention_reference, flash_covers,
    rope_attention_branches, rope_attention_qkv, split_heads,
};
pub use linear::{fp8_reference, linear, norm_linear, norm_mlp};
pub use loss::{cross_entropy, cross_entropy_reference, cross_entropy_sum, head_loss, head_rows};
pub use mlp::{swiglu, swiglu_mlp, swiglu_reference};
pub use nf4::{nf4_dequantize, nf4_linear, nf4_linear_reference};
pub use norm::{add_rms_norm, layer_norm, rms_norm, rms_norm_reference};
pub use recompute::recompute;
pub use rope::{rope_qkv, rope_reference};

use std::collections::BTreeSet;
use std::sync::Mutex;
use tch::{Kind, Tensor};

/// Whether this binary has a kernel for the tensor's device and dtype.
fn fused_here(x: &Tensor) -> bool {
    cfg!(cuda_kernels)
        && x.device().is_cuda()
        && matches!(x.kind(), Kind::Float | Kind::BFloat16 | Kind::Half)
        && x.numel() > 0
}

/// Says on stderr, once a process, why a kernel of ours is not used.
fn say_once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().is_ok_and(|mut said| said.insert(text.clone())) {
        eprintln!("{text}");
    }
}

pub(crate) fn or_panic<T>(result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{e:#}"))
}
