//! All integration tests, one crate: a test binary links libtorch, which is worth doing once.

mod checkpoint;
mod common;
mod config;
mod data;
mod doctor;
mod generate;
mod golden;
mod gpu;
mod metrics;
mod model;
mod pretrain;
mod tokenizer;
mod train;
