//! NF4 weights on the card (`csrc/nf4.cu`, `csrc/torch_cuda/nf4.cpp`).

use super::{Handle, check, cuda_functions, handle};
use anyhow::{Result, bail};
use std::ffi::c_int;
use std::ptr::null_mut;
use tch::{Kind, Tensor};

cuda_functions! {
    fn tl_nf4_dequantize(weight: *const RawNf4, kind: c_int, out: *mut Handle) -> c_int;
    fn tl_nf4_linear(x: Handle, weight: *const RawNf4, out: *mut Handle) -> c_int;
}

/// The tensors of a weight (O, C) as [`crate::quant::nf4`] has them, n = O C.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Parts<'a> {
    /// (ceil(n / 2),) u8
    pub codes: &'a Tensor,
    /// (ceil(n / 64),) fp32, or u8 where it is nested
    pub absmax: &'a Tensor,
    /// What the bytes of `absmax` stand for.
    pub nested: Option<Nf4Nested<'a>>,
    /// (O, C)
    pub shape: (i64, i64),
}

/// `absmax = map[byte] * absmax + offset`.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Nested<'a> {
    /// (256,) fp32
    pub map: &'a Tensor,
    /// (ceil(n / 64 / 256),) fp32
    pub absmax: &'a Tensor,
    /// () fp32
    pub offset: &'a Tensor,
}

impl Nf4Parts<'_> {
    fn raw(&self) -> RawNf4 {
        let part = |of: fn(&Nf4Nested) -> Handle| self.nested.as_ref().map_or(null_mut(), of);
        RawNf4 {
            codes: handle(self.codes),
            absmax: handle(self.absmax),
            nested_map: part(|n| handle(n.map)),
            nested_absmax: part(|n| handle(n.absmax)),
            nested_offset: part(|n| handle(n.offset)),
            rows: self.shape.0,
            columns: self.shape.1,
        }
    }
}

/// The matrix (O, C) of fp32, bf16 or fp16.
///
/// # Errors
/// Another dtype; tensors that do not go together, or do not lie on one card.
pub fn nf4_dequantize(weight: &Nf4Parts, kind: Kind) -> Result<Tensor> {
    let kind = match kind {
        Kind::Float => 0,
        Kind::BFloat16 => 1,
        Kind::Half => 2,
        other => bail!("nf4_dequantize: type must be fp32, bf16 or fp16, got {other:?}"),
    };
    let mut out: Handle = null_mut();
    // SAFETY: the tensors outlive the call; on success `out` is a new tensor of this side's.
    check(unsafe { tl_nf4_dequantize(&weight.raw(), kind, &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// `x W^T`, x (.., C) contiguous -> (.., O), differentiable in x.
///
/// # Errors
/// As of [`nf4_dequantize`]; an x of another shape, dtype or device.
pub fn nf4_linear(x: &Tensor, weight: &Nf4Parts) -> Result<Tensor> {
    let mut out: Handle = null_mut();
    // SAFETY: the tensors outlive the call; on success `out` is a new tensor of this side's.
    check(unsafe { tl_nf4_linear(handle(x), &weight.raw(), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[repr(C)]
struct RawNf4 {
    codes: Handle,
    absmax: Handle,
    nested_map: Handle,
    nested_absmax: Handle,
    nested_offset: Handle,
    rows: i64,
    columns: i64,
}
