//! The C ABI of `csrc/api.h`, mirrored once, behind safe functions. The only module with `unsafe`.
//!
//! Everything here takes and returns [`tch::Tensor`]; a failure carries the C++ exception's full text.

mod cpu;
mod cpu_decode;
pub mod cuda;
mod decode;
pub mod driver;
mod gradients;
mod graph;
mod hooks;
mod huge_pages;
mod kernels;
mod mmap;
mod nf4;
mod offload;
mod process_group;
pub mod profile;
mod recompute;
mod store;

pub use cpu::*;
pub use cpu_decode::*;
pub use decode::*;
pub use gradients::*;
pub use graph::*;
pub use hooks::{Call, on_gradient};
pub use huge_pages::want_huge_pages;
pub use kernels::*;
pub use mmap::map_file;
pub use nf4::*;
pub use offload::{HostLink, page_locked};
pub use process_group::*;
pub use recompute::{Part, recompute};
pub use store::TcpStore;

use anyhow::{Result, bail};
use cuda::cuda_functions;
use std::ffi::{CStr, c_char, c_int};
use std::marker::PhantomData;
use std::ops::Deref;
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

type Handle = *mut C_tensor;

unsafe extern "C" {
    fn tl_last_error() -> *const c_char;
    fn tl_libtorch_version() -> *const c_char;
    fn tl_rng_state(device: c_int, out: *mut Handle) -> c_int;
    fn tl_set_rng_state(device: c_int, state: Handle) -> c_int;
    fn tl_set_math_mode(allow_tf32: c_int, deterministic: c_int) -> c_int;
    fn tl_configure_allocator() -> c_int;
    fn tl_set_sdp_backends(mask: c_int) -> c_int;
}

cuda_functions! {
    fn tl_cuda_versions(buffer: *mut c_char, capacity: usize) -> c_int;
    fn tl_cuda_memory(device: c_int, out: *mut i64) -> c_int;
    fn tl_cuda_reset_peak_memory(device: c_int) -> c_int;
    fn tl_cuda_set_device(device: c_int) -> c_int;
    fn tl_cuda_memory_limit(device: c_int, bytes: i64) -> c_int;
    fn tl_cuda_device(
        device: c_int,
        name: *mut c_char,
        capacity: usize,
        major: *mut c_int,
        minor: *mut c_int,
        total: *mut i64,
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

/// Whether the libtorch that this binary was built against can use a GPU.
pub fn libtorch_has_cuda() -> bool {
    env!("TL_TORCH_CUDA") == "1"
}

/// Versions of the libraries this binary runs with; `-` where a library is absent, or not loaded ([`cuda`]).
pub struct Versions {
    pub libtorch: String,
    pub cuda: String,
    pub cudnn: String,
    pub nccl: String,
}

/// Versions of libtorch, the CUDA runtime, cuDNN and NCCL.
pub fn versions() -> Versions {
    // SAFETY: a NUL-terminated constant.
    let libtorch = unsafe { CStr::from_ptr(tl_libtorch_version()) }.to_string_lossy().into_owned();
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer outlives the call and its length is passed. On failure it stays empty.
    unsafe { tl_cuda_versions(buffer.as_mut_ptr().cast(), buffer.len()) };
    let joined = text(&buffer);
    let mut parts = joined.lines().map(str::to_owned);
    let mut next = || parts.next().unwrap_or_else(|| "-".into());
    Versions { libtorch, cuda: next(), cudnn: next(), nccl: next() }
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

/// Makes a card the one that this thread means where it names none (`torch.cuda.set_device`).
pub fn cuda_set_device(device: usize) -> Result<()> {
    // SAFETY: plain call.
    check(unsafe { tl_cuda_set_device(device as c_int) })
}

/// The caching allocator takes at most so many bytes of the card.
pub fn cuda_memory_limit(device: usize, bytes: i64) -> Result<()> {
    // SAFETY: plain call.
    check(unsafe { tl_cuda_memory_limit(device as c_int, bytes) })
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

/// `allow_tf32` is `torch.set_float32_matmul_precision("high")`; `deterministic` is
/// `torch.use_deterministic_algorithms(True)` with cuBLAS's fixed workspace.
pub fn set_math_mode(allow_tf32: bool, deterministic: bool) -> Result<()> {
    // SAFETY: plain call.
    check(unsafe { tl_set_math_mode(allow_tf32.into(), deterministic.into()) })
}

/// Lets the CUDA allocator grow its segments, so that no memory is lost between them; a user's own
/// `PYTORCH_ALLOC_CONF` stays. Call before the first CUDA allocation.
pub fn configure_allocator() -> Result<()> {
    // SAFETY: plain call, made before other threads start.
    check(unsafe { tl_configure_allocator() })
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

/// The bytes of a contiguous CPU tensor themselves (native order); `None` for any other.
pub fn bytes_of(tensor: &Tensor) -> Option<&[u8]> {
    if tensor.device() != tch::Device::Cpu || !tensor.is_contiguous() {
        return None;
    }
    let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if size == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous CPU tensor has exactly `size` readable bytes at `data_ptr`, as long as it lives.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, size) })
}

/// The same to write them.
pub fn bytes_of_mut(tensor: &mut Tensor) -> Option<&mut [u8]> {
    let bytes = bytes_of(tensor)?;
    let (start, size) = (bytes.as_ptr().cast_mut(), bytes.len());
    // SAFETY: as above; the tensor is borrowed mutably, and every pattern of bytes is a value of its dtype.
    Some(unsafe { std::slice::from_raw_parts_mut(start, size) })
}

/// The values of a contiguous fp32 tensor on the CPU, to read and write; `None` for any other.
pub fn floats_of_mut(tensor: &mut Tensor) -> Option<&mut [f32]> {
    let is = tensor.kind() == Kind::Float;
    // SAFETY: every pattern of 4 bytes is an f32.
    is.then(|| unsafe { values_of_mut(tensor) })?
}

/// The bits of a contiguous fp16 or bf16 tensor on the CPU, to read and write; `None` for any other.
pub fn halves_of_mut(tensor: &mut Tensor) -> Option<&mut [u16]> {
    let is = matches!(tensor.kind(), Kind::Half | Kind::BFloat16);
    // SAFETY: every pattern of 2 bytes is a u16.
    is.then(|| unsafe { values_of_mut(tensor) })?
}

/// The values of a contiguous int8 tensor on the CPU, to read and write; `None` for any other.
pub fn int8s_of_mut(tensor: &mut Tensor) -> Option<&mut [i8]> {
    let is = tensor.kind() == Kind::Int8;
    // SAFETY: every byte is an i8.
    is.then(|| unsafe { values_of_mut(tensor) })?
}

/// # Safety
/// T has the size of the tensor's dtype, and every pattern of bytes is one.
unsafe fn values_of_mut<T>(tensor: &mut Tensor) -> Option<&mut [T]> {
    let bytes = bytes_of_mut(tensor)?;
    let (start, len) = (bytes.as_mut_ptr().cast::<T>(), bytes.len() / size_of::<T>());
    if len == 0 {
        return Some(&mut []);
    }
    // SAFETY: libtorch aligns values to their size at least; the borrow is passed on.
    Some(unsafe { std::slice::from_raw_parts_mut(start, len) })
}

/// A copy of a tensor's bytes, any device; made contiguous. Makes the CPU wait for a CUDA tensor.
pub fn tensor_bytes(tensor: &Tensor) -> Vec<u8> {
    let t = tensor.detach().to_device(tch::Device::Cpu).contiguous();
    let size = t.numel() * t.kind().elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor has exactly `size` readable bytes at `data_ptr`.
    unsafe { std::slice::from_raw_parts(t.data_ptr() as *const u8, size) }.to_vec()
}

/// A CPU tensor that may lie in memory that is only borrowed: it must be read before that is gone, so it is given out by
/// reference alone. Do not keep a `shallow_clone` or a view of it.
pub struct TensorView<'a> {
    tensor: Tensor,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> TensorView<'a> {
    /// Over `bytes` (native order) themselves, a copy where they are not aligned for the dtype.
    pub fn over(bytes: &'a [u8], shape: &[i64], kind: Kind) -> Self {
        let size = kind.elt_size_in_bytes();
        let needed = shape.iter().product::<i64>() as usize * size;
        if bytes.is_empty()
            || needed != bytes.len()
            || !(bytes.as_ptr() as usize).is_multiple_of(size)
        {
            return tensor_from_bytes(bytes, shape, kind).into();
        }
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        // SAFETY: the sizes were just compared, the pointer is aligned, and the lifetime keeps the bytes. They are
        // only read: no one gets the tensor but by shared reference, to copy from it.
        let tensor =
            unsafe { Tensor::from_blob(bytes.as_ptr(), shape, &strides, kind, tch::Device::Cpu) };
        Self { tensor, memory: PhantomData }
    }

    /// A tensor of its own memory: itself, or a copy.
    pub fn to_owned(&self) -> Tensor {
        self.tensor.copy()
    }
}

impl From<Tensor> for TensorView<'_> {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, memory: PhantomData }
    }
}

impl Deref for TensorView<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
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
