//! `tinyllama score`.

use anyhow::{Result, bail};

/// Arguments of `score`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `score`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`score` is not there yet")
}
