//! `tinyllama tokenizer train|encode|decode|info`.

use super::generate::text_of_file;
use crate::error::{WithHint, exit};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::train::{self, Kind};
use anyhow::{Context, Result, anyhow};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

/// Arguments of `tokenizer`.
#[derive(clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Learn a BPE tokenizer from text; the same files give the same bytes on every run
    Train(TrainArgs),
    /// Print the ids of a text, separated by spaces
    Encode(EncodeArgs),
    /// Print the text of ids
    Decode(DecodeArgs),
    /// Print what a tokenizer is
    Info(InfoArgs),
}

#[derive(clap::Args)]
struct TrainArgs {
    /// Corpus files: text, .jsonl, .jsonl.zst, .parquet
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Number of ids, special tokens and bytes included
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Folder for tokenizer.json and tokenizer_config.json
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write over a tokenizer that is there
    #[arg(long)]
    overwrite: bool,
    /// What to learn
    #[arg(long, value_enum, default_value = "byte-bpe")]
    kind: Kind,
    /// Key (jsonl) or column (parquet) of the text [default: text for jsonl, content for parquet]
    #[arg(long, value_name = "NAME")]
    text_field: Option<String>,
    /// Token that begins a text
    #[arg(long, default_value = "<s>", value_name = "TOKEN")]
    bos: String,
    /// Token that ends a text
    #[arg(long, default_value = "</s>", value_name = "TOKEN")]
    eos: String,
    /// Put bos before a text by default [default: yes for llama, no for byte-bpe]
    #[arg(long, value_name = "BOOL")]
    add_bos: Option<bool>,
}

#[derive(clap::Args)]
struct EncodeArgs {
    /// Folder with tokenizer.json or tokenizer.model, or one of these files
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    /// The text; neither --text nor --file: standard input
    #[arg(long, conflicts_with = "file", allow_hyphen_values = true)]
    text: Option<String>,
    /// File that holds the text
    #[arg(long)]
    file: Option<PathBuf>,
    /// Put the bos token before
    #[arg(long)]
    bos: bool,
    /// Put the eos token after
    #[arg(long)]
    eos: bool,
    /// Print {"ids": [..], "tokens": [..]}
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct DecodeArgs {
    /// Folder with tokenizer.json or tokenizer.model, or one of these files
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    /// Token ids, separated by spaces or commas; none: standard input
    ids: Vec<String>,
}

#[derive(clap::Args)]
struct InfoArgs {
    /// Folder with tokenizer.json or tokenizer.model, or one of these files
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `tokenizer`.
pub fn run(args: Args) -> Result<u8> {
    match args.action {
        Action::Train(args) => train(args)?,
        Action::Encode(args) => encode(args)?,
        Action::Decode(args) => decode(args)?,
        Action::Info(args) => info(args)?,
    }
    Ok(exit::OK)
}

fn train(args: TrainArgs) -> Result<()> {
    if Tokenizer::is_in(&args.out) && !args.overwrite {
        return Err(anyhow!("`{}` holds a tokenizer already", args.out.display()))
            .usage("choose another `--out`, or add `--overwrite`");
    }
    let options = train::Options {
        kind: args.kind,
        vocab_size: args.vocab_size,
        bos: args.bos,
        eos: args.eos,
        use_bos: args.add_bos.unwrap_or(args.kind == Kind::Llama),
    };
    let bar = progress();
    let field = args.text_field.as_deref();
    // Opened one after the other, so that thousands of files need one handle.
    let documents = args.input.iter().flat_map(|path| match train::documents(path, field) {
        Ok(texts) => texts,
        Err(e) => Box::new(std::iter::once(Err(e))),
    });
    let counted = documents.inspect(|text| bar.inc(text.as_ref().map_or(0, |t| t.len() as u64)));
    let size = train::train(counted, &options, &args.out)?;
    bar.finish_and_clear();
    if size < options.vocab_size {
        eprintln!(
            "note: the corpus gave {size} tokens, fewer than the {} asked for",
            options.vocab_size
        );
    }
    eprintln!("wrote {} ({size} tokens)", args.out.join("tokenizer.json").display());
    Ok(())
}

/// Bytes read so far, on a terminal.
fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {bytes} read, {bytes_per_sec}, {elapsed}");
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

fn encode(args: EncodeArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let text = match (args.text, &args.file) {
        (Some(text), _) => text,
        (None, Some(file)) => text_of_file(file)?,
        (None, None) => stdin()?,
    };
    let ids = tokenizer.encode(&text, args.bos, args.eos)?;
    if args.json {
        let tokens: Vec<_> = ids.iter().map(|&id| tokenizer.token(id)).collect();
        return print(&format!("{}\n", json!({"ids": ids, "tokens": tokens})));
    }
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    print(&format!("{}\n", ids.join(" ")))
}

fn decode(args: DecodeArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let text = if args.ids.is_empty() { stdin()? } else { args.ids.join(" ") };
    let separator = |c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']');
    let ids: Vec<u32> = text
        .split(separator)
        .filter(|word| !word.is_empty())
        .map(|word| {
            let id = word.parse::<u32>();
            id.map_err(|_| anyhow!("{word:?} is no token id"))
                .usage("ids are whole numbers, e.g. `1 15043`")
        })
        .collect::<Result<_>>()?;
    print(&format!("{}\n", tokenizer.decode(&ids)?))
}

fn info(args: InfoArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let what = tokenizer.describe();
    let special =
        |id: Option<u32>| json!({"id": id, "token": id.and_then(|id| tokenizer.token(id))});
    if args.json {
        let object = json!({
            "kind": what.kind, "vocab_size": tokenizer.vocab_size(),
            "bos": special(tokenizer.bos_id()), "eos": special(tokenizer.eos_id()),
            "use_bos": tokenizer.use_bos(),
            "normalizer": what.normalizer, "pre_tokenizer": what.pre_tokenizer,
        });
        return print(&format!("{object}\n"));
    }
    let show = |id: Option<u32>| match id {
        Some(id) => format!("{id} {}", tokenizer.token(id).unwrap_or_default()),
        None => "none".to_string(),
    };
    print(&format!(
        "kind           {}\nvocab size     {}\nbos            {}\neos            {}\n\
         use bos        {}\nnormalizer     {}\npre-tokenizer  {}\n",
        what.kind,
        tokenizer.vocab_size(),
        show(tokenizer.bos_id()),
        show(tokenizer.eos_id()),
        tokenizer.use_bos(),
        what.normalizer,
        what.pre_tokenizer,
    ))
}

fn stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read UTF-8 from standard input")?;
    Ok(text)
}

/// Writes to stdout; a reader that has gone away (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
