//! Turns a panic into an error for the user. tch's plain operations unwrap libtorch's errors, so this is
//! how "shapes do not match" or "out of memory" is told, and the net under everything else.

use crate::error::{Told, WithHint};
use crate::ffi;
use anyhow::{Context, Result, anyhow};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use tch::Device;

/// Exit code of a program that wrote into a closed pipe, as a shell gives it (128 + SIGPIPE).
const CLOSED_PIPE: u8 = 141;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// Where the last guarded panic arose, as `file:line`.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `f`; a panic becomes the error `WHAT failed`, caused by libtorch's own sentence without its C++
/// stack. Out of memory gets the allocator's figures of `device` and the hint `lower`, what the user can
/// make smaller. An error of `f` passes unchanged.
pub fn catch<T>(
    what: &str,
    device: Device,
    lower: &str,
    f: impl FnOnce() -> Result<T>,
) -> Result<T> {
    silence_guarded_panics();
    let outer = GUARDED.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    match outcome.map_err(|payload| payload_text(payload.as_ref())) {
        Ok(result) => result,
        // `tinyllama .. | head`: nobody reads on, and that is no failure to tell of.
        Err(text) if text.starts_with("failed printing to stdout") => {
            Err(Told { line: String::new(), code: CLOSED_PIPE }.into())
        }
        Err(text) => from_panic(&text, device, lower).with_context(|| format!("{what} failed")),
    }
}

/// The default hook prints before anyone can catch. Under a guard, it only notes the place.
fn silence_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                return default(info);
            }
            let place = info.location().map(|l| format!("{}:{}", l.file(), l.line()));
            PLACE.set(place.unwrap_or_default());
        }));
    });
}

fn payload_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default()
}

fn from_panic<T>(text: &str, device: Device, lower: &str) -> Result<T> {
    // tch's panic quotes libtorch's text: its line breaks are escaped, and its stack follows them. Our own
    // operations panic with the sentence alone.
    let torch = text.split_once("Torch(\"").map(|(_, torch)| torch);
    let first_line =
        |t: &'_ str| t.split("\\n").next().unwrap_or(t).trim_end_matches("\")").to_owned();
    let sentence = torch.map_or_else(|| text.to_owned(), first_line);
    if ["out of memory", "DefaultCPUAllocator"].iter().any(|s| sentence.contains(s)) {
        return Err(anyhow!("{sentence}{}", allocator_figures(device))).hint(lower);
    }
    match torch {
        Some(_) => Err(anyhow!("{sentence}")),
        None => Err(anyhow!("internal error at {}: {text}", PLACE.take()))
            .hint("this is a bug: please report it with the command and this message"),
    }
}

fn allocator_figures(device: Device) -> String {
    let Device::Cuda(index) = device else { return String::new() };
    let Ok(memory) = ffi::cuda_memory(index) else { return String::new() };
    let gib = |bytes: i64| bytes as f64 / (1u64 << 30) as f64;
    format!(
        " (allocated {:.2} GiB, at most {:.2}; reserved {:.2} GiB)",
        gib(memory.allocated),
        gib(memory.peak_allocated),
        gib(memory.reserved)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    #[test]
    fn a_panic_of_tch_becomes_an_error_with_libtorchs_first_line() {
        let product = || {
            let a = Tensor::zeros([2, 3], tch::kind::FLOAT_CPU);
            Ok(a.matmul(&a))
        };
        let error = catch("the step", Device::Cpu, "nothing", product).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.starts_with("the step failed: mat1 and mat2 shapes"), "{text}");
        assert!(!text.contains("Exception raised from"), "{text}");
    }

    #[test]
    fn running_out_of_memory_is_told_with_the_size() {
        let huge = || Ok(Tensor::zeros([1 << 50], tch::kind::FLOAT_CPU));
        let error = catch("the step", Device::Cpu, "buy memory", huge).unwrap_err();
        let text = format!("{error:#}");
        for word in ["the step failed", "DefaultCPUAllocator", "4503599627370496"] {
            assert!(text.contains(word), "{text}");
        }
        assert!(!text.contains("frame") && !text.ends_with('"'), "{text}");

        let cuda = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried \
                    to allocate 2.00 GiB.\\nException raised from\\nframe #0\")";
        let error = from_panic::<()>(cuda, Device::Cpu, "").unwrap_err();
        assert_eq!(error.to_string(), "CUDA out of memory. Tried to allocate 2.00 GiB.");
        let ours = "CUDA out of memory. Tried to allocate 2.00 GiB.";
        let error = from_panic::<()>(ours, Device::Cpu, "").unwrap_err();
        assert_eq!(error.to_string(), ours);
    }

    #[test]
    fn an_ordinary_error_passes_and_another_panic_is_told_with_its_place() {
        let usual = || anyhow::bail!("as always");
        let error = catch::<()>("the step", Device::Cpu, "", usual).unwrap_err();
        assert_eq!(format!("{error:#}"), "as always");
        let error = catch::<()>("the step", Device::Cpu, "", || panic!("a bug")).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("internal error at src/guard.rs:") && text.ends_with(": a bug"),
            "{text}"
        );
    }
}
