//! Switches of a whole process, from a run's configuration, and the folder of what was chosen by measurement.

use crate::config::{AttentionBackend, MatmulBackend, RunConfig};
use crate::ffi;
use anyhow::Result;
use std::path::PathBuf;
use tch::Device;

/// Math modes, products and the most memory of a card. TF32 for fp32 products is the original's choice.
pub fn set_backends(config: &RunConfig, device: Device) -> Result<()> {
    ffi::set_math_mode(true, config.deterministic)?;
    if let Device::Cuda(index) = device {
        if let Some(bytes) = config.memory_limit_bytes() {
            ffi::cuda_memory_limit(index, bytes as i64)?;
        }
        let cache = cache_file("matmul.txt");
        ffi::set_matmul(match config.matmul {
            MatmulBackend::Aten => ffi::Matmul::Aten,
            MatmulBackend::Heuristic => ffi::Matmul::Heuristic,
            MatmulBackend::Search => ffi::Matmul::Search(cache.as_deref()),
        })?;
    }
    set_attention(config.attention, config.deterministic)
}

/// The kernels that libtorch's attention may be computed by. cuDNN's adds its gradients with atomics;
/// FlashAttention-2 has a mode with a fixed order.
pub fn set_attention(attention: AttentionBackend, deterministic: bool) -> Result<()> {
    let auto = attention == AttentionBackend::Auto;
    let only = |wanted: AttentionBackend| auto || attention == wanted;
    ffi::set_sdp_backends(ffi::SdpBackends {
        math: auto,
        flash: only(AttentionBackend::Flash),
        efficient: auto,
        cudnn: only(AttentionBackend::Cudnn) && !deterministic,
    })
}

/// Where something that was chosen by measurement is kept from run to run; `None` where the system names no place.
pub fn cache_file(name: &str) -> Option<PathBuf> {
    Some(crate::cache::folder()?.join(name))
}
