//! Turns a panic of tch (its plain operations unwrap libtorch's errors) into an error for the user.

use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Silences the default panic message inside [`catch`], which reports the failure itself. Call once.
pub fn install_panic_hook() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !GUARDED.get() {
            default(info);
        }
    }));
}

/// Runs `f`; a panic becomes an error. CUDA out of memory gets the allocator's figures and what to lower.
pub fn catch<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    match outcome {
        Ok(result) => result,
        Err(payload) => Err(from_panic(what, &payload_text(payload.as_ref()))),
    }
}

fn payload_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default()
}

fn from_panic(what: &str, text: &str) -> anyhow::Error {
    let cause = first_line(text);
    let error = anyhow!(cause.clone()).context(format!("{what} failed"));
    if !cause.contains("out of memory") {
        return error;
    }
    let memory = crate::ffi::cuda_memory(0).unwrap_or_default();
    let gib = |bytes: i64| bytes as f64 / (1u64 << 30) as f64;
    let hint = format!(
        "the allocator held {:.1} GiB (peak {:.1} GiB, reserved {:.1} GiB); lower \
         `train.micro_batch_size` (accumulation rises by itself, results stay) or \
         `train.max_seq_length`",
        gib(memory.allocated),
        gib(memory.peak_allocated),
        gib(memory.reserved)
    );
    match Err::<(), _>(error).hint(hint) {
        Err(hinted) => hinted,
        Ok(()) => anyhow!(cause),
    }
}

/// The message inside tch's `called Result::unwrap() on an Err value: Torch("...\nbacktrace")`.
fn first_line(text: &str) -> String {
    let inner = text.split_once("Torch(\"").map_or(text, |(_, rest)| rest);
    let line = inner.split("\\n").next().unwrap_or(inner);
    line.lines().next().unwrap_or(line).trim_end_matches("\")").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_tch_becomes_an_error_with_libtorchs_first_line() {
        install_panic_hook();
        let error = catch("the step", || {
            let a = tch::Tensor::zeros([2, 3], tch::kind::FLOAT_CPU);
            Ok(a.matmul(&a))
        })
        .unwrap_err();
        let text = format!("{error:#}");
        assert!(text.starts_with("the step failed: mat1 and mat2 shapes"), "{text}");
        assert!(!text.contains("Exception raised from"), "{text}");
    }

    #[test]
    fn out_of_memory_says_what_to_lower() {
        let error = from_panic("the step", "Torch(\"CUDA out of memory. Tried 2 GiB\\nframe #0\")");
        assert!(error.to_string().contains("the step failed"));
        assert!(error.chain().any(|e| e.to_string().contains("Tried 2 GiB")));
    }
}
