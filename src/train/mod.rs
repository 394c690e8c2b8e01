//! Training: the loop in [`mod@pretrain`], one step in [`step`], the optimizer in [`optimizer`].

mod announce;
mod append;
mod backends;
mod data;
pub mod evaluate;
pub mod flops;
mod initial;
pub mod memory;
pub mod metrics;
pub mod objective;
pub mod optimizer;
mod out_dir;
pub mod pick_attention;
pub mod plot;
pub mod pretrain;
pub mod progress;
mod ranks;
pub mod run;
mod saver;
pub mod schedule;
pub mod signals;
pub mod step;
pub mod tensorboard;
pub mod validate;

pub use pretrain::pretrain;

/// What to do where a step's memory runs out.
const LOWER: &str = "lower `train.micro_batch_size` (accumulation rises by itself, results stay) or \
                     `train.max_seq_length`, or set `train.activation_checkpointing` to `block`";
