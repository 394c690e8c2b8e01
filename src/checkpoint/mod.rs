//! Checkpoints: a Hugging Face folder that any tool loads, plus `train_state/` for resume.
//!
//! Read first: [`names`] (the table), then `hf.rs` (weights), `train_state.rs`, `folder.rs` (how a
//! folder appears whole or not at all).

pub mod adapter;
mod convert;
pub(crate) mod disk;
mod folder;
mod formats;
pub mod gguf;
mod hf;
pub mod hf_config;
mod inspect;
mod litgpt;
mod load;
mod moments;
pub mod names;
mod outline;
mod quantised;
mod source;
pub mod tensors;
pub mod torch_file;
mod train_state;
mod weights;

pub use convert::{Converted, Target, convert};
pub use disk::{check_space, free_bytes, required_bytes};
pub use folder::{
    check_final, copy_files, create_atomically, latest, list, prune, resolve, save_atomically,
    set_aside_later, sweep, temporary_folder,
};
pub use hf::{
    MAX_SHARD_BYTES, save, save_chat_template, save_model, save_parameters, save_quantised,
    save_weights, write_json,
};
pub use inspect::{Change, CheckpointReport, Statistics, TensorReport, inspect};
pub use load::{WeightReader, load_config, load_initial_weights, load_model, load_weights};
pub use moments::Moments;
pub use outline::outline;
pub use source::{BlockValues, Blocks, Parameters, Source, StoredTensor};
pub use train_state::{
    Tensors, TrainState, load_counters, load_train_state, save_counters, save_shard,
    save_train_state,
};
