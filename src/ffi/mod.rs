//! The C ABI of `csrc/api.h`, mirrored once, behind safe functions. The only module with `unsafe`.
//!
//! Everything here takes and returns [`tch::Tensor`]; a failure carries the C++ exception's full text.

use anyhow::{Result, bail};
use std::ffi::{CStr, c_char, c_int};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

type Handle = *mut C_tensor;

unsafe extern "C" {
    fn tl_last_error() -> *const c_char;
    fn tl_versions(buffer: *mut c_char, capacity: usize) -> c_int;
    fn tl_cuda_memory(device: c_int, out: *mut i64) -> c_int;
    fn tl_cuda_reset_peak_memory(device: c_int) -> c_int;
    fn tl_cuda_device(
        device: c_int,
        name: *mut c_char,
        capacity: usize,
        major: *mut c_int,
        minor: *mut c_int,
        total: *mut i64,
    ) -> c_int;
    fn tl_rng_state(device: c_int, out: *mut Handle) -> c_int;
    fn tl_set_rng_state(device: c_int, state: Handle) -> c_int;
    fn tl_pin_memory(tensor: Handle, out: *mut Handle) -> c_int;
    fn tl_set_math_mode(allow_tf32: c_int, deterministic: c_int) -> c_int;
    fn tl_set_sdp_backends(mask: c_int) -> c_int;
    fn tl_adamw(
        n: c_int,
        param: *mut Handle,
        grad: *mut Handle,
        exp_avg: *mut Handle,
        exp_avg_sq: *mut Handle,
        weight: *mut Handle,
        clip: Handle,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: i64,
    ) -> c_int;
}

/// Return code of the C side -> `Result` with its message.
fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: `tl_last_error` returns a NUL-terminated thread-local text, never null.
    let text = unsafe { CStr::from_ptr(tl_last_error()) }.to_string_lossy().into_owned();
    // libtorch appends a C++ backtrace; its first line says what happened.
    bail!("{}", text.lines().next().unwrap_or("unknown error"))
}

fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut()
}

fn text(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|&b| b == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).into_owned()
}

/// Compute capabilities that the CUDA kernels were compiled for, e.g. `["80", "90a"]`; empty without CUDA.
pub fn compiled_archs() -> Vec<&'static str> {
    env!("TL_CUDA_ARCHS").split(',').filter(|s| !s.is_empty()).collect()
}

/// Versions of the libraries this binary runs with; `-` where a library is absent.
pub struct Versions {
    pub libtorch: String,
    pub cuda: String,
    pub cudnn: String,
    pub nccl: String,
}

/// Versions of libtorch, the CUDA runtime, cuDNN and NCCL.
pub fn versions() -> Result<Versions> {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer outlives the call and its length is passed.
    check(unsafe { tl_versions(buffer.as_mut_ptr().cast(), buffer.len()) })?;
    let joined = text(&buffer);
    let mut parts = joined.lines().map(str::to_owned);
    let mut next = || parts.next().unwrap_or_else(|| "-".into());
    Ok(Versions { libtorch: next(), cuda: next(), cudnn: next(), nccl: next() })
}

/// Bytes held by libtorch's caching allocator on one CUDA device.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaMemory {
    pub allocated: i64,
    pub peak_allocated: i64,
    pub reserved: i64,
    pub peak_reserved: i64,
}

/// Allocator statistics; no CPU wait.
pub fn cuda_memory(device: usize) -> Result<CudaMemory> {
    let mut out = [0i64; 4];
    // SAFETY: `out` has the four slots that the callee fills.
    check(unsafe { tl_cuda_memory(device as c_int, out.as_mut_ptr()) })?;
    let [allocated, peak_allocated, reserved, peak_reserved] = out;
    Ok(CudaMemory { allocated, peak_allocated, reserved, peak_reserved })
}

/// Starts a new peak measurement.
pub fn cuda_reset_peak_memory(device: usize) -> Result<()> {
    // SAFETY: plain call.
    check(unsafe { tl_cuda_reset_peak_memory(device as c_int) })
}

/// One CUDA card as libtorch sees it.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    pub name: String,
    pub capability: (i32, i32),
    pub total_memory: i64,
}

/// Name, compute capability and memory (bytes) of a CUDA device.
pub fn cuda_device(device: usize) -> Result<CudaDevice> {
    let mut name = [0u8; 256];
    let (mut major, mut minor, mut total) = (0, 0, 0);
    // SAFETY: every pointer is to a live local of the type that the callee writes.
    check(unsafe {
        tl_cuda_device(
            device as c_int,
            name.as_mut_ptr().cast(),
            name.len(),
            &mut major,
            &mut minor,
            &mut total,
        )
    })?;
    Ok(CudaDevice { name: text(&name), capability: (major, minor), total_memory: total })
}

/// Index in the C ABI: -1 is the CPU.
fn device_index(device: tch::Device) -> c_int {
    match device {
        tch::Device::Cuda(i) => i as c_int,
        _ => -1,
    }
}

/// State of the device's default random generator, a `(bytes,)` u8 tensor on the CPU.
pub fn rng_state(device: tch::Device) -> Result<Tensor> {
    let mut out: Handle = std::ptr::null_mut();
    // SAFETY: on success `out` is a new tensor that this side owns.
    check(unsafe { tl_rng_state(device_index(device), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Restores what [`rng_state`] returned.
pub fn set_rng_state(device: tch::Device, state: &Tensor) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    check(unsafe { tl_set_rng_state(device_index(device), handle(state)) })
}

/// A copy of a CPU tensor in page-locked memory, from which a GPU copies without a CPU wait.
pub fn pin_memory(tensor: &Tensor) -> Result<Tensor> {
    let mut out: Handle = std::ptr::null_mut();
    // SAFETY: on success `out` is a new tensor that this side owns.
    check(unsafe { tl_pin_memory(handle(tensor), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// `allow_tf32` is `torch.set_float32_matmul_precision("high")`; `deterministic` is
/// `torch.use_deterministic_algorithms(True)` with cuBLAS's fixed workspace.
pub fn set_math_mode(allow_tf32: bool, deterministic: bool) -> Result<()> {
    // SAFETY: plain call.
    check(unsafe { tl_set_math_mode(allow_tf32.into(), deterministic.into()) })
}

/// Kernels that `scaled_dot_product_attention` may choose from.
#[derive(Clone, Copy, Debug)]
pub struct SdpBackends {
    pub math: bool,
    pub flash: bool,
    pub efficient: bool,
    pub cudnn: bool,
}

/// Process-wide switch of the attention kernels.
pub fn set_sdp_backends(b: SdpBackends) -> Result<()> {
    let bits = [b.math, b.flash, b.efficient, b.cudnn];
    let mask = bits.iter().enumerate().map(|(i, &on)| (on as c_int) << i).sum();
    // SAFETY: plain call.
    check(unsafe { tl_set_sdp_backends(mask) })
}

/// The tensors of one parameter in an AdamW step; all fp32 on one CUDA device but `weight` (bf16).
pub struct AdamWTensors<'a> {
    pub param: &'a Tensor,
    pub grad: &'a Tensor,
    pub exp_avg: &'a Tensor,
    pub exp_avg_sq: &'a Tensor,
    pub weight: Option<&'a Tensor>,
}

/// Scalars of one AdamW step; `step` counts from 1.
#[derive(Clone, Copy, Debug)]
pub struct AdamWScalars {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub step: i64,
}

/// One fused AdamW update in place (formula in `csrc/optim/adamw.cu`). Gradients are multiplied by `clip`,
/// a 0-dim fp32 CUDA tensor; where it is not finite nothing is written. The CPU does not wait.
pub fn adamw(tensors: &[AdamWTensors], clip: &Tensor, s: AdamWScalars) -> Result<()> {
    let column = |f: for<'a, 'b> fn(&'b AdamWTensors<'a>) -> &'a Tensor| -> Vec<Handle> {
        tensors.iter().map(|t| handle(f(t))).collect()
    };
    let mut param = column(|t| t.param);
    let mut grad = column(|t| t.grad);
    let mut exp_avg = column(|t| t.exp_avg);
    let mut exp_avg_sq = column(|t| t.exp_avg_sq);
    let mut weight: Vec<Handle> =
        tensors.iter().map(|t| t.weight.map_or(std::ptr::null_mut(), handle)).collect();
    // SAFETY: all five arrays have `tensors.len()` entries; the tensors outlive the call, and C++ checks
    // dtype, layout, device and size before it launches.
    check(unsafe {
        tl_adamw(
            tensors.len() as c_int,
            param.as_mut_ptr(),
            grad.as_mut_ptr(),
            exp_avg.as_mut_ptr(),
            exp_avg_sq.as_mut_ptr(),
            weight.as_mut_ptr(),
            handle(clip),
            s.lr,
            s.beta1,
            s.beta2,
            s.eps,
            s.weight_decay,
            s.step,
        )
    })
}

/// Copies a tensor's data (any device; made contiguous) into `out`, whose length must be its byte size.
/// Makes the CPU wait for a CUDA tensor.
pub fn tensor_bytes(tensor: &Tensor) -> Vec<u8> {
    let t = tensor.detach().to_device(tch::Device::Cpu).contiguous();
    let size = t.numel() * t.kind().elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor has exactly `size` readable bytes at `data_ptr`.
    unsafe { std::slice::from_raw_parts(t.data_ptr() as *const u8, size) }.to_vec()
}

/// A new CPU tensor of the given dtype and shape over a copy of `bytes` (native order).
pub fn tensor_from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Tensor {
    let t = Tensor::empty(shape, (kind, tch::Device::Cpu));
    let size = t.numel() * kind.elt_size_in_bytes();
    assert_eq!(
        size,
        bytes.len(),
        "tensor {shape:?} of {kind:?} needs {size} bytes, got {}",
        bytes.len()
    );
    // SAFETY: sizes were just compared; the regions are distinct allocations.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), t.data_ptr() as *mut u8, size) };
    t
}

/// Maps a file read-only.
pub fn map_file(file: &std::fs::File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the usual caveat of memory maps: another process must not truncate the file meanwhile.
    unsafe { memmap2::Mmap::map(file) }
}

/// Newest CUDA version of the driver library (13000 is 13.0), or `None` where there is no driver.
pub fn cuda_driver_version() -> Option<i32> {
    // SAFETY: only looks for the shared library; cudarc's calls would panic without it.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return None;
    }
    let mut version = 0;
    // SAFETY: the library is there and the pointer is to a live local.
    let code = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) };
    (code == cudarc::driver::sys::CUresult::CUDA_SUCCESS).then_some(version)
}
