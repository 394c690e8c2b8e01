//! Checkpoints: a Hugging Face folder that any tool loads, plus `train_state/` for resume.
//!
//! Read first: [`names`] (the table), then `hf.rs` (weights), `train_state.rs`, `folder.rs` (how a
//! folder appears whole or not at all).

pub(crate) mod disk;
mod folder;
mod hf;
pub mod hf_config;
mod moments;
pub mod names;
pub mod tensors;
mod train_state;

pub use disk::{check_space, free_bytes, required_bytes};
pub use folder::{
    copy_files, latest, list, prune, resolve, save_atomically, sweep, temporary_folder,
};
pub use hf::{
    MAX_SHARD_BYTES, load_config, load_initial_weights, load_model, load_weights, save, save_model,
    save_weights, write_json,
};
pub use moments::Moments;
pub use train_state::{
    Tensors, TrainState, load_counters, load_train_state, save_counters, save_shard,
    save_train_state,
};
