//! `tinyllama pretrain`.

use anyhow::{Result, bail};

/// Arguments of `pretrain`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `pretrain`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`pretrain` is not there yet")
}
