//! `tinyllama score`.

use super::generate::{is_broken_pipe, text_of_file, write_stdout};
use super::model_args::ModelArgs;
use crate::generate::score::{Score, score_tokens, score_windows};
use crate::generate::text::parse_ids;
use crate::tokenizer::Tokenizer;
use crate::{device, error, guard};
use anyhow::Result;
use std::fmt::Write;
use std::path::PathBuf;
use tch::Device;

/// Arguments of `score`.
#[derive(clap::Args)]
#[command(
    group = clap::ArgGroup::new("input").required(true),
    after_help = "Natural logs. Text gets bos where the tokenizer's own configuration says so; the \
        first token has no prefix and no score."
)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to score
    #[arg(long, value_name = "TEXT", group = "input", allow_hyphen_values = true)]
    text: Option<String>,
    /// File to score, every byte of it
    #[arg(long, value_name = "FILE", group = "input")]
    file: Option<PathBuf>,
    /// Token ids to score; needs no tokenizer
    #[arg(long, value_name = "1,2,3", group = "input", allow_hyphen_values = true)]
    tokens: Option<String>,
    /// Print `{"tokens": [...], "logprobs": [null, ...], "nll": x, "ppl": y}`
    #[arg(long)]
    json: bool,
    /// Score texts of any length in windows of N tokens, N up to the model's `block_size`
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens between the starts of two windows; each token is scored once, with a prefix of at
    /// least window - stride tokens after the first window [default: half the window]
    #[arg(long, value_name = "N", requires = "window")]
    stride: Option<usize>,
}

/// Runs `score`.
pub fn run(args: Args) -> Result<u8> {
    let lower = "use `--window` with a smaller N, `--precision bf16-true` or `--device cpu`";
    let device = device::resolve(&args.model.load.device)?;
    guard::catch("scoring", device, lower, || score(&args, device))
}

fn score(args: &Args, device: Device) -> Result<u8> {
    let given_ids = args.tokens.as_deref().map(parse_ids).transpose()?;
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => text_of_file(path)?,
        (None, None) => String::new(),
    };
    let loaded = args.model.load(device, given_ids.is_none())?;
    let tokens = match (given_ids, &loaded.tokenizer) {
        (Some(ids), _) => ids,
        (None, Some(tokenizer)) => tokenizer.encode_default(&text)?,
        (None, None) => Vec::new(),
    };

    let logprobs = match args.window {
        None => score_tokens(&loaded.network, &tokens)?,
        Some(window) => {
            let stride = args.stride.unwrap_or(window / 2);
            score_windows(&loaded.network, &tokens, window, stride)?
        }
    };
    let score = Score::new(tokens, logprobs)?;
    let output = match args.json {
        true => serde_json::to_string(&score)? + "\n",
        false => table(&score, loaded.tokenizer.as_ref())?,
    };
    match write_stdout(&output) {
        Err(e) if !is_broken_pipe(&e) => Err(e),
        _ => Ok(error::exit::OK),
    }
}

/// A line a token and the totals.
fn table(score: &Score, tokenizer: Option<&Tokenizer>) -> Result<String> {
    let mut out = format!("{:>8} {:>8} {:>10}  token\n", "position", "id", "logprob");
    for (at, (&id, logprob)) in score.tokens.iter().zip(&score.logprobs).enumerate() {
        let logprob = logprob.map_or("-".into(), |p| format!("{p:.4}"));
        // Escaped, so that a line break or a half character stays on its line.
        let text =
            tokenizer.map_or(Ok("-".into()), |t| t.decode_token(id).map(|s| format!("{s:?}")))?;
        writeln!(out, "{at:>8} {id:>8} {logprob:>10}  {text}")?;
    }
    let scored = score.logprobs.iter().flatten().count();
    writeln!(
        out,
        "\n{} tokens, {scored} scored | nll {:.6} nats a token | ppl {:.4} | total logprob {:.4}",
        score.tokens.len(),
        score.nll,
        score.ppl,
        -score.nll * scored as f64
    )?;
    Ok(out)
}
