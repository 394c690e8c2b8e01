//! A call when a tensor's gradient is known (`csrc/torch/hooks.cpp`).

use super::recompute::set_last_error;
use super::{Handle, check, handle};
use crate::guard;
use anyhow::Result;
use std::ffi::{c_int, c_void};
use tch::{Device, Tensor};

unsafe extern "C" {
    fn tl_on_gradient(
        tensor: Handle,
        call: extern "C" fn(*mut c_void) -> c_int,
        context: *mut c_void,
        drop: extern "C" fn(*mut c_void),
    ) -> c_int;
}

/// Called and dropped by whatever thread runs the backward pass, hence `Send`.
pub type Call = Box<dyn Fn() -> Result<()> + Send>;

/// Calls `call` in each backward pass through `tensor` once its gradient is known, before the function that made the
/// tensor runs backward. An error or a panic there comes out of the backward pass as an exception.
pub fn on_gradient(tensor: &Tensor, call: Call) -> Result<()> {
    let context = Box::into_raw(Box::new(call)).cast(); // freed by `free`
    // SAFETY: the tensor outlives the call; C++ owns the context, of the type that `run` and `free` expect.
    check(unsafe { tl_on_gradient(handle(tensor), run, context, free) })
}

/// `TlCall` of `csrc/api.h`. No panic leaves it.
extern "C" fn run(context: *mut c_void) -> c_int {
    // SAFETY: `context` is a live `Call`.
    let call = unsafe { &*context.cast::<Call>() };
    match guard::catch("a hook of the backward pass", Device::Cpu, "", call) {
        Ok(()) => 0,
        Err(error) => {
            set_last_error(&error);
            1
        }
    }
}

extern "C" fn free(context: *mut c_void) {
    // SAFETY: `context` came from `Box::into_raw` as a `Call`, and C++ frees it once.
    drop(unsafe { Box::from_raw(context.cast::<Call>()) });
}
