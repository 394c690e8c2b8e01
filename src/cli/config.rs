//! `tinyllama config`.

use anyhow::{Result, bail};

/// Arguments of `config`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `config`.
pub fn run(_args: Args) -> Result<u8> {
    bail!("`config` is not there yet")
}
