//! A part of the network that the backward pass runs again (`csrc/torch/checkpoint.cpp`).

use super::{Handle, check, handle};
use crate::guard;
use anyhow::{Result, ensure};
use std::ffi::{c_char, c_int, c_void};
use std::ptr::null_mut;
use std::slice;
use tch::{Device, Tensor};

type Run = extern "C" fn(*mut c_void, c_int, *mut Handle, c_int, *mut Handle) -> c_int;

unsafe extern "C" {
    fn tl_set_last_error(text: *const c_char, length: usize);
    fn tl_recompute(
        n_in: c_int,
        inputs: *mut Handle,
        n_out: c_int,
        results: *mut Handle,
        run: Run,
        context: *mut c_void,
        drop: extern "C" fn(*mut c_void),
        out: *mut Handle,
    ) -> c_int;
}

/// Inputs -> results. It is called and dropped by whatever thread runs the backward pass, hence `Send`.
pub type Part = Box<dyn Fn(&[Tensor]) -> Vec<Tensor> + Send>;

/// `results`, which `part` made of `inputs` without a graph, with a backward pass that runs the part again.
/// What panics there comes out of the backward pass as an exception.
pub fn recompute(part: Part, inputs: &[&Tensor], results: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut given: Vec<Handle> = inputs.iter().map(|t| handle(t)).collect();
    let mut results: Vec<Handle> = results.iter().map(handle).collect();
    let mut out: Vec<Handle> = vec![null_mut(); results.len()];
    let context = Box::into_raw(Box::new(part)).cast(); // freed by `free`
    // SAFETY: the arrays have as many entries as said; C++ owns the context, of the type that `run` and
    // `free` expect; on success each of `out` is a new tensor of this side's.
    check(unsafe {
        tl_recompute(
            given.len() as c_int,
            given.as_mut_ptr(),
            results.len() as c_int,
            results.as_mut_ptr(),
            run,
            context,
            free,
            out.as_mut_ptr(),
        )
    })?;
    Ok(out.into_iter().map(|t| unsafe { Tensor::from_ptr(t) }).collect())
}

/// `TlPart` of `csrc/api.h`. No panic leaves it.
extern "C" fn run(
    context: *mut c_void,
    n_in: c_int,
    inputs: *mut Handle,
    n_out: c_int,
    outputs: *mut Handle,
) -> c_int {
    let outcome = guard::catch("computing a block again", Device::Cpu, "", || {
        // SAFETY: `context` is a live `Part`, and C++ passes arrays of these lengths, of live tensors.
        let part = unsafe { &*context.cast::<Part>() };
        let inputs = unsafe { slice::from_raw_parts(inputs, n_in as usize) };
        let inputs: Vec<Tensor> =
            inputs.iter().map(|&t| unsafe { Tensor::clone_from_ptr(t) }).collect();
        let results = part(&inputs);
        ensure!(results.len() == n_out as usize, "{} results, {n_out} before", results.len());
        Ok(results)
    });
    match outcome {
        Ok(results) => {
            for (i, result) in results.into_iter().enumerate() {
                // SAFETY: room for `n_out` handles; C++ owns the tensors from here on.
                unsafe { *outputs.add(i) = handle(&result) };
                std::mem::forget(result);
            }
            0
        }
        Err(error) => {
            set_last_error(&error);
            1
        }
    }
}

/// What a call from C++ that failed tells it.
pub(super) fn set_last_error(error: &anyhow::Error) {
    let text = format!("{error:#}");
    // SAFETY: the text outlives the call, which copies it.
    unsafe { tl_set_last_error(text.as_ptr().cast(), text.len()) };
}

extern "C" fn free(context: *mut c_void) {
    // SAFETY: `context` came from `Box::into_raw` as a `Part`, and C++ frees it once.
    drop(unsafe { Box::from_raw(context.cast::<Part>()) });
}
