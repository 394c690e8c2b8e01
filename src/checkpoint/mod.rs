//! Checkpoints: a Hugging Face folder that any tool loads, plus `train_state/` for resume.

mod folder;
mod hf;
pub mod hf_config;
pub mod names;
pub mod tensors;
mod train_state;

pub use folder::{
    check_space, copy_files, latest, list, prune, required_bytes, resolve, save_atomically,
};
pub use hf::{
    load_config, load_initial_weights, load_model, load_weights, save, save_model, save_weights,
};
pub use train_state::{Tensors, TrainState, load_counters, load_train_state, save_train_state};
