//! Checks that `LIBTORCH` (set by `.cargo/config.toml` to `./.libtorch`) holds the one libtorch that
//! tch 0.24.0 works with. It has no dependencies, so it runs among the first units of any build.

use std::path::Path;
use std::process::exit;

const WANTED: &str = "2.11.0";

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let root = std::env::var("LIBTORCH").unwrap_or_default();
    let version_file = Path::new(&root).join("version.py");
    println!("cargo:rerun-if-changed={}", version_file.display());
    let Ok(text) = std::fs::read_to_string(&version_file) else {
        stop(&format!("no libtorch at `{root}` (expected `{}`)", version_file.display()));
    };
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .map(|v| v.trim_matches(['\'', '"']).to_owned())
        .unwrap_or_default();
    if found.split('+').next() != Some(WANTED) {
        stop(&format!("libtorch {WANTED} expected at `{root}`, found `{found}`"));
    }
}

fn stop(problem: &str) -> ! {
    eprintln!("\nerror: {problem}\n\nhint: run `./scripts/setup.sh` once, then build again\n");
    exit(1);
}
