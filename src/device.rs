//! Where to run: `auto`, `cpu`, `cuda`, `cuda:N` -> a device that this binary has code for.

use crate::bail_hint;
use crate::error::WithHint;
use crate::ffi;
use anyhow::{Context, Result, anyhow};
use tch::Device;

/// Turns a `device` setting into a device, or says why it cannot be used. `auto` is the first GPU
/// where one is visible, else the CPU. A program built with TL_NO_CUDA=1 sees none.
///
/// # Errors
/// No GPU is visible, the index does not exist, or the binary has no kernels for the card's compute
/// capability. The last is an error for `auto` too: a GPU is never left idle silently.
pub fn resolve(choice: &str) -> Result<Device> {
    let count = ffi::cuda::device_count()?;
    let index = match parse(choice)? {
        Choice::Cpu => return Ok(Device::Cpu),
        Choice::Auto if count == 0 => return Ok(Device::Cpu),
        Choice::Auto => 0,
        Choice::Cuda(index) => index,
    };
    if count == 0 {
        return Err(anyhow!("device `{choice}`: no GPU is visible")).usage(
            "take the CPU (`--device cpu`, in a run `--set device=cpu`); `tinyllama doctor` says what is wrong with the driver, and \
             CUDA_VISIBLE_DEVICES may hide cards",
        );
    }
    if index >= count {
        return Err(anyhow!(
            "device `{choice}`: this machine shows {count} GPUs, `cuda:0` to `cuda:{}`",
            count - 1
        ))
        .usage("pick an index that exists; `tinyllama doctor` lists the cards");
    }
    check_capability(index)?;
    Ok(Device::Cuda(index))
}

const KNOWN: &str = "one of `auto`, `cpu`, `cuda`, `cuda:N` with N from 0";

/// Whether a `device` setting is one, without a look at the machine.
///
/// # Errors
/// What it may be.
pub fn check(choice: &str) -> Result<()> {
    parse(choice).map(drop).map_err(|_| anyhow!("`{choice}` is not known; {KNOWN}"))
}

enum Choice {
    Auto,
    Cpu,
    Cuda(usize),
}

fn parse(choice: &str) -> Result<Choice> {
    let index = match choice {
        "auto" => return Ok(Choice::Auto),
        "cpu" => return Ok(Choice::Cpu),
        "cuda" => Some(0),
        _ => choice.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
    };
    index.map(Choice::Cuda).with_context(|| format!("device `{choice}` is not known")).usage(KNOWN)
}

/// Refuses a card that the kernels were not compiled for.
fn check_capability(index: usize) -> Result<()> {
    let card = ffi::cuda_device(index).with_context(|| format!("device `cuda:{index}`"))?;
    let archs = ffi::compiled_archs();
    if !has_kernels(card.capability, &archs) {
        let (major, minor) = card.capability;
        bail_hint!(
            format!(
                "add \"{major}{minor}\" to CUDA_ARCHS in build.rs and rebuild with \
                 `cargo build --release`, or run with `--device cpu`"
            );
            "`cuda:{index}` is a {} of compute capability {major}.{minor}; this binary has kernels \
             for {}",
            card.name,
            if archs.is_empty() { "no GPU".into() } else { format!("sm_{}", archs.join(", sm_")) }
        );
    }
    Ok(())
}

/// Whether one of the compiled architectures runs on a card of this compute capability.
pub fn has_kernels(capability: (i32, i32), archs: &[&str]) -> bool {
    archs.iter().any(|arch| runs_on(arch, capability))
}

/// Whether machine code for `arch` ("86", "90a") runs on a card: same major version and no newer
/// minor one; code with the suffix `a` runs on exactly its own version.
fn runs_on(arch: &str, (major, minor): (i32, i32)) -> bool {
    let digits = arch.trim_end_matches('a');
    let Ok(number) = digits.parse::<i32>() else { return false };
    let (arch_major, arch_minor) = (number / 10, number % 10);
    let exact = digits.len() < arch.len();
    arch_major == major && if exact { arch_minor == minor } else { arch_minor <= minor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_runs_within_its_major_version_and_upwards() {
        let runs = |arch| {
            [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)].map(|c| runs_on(arch, c))
        };
        assert_eq!(runs("80"), [false, true, true, true, false, false, false]);
        assert_eq!(runs("86"), [false, false, true, true, false, false, false]);
        assert_eq!(runs("89"), [false, false, false, true, false, false, false]);
        assert_eq!(runs("90a"), [false, false, false, false, true, false, false]);
        assert_eq!(runs("120"), [false, false, false, false, false, false, true]);
        assert!(!runs_on("", (8, 0)));
    }

    #[test]
    fn unknown_devices_are_a_usage_error_that_lists_the_known_ones() {
        for choice in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            let error = resolve(choice).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2, "{choice}");
            assert!(error.to_string().contains(&format!("`{choice}` is not known")), "{error}");
        }
        assert_eq!(resolve("cpu").unwrap(), Device::Cpu);
    }

    #[test]
    fn a_gpu_that_does_not_exist_is_refused() {
        let error = resolve("cuda:99").unwrap_err().to_string();
        assert!(
            error.contains("no GPU is visible") || error.contains("this machine shows"),
            "{error}"
        );
    }
}
