//! `tinyllama doctor`.

use anyhow::{Result, bail};

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `doctor`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`doctor` is not there yet")
}
