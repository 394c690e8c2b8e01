//! Weights' persistent gradients, which matrix products write (`csrc/torch_cuda/gradients.h`).

use super::{Handle, check, cuda_functions, handle};
use anyhow::{Result, ensure};
use std::borrow::Borrow;
use std::ffi::c_int;
use tch::Tensor;

unsafe extern "C" {
    fn tl_set_grad(weight: Handle, grad: Handle) -> c_int;
}

cuda_functions! {
    fn tl_gradients_watch(n: c_int, grads: *mut Handle, old: c_int) -> c_int;
    fn tl_gradients_written(n: c_int, grads: *mut Handle, written: *mut c_int) -> c_int;
}

/// `weight.grad = grad`, also of another dtype: backward passes add to it in place.
pub fn set_grad(weight: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both tensors outlive the call; C++ keeps a handle of its own.
    check(unsafe { tl_set_grad(handle(weight), handle(grad)) })
}

/// Some gradients, of which the first matrix products of a pass overwrite what they hold from the pass before, so that
/// nobody need clear those. Which they are is seen in the first pass. On a GPU; a graph that is captured between the two
/// keeps what it was told.
///
/// ```text
/// begin(grads)    the pass that computes them    end(grads)
/// ```
#[derive(Debug, Default)]
pub struct FirstProducts {
    /// Of each gradient, whether a product writes it; `None` before it is known.
    overwritten: Option<Vec<bool>>,
}

impl FirstProducts {
    /// Whether the i-th gradient is overwritten. The others are to be cleared before a pass; all are before the first.
    pub fn overwrites(&self, i: usize) -> bool {
        self.overwritten.as_ref().is_some_and(|old| old[i])
    }

    /// Before a pass that computes these gradients, always the same ones.
    pub fn begin<T: Borrow<Tensor>>(&self, grads: &[T]) -> Result<()> {
        let (mut handles, old) = (self.watched(grads), self.overwritten.is_some());
        // SAFETY: the array has as many entries as said; the tensors outlive the call.
        check(unsafe {
            tl_gradients_watch(handles.len() as c_int, handles.as_mut_ptr(), old.into())
        })
    }

    /// After it.
    ///
    /// # Errors
    /// A gradient that was to be overwritten was not, so that it still holds what it did.
    pub fn end<T: Borrow<Tensor>>(&mut self, grads: &[T]) -> Result<()> {
        let written = self.written(grads)?;
        if self.overwritten.is_some() {
            let left = written.iter().filter(|&&written| !written).count();
            ensure!(left == 0, "{left} gradients were to be overwritten and were not");
        } else {
            self.overwritten = Some(written);
        }
        Ok(())
    }

    /// Runs the pass between the two.
    pub fn around<T>(&mut self, grads: &[&Tensor], pass: impl FnOnce() -> Result<T>) -> Result<T> {
        self.begin(grads)?;
        let done = pass();
        if done.is_err() {
            self.written(grads)?;
            return done;
        }
        self.end(grads).and(done)
    }

    /// Which of those watched were written; they are watched no longer.
    fn written<T: Borrow<Tensor>>(&self, grads: &[T]) -> Result<Vec<bool>> {
        let mut handles = self.watched(grads);
        let mut written = vec![0; handles.len()];
        // SAFETY: the arrays have as many entries as said; the tensors outlive the call.
        check(unsafe {
            tl_gradients_written(handles.len() as c_int, handles.as_mut_ptr(), written.as_mut_ptr())
        })?;
        Ok(written.into_iter().map(|written| written != 0).collect())
    }

    /// Those that are overwritten where that is known, else all.
    fn watched<T: Borrow<Tensor>>(&self, grads: &[T]) -> Vec<Handle> {
        let wanted = |(i, _): &(usize, &T)| self.overwritten.is_none() || self.overwrites(*i);
        grads.iter().enumerate().filter(wanted).map(|(_, t)| handle(t.borrow())).collect()
    }
}
