//! Parse, dispatch, exit code.

use clap::Parser;
use std::process::ExitCode;
use tch::Device;
use tinyllama::{cli, error, guard};

/// What to do where memory runs out outside the guarded steps, mostly while a model is built.
const LOWER: &str = "choose a smaller model, `bf16-true`, or another device";

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match guard::catch("the command", Device::Cpu, LOWER, || cli::run(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            error::report(&e);
            ExitCode::from(error::exit_code(&e))
        }
    }
}
