//! `tinyllama inspect PATH`.

use super::generate::{is_broken_pipe, write_stdout};
use crate::checkpoint;
use crate::config::with_commas;
use crate::data::inspect::{self, Options, Report};
use crate::error::{WithHint, exit};
use crate::tokenizer::Tokenizer;
use crate::train::progress::{bytes, count};
use anyhow::{Result, anyhow};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Arguments of `inspect`.
#[derive(clap::Args)]
#[command(
    after_help = "Exits with 1 where a file is bad, after a list of the bad ones; or where --diff found a difference."
)]
pub struct Args {
    /// Folder of packed `.bin` files, or the prefix of some: data/packed/slim, FOLDER/train_star; or a checkpoint, or a
    /// run's out_dir (its newest one)
    path: PathBuf,
    /// Of a checkpoint: mean, deviation, least and largest value of each tensor
    #[arg(long)]
    pub(super) statistics: bool,
    /// Of a checkpoint: where its parameters differ from those of another, of any format
    #[arg(long, value_name = "OTHER")]
    pub(super) diff: Option<PathBuf>,
    /// Tokens of a training sequence; a block has one more
    #[arg(long, value_name = "T", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..1 << 32))]
    block_size: u64,
    /// Folder with tokenizer.json or tokenizer.model: decodes samples, counts documents by their end
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Blocks at random places to show the beginnings of
    #[arg(long, value_name = "N", default_value_t = 0)]
    samples: usize,
    /// Picks those blocks
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Read every file wholly: sizes, ids in the vocabulary, the manifest's checksums
    #[arg(long)]
    verify: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Runs `inspect`.
pub fn run(args: Args) -> Result<u8> {
    let checkpoint = checkpoint_at(&args.path);
    if checkpoint.is_none() {
        require_dataset(&args.path)?;
    }
    let (what, strays) = match checkpoint {
        Some(_) => ("a checkpoint", [("--verify", args.verify), ("--samples", args.samples > 0)]),
        None => ("a dataset", [("--diff", args.diff.is_some()), ("--statistics", args.statistics)]),
    };
    if let Some((flag, _)) = strays.iter().find(|(_, given)| *given) {
        let other = if checkpoint.is_some() { "packed datasets" } else { "checkpoints" };
        return Err(anyhow!("`{}` is {what}, and `{flag}` is of {other}", args.path.display()))
            .usage("leave it out");
    }
    if let Some(checkpoint) = checkpoint {
        return super::inspect_checkpoint::run(&args, &checkpoint);
    }
    let tokenizer = args.tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    let report = inspect::inspect(Options {
        path: &args.path,
        block_size: args.block_size,
        tokenizer: tokenizer.as_ref(),
        samples: args.samples,
        seed: args.seed,
        verify: args.verify,
        progress: !args.json,
    })?;
    let output = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => text(&report)?,
    };
    match write_stdout(&output) {
        Err(e) if !is_broken_pipe(&e) => return Err(e),
        _ => {}
    }
    Ok(if report.bad.is_empty() { exit::OK } else { exit::FAILED })
}

/// Refuses what is no packed dataset.
fn require_dataset(path: &Path) -> Result<()> {
    if inspect::is_dataset(path)? {
        return Ok(());
    }
    Err(anyhow!(
        "`{}` is no packed dataset, expected `.bin` files that begin with `LITPKDS`, and no checkpoint",
        path.display()
    ))
    .usage(
        "name the folder that `tinyllama prepare` wrote, or the prefix of its files; or a checkpoint, a folder with \
         `config.json` and `model.safetensors`",
    )
}

/// The checkpoint that a path names, if it does: a folder, a run's `out_dir`, a file.
fn checkpoint_at(path: &Path) -> Option<PathBuf> {
    (path.is_dir() || path.is_file()).then(|| checkpoint::resolve(path).ok()).flatten()
}

fn text(r: &Report) -> Result<String> {
    let mut out = String::new();
    let [least, most] = r.file_tokens;
    let each = match least == most {
        true => format!("{} tokens each", with_commas(most)),
        false => format!("{} to {} tokens each", with_commas(least), with_commas(most)),
    };
    writeln!(out, "{}", r.path.display())?;
    writeln!(
        out,
        "files       {} of {}, {each}",
        with_commas(r.files as u64),
        r.dtypes.join(", ")
    )?;
    writeln!(out, "size        {}, {} tokens", bytes(r.bytes), with_commas(r.tokens))?;
    let rest = r.tokens % (r.block_size + 1);
    writeln!(
        out,
        "blocks      {} of {} tokens; {rest} at the end stay out",
        with_commas(r.blocks),
        with_commas(r.block_size + 1)
    )?;
    match (r.documents, r.documents_by) {
        (Some(n), Some(by)) => {
            let mean = r.tokens as f64 / n.max(1) as f64;
            writeln!(
                out,
                "documents   {} by {by}, {} tokens each on average",
                with_commas(n),
                count(mean.round())
            )?;
        }
        _ => writeln!(out, "documents   not known; `--tokenizer` counts them")?,
    }
    let fill = match r.filled_files {
        0 => "no file ends in a run of one id".to_owned(),
        n => format!(
            "{} tokens at the ends of {n} file(s) repeat one id",
            with_commas(r.fill_tokens)
        ),
    };
    writeln!(out, "fill        {:.2} % of the tokens; {fill}", 100.0 * r.filled)?;
    for m in &r.manifests {
        let or = |x: &Option<String>| x.clone().unwrap_or_else(|| "?".into());
        let vocab = m.vocab_size.map_or("?".into(), with_commas);
        writeln!(
            out,
            "manifest    {}: {} from `{}`, a tokenizer of {vocab} ids, {} rows skipped",
            m.folder.display(),
            or(&m.kind),
            or(&m.source),
            with_commas(m.skipped)
        )?;
    }
    if let Some(v) = &r.verified {
        let ids = v.vocab_size.map_or("unknown vocabulary".to_owned(), |n| {
            format!("ids below {}", with_commas(n as u64))
        });
        writeln!(out, "verified    {} file(s): {ids}, {} checksum(s)", v.files, v.checksums)?;
    }
    for sample in &r.samples {
        let shown = match &sample.text {
            Some(text) => format!("{text:?}"),
            None => format!("{:?}", sample.ids),
        };
        writeln!(out, "block {:<6}{shown}", sample.block)?;
    }
    if !r.bad.is_empty() {
        writeln!(out, "bad         {} file(s):", r.bad.len())?;
    }
    for bad in &r.bad {
        writeln!(out, "  {}: {}", bad.path.display(), bad.problem)?;
    }
    Ok(out)
}
