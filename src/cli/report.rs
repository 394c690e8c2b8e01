//! `tinyllama report`.

use super::generate::{is_broken_pipe, write_stdout};
use crate::error::exit;
use crate::eval::report::{collect, markdown, picture};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Arguments of `report`.
#[derive(clap::Args)]
pub struct Args {
    /// Folders with `results.json` files of `evaluate`, or a run's out_dir with scores in metrics.jsonl; each is a
    /// series, searched to its depths
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Folder for `report.md` and `report.png`, which are written over
    #[arg(long, value_name = "DIR", default_value = "out/report")]
    out: PathBuf,
}

/// Runs `report`.
pub fn run(args: Args) -> Result<u8> {
    let report = collect::collect(&args.dirs)?;
    for warning in &report.warnings {
        eprintln!("warning: {warning}; left out");
    }
    let out = &args.out;
    std::fs::create_dir_all(out).with_context(|| format!("cannot create `{}`", out.display()))?;
    let (page, png) = (out.join("report.md"), out.join("report.png"));
    picture::draw(&report, &png)?;
    let beside = page.with_extension("md.tmp");
    std::fs::write(&beside, markdown::page(&report, "report.png"))
        .and_then(|()| std::fs::rename(&beside, &page))
        .with_context(|| format!("cannot write `{}`", page.display()))?;
    eprintln!("table       {}", page.display());
    eprintln!("picture     {}", png.display());
    match write_stdout(&markdown::table(&report)) {
        Err(e) if !is_broken_pipe(&e) => Err(e),
        _ => Ok(exit::OK),
    }
}
