//! Pretraining, finetuning, evaluation and inference of Llama-family models on libtorch, in the words of
//! PyTorch and lit-gpt.
//!
//! Read first: [`model`] (the network), [`train`] (the visible loop), `configs/tinyllama.yaml` (every
//! setting explained), `docs/pytorch-to-rust.md` (idioms). Arrows point one way:
//! `cli -> train | serve | eval -> generate -> quant | model -> ops -> ffi`, with `config`, `data`, `checkpoint`, `tokenizer` beside.
//!
//! Shape letters in comments: B batch, T query length, S key length, C width (`n_embd`), H query heads,
//! G query groups (key/value heads), D head size, F MLP width, V vocabulary, L layers, W world size,
//! N = B*T.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod bench;
mod cache;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod distributed;
pub mod doctor;
pub mod error;
pub mod eval;
#[allow(unsafe_code)]
#[allow(missing_docs)]
pub mod ffi;
pub mod generate;
pub mod guard;
pub mod model;
pub mod ops;
mod picture;
pub mod quant;
pub mod serve;
pub mod tokenizer;
pub mod train;
