//! `tinyllama generate`.

use anyhow::{Result, bail};

/// Arguments of `generate`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `generate`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`generate` is not there yet")
}
