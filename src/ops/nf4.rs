//! Products with a frozen weight of 4 bits (QLoRA).

use super::{fused_here, or_panic, recompute};
use crate::ffi;
use crate::quant::nf4::Nf4Weight;
use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

/// `y = x W^T`, differentiable in x alone; W is made from its codes in x's dtype for the forward pass, and for the
/// backward pass again.
///
/// Between the two the graph keeps no matrix: on a GPU handles on the codes and scales
/// (`csrc/torch_cuda/nf4.cpp`: `dx = dy W`, which needs no value of x), elsewhere and of other dtypes x too
/// ([`recompute`], whose second run repeats the product: simple, and slow only where nothing is fast).
///
/// # Shapes
/// x (.., C), W (O, C) -> (.., O).
///
/// # Numerics
/// As [`super::linear`] with the same W, whose values are rounded to x's dtype; tests
/// `nf4_linear_equals_a_linear_layer_with_the_dequantised_weight`, `nf4_linear_on_the_card_agrees_with_its_reference`.
///
/// # Source
/// arXiv 2305.14314, equation 5; `bitsandbytes.matmul_4bit`.
///
/// # Panics
/// An x of another width, dtype or device than the weight's.
pub fn nf4_linear(x: &Tensor, weight: &Nf4Weight) -> Tensor {
    or_panic(check(x, weight));
    if fused_here(x) {
        return or_panic(ffi::nf4_linear(&x.contiguous(), &weight.raw()));
    }
    let weight = weight.shallow_clone();
    let [y] = recompute(&[x], move |inputs| [nf4_linear_reference(&inputs[0], &weight)]);
    y
}

/// The same by libtorch, whose graph keeps the matrix.
pub fn nf4_linear_reference(x: &Tensor, weight: &Nf4Weight) -> Tensor {
    or_panic(check(x, weight));
    x.linear(&or_panic(weight.dequantize(x.kind())), None::<&Tensor>)
}

/// The matrix (O, C) of a weight in fp32, bf16 or fp16: on a GPU by `csrc/nf4.cu`, with the bits of
/// [`Nf4Weight::dequantize`], which it is elsewhere.
///
/// # Errors
/// Another dtype.
pub fn nf4_dequantize(weight: &Nf4Weight, kind: Kind) -> Result<Tensor> {
    match cfg!(cuda_kernels) && weight.device().is_cuda() {
        true => ffi::nf4_dequantize(&weight.raw(), kind),
        false => weight.dequantize(kind),
    }
}

fn check(x: &Tensor, weight: &Nf4Weight) -> Result<()> {
    let (rows, columns) = weight.shape();
    ensure!(
        x.size().last() == Some(&columns),
        "nf4_linear: x must be (.., {columns}) for a weight ({rows}, {columns}), got shape {:?}",
        x.size()
    );
    ensure!(
        matches!(x.kind(), Kind::Float | Kind::BFloat16 | Kind::Half),
        "nf4_linear: x must be fp32, bf16 or fp16, got {:?}",
        x.kind()
    );
    ensure!(
        x.device() == weight.device(),
        "nf4_linear: x must be on {:?}, where the weight is, got {:?}",
        weight.device(),
        x.device()
    );
    Ok(())
}
