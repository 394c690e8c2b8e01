//! Parse, dispatch, exit code.

use clap::Parser;
use std::process::ExitCode;
use tinyllama::{cli, error};

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            error::report(&e);
            ExitCode::from(error::exit_code(&e))
        }
    }
}
