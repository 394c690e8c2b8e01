//! Weights' persistent gradients, which matrix products write (`csrc/torch_cuda/gradients.h`).

use super::{Handle, check, cuda_functions, handle};
use anyhow::{Result, ensure};
use std::ffi::c_int;
use tch::Tensor;

unsafe extern "C" {
    fn tl_set_grad(weight: Handle, grad: Handle) -> c_int;
}

cuda_functions! {
    fn tl_gradients_record(on: c_int) -> c_int;
    fn tl_gradients_written(grad: Handle, written: *mut c_int) -> c_int;
    fn tl_gradients_overwrite(n: c_int, grad: *mut Handle, left: *mut c_int) -> c_int;
}

/// `weight.grad = grad`, also of another dtype: backward passes add to it in place.
pub fn set_grad(weight: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both tensors outlive the call; C++ keeps a handle of its own.
    check(unsafe { tl_set_grad(handle(weight), handle(grad)) })
}

/// Runs `work` and says of each gradient whether a matrix product wrote it (`csrc/torch_cuda/gradients.h`).
pub fn written_by_products<T>(
    grads: &[&Tensor],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<bool>)> {
    // SAFETY: a number.
    let record = |on: bool| check(unsafe { tl_gradients_record(on.into()) });
    record(true)?;
    let done = work();
    record(false)?;
    let done = done?;
    let written = |grad: &&Tensor| {
        let mut written = 0;
        // SAFETY: the tensor outlives the call.
        check(unsafe { tl_gradients_written(handle(grad), &mut written) })?;
        Ok(written != 0)
    };
    Ok((done, grads.iter().map(written).collect::<Result<_>>()?))
}

/// Runs `work`, in which the first matrix product of each of these gradients overwrites what it holds.
///
/// # Errors
/// One of them was not written, so that it still holds what it did.
pub fn overwriting<T>(grads: &[&Tensor], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mark = |grads: &[&Tensor]| -> Result<c_int> {
        let mut handles: Vec<Handle> = grads.iter().map(|t| handle(t)).collect();
        let mut left = 0;
        // SAFETY: the array has as many entries as said; the tensors outlive the call.
        check(unsafe {
            tl_gradients_overwrite(handles.len() as c_int, handles.as_mut_ptr(), &mut left)
        })?;
        Ok(left)
    };
    mark(grads)?;
    let done = work();
    let left = mark(&[])?;
    let done = done?;
    ensure!(left == 0, "{left} gradients were to be overwritten and were not");
    Ok(done)
}
