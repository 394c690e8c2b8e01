//! Measurements, each beside a peer in the same minutes.

pub mod comm;
pub mod data;
pub mod decode;
pub mod kernels;
pub mod load;
pub mod profile;
pub mod serve;
pub mod serve_client;
pub mod tokenizer;
pub mod train;
