//! All integration tests, one crate: a test binary links libtorch, which is worth doing once.

mod common;
mod config;
mod gpu;
mod model;
mod train;
