//! What the GPU does and where the CPU waits for it, recorded by CUPTI (`csrc/torch_cuda/profile.cpp`).

use super::{check, cuda_functions};
use anyhow::Result;
use std::ffi::{CStr, c_char, c_int};

/// `TlActivity` of `csrc/api.h`.
#[repr(C)]
struct RawActivity {
    name: *const c_char,
    start_ns: i64,
    end_ns: i64,
    lane: u32,
    kind: i32,
}

cuda_functions! {
    fn tl_profile_start() -> c_int;
    fn tl_profile_now(ns: *mut i64) -> c_int;
    fn tl_profile_stop(activities: *mut *const RawActivity, n: *mut usize) -> c_int;
}

/// What an [`Activity`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivityKind {
    /// A kernel, launched by itself or by a CUDA graph.
    Kernel,
    /// A copy from, to or within the GPU.
    Memcpy,
    /// Memory set to a value.
    Memset,
    /// A call of CUDA's API in which the CPU waited for the GPU.
    Wait,
}

/// Something that took time, in nanoseconds of CUPTI's clock.
#[derive(Clone, Debug)]
pub struct Activity {
    /// What it is.
    pub kind: ActivityKind,
    /// The kernel's name in C++, or the API call's.
    pub name: String,
    /// Its CUDA stream; of a wait, the CPU thread.
    pub lane: u32,
    /// When it began.
    pub start_ns: i64,
    /// When it was over.
    pub end_ns: i64,
}

/// A recording in progress; dropped, it ends and what it saw is lost.
#[derive(Debug)]
pub struct Recording {
    stopped: bool,
}

impl Recording {
    /// Starts to record what the current CUDA device does. One at a time in a process.
    ///
    /// # Errors
    /// No libcupti, or one that may not look at the GPU; another profiler is at work; a build without kernels.
    ///
    /// # Sync
    /// The CPU waits for the GPU.
    pub fn start() -> Result<Self> {
        // SAFETY: plain call.
        check(unsafe { tl_profile_start() })?;
        Ok(Self { stopped: false })
    }

    /// The time on CUPTI's clock, in nanoseconds. The CPU does not wait.
    pub fn now_ns(&self) -> Result<i64> {
        let mut ns = 0;
        // SAFETY: the pointer is to a live local.
        check(unsafe { tl_profile_now(&mut ns) })?;
        Ok(ns)
    }

    /// Ends the recording; all that was seen, in order of start.
    ///
    /// # Errors
    /// CUPTI lost records or had no times for them.
    ///
    /// # Sync
    /// The CPU waits for the GPU.
    pub fn stop(mut self) -> Result<Vec<Activity>> {
        self.stopped = true;
        let (mut first, mut n) = (std::ptr::null(), 0);
        // SAFETY: both pointers are to live locals.
        check(unsafe { tl_profile_stop(&mut first, &mut n) })?;
        if n == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: on success `first` points to `n` activities, which live until the next recording ends.
        let raw = unsafe { std::slice::from_raw_parts(first, n) };
        Ok(raw.iter().map(activity).collect())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if !self.stopped {
            let (mut first, mut n) = (std::ptr::null(), 0);
            // SAFETY: as in `stop`; nothing is read.
            unsafe { tl_profile_stop(&mut first, &mut n) };
        }
    }
}

fn activity(raw: &RawActivity) -> Activity {
    // SAFETY: the name is a NUL-terminated text that lives as long as the activity.
    let name = unsafe { CStr::from_ptr(raw.name) }.to_string_lossy().into_owned();
    let kind = match raw.kind {
        0 => ActivityKind::Kernel,
        1 => ActivityKind::Memcpy,
        2 => ActivityKind::Memset,
        _ => ActivityKind::Wait,
    };
    Activity { kind, name, lane: raw.lane, start_ns: raw.start_ns, end_ns: raw.end_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_a_recording_says_that_there_is_no_card() {
        if tch::Cuda::is_available() {
            return; // tests/suite/gpu.rs records there
        }
        let error = Recording::start().unwrap_err().to_string();
        let expected = match crate::ffi::compiled_archs().is_empty() {
            true => "built without CUDA kernels",
            false => "no GPU is visible",
        };
        assert!(error.contains(expected), "{error}");
    }
}
