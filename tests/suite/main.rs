//! All integration tests, one crate: a test binary links libtorch, which is worth doing once.

mod checkpoint;
mod common;
mod config;
mod convert;
mod data;
mod distributed;
mod doctor;
mod document_mask;
mod foreign;
mod fsdp;
mod generate;
mod gguf;
mod golden;
mod golden_train;
mod gpu;
mod gpu_ranks;
mod gpu_step;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod kernels;
mod launch;
mod low_memory;
mod metrics;
mod model;
mod ops;
mod order;
mod packed;
mod prepare;
mod presets;
mod pretrain;
mod pretrain_ranks;
mod recompute;
mod tokenizer;
mod torch_file;
mod train;
