//! See the module map in `lib.rs`.

mod append;
pub mod flops;
pub mod metrics;
pub mod plot;
pub mod progress;
pub mod schedule;
pub mod signals;
pub mod tensorboard;
