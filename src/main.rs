//! Parse, dispatch, exit code.

use clap::Parser;
use std::process::ExitCode;
use tinyllama::{cli, error, train};

fn main() -> ExitCode {
    train::guard::install_panic_hook();
    match cli::run(cli::Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            error::report(&e);
            ExitCode::from(error::exit_code(&e))
        }
    }
}
