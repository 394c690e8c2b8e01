//! `tinyllama prepare`.

use anyhow::{Result, bail};

/// Arguments of `prepare`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `prepare`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`prepare` is not there yet")
}
