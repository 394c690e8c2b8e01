//! `tinyllama tokenizer`.

use anyhow::{Result, bail};

/// Arguments of `tokenizer`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `tokenizer`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`tokenizer` is not there yet")
}
