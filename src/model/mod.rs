//! The network, config-driven as in lit-gpt. Read [`gpt`] first, then [`block`], [`attention`].
//!
//! Model code knows no rank and no file.

pub mod attention;
pub mod block;
pub mod config;
mod fp8;
pub mod gpt;
pub mod init;
pub mod kv_cache;
pub mod linear;
pub mod lora;
pub mod mlp;
pub mod norm;
pub mod paged_cache;
mod presets;
pub mod rope;
mod units;

pub use config::{MlpClass, ModelConfig, NormClass, RopeScaling, RopeType};
pub use fp8::{Fp8, Fp8Record, obstacle as fp8_obstacle, require_fp8};
pub use gpt::{GPT, fill_new_rows};
pub use kv_cache::KvCache;
pub use mlp::Mlp;
pub use paged_cache::PagedCache;
pub use units::{AtUnit, Pass};
