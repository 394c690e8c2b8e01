//! `tinyllama inspect CHECKPOINT`.

use super::generate::{is_broken_pipe, write_stdout};
use super::inspect::Args;
use crate::checkpoint::{self, Change, CheckpointReport, Source, Statistics};
use crate::config::with_commas;
use crate::error::{WithHint, exit};
use crate::train::progress::bytes;
use anyhow::Result;
use serde_json::json;
use std::fmt::Write;
use std::path::Path;

/// Runs `inspect` on a checkpoint. Exits with 1 where its tensors do not fit its architecture, or `--diff` found a
/// difference.
pub fn run(args: &Args, path: &Path) -> Result<u8> {
    let source = Source::open(path)?;
    let report = checkpoint::inspect(&source, args.statistics)?;
    let changes = match &args.diff {
        Some(other) => {
            let other = Source::open(&checkpoint::resolve(other)?)?;
            Some(Change::between(&source, &other).hint("look at each alone without `--diff`")?)
        }
        None => None,
    };
    let output = match args.json {
        true => serde_json::to_string_pretty(&json!({"report": report, "diff": changes}))? + "\n",
        false => text(&report, changes.as_deref())?,
    };
    match write_stdout(&output) {
        Err(e) if !is_broken_pipe(&e) => return Err(e),
        _ => {}
    }
    let same = changes.is_none_or(|changes| changes.is_empty());
    Ok(if same && report.problem.is_none() { exit::OK } else { exit::FAILED })
}

fn text(r: &CheckpointReport, changes: Option<&[(String, Change)]>) -> Result<String> {
    let mut out = String::new();
    let dtypes: Vec<String> = r.dtypes.iter().map(|(dtype, n)| format!("{n} of {dtype}")).collect();
    writeln!(out, "{}", r.path.display())?;
    writeln!(out, "format      {}", r.format)?;
    writeln!(out, "model       {} with {} parameters", r.config.name, with_commas(r.parameters))?;
    let c = &r.config;
    writeln!(
        out,
        "            L {} C {} H {} G {} D {} F {} V {} T {}, {:?}, {:?}{}",
        c.n_layer,
        c.n_embd,
        c.n_head,
        c.n_query_groups,
        c.head_size,
        c.intermediate_size,
        c.padded_vocab_size,
        c.block_size,
        c.mlp_class,
        c.norm_class,
        if c.tie_embeddings { ", tied head" } else { "" }
    )?;
    writeln!(out, "tensors     {}: {}, {}", r.tensors.len(), dtypes.join(", "), bytes(r.bytes))?;
    if let Some(changes) = changes {
        write_changes(&mut out, changes)?;
    } else {
        write_tensors(&mut out, r)?;
    }
    if let Some(problem) = &r.problem {
        writeln!(out, "bad         {problem}")?;
    }
    Ok(out)
}

fn write_tensors(out: &mut String, r: &CheckpointReport) -> Result<()> {
    let width = r.tensors.iter().map(|t| t.stored.name.len()).max().unwrap_or(0);
    let dtypes = r.tensors.iter().map(|t| t.stored.dtype.len()).max().unwrap_or(0);
    for tensor in &r.tensors {
        let t = &tensor.stored;
        let shape = t.shape.iter().map(i64::to_string).collect::<Vec<_>>().join(" x ");
        write!(out, "{:width$}  {:<dtypes$} {shape:<16}", t.name, t.dtype)?;
        if let Some(Statistics { mean, std, min, max, not_finite }) = tensor.statistics {
            write!(out, "mean {mean:<+10.3e} std {std:<9.3e} min {min:<+10.3e} max {max:<+10.3e}")?;
            if not_finite > 0 {
                write!(out, " {not_finite} not finite")?;
            }
        }
        while out.ends_with(' ') {
            out.pop();
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_changes(out: &mut String, changes: &[(String, Change)]) -> Result<()> {
    if changes.is_empty() {
        writeln!(out, "diff        none: all parameters are equal")?;
    }
    for (name, change) in changes {
        match change {
            Change::OnlyFirst => writeln!(out, "{name}: only in the first")?,
            Change::OnlySecond => writeln!(out, "{name}: only in the second")?,
            Change::Shape(a, b) => writeln!(out, "{name}: shape {a:?} and {b:?}")?,
            Change::Values(largest, relative) => {
                writeln!(out, "{name}: largest difference {largest:.3e}, relative {relative:.3e}")?;
            }
        }
    }
    Ok(())
}
